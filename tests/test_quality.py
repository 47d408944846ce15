"Quality: groups, intervals that hold together, lists, disturbances, the answer in words, and the report."
import contextlib, re, shutil, subprocess, sys
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
from IPython.core.interactiveshell import InteractiveShell
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from telemetry_loop.config import TelemetryError, load_params, read_json, write_json
from telemetry_loop.estimate import Estimate, mean
from telemetry_loop.fit import Targets, rank_targets
from telemetry_loop.metrics import beyond_precision, by_group, ndcg
from telemetry_loop.privacy import PrivacyConfig
from telemetry_loop.quality import *
from telemetry_loop.train import curves
from conftest import ROOT

N = 40
CFG = QualityConfig(min_users=20, categories=4, list_rows=500, robust_rows=200, levels={'noisy': [.2, .6], 'thinned': [.5], 'cold': [3, 1, 0], 'attacked': [1]})
after = lambda h: np.where(h[:, -1:] >= 0, -((np.arange(N) - h[:, -1:] - 1) % N), 0.) # knows what follows the newest item
same = lambda h: np.tile(np.arange(N, 0, -1.), (len(h), 1))                           # shows everybody the first items
CATEGORY = np.array(['low', 'mid', 'high', 'top'])[np.arange(N)//10]

def questions(n=300, long=4, seed=0):
    start = np.random.default_rng(seed).integers(0, N, n)
    return Targets([(s + np.arange(i % (long + 1))) % N for i, s in enumerate(start)], (start + np.arange(n) % (long + 1)) % N, np.arange(n), None, None)

def look(test=None, models=None, cfg=CFG, seed=7, **kw):
    test, models = questions() if test is None else test, models or {'sequence': after, 'most_popular': same}
    return quality(models, {name: rank_targets(score, test) for name, score in models.items()}, test, np.arange(N, 0, -1.), CATEGORY, cfg, seed, **kw)

@pytest.fixture(scope='module')
def found(): return look()

# ---------------------------------------------------------------- groups
def test_histories_are_told_apart_by_length():
    assert history_bands([0, 1, 4, 5, 19, 20, 900]).tolist() == ['0', '1-4', '1-4', '5-19', '5-19', '20+', '20+']
    assert history_bands([]).shape == (0,)

def test_items_are_told_apart_by_thirds_of_all_choices():
    assert popularity_bands([6, 0, 3, 2, 1]).tolist() == ['popular', 'new', 'middle', 'rare', 'rare']
    assert popularity_bands(np.zeros(3)).tolist() == ['new']*3 and popularity_bands([]).shape == (0,)

@settings(max_examples=100, deadline=None)
@given(arrays(float, st.integers(1, 30), elements=st.integers(0, 50).map(float)))
def test_bands_follow_popularity(popularity):
    bands = popularity_bands(popularity)
    assert ((bands == 'new') == (popularity == 0)).all()
    place = {b: i for i, b in enumerate(('popular', 'middle', 'rare'))}
    sold = [i for i in np.argsort(-popularity, kind='stable') if popularity[i]]
    assert [place[bands[i]] for i in sold] == sorted(place[bands[i]] for i in sold)
    for b in place: # a third each, but for the one item that crosses the line
        inside = popularity[bands == b]
        assert inside.sum() <= popularity.sum()/3 + inside.max(initial=0) + 1e-9

def test_rare_labels_are_one_and_none_is_unknown():
    assert largest(['a', 'a', 'b', 'b', 'c', None, '', np.nan], 2).tolist() == ['a', 'a', 'all others', 'all others', 'all others', 'unknown', 'unknown', 'unknown']

def test_an_attribute_is_what_was_told_last():
    told = pd.DataFrame({'user_id': ['u', 'v', 'u', 'v'], 'age_band': ['18-29', '50+', '30-49', None]})
    assert attribute_of(told, 'age_band', ['v', 'u', 'w', 'u']).tolist() == ['50+', '30-49', 'unknown', '30-49']

# ---------------------------------------------------------------- intervals
def test_looking_at_many_groups_finds_nothing_by_chance():
    "Twenty equal groups, 400 times: our intervals all hold 0 in 95 %; plain ones side by side do not."
    group, user, wrong = np.repeat(np.arange(20), 60), np.arange(1200), {'ours': 0, 'plain': 0}
    for seed in range(400):
        plain = {g: mean(x) for g, x in enumerate(np.random.default_rng(seed).normal(size=(20, 60)))}
        for name, e in (('plain', plain), ('ours', together(plain))): wrong[name] += any(not x.ci_lower <= 0 <= x.ci_upper for x in e.values())
    assert wrong['ours']/400 <= .05 + 2*np.sqrt(.05*.95/400) + .02 and wrong['plain']/400 > .5 # .02: normal intervals over 60 people

def test_one_group_keeps_its_interval_and_none_stays_none():
    e, none = Estimate(1., .5, 1.5, 9), Estimate(None, None, None, 3)
    assert together({'a': e, 'b': none}) == {'a': e, 'b': none}
    two = together({'a': e, 'b': e})
    assert two['a'].ci_lower < .5 and two['a'].ci_upper > 1.5 and two['a'].value == 1.

# ---------------------------------------------------------------- for whom
def test_a_seeded_disparity_is_found_and_equal_service_is_not_called_one():
    n = 600
    group = np.random.default_rng(1).choice(['f', 'm'], n)
    def gap(f, m): # share of first places in each group
        rank = np.where(np.random.default_rng(2).random(n) < np.where(group == 'f', f, m), 1, 99)
        return of_groups({'ours': rank}, None, group, np.arange(n), 20)['parity']
    unfair, fair = gap(.3, .6), gap(.5, .5)
    assert unfair['lowest'] == 'f' and unfair['difference']['ci_lower'] > 0 and unfair['unequal'] == 1 and abs(unfair['difference']['value'] - .3) < .1
    assert fair['difference']['ci_lower'] <= 0 and fair['unequal'] == 0

def test_an_attribute_of_people_is_audited_only_when_handed_in():
    test = questions()
    who = np.where(np.arange(300) < 10, 'few', np.where(np.arange(300) % 2, 'odd', 'even'))
    of = look(test, groups={'handed': who})['groups']
    assert list(look(test)['groups']) == ['history', 'popularity', 'category'] and list(of) == ['history', 'popularity', 'category', 'handed']
    assert of['handed']['models']['sequence']['few'] == dict(value=None, ci_lower=None, ci_upper=None, n=None)       # not even how few
    assert of['handed']['gain']['few']['n'] is None and of['handed']['models']['most_popular']['odd']['n'] == 145

def test_groups_hold_what_by_group_says(found):
    test = questions(); rank = {'sequence': rank_targets(after, test), 'most_popular': rank_targets(same, test)}
    bands = history_bands([len(h) for h in test.history])
    plain = {g: e.as_dict() for g, e in by_group(ndcg(rank['sequence']), bands, 20, test.user).items()}
    of = found['groups']['history']
    assert of['models']['sequence'] == plain and set(plain) == {'0', '1-4'}
    gain = by_group(ndcg(rank['sequence']) - ndcg(rank['most_popular']), bands, 20, test.user)
    assert all(np.isclose(of['gain'][g]['value'], gain[g].value) and of['gain'][g]['ci_lower'] < gain[g].ci_lower for g in ('0', '1-4') if gain[g].value)
    assert of['parity']['lowest'] == '0' and of['parity']['difference']['ci_lower'] > 0                              # without a past it knows nothing

def test_choices_are_told_apart_by_what_was_chosen(found):
    test = questions(); of = {'popularity': popularity_bands(np.arange(N, 0, -1.))[test.item], 'category': CATEGORY[test.item]}
    for name, label in of.items(): assert {g: e['n'] for g, e in found['groups'][name]['models']['sequence'].items()} == {g: int((label == g).sum()) for g in set(label)}

def test_the_rival_is_the_best_of_the_others():
    worst = lambda h: -same(h)
    found = look(models={'sequence': same, 'item_knn': worst, 'gap_markov': after, 'ease': worst})
    assert found['rival'] == 'gap_markov' and found['ours'] == 'sequence' and found['models'] == ['sequence', 'item_knn', 'gap_markov', 'ease']
    alone = look(models={'sequence': after})
    assert alone['rival'] is None and alone['groups']['history']['gain'] == {}

# ---------------------------------------------------------------- lists
def test_lists_leave_out_what_was_had_and_what_was_not_there():
    day = np.datetime64('2025-01-01') + np.arange(3)
    there = np.where(np.arange(N) < 15, day[0], day[2])
    test = Targets([np.array([0, 3]), np.array([], int)], np.array([1, 1]), np.array(['u', 'v']), there, np.array([day[1], day[1]]))
    assert lists_of(same, test).tolist() == [[1, 2, 4, 5, 6, 7, 8, 9, 10, 11], list(range(10))]
    last = lambda h: -same(h)
    assert lists_of(last, test)[0].tolist() == [14, 13, 12, 11, 10, 9, 8, 7, 6, 5]
    assert lists_of(same, test.take(np.zeros(0, int))).shape == (0, 10)

def test_lists_are_described_as_metrics_say(found):
    test = questions(); pad = np.array([[-1]*(4 - len(h)) + h.tolist() for h in test.history])
    want = beyond_precision(lists_of(after, test), pad, test.user, np.arange(N, 0, -1.), CATEGORY)
    assert found['lists']['sequence'] == {k: e.as_dict() for k, e in want.items()}
    assert found['lists']['sequence']['coverage@10']['value'] == 1 and found['lists']['most_popular']['coverage@10']['value'] < .5
    assert found['lists']['most_popular']['popularity_lift@10']['value'] > found['lists']['sequence']['popularity_lift@10']['value']

def test_exposure_is_over_the_share_of_the_catalogue(found):
    got = found['exposure']['models']
    assert got['most_popular']['highest'] == 'low' and got['most_popular']['groups']['low']['value'] > 3 and got['most_popular']['groups']['top']['value'] == 0
    assert all(abs(e['value'] - (1.6 if g == 'low' else .8)) < .2 for g, e in got['sequence']['groups'].items())       # a fifth have no past and are shown the first items
    share = found['exposure']['share']
    assert np.isclose(sum(s['choices'] for s in share.values()), 1) and all(np.isclose(s['catalogue'], .25) for s in share.values())
    due = found['exposure']['choices']['groups']
    assert all(np.isclose(due[g]['value'], got['sequence']['groups'][g]['value']*.25/share[g]['choices']) for g in share) # the same attention, another due

# ---------------------------------------------------------------- disturbances
def test_what_is_lost_is_what_the_model_looks_at(found):
    rows = {(r['kind'], r['level']): r for r in found['robustness']['sequence']}
    assert list(rows) == [('undisturbed', 0)] + [(k, x) for k in CFG.levels for x in CFG.levels[k]]
    lost = {k: r['difference']['value'] for k, r in rows.items()}
    assert lost['cold', 3] == lost['cold', 1] == 0 and lost['cold', 0] < -.5              # only the newest item counts
    assert lost['noisy', .6] < lost['noisy', .2] < 0 and lost['thinned', .5] < 0 and rows['attacked', 1]['difference']['ci_upper'] < 0
    assert all(r['ndcg@10']['n'] == 200 for r in rows.values()) and found['robust_rows'] == 200
    assert max(abs(r['difference']['value']) for r in found['robustness']['most_popular'] if r['kind'] in ('thinned', 'cold')) < .2

def test_a_sample_is_declared_and_seeded(found):
    assert look() == found and look(seed=8)['robustness'] != found['robustness'] and look(seed=8)['groups'] == found['groups']
    every = [look(questions(60), cfg=QualityConfig(20, 4, 60, 60, {'noisy': [.5]}), seed=seed)['robustness'] for seed in (7, 8)]
    assert every[0] != every[1]                                                           # also where nothing is left to draw but the noise
    few = look(cfg=QualityConfig(20, 4, 50, 60, {'cold': [0]}))
    assert (few['list_rows'], few['robust_rows'], few['n_targets']) == (50, 60, 300) and few['lists']['sequence']['novelty@10']['n'] == 50
    assert few['groups'] == found['groups']                                               # groups are of all choices

def test_plain_values_also_at_the_edges(tmp_path):
    for n in (0, 1): write_json(tmp_path/'x.json', look(questions(n))); assert read_json(tmp_path/'x.json')['n_targets'] == n
    one = Targets([np.array([], int)]*3, np.zeros(3, int), np.zeros(3, int), None, None)
    lone = quality({'sequence': lambda h: np.ones((len(h), 1))}, {'sequence': np.ones(3, int)}, one, np.zeros(1), ['only'], CFG, 0) # one item, one user
    write_json(tmp_path/'x.json', lone)
    assert lone['lists']['sequence']['coverage@10']['value'] == 1 and lone['groups']['history']['parity']['highest'] is None

@pytest.mark.parametrize('change, words', [(dict(models={}), 'models is empty'), (dict(ranks={}), "model 'sequence' has no 5 ranks"), (dict(ranks={'sequence': np.ones(4)}), 'no 5 ranks'), (dict(category=['a']), '1 categories for 40 items'),
    (dict(groups={'age_band': ['x']}), "'age_band' with 1 values"), (dict(groups={'history': ['x']*5}), "'history' with 5 values"), (dict(cfg=QualityConfig(20, 4, 9, 9, {'attacked': [.5]})), r'quality.levels.attacked has 0.5'),
    (dict(cfg=QualityConfig(20, 4, 9, 9, {'noisy': ['much']})), "quality.levels.noisy has 'much'"), (dict(cfg=QualityConfig(20, 4, 9, 9, {'noisy': [2]})), 'share is 2'), (dict(cfg=QualityConfig(20, 4, 9, 9, {'rotated': [1]})), "'rotated'")])
def test_refusals(change, words):
    given = dict(models={'sequence': after}, ranks={'sequence': np.ones(5)}, test=questions(5), popularity=np.ones(N), category=CATEGORY, cfg=CFG, seed=0) | change
    with pytest.raises(TelemetryError, match=words) as e: quality(**given)
    assert '\n' not in str(e.value)

# ---------------------------------------------------------------- words
e = lambda value, half=.001: dict(value=value, ci_lower=value - half, ci_upper=value + half, n=99)

def told(**gap): # a train.json whose differences are as named
    q = dict(models=['sequence', *gap], ours='sequence', rival=max(gap, key=lambda m: -gap[m]), groups={}, lists={})
    return dict(quality=q, models={'sequence': {'ndcg@10': e(.2)}} | {m: {'ndcg@10': e(.2 - d)} for m, d in gap.items()}, differences={f'sequence_minus_{m}': e(d) for m, d in gap.items()})

def test_the_answer_says_no_more_than_the_intervals():
    assert is_better(told(ease=.01, gap_markov=.02)).startswith('**Yes.**')
    assert '0.2000' in is_better(told(ease=.01, gap_markov=.02)) and 'EASE^R, has 0.1900 (+0.0100, +0.0090 to +0.0110)' in is_better(told(ease=.01, gap_markov=.02))
    assert is_better(told(ease=.0005, gap_markov=.02)).startswith('**Not surely.** Which ranks better, it or EASE^R, this test cannot tell.')
    no = is_better(told(ease=-.01, gap_markov=-.02, item_knn=.1))
    assert no.startswith('**No.** EASE^R and gap-decayed Markov ranked better.') and 'not worth its cost' in no
    assert 'not worth its cost' in is_better(told(ease=.01, gap_markov=.0005)) and 'not worth its cost' not in is_better(told(ease=.0005, gap_markov=.02))
    assert is_better(dict(quality=dict(rival=None), models={})).startswith('**Not known.**')

def test_for_whom_names_winners_and_losers():
    q = dict(ours='sequence', rival='ease', groups={'age_band': dict(gain={'50+': e(-.01)}), 'history': dict(gain={'20+': e(.01), '5-19': e(.01), '0': e(.0002)})})
    assert for_whom(q) == 'Surely better than EASE^R in these groups: 5-19 and 20+ (*choices known of the person before*). **Surely worse** in these: 50+ (*age band*).'
    none = for_whom(dict(q, groups={'history': dict(gain={'0': e(0.), '20+': dict(value=None, ci_lower=None, ci_upper=None, n=None)})}))
    assert none == 'For no group told apart here is it surely better. For none is it surely worse.'

def test_parts_are_told_by_verdict():
    assert 'not measured' in which_part({})
    words = which_part({'a': dict(what='the network', verdict='earns its place'), 'b': dict(what='dwell', verdict='worth nothing'), 'c': dict(what='noise', verdict='harms')})
    assert words == 'What earns its place: the network. Worth nothing: dwell. Better without: noise.'
    chance = dict(what='luck', placebo=True)
    assert which_part({'p': chance | dict(verdict='worth nothing'), 'c': dict(what='noise', verdict='cannot tell')}) == 'Open: noise.'
    assert which_part({'p': chance | dict(verdict='harms')}).startswith('**Trust none of this:** luck is pure chance')

def test_lists_in_words(found):
    assert what_lists(found) == '100% of the catalogue is shown to somebody (most popular: 35%). A list holds items {:.1f} times as popular as what its person chose before (most popular: {:.1f}).'.format(*(found['lists'][m]['popularity_lift@10']['value'] for m in found['models']))
    assert what_lists(look(questions(0))) == 'There were none to look at.' and 'most popular' not in what_lists(look(models={'sequence': after}))

def test_groups_stand_as_one_counts():
    assert in_order(['unknown', '20+', '0', '5-19', '1-4']) == ['0', '1-4', '5-19', '20+', 'unknown']
    assert in_order(['c10', 'all others', 'c2', 'c1']) == ['c1', 'c2', 'c10', 'all others'] and in_order(['50+', '18-29', '30-49']) == ['18-29', '30-49', '50+']

# ---------------------------------------------------------------- pictures
def ablation(what, value, verdict): return dict(variant=what, what=what, delta=e(value), seeds=3, rows=900, verdict=verdict)

def test_pictures_show_every_row(found):
    rows = lambda fig: [[t.get_text() for t in ax.get_yticklabels()] for ax in fig.axes]
    assert rows(plot_groups(found, 'category'))[0] == ['top', 'mid', 'low', 'high'] and len(plot_lists(found).axes) == 6 and [ax.get_title('left') for ax in plot_robustness(found).axes] == ['wrong', 'missing', 'short', 'attacked']
    assert set(rows(plot_exposure(found))[0]) == {'top', 'mid', 'low', 'high'}
    fig = plot_ablations({w: ablation(w, v, verdict) for w, v, verdict in (('null', .0002, 'worth nothing'), ('network', -.02, 'earns its place'))})
    assert rows(fig)[0] == ['null', 'network'] and [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ['earns its place', 'worth nothing']
    assert 'without' in fig.axes[0].get_xlabel()
    alone = look(models={'sequence': after})
    for fig in (plot_groups(alone, 'history'), plot_lists(alone), plot_exposure(alone), plot_robustness(alone)): plt.close(fig)
    plt.close('all')

def test_pictures_bear_what_is_not_known():
    empty = look(questions(3))                                                             # too few for any group
    for fig in (plot_groups(empty, 'history'), plot_lists(empty), plot_exposure(empty), plot_robustness(empty)): plt.close(fig)

# ---------------------------------------------------------------- the report
@pytest.fixture
def desk(found, tmp_path): # what the report reads
    (tmp_path/'reports').mkdir(); shutil.copy(ROOT/'reports/02_model_quality.ipynb', tmp_path/'reports')
    full = lambda v: {'ndcg@10': e(v), 'recall@10': e(v), 'mrr': e(v)}
    write_json(tmp_path/'metrics/train.json', dict(quality=found, models={'sequence': full(.8), 'network': full(.7), 'most_popular': full(.2)}, differences={'sequence_minus_network': e(.1), 'sequence_minus_most_popular': e(.6)},
        n_targets=300, n_sequences=2000, epochs=2, version='bundle123'))
    with contextlib.chdir(tmp_path), curves() as each:
        for n, told in enumerate([(3., .1), (2., .3), (1., .2)], 1): each(n, *told)
    write_json(tmp_path/'metrics/release.json', dict(version='run456', model_version='bundle123', data_digest='features789', code_digest='code1', params_digest='params1'))
    with contextlib.chdir(tmp_path): yield tmp_path

def test_report(desk):
    from telemetry_loop.report import headline, render
    write_json('metrics/ablate/no_dwell.json', ablation('how long they looked', .0001, 'worth nothing'))
    html = render('02_model_quality').read_text()
    text = re.sub(r'<[^>]+>', ' ', html)
    title, first = headline(html)
    assert title == 'Is it better, for whom, and which part earns it?' and first.startswith('Yes') and '0.8000' in first
    assert all(word in text for word in ('Caveats', 'run456', 'bundle123', 'features789', 'code1', 'params1', 'how long they looked', 'Worth nothing', 'learned from 900 people, 99 choices', 'part of the 2,000 people')) and not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert html.count('data:image/png;base64,') == 9

def test_report_without_ablations_and_curves(desk):
    "The same cells, without a kernel: one plain sentence where there is nothing to show."
    shutil.rmtree('metrics/curves')
    shell, said = InteractiveShell(), []
    for cell in read_json('reports/02_model_quality.ipynb')['cells']:
        if cell['cell_type'] == 'code': done = shell.run_cell(''.join(cell['source'])); done.raise_error(); said.append(getattr(done.result, 'data', ''))
    plt.close('all')
    assert 'No part was taken out in this run' in ''.join(said) and 'Which part earns it was not measured in this run.' in said[1]

def test_values_are_declared():
    cfg = load_params(QualityConfig, 'quality', ROOT/'params.yaml')
    assert set(cfg.levels) == {'noisy', 'thinned', 'cold', 'attacked'} and 0 in cfg.levels['cold'] and cfg.min_users >= load_params(PrivacyConfig, 'privacy', ROOT/'params.yaml').k

def test_import_is_light():
    code = 'import sys, telemetry_loop.quality; sys.exit(any(m in sys.modules for m in ("fairlearn", "sklearn", "torch", "matplotlib")))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
