"Slates: every estimator right in its own click model and wrong outside it, against truths that are added up, not estimated."
from itertools import permutations, product
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import standard_error
from telemetry_loop.choice import draw_slates, position_marginals
from telemetry_loop.estimators import dr, ips
from telemetry_loop.slate import (cascade_dr, iips, plackett_luce, plackett_luce_weight, position_weight, prefix_weight,
    product_weight, pseudo_inverse, rips, sips, uniform_weight)
from slate_log import softmax

SEED, REPLICATIONS, N = 20261, 400, 1000 # declared once
RIGHT = dict(independent={'sips', 'iips', 'rips', 'cascade_dr'}, cascade={'sips', 'rips', 'cascade_dr'}, standard={'sips'})

class World:
    "Three kinds of user, every slate listed: tables of (kind, slate) or (kind, slate, place)."
    def __init__(self, m=6, k=3, sharp=1.2, seed=5):
        rng = np.random.default_rng(seed); score = rng.normal(size=(3, m)); self.m, self.k = m, k
        self.logging, self.target = softmax(.3*rng.normal(size=(3, m))), softmax(sharp*score)
        self.slates = np.array(list(permutations(range(m), k)))
        self.p, self.t = plackett_luce(self.logging, self.slates), plackett_luce(self.target, self.slates)
        same = [(self.slates[:, None, :j] == self.slates[None, :, :j]).all(2) for j in range(k + 1)]
        self.begins = lambda p, j: p @ same[j]
        conditional = lambda p: np.stack([self.begins(p, j+1)/self.begins(p, j) for j in range(k)], 2)
        self.conditional, self.prefix = conditional(self.p), self.flat(prefix_weight, conditional(self.t), conditional(self.p))
        place = lambda w: position_marginals(w, k)[:, self.slates, np.arange(k)]
        self.place = self.flat(position_weight, place(self.target), place(self.logging))
        like = (1/(1 + np.exp(-score)))[:, self.slates]
        reached = np.concatenate([np.ones((3, len(self.slates), 1)), (1 - .7*like)[:, :, :-1].cumprod(2)], 2)
        self.expected = dict(independent=like/np.sqrt(1 + np.arange(k)), cascade=like*reached, standard=like*(1 - .45*like @ (1 - np.eye(k))))
    def flat(self, weight, *tables): return weight(*[x.reshape(-1, self.k) for x in tables]).reshape(3, -1, self.k)
    def truth(self, worth): return (self.t*worth).sum(1).mean()
    def model(self, expected):
        "The true q and v of Cascade-DR."
        ahead = expected[:, :, ::-1].cumsum(2)[:, :, ::-1]
        return [np.stack([self.begins(self.t*ahead[:, :, j], j+down)/self.begins(self.t, j+down) for j in range(self.k)], 2) for down in (1, 0)]
    def draw(self, rng, expected, n=N):
        kind = rng.integers(3, size=n); slate = np.minimum((self.p.cumsum(1)[kind] <= rng.random((n, 1))).sum(1), len(self.slates) - 1)
        return (kind, slate), (rng.random((n, self.k)) < expected[kind, slate])*1.
    def pairs(self): return np.repeat(np.arange(3), len(self.slates)), np.tile(self.slates, (3, 1))
    def pi(self): kind, shown = self.pairs(); return plackett_luce_weight(shown, self.logging[kind], self.target[kind]).reshape(3, -1)

def estimates(w, expected, i, reward, off=.8):
    q, v = w.model(off*expected)
    return dict(sips=sips(reward, w.prefix[i]), iips=iips(reward, w.place[i]), rips=rips(reward, w.prefix[i]), cascade_dr=cascade_dr(reward, w.prefix[i], q[i], v[i]))

@pytest.fixture(scope='module')
def study():
    "click model -> (truth, values, standard errors), one row a log."
    w, rng, out = World(), np.random.default_rng(SEED), {}
    for name, expected in w.expected.items():
        found = [estimates(w, expected, *w.draw(rng, expected)) for _ in range(REPLICATIONS)]
        out[name] = w.truth(expected.sum(2)), pd.DataFrame([{k: v for k, (v, _) in f.items()} for f in found]), pd.DataFrame([{k: standard_error(i) for k, (_, i) in f.items()} for f in found])
    return out
off = lambda error: abs(error.mean())/(error.std(ddof=1)/np.sqrt(len(error))) # in Monte Carlo standard errors

@pytest.mark.parametrize('model', RIGHT)
def test_right_in_its_own_click_model_and_wrong_outside(study, model):
    truth, values, _ = study[model]
    for name in values: assert off(values[name] - truth) <= 4 if name in RIGHT[model] else off(values[name] - truth) > 10, name

@pytest.mark.parametrize('model', RIGHT)
def test_intervals_cover_where_the_assumption_holds(study, model):
    truth, values, se = study[model]
    for name in values:
        cover = np.mean(abs(values[name] - truth) < 1.96*se[name])
        assert .9 < cover < .985 if name in RIGHT[model] else cover < .8, (name, cover)

def test_assuming_more_shortens_the_interval(study):
    spread = study['independent'][1].std(); assert spread.iips < .7*spread.rips and spread.rips < .85*spread.sips
    spread = study['cascade'][1].std(); assert spread.cascade_dr < .85*spread.rips and spread.rips < .85*spread.sips

@pytest.mark.parametrize('model', RIGHT)
def test_expectations_added_up_over_all_slates(model):
    w = World(); expected, rng = w.expected[model], np.random.default_rng(SEED)
    size = w.p.size/3; scaled = lambda x: (x*w.p[:, :, None]*size).reshape(-1, w.k)  # estimators are linear in rewards and model
    prefix, place, truth = w.prefix.reshape(-1, w.k), w.place.reshape(-1, w.k), w.truth(expected.sum(2))
    q, v = w.model(rng.normal(size=expected.shape))                                  # any model
    found = dict(sips=sips(scaled(expected), prefix)[0], iips=iips(scaled(expected), place)[0], rips=rips(scaled(expected), prefix)[0], cascade_dr=cascade_dr(scaled(expected), prefix, scaled(q), scaled(v))[0])
    for name, value in found.items(): assert (abs(value - truth) < 1e-10) == (name in RIGHT[model]), name

# ---------------------------------------------------------------- pseudo-inverse
def test_pseudo_inverse_is_sharp_for_sums_and_wrong_for_interactions():
    w = World(m=8, k=4, sharp=1.2); pi, rng, expected = w.pi(), np.random.default_rng(SEED), w.expected['independent']
    additive = expected.sum(2); bonus = 1.*(w.slates[:, :2].sum(1) % 4 == 0); together = additive + bonus
    rows = []
    for _ in range(REPLICATIONS):
        i, places = w.draw(rng, expected); reward = places.sum(1); whole = w.prefix[i][:, -1]; more = reward + bonus[i[1]]
        rows.append(dict(pi=pseudo_inverse(reward, pi[i])[0], sips=ips(reward, whole)[0], product=pseudo_inverse(reward, product_weight(w.place[i]))[0], pi_together=pseudo_inverse(more, pi[i])[0], sips_together=ips(more, whole)[0]))
    e = pd.DataFrame(rows); truth, truth_together = w.truth(additive), w.truth(together)
    assert off(e.pi - truth) <= 4 and off(e.sips - truth) <= 4 and e.pi.std() < .6*e.sips.std()
    assert off(e.pi_together - truth_together) > 10 and off(e.sips_together - truth_together) <= 4
    assert off(e['product'] - truth) > 10  # the product's weight on slates without repetition

def test_pseudo_inverse_weight_is_its_definition():
    w = World(m=4, k=2); pi = w.pi()
    for kind in range(3):
        gamma, wanted, one = np.zeros((8, 8)), np.zeros(8), np.zeros((len(w.slates), 8))
        for s, (a, b) in enumerate(w.slates):
            one[s, [a, 4 + b]] = 1; gamma += w.p[kind, s]*np.outer(one[s], one[s]); wanted += w.t[kind, s]*one[s]
        assert pi[kind] == pytest.approx(one @ np.linalg.pinv(gamma) @ wanted, abs=1e-11)

@pytest.mark.parametrize('m, k', [(5, 3), (4, 1), (3, 3), (6, 2)])
def test_pseudo_inverse_expectations(m, k):
    w = World(m, k); kind, shown = w.pairs(); worth = np.random.default_rng(SEED).normal(size=(3, m, k))
    additive = worth[:, w.slates, np.arange(k)].sum(2); truth = w.truth(additive)
    assert (w.p*w.pi()*additive).sum(1).mean() == pytest.approx(truth, abs=1e-11) and (w.p*w.pi()).sum(1) == pytest.approx(np.ones(3), abs=1e-12)
    marginals = position_marginals(w.target, k)
    even = uniform_weight(marginals[kind[:, None], shown, np.arange(k)], marginals.sum(2)[kind[:, None], shown], m)
    assert even == pytest.approx(plackett_luce_weight(shown, np.ones((len(kind), m)), w.target[kind]), abs=1e-10)
    assert (even.reshape(3, -1)*additive).mean() == pytest.approx(truth, abs=1e-11)
    assert plackett_luce_weight(shown, w.logging[kind], w.logging[kind]) == pytest.approx(np.ones(len(kind)), abs=1e-12)

def test_product_weight_where_places_are_filled_independently():
    rng = np.random.default_rng(SEED); p, t, worth = softmax(rng.normal(size=(3, 4))), softmax(rng.normal(size=(3, 4))), rng.normal(size=(3, 4))
    slates, j = np.array(list(product(range(4), repeat=3))), np.arange(3)
    chance, weight = p[j, slates].prod(1), product_weight(position_weight(t[j, slates], p[j, slates]))
    assert (chance*weight*worth[j, slates].sum(1)).sum() == pytest.approx((t*worth).sum(), abs=1e-12)
    assert product_weight([[2., 3., .5]]).tolist() == [3.5] and (chance*weight**2).sum() == pytest.approx(1 + ((t**2/p).sum(1) - 1).sum())  # spreads add up, where those of the slate's weight multiply

def test_a_candidate_nobody_offers_changes_nothing():
    w = World(m=4, k=2); kind, shown = w.pairs(); pad = lambda x: np.pad(x[kind], ((0, 0), (0, 1)))
    assert plackett_luce_weight(shown, pad(w.logging), pad(w.target)) == pytest.approx(w.pi().ravel(), abs=1e-12)
    assert plackett_luce_weight(shown, 7*pad(w.logging), 3*pad(w.target)) == pytest.approx(w.pi().ravel(), abs=1e-12)  # weights need not sum to 1

def test_chunks_leave_no_seam():
    rng = np.random.default_rng(SEED); n = 250                                       # 12 candidates: 250 decisions are several chunks
    logging, target, shown = softmax(rng.normal(size=(n, 12))), softmax(rng.normal(size=(n, 12))), rng.permuted(np.tile(np.arange(12), (n, 1)), axis=1)[:, :3]
    whole = plackett_luce_weight(shown, logging, target)
    for a in (0, 251//2, n - 1): assert plackett_luce_weight(shown[[a]], logging[[a]], target[[a]])[0] == pytest.approx(whole[a], rel=1e-10)

# ---------------------------------------------------------------- the policy's own propensities
def test_propensities_as_the_policy_logs_them():
    w, rng = World(), np.random.default_rng(SEED); kind = rng.integers(3, size=200)
    shown, p = draw_slates(w.logging[kind], w.k, rng)
    slate = (w.slates[None] == shown[:, None]).all(2).argmax(1)
    assert p == pytest.approx(w.conditional[kind, slate], rel=1e-12) and p.prod(1) == pytest.approx(w.p[kind, slate], rel=1e-12)
    marginals = np.stack([[w.p[:, w.slates[:, j] == a].sum(1) for a in range(w.m)] for j in range(w.k)], 2).transpose(1, 0, 2)
    assert marginals == pytest.approx(position_marginals(w.logging, w.k), abs=1e-12)

# ---------------------------------------------------------------- identities
@st.composite
def logs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6))); shape = draw(st.integers(2, 200)), draw(st.integers(1, 5))
    return rng.normal(size=shape), rng.uniform(.1, 1, shape)/rng.uniform(.1, 1, shape), rng

@settings(deadline=None, max_examples=40)
@given(logs())
def test_identities(log):
    reward, weight, rng = log; (n, k), near = reward.shape, lambda x: pytest.approx(x, rel=1e-12, abs=1e-12)
    q, v, zero = rng.normal(size=(n, k)), rng.normal(size=(n, k)), np.zeros((n, k))
    for estimator in (sips, iips, rips):
        assert estimator(reward, np.ones((n, k)))[0] == near(reward.sum(1).mean())
        assert estimator(reward[:, :1], weight[:, :1])[0] == near(ips(reward[:, 0], weight[:, 0])[0])
        assert estimator(reward + 3, weight, normalised=True)[0] == pytest.approx(estimator(reward, weight, normalised=True)[0] + 3*k, abs=1e-11)
        value, influence = estimator(reward, weight); order = rng.permutation(n)
        assert influence.shape == (n,) and influence.mean() == pytest.approx(0, abs=1e-11) and estimator(reward[order], weight[order])[0] == near(value)
    assert cascade_dr(reward[:, :1], weight[:, :1], q[:, :1], v[:, :1])[0] == near(dr(reward[:, 0], weight[:, 0], q[:, 0], v[:, 0])[0])
    assert cascade_dr(reward, weight, zero, zero)[1] == near(rips(reward, weight)[1]) and cascade_dr(reward, weight, zero, zero)[0] == near(rips(reward, weight)[0])
    assert cascade_dr(reward, np.ones((n, k)), q, q)[0] == near(reward.sum(1).mean())
    assert sips(reward, weight)[0] == near(ips(reward.sum(1), weight[:, -1])[0])
    assert pseudo_inverse(reward[:, 0], product_weight(weight[:, :1]))[0] == near(ips(reward[:, 0], weight[:, 0])[0])
    assert pseudo_inverse(reward.sum(1), product_weight(np.ones((n, k))))[0] == near(reward.sum(1).mean())

def test_by_hand():
    reward, w = np.array([[1., 0, 1], [0, 1, 1]]), prefix_weight([[.5, .5, 1], [.2, .3, .5]], [[.25, .5, .5], [.4, .6, .5]])
    assert w.tolist() == [[2, 2, 4], [.5, .25, .25]]
    assert sips(reward, w)[0] == (8 + .5)/2 and rips(reward, w)[0] == (6 + .5)/2
    q, v = np.array([[.5, .5, .5], [.1, .2, .3]]), np.array([[.4, .4, .4], [.3, .2, .1]])
    rows = [.4 + 2*.5 + 2*.4 + 2*-.5 + 2*.4 + 4*.5, .3 + .5*-.1 + .5*.2 + .25*.8 + .25*.1 + .25*.7]
    assert cascade_dr(reward, w, q, v)[0] == pytest.approx(np.mean(rows), abs=1e-14)

def test_repeated_users_lengthen_the_interval():
    w = World(); i, reward = w.draw(np.random.default_rng(SEED), w.expected['cascade'], 300)
    for name, (_, influence) in estimates(w, w.expected['cascade'], i, reward).items():
        assert standard_error(np.repeat(influence, 8), np.repeat(np.arange(300), 8)) == pytest.approx(standard_error(influence), rel=1e-9), name
        assert standard_error(np.repeat(influence, 8)) < .4*standard_error(influence), name

# ---------------------------------------------------------------- refusals
P, ONE = np.full((4, 2), .5), np.ones((4, 2))
@pytest.mark.parametrize('call, says', [
    (lambda: prefix_weight(P, [[.5, 0], [.5, -1], [.5, .5], [.5, .5]]), 'propensity has 2 values <= 0; every logged action needs a positive propensity'),
    (lambda: position_weight(P, P*3), 'propensity has 8 values > 1'),
    (lambda: position_weight(P*3, P), r'target_prob has 8 values outside 0\.\.1'),
    (lambda: prefix_weight(P, P*np.nan), 'propensity has 8 values that are missing'),
    (lambda: prefix_weight(P, [[.5, .5], [.5], [.5, .5], [.5, .5]]), 'propensity is ragged'),
    (lambda: prefix_weight(pd.Series([[.5, .5], [.5]]), pd.Series([[.5, .5], [.5]])), 'target_prob is ragged'),
    (lambda: prefix_weight(P, P[:, :1]), r'propensity has shape \(4, 1\) and target_prob has \(4, 2\)'),
    (lambda: sips(ONE[:, 0], ONE[:, 0]), r'reward has shape \(4,\); it must be \(n, k\)'),
    (lambda: rips(ONE[:0], ONE[:0]), r'reward has shape \(0, 2\)'),
    (lambda: iips([['a', 1]], [[1, 1]]), 'reward is ragged or holds something that is no number'),
    (lambda: iips(ONE, ONE[:3]), r'weight has shape \(3, 2\) and reward has \(4, 2\)'),
    (lambda: rips(ONE, ONE*np.inf), 'weight has 8 values'),
    (lambda: cascade_dr(ONE, ONE, ONE, ONE[:, :1]), r'v_target has shape \(4, 1\)'),
    (lambda: pseudo_inverse(ONE[:, 0], ONE), r'weight has shape \(4, 2\); it must be \(n,\)'),
    (lambda: pseudo_inverse(ONE[:, 0], np.ones(3)), r'weight has shape \(3,\) and reward has \(4,\)'),
    (lambda: uniform_weight(P, P, 1), 'm is 1 and slates have 2 places'),
    (lambda: plackett_luce_weight([[0, 1]], np.ones((2, 3)), np.ones((2, 3))), 'logging has 2 rows and shown has 1'),
    (lambda: plackett_luce_weight([[0, 1]], [[1.]], [[1.]]), '2 places and 1 candidates'),
    (lambda: plackett_luce_weight([[0, 1, 2]], np.ones((1, 200)), np.ones((1, 200))), '3 places and 200 candidates'),
    (lambda: plackett_luce_weight([[0, 1]], [[1, 1, -1.]], [[1, 1, 1.]]), 'has 1 rows with weights below 0'),
    (lambda: plackett_luce_weight([[0, -1]], np.ones((1, 3)), np.ones((1, 3))), r'shown holds -1\.\.0'),
    (lambda: plackett_luce_weight([[0, 0]], np.ones((1, 3)), np.ones((1, 3))), 'shown has 1 slates that logging could not draw'),
    (lambda: plackett_luce_weight([[0, 2]], [[1, 1, 0.]], [[1, 1, 0.]]), 'shown has 1 slates that logging could not draw'),
    (lambda: plackett_luce_weight([[0, 1]], [[1, 1, 0.]], [[1, 1, 1.]]), 'puts items where the log could not show them'),
    (lambda: plackett_luce_weight([[0, 1]], [[1, 1, 1.]], [[1, 0, 0.]]), 'puts items where the log could not show them')])
def test_bad_input_is_refused_in_one_line(call, says):
    with pytest.raises(TelemetryError, match=says) as e: call()
    assert '\n' not in str(e.value) and str(e.value).count(';') >= 2
