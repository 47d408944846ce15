"The whole experiment: verdicts by the plan, the course over time, the doors for tables and summaries."
import json
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from telemetry_loop import cli
from telemetry_loop.config import TelemetryError
from telemetry_loop.contrast import Moments, moments
from telemetry_loop.estimate import Verdict
from telemetry_loop.experiment import ExperimentConfig, analyse, as_mean, crossings, evaluate_summary, evaluate_table, over_time, study
from telemetry_loop.plan import Plan
from telemetry_loop.readout import about

SEED = 56
PLAN = Plan('headline', 'Honest headlines bring readers back.', 'user_id', 'plain', {'plain': .5, 'honest': .5}, ['joy'], {'back': .03}, {'joy': 'up', 'back': 'up'}, ['clicks'], [], 7, {}, .05, .8, .03, 14, [7, 14], 'group-sequential')
def people(joy=0., back=0., n=20_000, seed=SEED):
    rng = np.random.default_rng(seed); arm = rng.random(n) < .5; before = rng.normal(5, 1, n)
    return pd.DataFrame(dict(user_id=np.arange(n), variant=np.where(arm, 'honest', 'plain'), before=before, joy=before + rng.normal(0, 1, n) + joy*5*arm, back=(rng.random(n) < .6*(1 + back*arm))*1., clicks=rng.poisson(3, n)*1.))
def judged(table, plan=PLAN, **more): return analyse(moments(table, 'variant', ['joy', 'back', 'clicks', 'before']), 'plain', covariates={'joy': ['before']}, plan=plan, **more)
kind = lambda *a, **k: judged(*a, **k).verdicts['honest']['kind']

def test_every_verdict():
    assert kind(people(.03)) == 'win' and kind(people()) == 'no difference shown' and kind(people(-.03)) == 'harm' and kind(people(.03, -.1)) == 'harm'
    assert kind(people(.03, -.03, seed=SEED + 1)) == 'inconclusive'                       # at its margin a guardrail is not clear
    assert kind(people(.03), day=3) == 'inconclusive' and 'the plan looks on days 7, 14' in judged(people(.03), day=3).verdicts['honest']['reason']
    assert kind(people(n=400)) == 'inconclusive' and 'too few units' in judged(people(n=400)).verdicts['honest']['reason']
    assert kind(people(.03), exposed=Verdict('fail', 'the verdict is void')) == 'invalid'
    lost = people(.03); assert kind(lost[(lost.variant == 'plain') | (lost.user_id % 10 > 0)]) == 'invalid'

def test_an_early_look_needs_more_than_the_last():
    "The same z is not enough on day 7, and is on day 14."
    from telemetry_loop.sequential import boundaries
    table = people(.005, n=20_000); first, last = (judged(table, day=d) for d in (7, 14))
    z = first.metrics['honest']['joy']['z']
    limits = boundaries(np.array([.5, 1])); assert limits[1] < z < limits[0] and not first.metrics['honest']['joy']['significant'] and last.metrics['honest']['joy']['significant']

def test_information_is_units_not_days():
    "Half of the planned people on day 7 is half of the information; nearly all of them is nearly all of it; and the look that reaches the size decides."
    from telemetry_loop.sequential import boundaries
    table, of = people(.005), lambda units, **k: judged(table, replace(PLAN, units=units), **k)
    limit = lambda r: r.metrics['honest']['joy']; z = limit(of(40_000, day=7))['z']
    half, most = boundaries(np.array([.5, 1.])), boundaries(np.array([.95, 1.])); assert most[0] < z < half[0]
    assert not limit(of(40_000, day=7))['significant'] and limit(of(21_000, day=7))['significant'] and limit(of(15_000, day=7))['significant']
    assert of(40_000, day=7).verdicts['honest']['reason'] == 'no primary has moved by day 7 of 14' and judged(people(), replace(PLAN, units=15_000), day=7).verdicts['honest']['kind'] == 'no difference shown'
    late = of(15_000, day=14, seen={7: 16_000, 14: 20_000}); assert late.verdicts['honest']['kind'] == 'inconclusive' and 'reached at an earlier look' in late.verdicts['honest']['reason']
    assert of(40_000, day=14, seen={7: 12_000, 14: 20_000}).metrics['honest']['joy']['significant']        # fewer than planned: the last look spends what is left

def test_peeking_with_whatever_came_keeps_alpha():
    "People come two times as fast as the calendar says; limits by days would still hold, by units they hold and are not wasted."
    rng, plan, stopped = np.random.default_rng(SEED), replace(PLAN, units=4000, guardrails={}, directions={'joy': 'up'}, secondary=[]), 0
    for _ in range(400):
        arm, joy, seen = rng.random(4400) < .5, rng.normal(5, 1, 4400), {7: 3600, 14: 4400}
        of = lambda x: Moments(('joy',), len(x), x.mean(keepdims=True), np.array([[x.var(ddof=1)]]))
        stopped += any(analyse({'honest': of(joy[:seen[d]][arm[:seen[d]]]), 'plain': of(joy[:seen[d]][~arm[:seen[d]]])}, 'plain', plan=plan, day=d, seen={k: v for k, v in seen.items() if k <= d}).metrics['honest']['joy']['significant'] for d in seen)
    assert .02 < stopped/400 < .08

def test_the_plans_word_is_the_plans():
    with pytest.raises(TelemetryError, match="control is 'honest' and the plan compares with 'plain'"): analyse(moments(people(.03), 'variant', ['joy', 'back', 'clicks']), 'honest', plan=PLAN)
    with pytest.raises(TelemetryError, match='the plan has covariate_days 0'): judged(people(), replace(PLAN, covariate_days=0))

def test_several_primaries_share_what_they_could_show():
    two = replace(PLAN, primary=['joy', 'clicks'], directions=PLAN.directions | {'clicks': 'up'}, secondary=[]); one, both = (judged(people(n=1000), p).metrics['honest']['joy'] for p in (PLAN, two))
    assert both['mde'] > 1.05*one['mde'] and both['power'] < one['power']

def test_a_band_made_for_more_people_finds_less():
    "Found with 80 %, says the plan: shown by experiments, looked at every day, with that very effect."
    plan = replace(PLAN, stopping='anytime', looks=[], units=20_000, guardrails={}, directions={'joy': 'up'}, secondary=[]); rng, days = np.random.default_rng(SEED), range(1, 15)
    of = lambda x: Moments(('joy',), len(x), x.mean(keepdims=True), np.array([[x.var(ddof=1)]]))
    arms = lambda joy, arm, k: {'honest': of(joy[:k][arm[:k]]), 'plain': of(joy[:k][~arm[:k]])}
    draw = lambda mde: (lambda arm: (rng.normal(5, 1, 1400) + 5*mde*arm, arm))(rng.random(1400) < .5)
    mde = analyse(arms(*draw(0.), 1400), 'plain', plan=plan).metrics['honest']['joy']['mde']; assert mde > 1.1*analyse(arms(*draw(0.), 1400), 'plain', plan=replace(plan, units=1400)).metrics['honest']['joy']['mde']
    found = [any(analyse(arms(joy, arm, 100*d), 'plain', plan=plan, day=d).metrics['honest']['joy']['significant'] for d in days) for joy, arm in (draw(mde) for _ in range(150))]
    assert .72 < np.mean(found) < .92
    assert analyse(arms(*draw(0.), 90), 'plain', plan=plan).verdicts['honest']['kind'] == 'inconclusive'

def test_planned_looks_at_few_people_keep_alpha():
    "Limits are made for a normal z; eight people have Student's t. Taken as it is, it crosses them in a tenth of experiments."
    rng, plan, crossed, plain = np.random.default_rng(SEED), replace(PLAN, units=16, guardrails={}, directions={'joy': 'up'}, secondary=[], looks=[7, 14]), 0, 0
    of = lambda x: Moments(('joy',), len(x), x.mean(keepdims=True), np.array([[x.var(ddof=1)]]))
    for _ in range(1500):
        a, b = rng.normal(5, 1, (2, 8)); seen = {}
        for day, k in ((7, 4), (14, 8)):
            seen[day] = 2*k; row = analyse({'plain': of(a[:k]), 'honest': of(b[:k])}, 'plain', plan=plan, day=day, seen=seen).metrics['honest']['joy']
            if row['significant']: crossed += 1; break
        plain += abs(row['signal_to_noise']) > 1.969
    assert .035 < crossed/1500 < .065 < plain/1500

def test_a_lift_over_next_to_nothing_is_told_as_a_difference():
    rng = np.random.default_rng(SEED); t = pd.DataFrame(dict(variant=np.repeat(['plain', 'honest'], 500), joy=np.r_[rng.normal(.01, 1, 500), rng.normal(.5, 1, 500)]))
    found = analyse(moments(t, 'variant', ['joy']), 'plain', ['joy']); assert 'joy differs by +0.4' in found.verdicts['honest']['reason'] and '%' not in found.verdicts['honest']['reason']
    none = rng.normal(size=1000); none[500:] += none[:500].mean() - none[500:].mean(); same = analyse(moments(t.assign(joy=none - none[:500].mean()), 'variant', ['joy']), 'plain', ['joy'])
    said = same.verdicts['honest']['reason'].split(); assert said[-2] == 'joy' and float(said[-1]) == pytest.approx(2.8016*np.sqrt(none[:500].var(ddof=1)/500 + none[500:].var(ddof=1)/500), rel=3e-3)

def test_an_early_look_without_anything_to_see_is_left_out():
    "Nobody has complained by the second day; that is no fault of the experiment."
    t = people(.02).assign(rare=lambda t: (t.user_id == 15_000)*1.); looks = {d: moments(t[t.user_id < 1400*d], 'variant', ['rare', 'joy']) for d in (2, 7, 14)}
    assert over_time(looks, 'plain', 'honest', 'rare').day.tolist() == [14] and len(over_time({2: looks[2]}, 'plain', 'honest', 'rare')) == 0

def test_uneven_shares_that_nobody_declared():
    t = people(); found = analyse(moments(t[(t.variant == 'plain') | (t.user_id % 3 == 0)], 'variant', ['joy']), 'plain', ['joy'])
    assert found.verdicts['honest']['kind'] == 'invalid' and '--share VARIANT=SHARE' in found.verdicts['honest']['reason']

def test_one_metric_of_a_hundred_asked_afterwards_is_corrected():
    rng = np.random.default_rng(SEED); names = [f'm{i}' for i in range(100)]
    table = pd.DataFrame(rng.normal(10, 1, (4000, 100)), columns=names).assign(variant=np.where(rng.random(4000) < .5, 'honest', 'plain'))
    found = analyse(moments(table, 'variant', names), 'plain', names)
    ms = found.metrics['honest'].values()
    assert any(m['p_value'] < .05 for m in ms) and not any(m['significant'] for m in ms) and found.verdicts['honest']['kind'] == 'no difference shown'

def test_what_was_promised_is_reported():
    with pytest.raises(TelemetryError, match='the plan promises clicks and it is not analysed'): analyse(moments(people(), 'variant', ['joy', 'back']), 'plain', ['joy', 'back'], plan=PLAN)
    with pytest.raises(TelemetryError, match="no variant 'old'; the variants are honest, plain"): analyse(moments(people(), 'variant', ['joy']), 'old', ['joy'])

def test_a_ratio_as_one_value_a_unit():
    t = people(); t = t.assign(visits=1. + np.random.default_rng(SEED).poisson(2, len(t))); control = (t.variant == 'plain').to_numpy()
    line = as_mean(t, 'clicks/visits', control); of = lambda rows: t.clicks[rows].sum()/t.visits[rows].sum()
    assert line[control].mean() == pytest.approx(of(control), rel=1e-12) and line[~control].mean() == pytest.approx(of(~control), abs=2e-3)
    assert (as_mean(t, 'clicks', control) == t.clicks).all()

def test_the_past_is_drawn_though_its_covariate_once_differed():
    t = people(.02); early = t[t.user_id % 14 < 2]; early = early[(early.variant == 'plain') | (early.before > 4.5)]
    found = moments(early, 'variant', ['joy', 'before'])
    with pytest.raises(TelemetryError, match='covariate before differs'): analyse(found, 'plain', ['joy'], ['before'], shares={'plain': .5, 'honest': .5})
    assert len(over_time({2: found, 14: moments(t, 'variant', ['joy', 'before'])}, 'plain', 'honest', 'joy', 'before')) == 2

def test_the_band_over_time_is_wider_than_one_look_and_shrinks():
    t = people(.02); looks = {d: moments(t[t.user_id % 14 < d], 'variant', ['joy', 'before']) for d in (2, 7, 14)}
    path = over_time(looks, 'plain', 'honest', 'joy', 'before')
    assert (path.anytime_upper - path.anytime_lower > path.upper - path.lower).all() and (np.diff(path.anytime_upper - path.anytime_lower) < 0).all() and path.n.tolist() == sorted(path.n)

# --- doors

def door(capsys, *words): # as a user would
    try: cli.app(list(map(str, words)), standalone_mode=False)
    except TelemetryError as e: return None, str(e)
    return capsys.readouterr().out, None

def test_table_door(tmp_path, capsys):
    people(.03).to_csv(tmp_path/'ab.csv', index=False)
    said, _ = door(capsys, 'experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--metric', 'back', '--covariate', 'before', '--json', tmp_path/'o.json')
    told = json.loads((tmp_path/'o.json').read_text())
    assert 'honest: difference; joy differs by' in said and set(told) >= {'srm', 'metrics'} and set(told['srm']) >= {'p_value', 'verdict'}
    joy = told['metrics']['joy']; assert set(joy) >= {'control', 'treatment', 'difference', 'anytime', 'p_value'} and set(joy['difference']) == {'value', 'ci_lower', 'ci_upper', 'n'}
    assert joy['difference']['ci_lower'] < .15 < joy['difference']['ci_upper'] and joy['anytime']['ci_lower'] < joy['difference']['ci_lower']
    assert told == json.loads(json.dumps(evaluate_table(tmp_path/'ab.csv', 'user_id', 'variant', 'plain', ['joy', 'back'], ['before']), default=float))

def test_three_variants_are_keyed_by_treatment(tmp_path):
    t = people(.03); t.loc[t.user_id % 3 == 0, 'variant'] = 'third'
    told = evaluate_table(t, 'user_id', 'variant', 'plain', ['joy'], shares={'plain': 1/3, 'honest': 1/3, 'third': 1/3})
    assert set(told['metrics']['joy']) == {'honest', 'third'} == set(told['verdict'])

@pytest.mark.parametrize('words, said', [
    (('--table', 'T'), '--unit is missing'), (('--unit', 'user_id'), '--unit goes with --table'), (('--table', 'T', '--summary', 'T'), 'one at a time'), (('--summary', 'T'), "no column 'count_c'"),
    (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'old', '--metric', 'joy'), "no variant 'old'"), (('--table', 'none.csv', '--unit', 'u', '--variant', 'v', '--control', 'c', '--metric', 'm'), 'no file none.csv'),
    (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--share', 'plain'), 'is not VARIANT=NUMBER'), (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--share', 'plain=.5', '--share', 'plain=.5'), '--share is given twice for plain'), (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--cap', 'joy'), 'is not METRIC=NUMBER'),
    (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--day', '3'), '--day is 3 and there is no plan'), (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--alpha', '2'), 'alpha is 2')])
def test_bad_words_are_refused(tmp_path, capsys, words, said):
    people(n=200).to_csv(tmp_path/'t.csv', index=False)
    out, error = door(capsys, 'experiment', *[tmp_path/'t.csv' if w == 'T' else w for w in words])
    assert out is None and said in error and '\n' not in error

def test_plan_door(tmp_path, capsys):
    from dataclasses import asdict; import yaml
    from telemetry_loop.plan import plan_digest
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(asdict(PLAN)))
    said, _ = door(capsys, 'plan', tmp_path/'p.yaml')
    assert plan_digest(PLAN) in said and 'Honest headlines' in said
    people(.03).to_csv(tmp_path/'ab.csv', index=False)
    said, _ = door(capsys, 'experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--plan', tmp_path/'p.yaml', '--covariate', 'before')
    assert 'honest: win' in said
    words = ('experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--plan', tmp_path/'p.yaml')
    assert 'inconclusive; the plan looks on days 7, 14; this is day 3' in door(capsys, *words, '--day', 3)[0]              # without the day an early look was judged as the last
    assert '--cap is given and the plan says its own' in door(capsys, *words, '--cap', 'joy=.99')[1]

def test_a_table_says_which_plan_was_in_force(tmp_path, capsys):
    from dataclasses import asdict; import yaml
    from telemetry_loop.plan import plan_digest
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(asdict(PLAN))); words = ('experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--plan', tmp_path/'p.yaml', '--covariate', 'before')
    t = people(.03).assign(digest=plan_digest(PLAN)); t.to_csv(tmp_path/'ab.csv', index=False)
    assert 'does not say which plan was in force' in door(capsys, *words)[0] and 'honest: win' in door(capsys, *words, '--announced', 'digest')[0]
    t.loc[:9, 'digest'] = plan_digest(replace(PLAN, mde=.01)); t.to_csv(tmp_path/'ab.csv', index=False)
    assert 'honest: invalid; the verdict is void: 10 of 20,000 exposures were not under plan' in door(capsys, *words, '--announced', 'digest')[0]
    with pytest.raises(TelemetryError, match="unit is 'clicks' and the plan randomises 'user_id'"): evaluate_table(t, 'clicks', 'variant', 'plain', [], plan=PLAN)

def test_true_is_true(tmp_path):
    t = people(n=400); t = t.assign(variant=t.variant == 'honest'); t.to_csv(tmp_path/'ab.csv', index=False)
    for source, control in ((t, False), (t, 'False'), (t, 'false'), (tmp_path/'ab.csv', 'False'), (tmp_path/'ab.csv', 'false')): assert evaluate_table(source, 'user_id', 'variant', control, ['joy'])['treatments'][0].casefold() == 'true'

def test_caps_and_alpha_by_the_door(tmp_path, capsys):
    t = people(); t.loc[5, 'joy'] = 1e6; t.to_csv(tmp_path/'ab.csv', index=False); words = ('experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--json', tmp_path/'o.json')
    width = lambda: (lambda d: d['ci_upper'] - d['ci_lower'])(json.loads((tmp_path/'o.json').read_text())['metrics']['joy']['difference'])
    door(capsys, *words); wild = width(); door(capsys, *words, '--cap', 'joy=.999'); tame = width(); door(capsys, *words, '--cap', 'joy=.999', '--alpha', .01)
    assert wild > 100*tame and width() == pytest.approx(tame*2.5758/1.96, rel=1e-3)

# --- the pipeline's own

CFG, DAY = ExperimentConfig(follow_up=3, least=20, units=1500), pd.Timestamp('2025-01-01')
OWN = Plan('try', 'More joy.', 'user_id', 'old', {'old': .5, 'new': .5}, ['engagement'], {}, {'engagement': 'up'}, ['complaints'], ['segment'], 0, {'engagement': 3.}, .05, .8, .2, 8, [4, 6, 8], 'group-sequential')
def lived(n=2000, gain=0., complaints=True, late=4, seed=SEED):
    "First exposures, days and people; who comes on which of `late` days."
    rng = np.random.default_rng(seed); ids = np.array([f'u{i:04d}' for i in range(n)]); arm = rng.random(n) < .5; came = rng.integers(late, size=n)
    first = pd.DataFrame(dict(user_id=ids, variant=np.where(arm, 'new', 'old'), event_time=DAY + pd.to_timedelta(came, unit='D') + pd.Timedelta(hours=9)))
    days = pd.DataFrame(dict(user_id=np.repeat(ids, 8), day=DAY + pd.to_timedelta(np.tile(np.arange(8), n), unit='D'))).assign(decisions=1., clicks=rng.poisson(np.repeat(1.5*(1 + gain*arm), 8))*1.)
    days = days.assign(satisfied=days.clicks, complaints=rng.poisson(.1, len(days))*1.*complaints)
    return first, days, pd.DataFrame(dict(user_id=ids, segment=rng.choice(['a', 'b'], n), joined=DAY))
told = lambda plan, *frames: study(plan, Verdict('pass', ''), *frames, DAY + pd.Timedelta(days=7), CFG)

def test_the_look_that_reaches_the_size_decides():
    found = told(OWN, *lived(gain=.2)); assert [r['day'] for r in found['over_time']['new']] == [4, 6, 8] and found['looked'] == 6 and found['followed'] == 2000 > found['planned'] == 1500 and found['verdict']['kind'] == 'win'
    more = told(replace(OWN, units=5000), *lived(gain=.2)); assert more['looked'] == 8 and more['planned'] == 5000 and '40% of the 5,000 planned' in about(more | dict(announced=dict(answer='pass', reason='')))
    assert '100% of the 1,500 planned: the look that reached the size decides' in about(found)

def test_outliers_are_what_the_plan_says_in_every_picture():
    first, days, people = lived(); days.loc[days.user_id == 'u0012', 'clicks'] = 1e5
    wide = lambda f: max(e['ci_upper'] - e['ci_lower'] for e in f['segments']['new']['segment']['effects'].values())
    assert wide(told(OWN, first, days, people)) < 1 < wide(told(replace(OWN, outliers={}), first, days, people))

def test_nobody_in_a_variant_is_not_a_matter_of_waiting():
    first, days, people = lived(); plan = replace(OWN, shares={'old': .4, 'new': .4, 'third': .2})
    assert told(plan, first, days, people)['verdict']['kind'] == 'invalid' and "nobody met 'third'" in told(plan, first, days, people)['verdict']['reason']

def test_pairs_and_metrics_are_asked_together():
    "Five things that change nothing, ten pairs, two metrics each: an alarm somewhere in one product of twenty, not in most."
    rng, alarms = np.random.default_rng(SEED), 0
    for _ in range(60):
        ids = np.arange(600); y = pd.DataFrame(dict(user_id=ids, engagement=rng.normal(size=600), return_rate=rng.normal(size=600)))
        tables = {n: (replace(OWN, experiment=n), y.assign(variant=np.where(rng.random(600) < .5, 'new', 'old'))) for n in 'abcde'}
        alarms += any(m['answer'] == 'fail' for c in crossings(tables, CFG) for m in c['metrics'].values())
    assert alarms/60 < .25

def test_summaries(tmp_path, capsys):
    at = np.arange(1, 15); k = at*700
    t = pd.DataFrame(dict(experiment_id='e', variant_id=1, metric_id=1, time_since_start=at, count_c=k, count_t=k, mean_c=2., mean_t=2.1, variance_c=4., variance_t=4.)); t.to_csv(tmp_path/'s.csv', index=False)
    one = evaluate_summary(t)['series'][0]; se = np.sqrt(8/9800)
    assert one['difference']['value'] == pytest.approx(.1) and one['difference']['ci_upper'] - .1 == pytest.approx(1.96*se, rel=1e-3) and one['srm']['p_value'] is None and one['looks'] == 14
    assert evaluate_summary(t, shares={'control': .6, 'treatment': .4})['series'][0]['srm']['verdict'] == 'fail'
    said, _ = door(capsys, 'experiment', '--summary', tmp_path/'s.csv', '--json', tmp_path/'o.json')
    assert 'naive' in said and json.loads((tmp_path/'o.json').read_text())['series'][0]['time'] == 14
    said, _ = door(capsys, 'experiment', '--summary', tmp_path/'s.csv', '--share', 'control=.6', '--share', 'treatment=.4'); assert 'fail' in said and 'corrected' in said
    t.assign(variance_c=-1.).to_csv(tmp_path/'none.csv', index=False); said, _ = door(capsys, 'experiment', '--summary', tmp_path/'none.csv'); assert 'e 1 1: not judged; 14 checkpoints' in said
    assert evaluate_summary(t.assign(variance_c=0., variance_t=0.))['not_judged'][0]['reason'].startswith('14 checkpoints')

def test_summaries_in_which_nobody_stops_and_odd_ones(tmp_path, capsys):
    "Nobody stopped: no median, and not a file that no reader of JSON takes (it was NaN)."
    at = np.arange(1, 15); k = at*700; t = pd.DataFrame(dict(experiment_id='e', time_since_start=at, count_c=k, count_t=k, mean_c=2., mean_t=2.001, variance_c=4., variance_t=4.)); t.to_csv(tmp_path/'s.csv', index=False)
    door(capsys, 'experiment', '--summary', tmp_path/'s.csv', '--json', tmp_path/'o.json'); told = json.loads((tmp_path/'o.json').read_text(), parse_constant=lambda c: pytest.fail(c))
    assert told['peeking']['naive']['median_stop'] is None and told['series'][0]['looks'] == 14
    fewer = t.assign(count_c=np.where(at == 14, 10, k), mean_t=np.where(at == 14, 99., 2.001)); assert evaluate_summary(fewer)['series'][0]['time'] == 13   # counts fell: that checkpoint is not judged
    for change, said in ((dict(time_since_start='soon'), 'time_since_start is VARCHAR'), (dict(time_since_start=0.), 'time_since_start has 14 values that are not above 0'), (dict(experiment_id=None), '14 rows in which one of experiment_id is empty'), (dict(mean_t=1e300), r'metric is around 1e\+300')):
        with pytest.raises(TelemetryError, match=said): evaluate_summary(t.assign(**change))

def test_the_calculator_by_the_door(tmp_path, capsys):
    "A tenth of a standard deviation takes 3,140 people at one look; with half of the variance known before, half of them."
    from dataclasses import asdict; import yaml
    from statsmodels.stats.power import NormalIndPower
    rng = np.random.default_rng(SEED); plan = replace(PLAN, primary=['joy'], guardrails={'back/visits': .1}, directions={'joy': 'up', 'back/visits': 'up'}, secondary=[], looks=[14], stopping='fixed', mde=.01); (tmp_path/'p.yaml').write_text(yaml.safe_dump(asdict(plan)))
    x = rng.normal(size=4000); x = (x - x.mean())/x.std(ddof=1); e = rng.normal(size=4000); e -= e.mean() + (e @ x)/(x @ x)*x; e /= e.std(ddof=1)
    past = pd.DataFrame(dict(joy=10 + (x + e)/np.sqrt(2), before=x, back=rng.poisson(2, 4000), visits=rng.poisson(2, 4000) + 1)); past.to_csv(tmp_path/'past.csv', index=False)
    words = ('plan', tmp_path/'p.yaml', '--past', tmp_path/'past.csv'); row = lambda out, m: next(l for l in out.splitlines() if l.startswith(m)).split()
    assert row(door(capsys, *words)[0], 'joy') == ['joy', 'primary', '10', '0.1', '3,140'] and row(door(capsys, *words, '--covariate', 'before')[0], 'joy')[-1] == '1,570'
    out = door(capsys, *words, '--arrivals', 157)[0]; assert row(out, 'joy')[-2:] == [f'{NormalIndPower().power(.1, 157*14/2, .05):.0%}', '20'] and 'power in 14 days' in out and row(out, 'back/visits')[1] == 'guardrail'
    for more, said in ((('--arrivals', 0), '--arrivals is 0'), (('--covariate', 'nope'), "no column 'nope'")): assert said in door(capsys, *words, *more)[1]
    assert '--arrivals goes with --past' in door(capsys, 'plan', tmp_path/'p.yaml', '--arrivals', 5)[1]
    past.assign(joy=3.).to_csv(tmp_path/'past.csv', index=False); assert 'joy is the same (3) for every past unit' in door(capsys, *words)[1]
    past.drop(columns='joy').to_csv(tmp_path/'past.csv', index=False); assert "no column 'joy'" in door(capsys, *words)[1]
