"Propensities that are probabilities: against enumeration, against frequencies, and against the log that the same policy wrote."
import contextlib, json, shutil
from dataclasses import replace
from itertools import permutations
import numpy as np, pandas as pd, pytest, yaml
from conftest import small_params
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from telemetry_loop import policy
from telemetry_loop.config import TelemetryError, load_params
from telemetry_loop.features import contexts_of, read_features
from telemetry_loop.policy import (Policy, PolicyConfig, PopularityScorer, _marginals_exact, _marginals_race, bootstrap_policy, choice_weights, draw_slates, model_policy, position_marginals, replay)
from telemetry_loop.schema import Contexts
from telemetry_loop.train import Recommender

SEED = 40                                                              # of every draw
CFG = PolicyConfig(slate=3, temperature=.7, exploration=.1, objective='satisfaction', bootstrap_power=.5, bootstrap_exploration=.4)
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)

def enumerate_slates(w, k): # -> {slate: probability} under Plackett-Luce
    found = {}
    for slate in permutations(range(len(w)), k):
        p, out = 1., []
        for i in slate: p *= w[i]/sum(w[j] for j in range(len(w)) if j not in out); out.append(i)  # summed, never subtracted
        found[slate] = p
    return found

def enumerate_places(w, k): # -> (m, k) P(item at position)
    place = np.zeros((len(w), k))
    for slate, p in enumerate_slates(w, k).items(): place[list(slate), range(k)] += p
    return place

def weights(n, m, spread=2., exploration=.1, seed=SEED): return choice_weights(spread*np.random.default_rng(seed).normal(size=(n, m)), np.ones((n, m), bool), 1., exploration)

class Knows: # a scorer that reads scores from the candidates' names
    version = 'toy'
    def __init__(self, **scores): self.known = scores
    def scores(self, contexts): return np.vectorize(lambda c: self.known.get(c, np.nan), otypes=[float])(contexts.candidates)

def contexts(*offers, popularity=None, history='h', personalise=True):
    n, m = len(offers), max(map(len, offers))
    candidates = np.array([list(o) + ['']*(m - len(o)) for o in offers], dtype='<U8')
    return Contexts(user_id=np.array([f'u{i}' for i in range(n)]), time=np.full(n, np.datetime64('2025-01-06', 'ms')), candidates=candidates, popularity=np.zeros((n, m)) if popularity is None else popularity,
                    history=np.full((n, 1), history), personalise=np.full(n, personalise))

# --- weights

scored = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(lambda shape: st.tuples(
    arrays(float, shape, elements=st.floats(-1e6, 1e6) | st.floats(-3, 3) | st.just(float('nan'))), arrays(bool, shape), st.floats(.05, 20), st.floats(0, 1)))

@quick
@given(scored)
def test_weights_are_probabilities_with_a_floor_and_none_for_padding(case):
    scores, there, temperature, exploration = case
    w, size = choice_weights(scores, there, temperature, exploration), there.sum(1, keepdims=True)
    assert np.isfinite(w).all() and (w[~there] == 0).all()
    assert np.allclose(w.sum(1), there.any(1), atol=1e-12)
    assert (w >= there*exploration/np.maximum(1, size)*(1 - 1e-12)).all()               # everything real is explored
    for row, s, t in zip(w, scores, there):                                              # and the better never has less
        known = t & ~np.isnan(s)
        assert (np.diff(row[known][np.argsort(s[known], kind='stable')]) >= -1e-15).all()
        unknown = row[t & np.isnan(s)]
        if known.any() and len(unknown): assert row[known].min() - 1e-15 <= unknown.min() == unknown.max() <= row[known].max() + 1e-15
    assert np.array_equal(choice_weights(np.where(there, scores, 1e9), there, temperature, exploration), w)   # padding has no say

def test_temperature_is_the_odds_of_scores():
    w = choice_weights(np.array([[1., 3.]]), np.ones((1, 2), bool), .5, 0.)
    assert w[0, 1]/w[0, 0] == pytest.approx(np.exp(2/.5))
    assert choice_weights(np.array([[1., 3.]]), np.ones((1, 2), bool), .5, 1.).tolist() == [[.5, .5]]

@pytest.mark.parametrize('temperature,exploration', [(0., .1), (-1., .1), (1., -.01), (1., 1.01)])
def test_impossible_settings_are_refused(temperature, exploration):
    with pytest.raises(TelemetryError, match='correct section policy of params.yaml') as refused: choice_weights(np.zeros((1, 2)), np.ones((1, 2), bool), temperature, exploration)
    assert len(str(refused.value).splitlines()) == 1

# --- draws

@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_slates_come_as_often_as_they_should(k):
    "Every slate and every item at every position, within 4.5 standard errors; chi-square of the slates within 5 of its own."
    n, w = 60_000, weights(1, 4, exploration=.2)[0]
    chosen, _ = draw_slates(np.tile(w, (n, 1)), k, np.random.default_rng(SEED))
    at = np.stack([(chosen == i).mean(0) for i in range(4)])
    place = position_marginals(w[None], k)[0]
    assert (np.abs(at - place) <= 4.5*np.sqrt(place*(1 - place)/n) + 1e-12).all()
    p = enumerate_slates(w, k)
    code = chosen @ 4**np.arange(k)
    seen = np.array([(code == np.dot(s, 4**np.arange(k))).sum() for s in p]); due = n*np.array(list(p.values()))
    assert seen.sum() == n and ((seen - due)**2/due).sum() < len(p) - 1 + 5*np.sqrt(2*(len(p) - 1) + 1)

@quick
@given(st.integers(1, 5), st.integers(1, 4), st.floats(0, 8), st.integers(0, 99))
def test_propensities_multiply_to_the_probability_of_the_slate(m, k, spread, seed):
    k, w = min(k, m), weights(1, m, spread, .1, seed)[0]
    p = enumerate_slates(w, k)
    assert sum(p.values()) == pytest.approx(1, abs=1e-9)
    chosen, conditional = draw_slates(np.tile(w, (50, 1)), k, np.random.default_rng(seed))
    assert ((conditional > 0) & (conditional <= 1)).all()
    assert np.allclose(conditional.prod(1), [p[tuple(c)] for c in chosen.tolist()], rtol=1e-9)

# --- marginals

@quick
@given(st.integers(3, 6), st.floats(0, 40), st.sampled_from([.01, .1, 1.]), st.integers(0, 99))
def test_marginals_are_enumerated_ones_however_peaked_the_scores(m, spread, exploration, seed):
    w = weights(3, m, spread, exploration, seed)
    for k in (1, 2, 3): assert np.allclose(position_marginals(w, k), [enumerate_places(r, k) for r in w], atol=1e-10)
    if m > 3: assert np.allclose(position_marginals(w, 4), [enumerate_places(r, 4) for r in w], atol=1e-7)

@quick
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0, 10), st.integers(0, 99), st.integers(0, 11))
def test_marginals_fill_every_position_once_and_no_item_twice(m, k, spread, seed, absent):
    there = np.arange(m) != absent
    if not there.any(): return
    w = choice_weights(spread*np.random.default_rng(seed).normal(size=(2, m)), np.tile(there, (2, 1)), 1., .1)
    place, size = position_marginals(w, k), there.sum()
    assert place.shape == (2, m, k) and (place >= 0).all() and (place[:, ~there] <= 1e-12).all()
    assert np.allclose(place.sum(1), np.arange(k) < size, atol=1e-7)                     # each position, while candidates last
    assert np.allclose(place.sum(2)[:, there], 1, atol=1e-7) if k >= size else (place.sum(2) <= 1 + 1e-7).all()

def test_two_ways_to_the_same_marginals():
    w = weights(40, 24, 3., .05)
    for k in (1, 2, 3): assert np.allclose(_marginals_exact(w, k), _marginals_race(w, k), rtol=1e-7, atol=1e-10)
    four = position_marginals(w, 4)
    assert np.allclose(four[:, :, :3], position_marginals(w, 3), rtol=1e-7, atol=1e-10)   # a longer slate begins the same

def test_marginals_do_not_depend_on_how_many_are_asked_at_once():
    w = weights(300, 80)                                                                  # more rows than one block holds at four positions
    assert np.allclose(position_marginals(w, 4)[[0, 150, 299]], position_marginals(w[[0, 150, 299]], 4), rtol=1e-7)
    assert position_marginals(w[:0], 3).shape == (0, 80, 3)

LOST = pytest.mark.xfail(strict=True, reason='what is left beside two giants rounds to nothing, and the race does not run long enough for weights below 1e-9')

@pytest.mark.parametrize('w,k', [([1., 1e-17, 1e-18], 2), ([1., 1e-17, 1e-18], 3), ([1 - 1e-7, 1e-7, 1e-14], 3), ([.5, .5 - 1e-9, 1e-9], 3), ([.6, .4, 1e-7, 1e-8], 4),
    pytest.param([.5, .5, 1e-17], 3, marks=LOST), pytest.param([.6, .4, 1e-11, 1e-12], 4, marks=LOST)])
def test_marginals_are_probabilities_without_exploration_too(w, k):
    assert np.allclose(position_marginals(np.array([w]), k)[0], enumerate_places(w, k), atol=1e-6)

# --- policies

def test_decisions_carry_the_probabilities_of_what_they_show():
    rng, names = np.random.default_rng(SEED), np.array([f'i{j}' for j in range(9)])
    who = contexts(*[rng.permutation(names)[:rng.integers(3, 8)] for _ in range(200)])
    one = Policy(Knows(**dict(zip(names, rng.normal(size=9)))), CFG, 'toy', .7, .1)
    s, w = one.decide(who, rng), one.weights(who)
    place = position_marginals(w, 3)
    for i in range(len(who)):
        at = [who.candidates[i].tolist().index(x) for x in s.items[i]]
        assert '' not in s.items[i] and len(set(at)) == 3
        assert s.propensity[i].prod() == pytest.approx(w[i, at[0]]*w[i, at[1]]/(1 - w[i, at[0]])*w[i, at[2]]/(1 - w[i, at[0]] - w[i, at[1]]), rel=1e-9)
        assert s.position_propensity[i].tolist() == [place[i, a, j] for j, a in enumerate(at)]
    assert (s.policy_id, s.model_version) == ('toy', 'toy')

def test_short_offers_leave_places_empty_and_too_few_columns_are_refused():
    boot = bootstrap_policy(CFG)
    s = boot.decide(contexts('abcd', 'ab', 'a', ''), np.random.default_rng(SEED))
    assert [''.join(sorted(row)) for row in s.items[1:]] == ['ab', 'a', ''] and s.items[2].tolist() == ['a', '', ''] and (s.items[0] != '').all()
    empty = s.items == ''
    assert (s.propensity[empty] == 1).all() and (s.position_propensity[empty] == 1).all() and not s.personalised.any()
    assert s.propensity[2, 0] == s.position_propensity[2, 0] == 1 and s.propensity[1].prod() == pytest.approx(.5)
    with pytest.raises(TelemetryError, match='2 candidates were offered for 3 positions; .*policy.slate') as refused: boot.decide(contexts('ab', 'ba'), np.random.default_rng(SEED))
    assert len(str(refused.value).splitlines()) == 1

def test_the_first_policy_weighs_by_clicks_and_explores_its_share():
    w = bootstrap_policy(CFG).weights(contexts('abc', popularity=np.array([[8., 0., 3.]])))[0]
    assert w == pytest.approx(.6*np.array([3., 1., 2.])/6 + .4/3)                         # (1 + clicks)**.5

# --- replay

def logged(slates, **more):
    n, same = len(slates), lambda x: [[x]*len(s) for s in slates]
    return pd.DataFrame(dict(decision_id=[f'd{i}' for i in range(n)], user_id=[f'u{i}' for i in range(n)], event_time=pd.Timestamp('2025-01-06'), seq=range(n), slate=[list(s) for s in slates],
        position_propensities=same(.25), reward=same(0.), clicked=same(False), satisfied=same(False), hidden=same(False)) | more)

def test_what_the_target_would_never_show_has_no_probability():
    who = contexts('abcd', 'ab')
    rows, candidates = replay(Policy(Knows(a=2., b=1.), CFG, 'toy', 1., .1), logged(['axbcd', 'ba'], reward=[[1., 2., 3., 4., 5.], [6., 7.]]), who)
    assert rows['position'].tolist() == [0, 1, 2, 3, 4, 0, 1] and rows['reward'].tolist() == [1., 2., 3., 4., 5., 6., 7.]
    assert (rows['target_prob'] > 0).tolist() == [True, False, True, False, False, True, True]      # x was no candidate, and the target shows three
    assert len(candidates) == 3*(4 + 2) and not (candidates['item_id'] == '').any()
    assert candidates.groupby(['decision_id', 'position'])['target_prob'].sum().round(9).tolist() == [1, 1, 1, 1, 1, 0]  # two candidates fill two positions

def test_rows_of_the_tiny_world_are_entries_of_their_candidates(tiny_run):
    read = lambda path: pd.read_parquet(tiny_run/'artifacts'/path)
    rows, candidates = read('policy/rows.parquet'), read('policy/candidates.parquet')
    log = read('sessions/decisions').merge(read('features/decisions.parquet')[['decision_id', 'split']], on='decision_id')
    log = log[log['split'] == 'test']
    assert not rows.duplicated(['decision_id', 'position']).any() and not candidates.duplicated(['decision_id', 'position', 'item_id']).any()
    both = rows.merge(candidates, on=['decision_id', 'position', 'item_id'], suffixes=('', '_there'))
    assert len(both) == len(rows) == log['slate'].str.len().sum() > 1000
    assert all((both[c] == both[f'{c}_there']).all() for c in ('target_prob', 'score', 'log_popularity'))
    assert np.allclose(candidates.groupby(['decision_id', 'position'])['target_prob'].sum(), 1, atol=1e-9) and (candidates['target_prob'] > 0).all()
    flat = log[['decision_id', 'slate', 'position_propensities', 'reward']].explode(['slate', 'position_propensities', 'reward'])
    told = rows.merge(flat, left_on=['decision_id', 'item_id'], right_on=['decision_id', 'slate'])
    assert len(told) == len(rows) and (told['propensity'] == told['position_propensities']).all() and (told['reward_x'] == told['reward_y']).all()
    offered = dict(zip(log['decision_id'], log['candidates']))
    assert all(set(c) == set(offered[d]) for d, c in candidates[candidates['position'] == 0].groupby('decision_id')['item_id'])

@pytest.fixture(scope='module')
def tiny(tiny_run):
    with contextlib.chdir(tiny_run): f, cfg = read_features(), load_params(PolicyConfig, 'policy')
    d = pd.read_parquet(tiny_run/'artifacts/sessions/decisions')
    return dict(features=f, cfg=cfg, decisions=d, contexts=contexts_of(d, f))

def far(rows): # -> (decisions,) largest relative difference between the two propensities of a decision
    return (rows['target_prob']/rows['propensity'] - 1).abs().groupby(rows['decision_id'], sort=False).max().to_numpy()

def test_replaying_the_policy_that_logged_gives_the_logged_propensities(tiny, tiny_run):
    """Given the click counts that the policy saw, which a second life of the same world tells, every logged propensity comes back, to the nine digits that were logged.
    Given the log's own counts all of the first day still do, and ever fewer later: 31 % when measured in a world with broken, late and withheld lines (56 % where only one click in 400
    was lost). The rest is no error of replay: a click that is lost, or known only later, makes its item count less, and that shifts every decision it is offered in; in 99 of 100 by 5 % at most."""
    from telemetry_loop.loop import first_world
    with contextlib.chdir(tiny_run): world = first_world(progress=False)
    d, seen, boot = tiny['decisions'], tiny['contexts'], bootstrap_policy(tiny['cfg'])
    day = (seen.time.astype('datetime64[D]') - np.datetime64(world.cfg.start, 'D')).astype(int)
    item = np.searchsorted(world.item_ids, seen.candidates)                               # '' sorts first, and is padding anyway
    truth = replace(seen, popularity=np.where(seen.candidates == '', 0., np.stack(world.clicks)[day[:, None], item]))
    rows, _ = replay(boot, d, truth)
    assert len(far(rows)) == len(d) > 5000 and far(rows).max() < 1e-8
    w, first = boot.weights(truth), d['slate'].str[0].to_numpy()                          # conditional propensities too
    at = [np.argmax(truth.candidates == d['slate'].str[j].to_numpy(dtype=object).astype(str)[:, None], axis=1) for j in range(3)]
    p = np.stack([w[np.arange(len(d)), a] for a in at], 1)
    assert np.allclose(p/(1 - np.cumsum(p, 1) + p), np.stack(d['propensities']), rtol=1e-8)

    off = far(replay(boot, d, seen)[0])
    same = (seen.popularity == truth.popularity).all(1)
    assert (off[same] < 1e-8).all() and (off[day == 0] < 1e-8).all() and (day == 0).sum() > 300
    assert .25 < (off < 1e-8).mean() < 1 and (off < .05).mean() > .99 and off.max() < .25
    assert set(np.unique(seen.popularity - truth.popularity)) <= {0., -1., -2.}           # clicks are lost, never invented

def test_where_one_click_in_400_is_lost_most_propensities_come_back_from_the_log_itself(tmp_path):
    from telemetry_loop import features, ingest, sessions
    from telemetry_loop.faults import NONE
    from telemetry_loop.loop import first_world
    params = small_params(); params['simulate']['faults'] = NONE | dict(late=.02, duplicated=.01, malformed=.002, violating=.0005)
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(params))
    with contextlib.chdir(tmp_path):
        first_world(tmp_path/'data', progress=False)
        for stage in (ingest, sessions, features): stage.run()
        f, cfg = read_features(), load_params(PolicyConfig, 'policy')
    d = pd.read_parquet(tmp_path/'artifacts/sessions/decisions')
    off = far(replay(bootstrap_policy(cfg), d, contexts_of(d, f))[0])
    assert .4 < (off < 1e-8).mean() < 1 and (off < .05).mean() > .99 and off.max() < .25

def test_who_refused_gets_the_popular_choice_in_replay_too(tiny, tiny_run):
    rows = pd.read_parquet(tiny_run/'artifacts/policy/rows.parquet')
    some = tiny['decisions']['decision_id'].isin(rows['decision_id']).to_numpy()
    d, c = tiny['decisions'][some].reset_index(drop=True), tiny['contexts'].take(some)
    plain, _ = replay(Policy(PopularityScorer(tiny['cfg'].bootstrap_power), tiny['cfg'], 'plain', 1., tiny['cfg'].exploration), d, c)
    both = rows.merge(plain, on=['decision_id', 'position'], suffixes=('', '_plain'))
    personal = both['decision_id'].isin(d['decision_id'][c.personalise & (c.history != '').any(1)]).to_numpy()
    same = np.isclose(both['target_prob'], both['target_prob_plain'], rtol=1e-9)
    assert len(both) == len(rows) and same[~personal].all() and same[personal].mean() < .05
    refused = both['decision_id'].isin(d['decision_id'][~c.personalise & (c.history != '').any(1)]).to_numpy()
    assert refused.sum() > 30 and same[refused].all()                                     # although something is known of them

def test_the_bundle_decides_as_it_is_replayed(tiny, tiny_run):
    "`decide` of the released bundle draws from the very distribution that `replay` writes down."
    candidates = pd.read_parquet(tiny_run/'artifacts/policy/candidates.parquet')
    name = candidates['decision_id'].iloc[[0, len(candidates)//6]].tolist()
    some = tiny['decisions']['decision_id'].isin(name).to_numpy()
    one, n = model_policy(Recommender.load(tiny_run/'artifacts/train'), tiny['cfg']), 4000
    s = one.decide(tiny['contexts'].take(np.repeat(np.flatnonzero(some), n)), np.random.default_rng(SEED))
    for i, decision in enumerate(tiny['decisions']['decision_id'][some]):
        told = candidates[candidates['decision_id'] == decision].set_index(['position', 'item_id'])['target_prob']
        for j in range(3):
            seen = pd.Series(s.items[i*n:(i + 1)*n, j]).value_counts(normalize=True).reindex(told[j].index, fill_value=0.)
            assert (np.abs(seen - told[j]) <= 4.5*np.sqrt(told[j]*(1 - told[j])/n) + 1e-9).all()
            assert np.allclose(s.position_propensity[i*n:(i + 1)*n, j], told[j][s.items[i*n:(i + 1)*n, j]], rtol=1e-9)

def test_a_log_without_propensities_is_replayed_into_nothing(tiny, tiny_run, tmp_path):
    for name in ('features', 'train'): shutil.copytree(tiny_run/'artifacts'/name, tmp_path/'artifacts'/name)
    (tmp_path/'artifacts/sessions/decisions').mkdir(parents=True); shutil.copy(tiny_run/'params.yaml', tmp_path)
    tiny['decisions'].assign(propensities=None, position_propensities=None).to_parquet(tmp_path/'artifacts/sessions/decisions/all.parquet')
    with contextlib.chdir(tmp_path): policy.run()
    for name in ('rows', 'candidates'):
        empty, full = (pd.read_parquet(at/f'artifacts/policy/{name}.parquet') for at in (tmp_path, tiny_run))
        assert len(empty) == 0 < len(full) and empty.columns.tolist() == full.columns.tolist()
    said = json.loads((tmp_path/'metrics/policy.json').read_text())
    assert (said['decisions_with_propensities'], said['rows'], said['unsupported_mass']['value'], said['target_prob']['value']) == (0, 0, None, None) and said['decisions_in_test'] > 1000
