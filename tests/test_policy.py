"Who is shown what: wishes, rules, exploration and exposure, and replay against the log that the same policy wrote."
import contextlib, json, shutil
from dataclasses import asdict, replace
import numpy as np, pandas as pd, pytest, yaml
from conftest import small_params
from scipy.special import ndtr
from telemetry_loop import policy
from telemetry_loop.replay import replay_equality
from telemetry_loop.config import TelemetryError, load_params
from telemetry_loop.estimate import mean
from telemetry_loop.features import contexts_of, read_features
from telemetry_loop.choice import best_odds, choice_weights, position_marginals, slate_propensities
from telemetry_loop.policy import (EvenScorer, Policy, PolicyConfig, PopularityScorer, Rules, after_reset, bootstrap_policy, check_budget, drawn_by, exploration_cost, exposure, exposure_boosts, model_policy, random_policy,
    replay, under_all)
from telemetry_loop.schema import Contexts
from telemetry_loop.train import Recommender
from test_choice import enumerate_slates

SEED = 40                                                              # of every draw
RULES = Rules(blocked=[], exclude_seen=False, less=.1, repeat=1., boosts={})
CFG = PolicyConfig(slate=3, temperature=.7, explorer='plackett-luce', exploration=.1, budget=.5, objective='satisfaction', bootstrap_power=.5, bootstrap_exploration=.4, rules=RULES)

class Knows: # a scorer that reads scores from the candidates' names
    version = 'toy'
    def __init__(self, **scores): self.known = scores
    def scores(self, contexts): return np.vectorize(lambda c: self.known.get(c, np.nan), otypes=[float])(contexts.candidates)

def contexts(*offers, popularity=None, history='h', personalise=True):
    n, m = len(offers), max(map(len, offers))
    candidates = np.array([list(o) + ['']*(m - len(o)) for o in offers], dtype='<U8')
    return Contexts(user_id=np.array([f'u{i}' for i in range(n)]), time=np.full(n, np.datetime64('2025-01-06', 'ms')), candidates=candidates, popularity=np.zeros((n, m)) if popularity is None else popularity,
                    history=np.full((n, 1), history), personalise=np.full(n, personalise))

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

# --- every explorer, and where exactness ends

def test_where_exactness_ends_the_policy_refuses():
    for change in (dict(explorer='epsilon'), dict(rules=replace(RULES, repeat=.5))):
        with pytest.raises(TelemetryError, match='policy.slate is 4; .*exact for up to 3') as refused: Policy(Knows(), replace(CFG, slate=4, **change), 'toy', 1., .1)
        assert len(str(refused.value).splitlines()) == 1
        Policy(Knows(), replace(CFG, slate=3, **change), 'toy', 1., .1)
    Policy(Knows(), replace(CFG, slate=9), 'toy', 1., .1)

@pytest.mark.parametrize('change,match', [(dict(explorer='ucb'), "explorer is 'ucb'"), (dict(rules=dict(repeat=0.)), 'repeat 0.0 must be above 0'), (dict(rules=dict(less=2.)), 'less 2.0 within 0..1'), (dict(rules=dict(boosts={'x': 0.})), 'above 0'), (dict(explorer='thompson'), 'Knows does not say how sure')])
def test_impossible_policies_are_refused(change, match):
    change = {k: replace(RULES, **v) if k == 'rules' else v for k, v in change.items()}
    with pytest.raises(TelemetryError, match=match) as refused: Policy(Knows(), replace(CFG, **change), 'toy', 1., .1)
    assert len(str(refused.value).splitlines()) == 1

class Unsure(Knows): # the doubt stands in the second digit of the name's score
    def doubt(self, contexts): return np.vectorize(lambda c: {'a': .1, 'b': 1., 'c': 3.}.get(c, .5), otypes=[float])(contexts.candidates)

def test_thompson_shows_an_item_first_as_often_as_it_is_the_best():
    rng = np.random.default_rng(SEED)
    mean_, sd, n = np.array([[1., .5, -2., 0.]]), np.array([[.05, 1., 3., .3]]), 400_000
    best = (mean_ + sd*rng.normal(size=(n, 4))).argmax(1)
    p = best_odds(mean_, sd, np.ones((1, 4), bool))[0]
    assert p.sum() == pytest.approx(1) and (np.abs(np.bincount(best, minlength=4)/n - p) < 4.5*np.sqrt(p*(1 - p)/n) + 2e-3*p).all()
    assert best_odds(np.array([[1., 1.3, 9.]]), np.array([[.4, .3, 1.]]), np.array([[True, True, False]]))[0] == pytest.approx([ndtr(-.3/.5), ndtr(.3/.5), 0], abs=1e-9)
    assert best_odds(np.array([[np.nan, 1., 1.]]), np.ones((1, 3)), np.ones((1, 3), bool))[0] == pytest.approx([1/3]*3)
    with pytest.raises(TelemetryError, match='doubt has 1 values that are not above 0'): best_odds(np.zeros((1, 2)), np.array([[0., 1.]]), np.ones((1, 2), bool))
    who, thompson = contexts('abc'), Policy(Unsure(a=1., b=.5, c=-2.), replace(CFG, explorer='thompson', slate=2), 'toy', 1., .1)
    w = .9*best_odds(np.array([[1., .5, -2.]]), np.array([[.1, 1., 3.]]), np.ones((1, 3), bool)) + .1/3
    assert np.allclose(thompson.weights(who), w)
    assert np.allclose(Policy(thompson.scorer, thompson.cfg, 'toy', 1., 0.).weights(who), (w - .1/3)/.9)   # the posterior explores without a floor too
    s = thompson.decide(who.take(np.zeros(20_000, int)), rng)
    assert (np.abs([(s.items[:, 0] == x).mean() for x in 'abc'] - w[0]) < 4.5*np.sqrt(w[0]/20_000)).all()
    assert Policy(PopularityScorer(.5), replace(CFG, explorer='thompson'), 'p', 1., .1).weights(contexts('ab', popularity=np.array([[3., 0.]])))[0, 0] < .9

# --- rules and wishes

def asked(*offers, **more):
    c = contexts(*offers)
    return replace(c, **dict(category=np.vectorize(lambda x: {'a': 'x', 'b': 'x', 'c': 'y', 'd': 'z'}.get(x, ''))(c.candidates)) | more)

def everybody(cfg=None): # the same wish must bind the personal slate, the fallback and the first policy
    cfg = cfg or replace(CFG, slate=2)
    return [Policy(Knows(a=3., b=1.), cfg, 'toy', 1., .2), Policy(Knows(a=3., b=1.), cfg, 'toy', 1., .2, fallback=PopularityScorer(.5)), bootstrap_policy(cfg), random_policy(cfg)]

def shown(policy, who, n=400): # items seen in n slates of the first decision; every propensity checked against the enumeration of the weights
    many = who.take(np.zeros(n, int))
    s, w = policy.decide(many, np.random.default_rng(SEED)), policy.weights(who)[0]
    p, place = enumerate_slates(w[w > 0], min(2, (w > 0).sum())), who.candidates[0][w > 0].tolist()
    for items, own in zip(s.items.tolist(), s.propensity): assert own.prod() == pytest.approx(p[tuple(place.index(i) for i in items if i)], rel=1e-9)
    return set(s.items.ravel()) - {''}

def test_a_muted_topic_is_gone_from_the_next_slate():
    who = asked('abcd', muted=np.array([['x', '']]))
    for p in everybody():
        assert shown(p, replace(who, muted=None)) == set('abcd') and shown(p, who) == set('cd')
        assert shown(p, replace(who, personalise=np.array([False]))) == set('cd')
        assert p.decide(replace(who, muted=np.array([['x', 'y']])), np.random.default_rng(SEED)).items.tolist() == [['d', '']]     # nothing is put in its place
        assert p.decide(replace(who, muted=np.array([['d', 'c']])), np.random.default_rng(SEED)).items.ravel().tolist() in (['a', 'b'], ['b', 'a'])

def test_less_like_this_takes_the_item_away_and_makes_its_kind_rarer():
    plain, less = asked('abcd'), asked('abcd', less=np.array([['a', 'x']]))
    for p in everybody():
        w, v = p.weights(plain)[0], p.weights(less)[0]
        assert v[0] == 0 and v.sum() == pytest.approx(1) and shown(p, less) <= set('bcd')
        factors = v[1:]/p.weights(replace(less, less=np.array([['a', '']])))[0][1:]
        assert factors[0]/factors[1] == pytest.approx(.1) and factors[1] == pytest.approx(factors[2]) and w[0] > 0
        assert shown(Policy(p.scorer, replace(CFG, slate=2, rules=replace(RULES, less=0.)), 'toy', 1., .2), less) == set('cd')

def test_switching_off_and_reset_make_the_next_slate_impersonal_and_the_log_says_so():
    when = np.array([['2025-01-01', '2025-01-03']], 'datetime64[ms]')
    who = replace(asked('abc', when=when), history=np.array([['q', 'r']]), kind=np.array([[1, 2]], np.uint8), dwell=np.array([[3., 4.]], np.float32))
    p = Policy(Knows(a=0., b=0., c=9.), replace(CFG, slate=2), 'toy', 1., .1, fallback=PopularityScorer(.5))
    at = lambda t: replace(who, reset=np.array([t], 'datetime64[ms]'))
    personal = lambda c: (bool(p.decide(c, np.random.default_rng(SEED)).personalised[0]), bool(p.weights(c)[0, 2] > .5))
    assert personal(who) == personal(at('NaT')) == personal(at('2025-01-02')) == (True, True)
    assert personal(replace(who, personalise=np.array([False]))) == personal(at('2025-01-03')) == personal(replace(at('2025-01-02'), when=None)) == (False, False)
    half = after_reset(at('2025-01-02'))
    assert half.history.tolist() == [['', 'r']] and half.kind.tolist() == [[0, 2]] and np.isnan(half.dwell[0, 0]) and np.isnat(half.when[0, 0]) and half.dwell[0, 1] == 4
    both = who.take([0, 0]); both = replace(both, reset=np.array(['2025-01-04', 'NaT'], 'datetime64[ms]'))
    assert after_reset(both).history.tolist() == [['', ''], ['q', 'r']]                   # one user's reset is nobody else's

def test_house_rules_bind_everybody():
    who = replace(asked('abcd'), history=np.array([['b']]))
    for p in everybody(replace(CFG, slate=2, rules=replace(RULES, blocked=['a'], exclude_seen=True))): assert shown(p, who) == set('cd')
    for p in everybody(): assert shown(p, who) == set('abcd')

def test_what_cannot_be_honoured_is_refused():
    p = everybody()[0]
    for more, cfg, match in ((dict(muted=np.array([['x']])), CFG, 'muted or less'), (dict(less=np.array([['x']])), CFG, 'muted or less'), ({}, replace(CFG, rules=replace(RULES, boosts={'x': 2.})), 'boosts names categories'), ({}, replace(CFG, rules=replace(RULES, repeat=.5)), 'repeat is 0.5')):
        with pytest.raises(TelemetryError, match=match) as refused: Policy(p.scorer, cfg, 'toy', 1., .1).weights(asked('abcd', category=None, **more))
        assert len(str(refused.value).splitlines()) == 1

def test_diversity_lets_a_slate_vary_and_keeps_the_floor():
    who, cfg = asked('abcd').take(np.zeros(4000, int)), replace(CFG, slate=2)
    same = lambda p: np.isin((s := p.decide(who, np.random.default_rng(SEED))).items, ['a', 'b']).all(1).mean()
    plain, varied = (Policy(Knows(a=3., b=2., c=0., d=0.), replace(cfg, rules=replace(RULES, repeat=r)), 'toy', 1., .2) for r in (1., .05))
    assert same(plain) > .5 and same(varied) < .2
    s, c = varied.decide(who, np.random.default_rng(SEED)), varied.choice(who)
    at = np.stack([(who.candidates == s.items[:, [j]]).argmax(1) for j in range(2)], 1)
    assert np.allclose(s.propensity, slate_propensities(c, at)) and np.allclose(s.position_propensity, np.take_along_axis(position_marginals(c, 2), at[:, None], 1)[:, 0])

def test_boosts_bring_a_category_to_its_floor_in_the_slates_too():
    rng, names = np.random.default_rng(SEED), np.array(list('abcdefgh'))
    who = asked(*[rng.permutation(names)[:6] for _ in range(3000)])
    who = replace(who, category=np.where(np.isin(who.candidates, ['g', 'h']), 'new', 'old'))
    p = Policy(Knows(a=3., b=2., g=-2., h=-2.), CFG, 'toy', 1., .1)
    before = exposure(p.choice(who), who.category, 3)
    boosts = exposure_boosts(p.choice(who), who.category, {'new': .25}, 3)
    fair = Policy(p.scorer, replace(CFG, rules=replace(RULES, boosts=boosts)), 'toy', 1., .1)
    after = exposure(fair.choice(who), who.category, 3)
    assert before['new'] < .2 and after['new'] == pytest.approx(.25, abs=1e-4) and sum(after.values()) == pytest.approx(1)
    assert np.isin(fair.decide(who, rng).items, ['g', 'h']).mean() == pytest.approx(.25, abs=.015)
    assert exposure_boosts(p.choice(who), who.category, {'new': before['new']/2}, 3) == {}
    with pytest.raises(TelemetryError, match="category 'new' gets .* its floor is 0.9"): exposure_boosts(p.choice(who), who.category, {'new': .9}, 3)

# --- what exploration costs, and baselines

def test_exploration_costs_what_it_moves():
    who, scores = contexts('abcd'), dict(a=2., b=1., c=0., d=-1.)
    soft = choice_weights(np.array([list(scores.values())]), np.ones((1, 4), bool), 1., 0.)[0]
    for explorer in ('plackett-luce', 'epsilon'):
        changed, ours, best = exploration_cost(Policy(Knows(**scores), replace(CFG, slate=1, explorer=explorer), 'toy', 1., .3), who)
        assert changed[0] == pytest.approx(.3*np.abs(soft - .25).sum()/2) and best[0] == pytest.approx(soft @ soft) and ours[0] == pytest.approx((.7*soft + .3/4) @ soft)
    hot = {x: -4.*i for i, x in enumerate('abcdefgh')}
    luce, epsilon = (Policy(Knows(**hot), replace(CFG, explorer=e), 'toy', 1., .1) for e in ('plackett-luce', 'epsilon'))
    spent = lambda p, above: np.abs(p.choice(contexts('abcdefgh')).next(above) - p.choice(contexts('abcdefgh'), explore=False).next(above)).sum()/2
    top, more = np.zeros((1, 0), int), np.array([[0, 1]])
    assert spent(luce, top) <= .1 and spent(epsilon, top) <= .1 and spent(epsilon, more) <= .1 and spent(luce, more) > .7 # inside the weights, lower positions are mostly explored
    assert exploration_cost(luce, contexts('abcdefgh'))[0] > .3 > .2 >= exploration_cost(epsilon, contexts('abcdefgh'))[0]  # at most 1, 2 and 3 times .1
    assert exploration_cost(Policy(Knows(a=9.), CFG, 'toy', 1., 0.), who)[0] == pytest.approx(0)
    check_budget(mean(np.array([.2, .4])), replace(CFG, budget=.31))
    with pytest.raises(TelemetryError, match='exploration changes 0.300 of what is shown; policy.budget allows 0.2; lower policy.exploration') as refused: check_budget(mean(np.array([.2, .4])), replace(CFG, budget=.2))
    assert len(str(refused.value).splitlines()) == 1

def test_the_random_policy_shows_every_slate_alike():
    s = random_policy(replace(CFG, explorer='epsilon')).decide(contexts('abcd', 'abc', popularity=np.arange(8.).reshape(2, 4)), np.random.default_rng(SEED))
    assert np.allclose(s.propensity, [[1/4, 1/3, 1/2], [1/3, 1/2, 1]]) and np.allclose(s.position_propensity, [[1/4]*3, [1/3]*3]) and s.policy_id == 'random' and not s.personalised.any()

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
    assert np.allclose(candidates.groupby(['decision_id', 'position'])['target_prob'].sum(), 1, atol=1e-9) and (candidates['target_prob'] >= 0).all() and (candidates['target_prob'] == 0).mean() < .02 # what somebody muted
    flat = log[['decision_id', 'slate', 'position_propensities', 'reward']].explode(['slate', 'position_propensities', 'reward'])
    told = rows.merge(flat, left_on=['decision_id', 'item_id'], right_on=['decision_id', 'slate'])
    assert len(told) == len(rows) and (told['propensity'] == told['position_propensities']).all() and (told['reward_x'] == told['reward_y']).all()
    assert set(rows['who']) <= {'without consent', 'strangers', 'newcomers', 'regulars'} and len(set(rows['who'])) > 2 and (rows.groupby('decision_id')['who'].nunique() == 1).all()
    offered = dict(zip(log['decision_id'], log['candidates']))
    assert all(set(c) == set(offered[d]) for d, c in candidates[candidates['position'] == 0].groupby('decision_id')['item_id'])

def log_of(policies, who, seed=SEED): # each decision by the next policy in turn
    turn = np.arange(len(who)) % len(policies); drawn = [p.decide(who.take([i]), np.random.default_rng((seed, i))) for i, p in ((i, policies[t]) for i, t in enumerate(turn))]
    cut = lambda x, s: [v for v, item in zip(x, s.items[0].tolist()) if item]
    return logged([cut(s.items[0].tolist(), s) for s in drawn], position_propensities=[cut(s.position_propensity[0].tolist(), s) for s in drawn], policy_id=[s.policy_id for s in drawn], model_version=[s.model_version for s in drawn],
        candidates=[[x for x in row if x] for row in who.candidates.tolist()], weights=[s.weights[0][:(c != '').sum()].tolist() for s, c in zip(drawn, who.candidates)], even=[s.even for s in drawn], repeat=[s.repeat for s in drawn])

@pytest.mark.parametrize('change', [{}, dict(explorer='epsilon'), dict(rules=replace(RULES, repeat=.3))], ids=['plain', 'epsilon', 'diverse'])
def test_what_every_writer_would_have_shown_is_what_it_says_itself(change):
    cfg = replace(CFG, **change)
    who = replace(contexts('abcde', 'edcba', 'acebd', 'abc', 'ab', 'bcdae'), category=np.array([['x', 'x', 'y', 'y', '']]*6))
    two = [Policy(Knows(a=2., b=1.), cfg, 'knows', 1., .2), Policy(EvenScorer(), cfg, 'evenly', 1., .2)]
    log, at_hand = log_of(two, who), {'knows/toy': two[0], 'evenly/none': two[1]}
    told = under_all(log, who, at_hand)
    assert len(told) == 2*log['slate'].str.len().sum() and told['wrote'].mean() == .5 and not told.duplicated(['decision_id', 'position', 'logger']).any()
    for name, p in at_hand.items():                                                       # whoever wrote it: what `replay` says of the same policy
        rows, _ = replay(p, log, who); both = told[told['logger'] == name].merge(rows, on=['decision_id', 'position'])
        assert len(both) == len(rows) and both['propensity_x'].to_numpy() == pytest.approx(both['target_prob'].to_numpy(), rel=1e-9)
    rows, candidates = replay(two[0], log, who); shown_ = rows.merge(candidates, on=['decision_id', 'position', 'item_id'])
    assert shown_['logging_prob'].to_numpy() == pytest.approx(shown_['propensity'].to_numpy(), rel=1e-9)        # all candidates, from the weights of the draw
    assert candidates.groupby(['decision_id', 'position'])['logging_prob'].sum().round(9).tolist() == [1]*14 + [0] + [1]*3    # two candidates fill two positions
    alone = under_all(log, who, {'knows/toy': two[0], 'evenly/none': None})                # a bundle that is gone: only its own word is left
    assert alone[alone['logger'] == 'evenly/none']['wrote'].all() and len(alone) < len(told)
    bare = log.assign(weights=None); assert drawn_by(bare, who) == [] and replay(two[0], bare, who)[1]['logging_prob'].isna().all()

@pytest.fixture(scope='module')
def tiny(tiny_run):
    with contextlib.chdir(tiny_run): f, cfg = read_features(), load_params(PolicyConfig, 'policy')
    d = pd.read_parquet(tiny_run/'artifacts/sessions/decisions')
    return dict(features=f, cfg=cfg, decisions=d, contexts=contexts_of(d, f))

def far(rows): # -> (decisions,) largest relative difference between the two propensities of a decision
    return (rows['target_prob']/rows['propensity'] - 1).abs().groupby(rows['decision_id'], sort=False).max().to_numpy()

def test_half_of_the_tiny_world_met_another_policy_and_the_stages_weigh_by_both(tiny, tiny_run, tmp_path):
    "Half of the users meet a policy that shows every candidate alike: what it would have shown is known to the digit, what it showed the other half did not, and the mixture adds up."
    from telemetry_loop import ope
    for name in ('features', 'train'): (tmp_path/'artifacts').mkdir(exist_ok=True); (tmp_path/'artifacts'/name).symlink_to(tiny_run/'artifacts'/name)
    d, even = tiny['decisions'].copy(), replace(tiny['cfg'], bootstrap_power=0.)
    half = d['user_id'].isin(np.sort(d['user_id'].unique())[::2]).to_numpy()
    s = bootstrap_policy(even, 'evenly').decide(tiny['contexts'].take(half), np.random.default_rng(SEED))
    full = lambda x, like: [list(row)[:len(l)] for row, l in zip(x.tolist(), like)]
    for name, x in dict(slate=s.items, propensities=s.propensity, position_propensities=s.position_propensity).items(): column = d[name].tolist(); [column.__setitem__(i, v) for i, v in zip(np.flatnonzero(half), full(x, d['slate'][half]))]; d[name] = column
    column = d['weights'].tolist(); [column.__setitem__(i, v) for i, v in zip(np.flatnonzero(half), full(s.weights, d['candidates'][half]))]; d['weights'] = column
    d['policy_id'] = np.where(half, 'evenly', d['policy_id'])
    (tmp_path/'artifacts/sessions/decisions').mkdir(parents=True); d.to_parquet(tmp_path/'artifacts/sessions/decisions/all.parquet')
    (tmp_path/'data/bundles/evenly').mkdir(parents=True); (tmp_path/'data/bundles/evenly/policy.json').write_text(json.dumps(asdict(even)))
    shutil.copy(tiny_run/'params.yaml', tmp_path); (tmp_path/'metrics').mkdir(); (tmp_path/'metrics/replay.json').write_text(json.dumps({'complaints': []}))
    with contextlib.chdir(tmp_path): policy.run(); ope.run()
    rows, loggers = (pd.read_parquet(tmp_path/f'artifacts/policy/{name}.parquet') for name in ('rows', 'loggers'))
    said, offered = json.loads((tmp_path/'metrics/ope.json').read_text()), d.set_index('decision_id')['candidates'].str.len()
    theirs = loggers[(loggers['logger'] == 'evenly/none') & ~loggers['wrote']]
    assert len(loggers) == 2*len(rows) > 2000 and .3 < loggers['wrote'][loggers['logger'] == 'evenly/none'].mean() < .7
    assert np.isclose(theirs['propensity'], 1/offered[theirs['decision_id']].to_numpy(), rtol=1e-9).mean() > .7     # whoever muted nothing
    mine = rows.merge(loggers[loggers['wrote']], on=['decision_id', 'position']); assert (mine['propensity_x'] == mine['propensity_y']).all()
    names, p, writer = ope.logged_by(rows, loggers); day = rows['event_time'].dt.normalize().to_numpy()
    from telemetry_loop.many import balanced_weight
    for target in (rows['target_prob'].to_numpy(), p[:, 0], p[:, 1]):                      # any policy's weights average 1 under the mixture
        w = balanced_weight(target, p, writer, day); assert abs(w.mean() - 1) < 4*w.std()/np.sqrt(len(w)) + .005
    found = said['gain']; assert said['otherwise']['balanced'] == {'policies': ['evenly/none', 'popularity/none'], 'left_out': None} and said['support']['verdict'] != 'refuse'
    assert found['balanced']['ci_lower'] < found['ips']['value'] < found['balanced']['ci_upper'] and found['balanced']['value'] != found['ips']['value']
    assert {'mips', 'offcem'} <= set(found) and said['otherwise']['mips']['tried'][0]['value'] == pytest.approx(said['estimates']['ips']['value'], rel=1e-6) # every item alone

def test_replaying_the_policy_that_logged_gives_the_logged_propensities(tiny, tiny_run):
    """Given the click counts that the policy saw, which a second life of the same world tells, every logged propensity comes back, to the nine digits that were logged.
    Given the log's own counts all of the first day still do, and ever fewer later: 31 % when measured in a world with broken, late and withheld lines (56 % where only one click in 400
    was lost). The rest is no error of replay: a click that is lost, or known only later, makes its item count less, and that shifts every decision it is offered in; in 99 of 100 by 5 % at most."""
    from telemetry_loop.loop import first_world
    from telemetry_loop.privacy import key, pseudonyms
    with contextlib.chdir(tiny_run): world = first_world(progress=False)
    d, seen, boot = tiny['decisions'], tiny['contexts'], bootstrap_policy(tiny['cfg'])
    day = (seen.time.astype('datetime64[D]') - np.datetime64(world.cfg.start, 'D')).astype(int)
    item = np.searchsorted(world.item_ids, seen.candidates)                               # '' sorts first, and is padding anyway
    p = world.people                                                                      # a wish may be known late, or be lost, like any line: those who never had one tell of the policy alone
    wished = (p['muted'] >= 0).any(1) | (p['less'] >= 0).any(1) | ~np.isnat(p['reset'])
    silent = ~np.isin(seen.user_id, pseudonyms(world.user_ids[wished], key()))
    assert .7 < silent.mean() < 1
    d, seen, day, item = d[silent].reset_index(drop=True), seen.take(silent), day[silent], item[silent]
    truth = replace(seen, popularity=np.where(seen.candidates == '', 0., np.stack(world.clicks)[day[:, None], item]))
    rows, _ = replay(boot, d, truth)
    assert len(far(rows)) == len(d) > 5000 and far(rows).max() < 1e-8
    assert (replay_equality(boot, d, truth)['reason'] == '').all() and (replay_equality(boot, d, seen)['reason'].isin(['', 'propensity differs', 'position propensity differs'])).all()
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
    assert ((both['who'] == 'without consent') | (both['who'] == 'strangers')).tolist() == (~personal).tolist()
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

def test_the_stage_says_what_exploration_costs_and_refuses_above_the_budget(tiny_run, tmp_path):
    said = json.loads((tiny_run/'metrics/policy.json').read_text())
    assert 0 < said['exploration']['changed']['ci_lower'] < said['exploration']['changed']['ci_upper'] < said['exploration']['budget'] and 0 < said['exploration']['value_lost']['value'] < .5
    for name in ('features', 'train', 'sessions'): shutil.copytree(tiny_run/'artifacts'/name, tmp_path/'artifacts'/name)
    params = yaml.safe_load((tiny_run/'params.yaml').read_text()); params['policy']['budget'] = .001
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(params))
    with contextlib.chdir(tmp_path), pytest.raises(TelemetryError, match='policy.budget allows 0.001'): policy.run()
    assert not (tmp_path/'metrics/policy.json').exists() and not (tmp_path/'artifacts/policy').exists()

def test_a_loop_that_feeds_on_its_own_clicks_is_flagged(tiny_run, tmp_path):
    "A policy that shows what was clicked, and so makes it clicked: exposure crowds from week to week, the gate sees it in advance; the candidate of the small product passes."
    from telemetry_loop.scorecard import criterion
    from telemetry_loop.simulate import SimulateConfig, World
    from telemetry_loop.config import from_dict
    gate = next(criterion(c) for c in small_params()['scorecard']['criteria'] if c['name'] == 'exposure')
    assert gate.judge(json.loads((tiny_run/'metrics/policy.json').read_text())['exposure']['more']).answer == 'pass'
    world = World(from_dict(SimulateConfig, small_params(simulate=dict(users=300))['simulate'], 'simulate'), SEED)
    feeding, lists = Policy(PopularityScorer(3.), CFG, 'feeding', 1., 0.), []
    class Watched: # keeps what was offered and shown
        def __init__(self, policy): self.policy = policy
        def decide(self, c, rng): s = self.policy.decide(c, rng); lists.append((c, s)); return s
    def log(of): # the slates of the watched policy as decisions, rows and candidates; `of`: the policy to be judged at them
        decisions = pd.DataFrame(dict(event_time=np.concatenate([c.time for c, _ in lists]), candidates=[[x for x in row if x] for c, _ in lists for row in c.candidates], slate=[[x for x in row if x] for _, s in lists for row in s.items]))
        would = pd.concat([pd.DataFrame(dict(item_id=c.candidates.ravel(), target_prob=position_marginals(of.choice(c), 3).sum(2).ravel())) for c, _ in lists])
        return decisions, pd.DataFrame(dict(item_id=decisions['slate'].explode())), would[would['item_id'] != '']
    world.live(Watched(random_policy(CFG)), 7); even = log(feeding); lists.clear()
    ahead = policy.crowding(*even)
    world.live(Watched(feeding), 21)
    lived = list(policy.crowding(*log(feeding))['by_week'].values())
    assert gate.judge(ahead['more']).answer == 'fail' and ahead['candidate'] > ahead['shown'] + .3
    assert min(lived) > ahead['shown'] + .2 and policy.crowding(*even[:2], log(random_policy(CFG))[2])['more'] < .1
