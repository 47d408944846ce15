"Assignment: the coin, ramps that flip nobody, independent layers, holdouts, forced variants, exposure; the naive rules fail beside."
import hashlib, json, time
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import kstest
from telemetry_loop.assignment import Experiment, assign, assign_all, check_slots, expose, first_exposure, in_holdout, layer_independence, left_out, position, _pieces
from telemetry_loop.config import TelemetryError

UNITS = np.char.add('u', np.arange(1_000_000).astype(str))
FEW = UNITS[:50_000]
TWO = Experiment('headline', 'interface', {'control': .5, 'treatment': .5}, share=.2, start=.1)
def flips(before, after): return int(((before != '') & (before != after)).sum())

# the coin
def test_position_is_the_hash_it_says():
    def plain(unit, salt): return (int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8, key=hashlib.sha256(salt.encode()).digest()).digest(), 'big') >> 11)/2**53
    names = ['u1', 'ünïcode', '7', 'a\x1fb', 'x'*500, '\ud800']
    assert position(names[:5], 's').tolist() == [plain(n, 's') for n in names[:5]] and 0 <= position(names, 's')[5] < 1
    assert position(['u1', 'u2'], 'spring').round(6).tolist() == [.8543, .696644]                  # pinned: a change would move people

def test_names_not_types_decide():
    assert position([7, 8], 's').tolist() == position(['7', '8'], 's').tolist() == position(np.array([7, '8'], object), 's').tolist() == position(pd.Series([7, 8]), 's').tolist()
    assert len(position([], 's')) == 0 and assign(TWO, []).tolist() == []

@pytest.mark.parametrize('units,says', [([7., 8.], 'float64'), (['a', None], 'NoneType'), (['a', ''], '1 empty'), ([True, False], 'bool'), (np.array([True, 'a'], object), 'bool'), (np.array([1.5, 'a'], object), 'float'), ([['a']], '2 dimensions'), ('u1', '0 dimensions'), ([pd.Timestamp('2025-01-01')], 'Timestamp'), (pd.to_datetime(['2025-01-01']), 'datetime64'), (pd.Series([1, None]), 'float64')])
def test_names_that_are_none(units, says):
    with pytest.raises(TelemetryError, match=says): position(units, 's')
    with pytest.raises(TelemetryError, match=says): assign(TWO, units)

def test_a_million_in_seconds_and_even():
    begun = time.process_time(); line = position(UNITS, 'test'); took = time.process_time() - begun
    assert took < 5 and line.min() >= 0 and line.max() < 1 and kstest(line, 'uniform').pvalue > .001 and len(np.unique(line)) == len(line)
    assert abs(np.corrcoef(line[:-1], line[1:])[0, 1]) < .005                                     # neighbouring names know nothing of each other

def test_the_same_today_and_for_each_alone():
    whole = assign(TWO, FEW, 'salt', .1)
    assert (whole == assign(TWO, FEW[::-1], 'salt', .1)[::-1]).all() and [assign(TWO, [u], 'salt', .1)[0] for u in FEW[:50]] == whole[:50].tolist()
    assert 0 < (whole != assign(TWO, FEW, 'other', .1)).mean()

# ramps
def test_a_million_units_on_the_ramp_and_the_naive_ramps():
    found = [assign(replace(TWO, share=s, start=0.), UNITS) for s in (.01, .05, .25, .5, 1.)]
    assert [flips(a, b) for a, b in zip(found, found[1:])] == [0, 0, 0, 0]
    for share, f in zip((.01, .05, .25, .5, 1.), found):
        assert abs((f != '').mean() - share) < 4*np.sqrt(share/1e6) and abs((f == 'treatment').sum()/(f != '').sum() - .5) < 4*np.sqrt(.25/(1e6*share))
    line = position(FEW, 'naive')                                                                  # one number for who and which
    naive = [np.where(line < s/2, 'treatment', np.where(line < s, 'control', '')).astype(object) for s in (.05, .25, 1.)]
    modulo = [np.where(np.floor(line*1e6)%round(1/s) == 0, np.where(np.floor(line*1e6)%2, 'treatment', 'control'), '').astype(object) for s in (1/5, 1/3)]
    session = [assign(replace(TWO, share=1., start=0.), np.char.add(FEW, f'/{i}')) for i in (0, 1)]
    for few in (naive[:2], naive[1:], modulo, session): assert flips(*few) > .4*(few[0] != '').sum()

shares = st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(lambda s: sum(s) > 0).map(lambda s: [x/sum(s) for x in s])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(shares)
def test_every_variant_gets_its_share_of_the_line(s):
    left, number = _pieces(dict(enumerate(s)))
    width = np.bincount(number, np.diff(left, append=1.), minlength=len(s))
    assert left[0] == 0 and np.allclose(width, s, atol=1e-9)

@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.data())
def test_a_canary_moves_people_from_control_only(n, data):
    top = 1. if n <= 2 else 1/n
    later = np.array(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))); later = later*top/max(1, later.sum()) if n <= 2 else later*top
    before = later*np.array(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
    line = np.linspace(0, 1, 2001)[:-1] + 1e-4
    a, b = (number[np.searchsorted(left, line, 'right') - 1] for left, number in (_pieces(dict(enumerate([1 - s.sum(), *s]))) for s in (before, later)))
    assert ((a == b) | (a == 0)).all()

def test_cumulative_shares_push_people_between_treatments():
    ours = [assign(Experiment('c', 'l', dict(control=1 - a - .3, a=a, b=.3), 1., 0.), FEW) for a in (.1, .6)]
    edges = [np.cumsum([1 - a - .3, a, .3]) for a in (.1, .6)]; line = position(FEW, 'x')
    grown = [np.cumsum([a, .3, 1 - a - .3]) for a in (.1, .6)]                                     # treatment first: b is pushed on
    before, after = (np.searchsorted(e, line, 'right') for e in grown)
    assert (before != after)[before == 1].mean() > .9 and not ((ours[0] != 'control') & (ours[0] != ours[1])).any()
    assert len(edges) == 2 and abs((ours[1] == 'a').mean() - .6) < .01

# layers and holdouts
def test_layers_over_a_million_units_and_one_salt_for_two():
    a, b = assign(replace(TWO, share=.5, start=.2), UNITS, 'p'), assign(Experiment('ranking', 'algorithm', {'control': .3, 'x': .3, 'y': .4}, .7, 0.), UNITS, 'p')
    assert layer_independence(a, b) > .001
    same = assign(Experiment('ranking', 'interface', {'control': .5, 'x': .5}, .7, 0.), UNITS, 'p')
    assert layer_independence(a, same) < 1e-100
    both = (a != '') & (same != '')                                                                # who is in both of one layer: the variants still do not know each other
    assert layer_independence(a[both], same[both]) > .001

def test_p_values_of_independent_layers_are_even():
    p = [layer_independence(assign(replace(TWO, share=1., start=0.), FEW[:2000], f's{i}'), assign(Experiment('r', 'other', {'a': .5, 'b': .5}, .5, 0.), FEW[:2000], f's{i}')) for i in range(200)]
    assert kstest(p, 'uniform').pvalue > .001

def test_slots_of_a_layer_are_disjoint():
    a, b, c = TWO, replace(TWO, name='second', start=.3, share=.7), replace(TWO, name='other', layer='ranking', start=0.)
    found = assign_all([a, b, c], FEW, 'p', .1)
    assert not ((found.headline != '') & (found.second != '')).any() and abs(((found.headline != '') | (found.second != '')).mean() - .9*.9) < .01
    assert ((found.headline != '') & (found.other != '')).any()
    check_slots([replace(a, start=.1, share=.2), replace(b, start=.1 + .2, share=.1)])              # .1 + .2 > .3 in floating point
    with pytest.raises(TelemetryError, match=r"'headline' \(0.1..0.3\) and 'second' \(0.2..0.9\) overlap in layer 'interface'"): assign_all([a, replace(b, start=.2)], FEW)
    with pytest.raises(TelemetryError, match="'headline' is named 2 times"): check_slots([a, replace(a, layer='x')])

def test_a_holdout_is_kept_out_of_everything():
    out = in_holdout(FEW, 'p', .1)
    assert abs(out.mean() - .1) < .01 and (in_holdout(FEW, 'p', .2) | ~out).all()
    for layer in 'ab':
        found = assign(Experiment(f'e{layer}', layer, TWO.variants, 1., 0.), FEW, 'p', .1)
        assert ((found == '') == out).all()
    with pytest.raises(TelemetryError, match='holdout is 1.5'): in_holdout(FEW, 'p', 1.5)

def test_forced_variants_come_first_and_disturb_nobody():
    out = FEW[in_holdout(FEW, 'p', .1)][0]
    free, found = assign(TWO, FEW, 'p', .1), assign(TWO, FEW, 'p', .1, forced={out: 'treatment', 'nobody': 'control'})
    assert found[FEW == out] == ['treatment'] and (free != found).sum() == 1
    assert assign(TWO, [7], forced=[('7', 'control')])[0] == 'control'
    for forced, says in (({7: 'control', '7': 'treatment'}, "'7' more than once"), ([('a', 'control')]*2, 'more than once'), ({'a': 'blue'}, "'blue'.*knows control, treatment"), ({None: 'control'}, 'NoneType')):
        with pytest.raises(TelemetryError, match=says): assign(TWO, FEW[:5], forced=forced)
    with pytest.raises(TelemetryError, match="experiment 'x'"): assign_all([TWO], FEW[:5], forced={'x': {}})

@pytest.mark.parametrize('change,says', [(dict(variants={'a': .5, 'b': .4}), 'sum to 0.9'), (dict(variants={'a': 1.}), '1 variant'), (dict(variants={}), '0 variant'), (dict(variants={'': .5, 'b': .5}), "named ''"), (dict(variants={True: .5, 'b': .5}), 'named True'),
    (dict(variants={'a': -.5, 'b': 1.5}), 'share -0.5'), (dict(variants={'a': float('nan'), 'b': 1.}), 'share nan'), (dict(variants={'a': '.5', 'b': .5}), "share '.5'"), (dict(variants={f'v{i}': 1e-6 for i in range(1_000_000)}), '1000000 variants'),
    (dict(share=1.2), 'share 1.2'), (dict(share=-.1), 'share -0.1'), (dict(share=float('nan')), 'share nan'), (dict(share='1'), "share '1'"), (dict(start=.9), 'ends at 1.1'), (dict(name=''), "name ''"), (dict(layer=None), 'layer None')])
def test_what_is_no_experiment(change, says):
    with pytest.raises(TelemetryError, match=says) as e: replace(TWO, **change)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400

# exposure
def log(*rows): return pd.DataFrame(rows, columns=['user_id', 'experiment', 'variant', 'event_time', 'plan', 'forced'])
MET = [('a', 'e', 'control', 3, 'p2', False), ('a', 'e', 'control', 1, None, False), ('b', 'e', 'treatment', 2, 'p1', False), ('b', 'e', 'control', 5, 'p1', False), ('c', 'e', 'treatment', 9, 'p1', True), ('c', 'e', 'treatment', 1, 'p1', False), ('a', 'f', 'x', 1, 'p1', False), ('d', 'f', 'y', 1, 'p1', False)]

def test_first_meetings():
    first = first_exposure(log(*MET)).set_index(['experiment', 'user_id'])
    assert first.event_time.to_dict() == {('e', 'a'): 1, ('e', 'b'): 2, ('e', 'c'): 1, ('f', 'a'): 1, ('f', 'd'): 1}
    assert first.plan.isna().tolist() == [True, False, False, False, False]                        # the plan of the first meeting, not the first plan found
    assert first.crossed.tolist() == [False, True, False, False, False] and first.forced.tolist() == [False, False, True, False, False] and first.analysed.tolist() == [True, False, False, True, True]
    assert left_out(first.reset_index()) == {'units': 5, 'analysed': 3, 'crossed': {'n': 1, 'share': .2, 'units': ['b']}, 'forced': {'n': 1, 'share': .2, 'units': ['c']}}

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations(MET))
def test_the_order_of_rows_does_not_count(rows): pd.testing.assert_frame_equal(first_exposure(log(*rows)), first_exposure(log(*MET)))

@pytest.mark.parametrize('table,says', [(log(*MET).drop(columns='variant'), "no column 'variant'"), (log(), '0 rows'), (log(*MET[:2]), "one variant only \\('control'\\)"), (log(*MET, ('x', 'e', '', 1, '', False)), '1 rows without variant'), (log(*MET, (None, 'e', 'control', 1, '', False)), '1 rows without user_id'),
    (log(*MET, ('x', 'e', 'control', None, '', False)), '1 rows without event_time'), (log(*MET, (7, 'e', 'control', 1, '', False)), 'mixed.* in user_id'), (log(*MET, ('x', 'e', 'control', 1, '', 'no')), "in forced \\('no'\\)"), (log(*((f'u{i}', 'e', f'v{i}', i, '', False) for i in range(1000))), '1000 variants')])
def test_exposures_that_say_too_little(table, says):
    with pytest.raises(TelemetryError, match=says): first_exposure(table)

def test_logged_when_met():
    units = np.repeat(FEW[:2000], 2); first = FEW[:2000][assign(TWO, FEW[:2000], 'p', .1) != '']
    rows = expose(TWO, units, pd.Timestamp('2025-01-06') + pd.to_timedelta(np.arange(4000), 'h'), 'p', .1, {first[0]: 'control'}, 'abc')
    assert set(rows.user_id) == set(first) and len(rows) == 2*len(first) and rows.forced.sum() == 2 and set(rows.plan) == {'abc'}
    found = first_exposure(rows)
    assert len(found) == len(first) and found.analysed.sum() == len(first) - 1 and json.dumps(left_out(found))
    assert (found.set_index('user_id').variant[first[1:]].to_numpy() == assign(TWO, first[1:], 'p')).all()

def test_a_million_exposures_in_seconds():
    rows = pd.DataFrame(dict(user_id=UNITS, experiment='e', variant=np.where(np.arange(1_000_000) % 2, 'control', 'treatment'), event_time=np.arange(1_000_000)))
    begun = time.process_time(); first = first_exposure(rows)
    assert len(first) == 1_000_000 and first.analysed.all() and time.process_time() - begun < 15

def test_by_exposure_finds_what_assignment_dilutes():
    rng = np.random.default_rng(20261); z = {'exposed': [], 'assigned': []}
    arm = assign(replace(TWO, share=1., start=0.), FEW[:5000])
    for _ in range(200):
        came = rng.random(5000) < .2; y = rng.normal(size=5000) + .25*(came & (arm == 'treatment'))
        for name, keep in (('exposed', came), ('assigned', np.full(5000, True))):
            a, b = y[keep & (arm == 'treatment')], y[keep & (arm == 'control')]
            z[name].append((a.mean() - b.mean())/np.sqrt(a.var()/len(a) + b.var()/len(b)))
    assert np.mean(np.array(z['exposed']) > 1.96) > .95 > 2*np.mean(np.array(z['assigned']) > 1.96) > .2
