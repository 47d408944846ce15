"Many: cluster weights, mixtures of loggers, bad tails and honest winners, each beside the plain method that fails."
import numpy as np, pandas as pd, pytest
from functools import partial
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import standard_error, wald
from telemetry_loop.many import balanced_ips, balanced_weight, choose_by_split, cluster_prob, clusters_of, cvar, mips, offcem, paired_difference, rank_correlation, regret_at_k, reward_quantile, sharpe_at_k, slope
from telemetry_loop.estimators import corrected, dm, dr, ips, snips
from telemetry_loop.support import support_verdict, widening
from telemetry_loop.train import Recommender
from slate_log import softmax

SEED, REPLICATIONS = 20261, 300 # declared once
COVER = (.9175, .98)            # 95 % within about 2.6 binomial standard errors
covers = lambda e, truth: e.ci_lower <= truth <= e.ci_upper
rmse = lambda error: np.sqrt(np.mean(np.square(error), axis=0))
noise = lambda error: np.std(error, axis=0, ddof=1)/np.sqrt(len(error)) # Monte Carlo standard error of the mean

class World:
    "1,000 items in 20 groups (topic and length), 3 kinds of user; logging almost even, the target has one favourite in each group."
    def __init__(self, direct=0.):
        taste, self.group, nth = np.random.default_rng(5).normal(size=(3, 10)), np.arange(1000) % 20, np.arange(1000) // 20
        self.topic, self.favourite = self.group // 2, nth == np.arange(3)[:, None]
        self.logging = softmax(.3*taste[:, self.topic]); self.target = softmax(.6*taste[:, self.topic] + 1.5*(self.group % 2) + 5.*self.favourite)
        self.earned = 1 + .6*taste[:, self.topic] + .8*(self.group % 2) + direct*self.favourite
        self.truth = (self.target*self.earned).sum(1).mean()
    def draw(self, rng, n=4000):
        kind, item = rng.integers(3, size=n), np.empty(n, int)
        for k in range(3): item[kind == k] = np.searchsorted(self.logging[k].cumsum(), rng.random((kind == k).sum())*self.logging[k].sum(), side='right')
        return kind, item, self.earned[kind, item] + .3*rng.normal(size=n), self.target[kind, item]/self.logging[kind, item]
    def pair(self, cluster, kind, item): # P(logged cluster) under target and logging
        each = [np.stack([np.bincount(cluster, weights=p) for p in policy])[kind, cluster[item]] for policy in (self.target, self.logging)]
        return each
    def bias(self, cluster): # of MIPS with these clusters, exactly
        one = np.eye(cluster.max() + 1)[cluster]; w = (self.target@one)/(self.logging@one)
        return (self.logging*w[:, cluster]*self.earned).sum(1).mean() - self.truth

@pytest.fixture(scope='module')
def thousand():
    "Logs of a thousand actions without a direct effect."
    world, rng = World(), np.random.default_rng(SEED)
    return world, [world.draw(rng) for _ in range(REPLICATIONS)]

def test_mips_on_a_thousand_actions(thousand):
    world, logs = thousand
    error = np.array([[ips(r, w)[0], mips(r, *world.pair(world.group, k, i))[0], mips(r, *world.pair(world.topic, k, i))[0]] for k, i, r, w in logs]) - world.truth
    assert (np.abs(error.mean(0)) <= 4*noise(error))[:2].all()
    assert rmse(error)[1] <= rmse(error)[0]/5
    assert error.mean(0)[2] < -10*noise(error)[2] and error.mean(0)[2] == pytest.approx(world.bias(world.topic), abs=4*noise(error)[2])  # the relevant part of the embedding dropped
    own = [wald(v, standard_error(f), len(f)) for v, f in (mips(r, *world.pair(world.topic, k, i)) for k, i, r, w in logs)]
    assert np.mean([covers(e, world.truth) for e in own]) < .1  # and its own interval says nothing of it
    right = [wald(v, standard_error(f), len(f)) for v, f in (mips(r, *world.pair(world.group, k, i)) for k, i, r, w in logs)]
    assert COVER[0] <= np.mean([covers(e, world.truth) for e in right]) <= COVER[1]

def test_a_dropped_embedding_is_reported():
    world, rng, found = World(), np.random.default_rng(SEED), []
    for _ in range(200):
        k, i, r, w = world.draw(rng, 20_000); wide = widening(support_verdict(w))
        found.append([paired_difference(mips(r, *world.pair(c, k, i)), snips(r, w), wide=wide) for c in (world.group, world.topic)])
    assert np.mean([dropped.ci_upper < 0 for _, dropped in found]) >= .95
    assert COVER[0] - .01 <= np.mean([covers(dropped, world.bias(world.topic)) for _, dropped in found])
    assert np.mean([not covers(right, 0) for right, _ in found]) <= .085                    # no alarm where there is no bias

def test_a_bias_is_not_claimed_where_the_log_cannot_tell():
    world = World(); k, i, r, w = world.draw(np.random.default_rng(SEED), 500)
    support = support_verdict(w); assert support.verdict == 'refuse'
    e = paired_difference(mips(r, *world.pair(world.topic, k, i)), snips(r, w), wide=widening(support))
    assert e.ci_lower is None and e.value is not None

def test_paired_difference_is_the_difference_of_influences_by_user():
    rng = np.random.default_rng(SEED); r = np.repeat(rng.normal(size=300), 8); w = np.repeat(rng.exponential(size=300), 8)
    alone, together = (paired_difference(ips(r, w), ips(r, np.ones(2400)), c) for c in (None, np.repeat(np.arange(300), 8)))
    assert alone.value == pytest.approx(np.mean((w - 1)*r)) and alone.ci_upper - alone.value == pytest.approx(1.959964*standard_error((w - 1)*r))
    assert together.ci_upper - together.value > 2.7*(alone.ci_upper - alone.value)
    same = paired_difference(ips(r, w), ips(r, w)); assert (same.value, same.ci_lower, same.ci_upper) == (0, 0, 0)

# ---------------------------------------------------------------- OffCEM
def test_offcem_where_items_of_a_cluster_differ():
    world, rng = World(direct=.8), np.random.default_rng(SEED)
    right = world.earned - 2*(world.group % 3)                        # wrong about every group, right within
    wrong = right - .8*world.favourite                                # wrong within
    def answers(k, i, r, w):
        pair = world.pair(world.group, k, i); model = lambda q: (q[k, i], (world.target*q).sum(1)[k])
        return [offcem(r, *pair, *model(right))[0], dr(r, w, *model(right))[0], mips(r, *pair)[0], dm(model(right)[1])[0], offcem(r, *pair, *model(wrong))[0]]
    error = np.array([answers(*world.draw(rng)) for _ in range(REPLICATIONS)]) - world.truth
    z, spread = np.abs(error.mean(0))/noise(error), error.std(0)
    assert z[0] <= 4 and z[1] <= 4 and (z[2:] > 10).all()
    assert spread[0] < spread[1]/3

# ---------------------------------------------------------------- identities
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(2, 12))
def test_identities(seed, n, actions):
    rng = np.random.default_rng(seed); near = lambda x: pytest.approx(x, abs=1e-12, rel=1e-12)
    p, t, a, r, q, v = rng.dirichlet(np.full(actions, 5.), n), rng.dirichlet(np.ones(actions), n), rng.integers(actions, size=n), rng.normal(size=n), rng.normal(size=n), rng.normal(size=n)
    row, every = np.repeat(np.arange(n), actions), np.tile(np.arange(actions), n); i = np.arange(n)
    alone = [cluster_prob(x.ravel(), every, row, a) for x in (t, p)]  # every action a cluster of its own
    assert alone[0] == near(t[i, a]) and mips(r, *alone)[0] == near(ips(r, t[i, a]/p[i, a])[0]) and mips(r, *alone)[1] == near(ips(r, t[i, a]/p[i, a])[1])
    assert offcem(r, *alone, q, v)[0] == near(dr(r, t[i, a]/p[i, a], q, v)[0]) and offcem(r, *alone, 0*q, 0*v)[0] == near(mips(r, *alone)[0])
    assert mips(r, *[cluster_prob(x.ravel(), 0*every, row, 0*a) for x in (t, p)])[0] == near(r.mean())  # one cluster: the plain mean
    name = rng.integers(3, size=actions)                              # summed by hand
    assert cluster_prob(t.ravel(), name[every], row, name[a]) == near([(t[j]*(name == name[a[j]])).sum() for j in range(n)])
    order = rng.permutation(len(row)); assert cluster_prob(t.ravel()[order], name[every][order], row[order], name[a]) == near(cluster_prob(t.ravel(), name[every], row, name[a]))
    assert balanced_ips(r, t[i, a], p[i, a][:, None], 0*a)[0] == near(ips(r, t[i, a]/p[i, a])[0])       # one logger
    both = np.stack([p[i, a]]*2, 1); assert balanced_ips(r, t[i, a], both, rng.integers(2, size=n))[0] == near(ips(r, t[i, a]/p[i, a])[0])
    w = t[i, a]/p[i, a]; assert cvar(r + 3, w, .3)[0] == pytest.approx(cvar(r, w, .3)[0] + 3, abs=1e-9) and cvar(r, w, .3)[0] == pytest.approx(cvar(r, 7*w, .3)[0], abs=1e-9)

# ---------------------------------------------------------------- clusters of vectors
def test_clusters_of_vectors():
    rng = np.random.default_rng(SEED); group = rng.integers(12, size=600); centre = rng.normal(size=(12, 8))
    vectors = centre[group] + .02*rng.normal(size=(600, 8)); found = clusters_of(vectors, 12, seed=3)
    assert len({(a, b) for a, b in zip(found, group)}) == 12 and found.max() == 11
    assert np.array_equal(found, clusters_of(vectors, 12, seed=3)) and len(np.unique(clusters_of(vectors, 600, seed=3))) == 600 and (clusters_of(vectors, 1, seed=3) == 0).all()
    with pytest.raises(TelemetryError, match='k is 601 for 600 items'): clusters_of(vectors, 601, seed=3)
    with pytest.raises(TelemetryError, match='1 values that are no finite numbers'): clusters_of(np.array([[1., np.nan], [0., 1.]]), 2, seed=3)

def test_the_number_of_clusters_is_set_by_the_data(thousand):
    world, logs = thousand
    vectors = np.c_[np.eye(10)[world.topic], world.group % 2, .3*world.favourite.T]; cuts = {k: clusters_of(vectors, k, seed=3) for k in (50, 20, 10, 2)} | {1000: np.arange(1000)}
    tuned = [slope(lambda c: mips(r, *world.pair(cuts[c], k, i)), [1000, 50, 20, 10, 2]) for k, i, r, w in logs[:60]]
    assert rmse([t.value - world.truth for t in tuned]) < rmse([ips(r, w)[0] - world.truth for k, i, r, w in logs[:60]])/3
    assert np.mean([t.setting in (50, 20) for t in tuned]) > .5

def test_paired_slope_sees_bias_that_shared_luck_hides():
    "Light weights and moods that differ between people: separate intervals overlap, their difference does not; without bias both agree."
    rng = np.random.default_rng(SEED); n = 4000; item = rng.integers(8, size=n); t = np.where(np.arange(8) < 4, .2, .05)
    for direct, paired, plain in ((1., 8, 2), (0., 2, 2)):
        r = 5*rng.normal(size=n//10)[np.arange(n)//10] + 2*(item % 2) + direct*(item < 4); w = {8: t[item]*8, 2: np.ones(n)}
        found = [slope(lambda k: corrected(r - r.mean(), w[k]), [8, 2], np.arange(n)//10, paired=p).setting for p in (True, False)]
        assert found == [paired, plain], found

# ---------------------------------------------------------------- several loggers
WRITERS, WANTED, PAYS = np.array([[.97, .02, .01], [.05, .15, .8]]), np.array([.1, .2, .7]), np.array([.2, .5, .9])
def written(rng, n=2000):
    logger = np.arange(n) % 2; a = (WRITERS[logger].cumsum(1) > rng.random((n, 1))).argmax(1)
    return (rng.random(n) < PAYS[a])*1., WANTED[a], WRITERS.T[a], logger

def test_balanced_over_two_loggers():
    rng, truth = np.random.default_rng(SEED), WANTED@PAYS
    logs = [written(rng) for _ in range(1000)]
    naive, balanced = np.array([ips(r, t/p[np.arange(2000), l])[0] for r, t, p, l in logs]) - truth, np.array([balanced_ips(*log)[0] for log in logs]) - truth
    assert abs(naive.mean()) <= 4*noise(naive) and abs(balanced.mean()) <= 4*noise(balanced)
    assert balanced.std() <= naive.std()/3
    swapped = np.array([ips(r, t/p[np.arange(2000), 1 - l])[0] for r, t, p, l in logs]) - truth          # policy versions swapped: what naive IPS cannot survive
    assert abs(swapped.mean()) > 10*noise(swapped)
    shares = [wald(v, standard_error(f), 2000) for v, f in (balanced_ips(*log) for log in logs)]
    assert np.mean([covers(e, truth) for e in shares]) >= .93
    naive_shares = [wald(v, standard_error(f), 2000) for v, f in (ips(r, t/p[np.arange(2000), l]) for r, t, p, l in logs)]
    assert np.mean([e.ci_upper - e.ci_lower for e in naive_shares]) > 3*np.mean([e.ci_upper - e.ci_lower for e in shares])

def test_balanced_weights_average_one_with_unequal_shares():
    rng = np.random.default_rng(SEED); logger = (rng.random(200_000) < .9)*1
    a = (WRITERS[logger].cumsum(1) > rng.random((200_000, 1))).argmax(1)
    assert balanced_weight(WANTED[a], WRITERS.T[a], logger).mean() == pytest.approx(1, abs=.01)
    assert abs((WANTED[a]/WRITERS.T[a].mean(1)).mean() - 1) > .05    # equal shares, where nine tenths are one policy's

def test_a_policy_that_follows_another_has_a_mixture_of_its_own_time():
    "The second week pays more and is another policy's: one mixture for both is wrong, one a week is IPS of the policy that wrote."
    rng = np.random.default_rng(SEED); week = np.arange(40_000) // 20_000
    a = (WRITERS[week].cumsum(1) > rng.random((40_000, 1))).argmax(1); r = PAYS[a] + week
    of = lambda **by: balanced_ips(r, WANTED[a], WRITERS.T[a], week, **by)
    own = ips(r, WANTED[a]/WRITERS[week, a])
    assert of(group=week)[0] == pytest.approx(own[0], rel=1e-12) and abs(own[0] - (WANTED@PAYS + .5)) < 4*standard_error(own[1])
    assert abs(of()[0] - (WANTED@PAYS + .5)) > 10*standard_error(of()[1])
    assert of(group=0*week)[0] == of()[0]

@pytest.mark.parametrize('change, says', [
    (dict(propensity=np.full(4, .5)), 'propensity has shape'), (dict(logger=[0, 1]), r'logger \(2,\) for 4 rows'),
    (dict(logger=[0, 1, 2, -1]), r'logger has 2 values outside 0\.\.1'), (dict(propensity=[[.5, 1.5]]*4), 'propensity has 4 values outside'),
    (dict(propensity=[[np.nan, .5]]*4), 'propensity has 4 values outside'), (dict(propensity=[[0, .5]]*4), 'propensity has 2 values of 0 for the policy that wrote the row')])
def test_bad_loggers_are_refused_in_one_line(change, says):
    with pytest.raises(TelemetryError, match=says) as e: balanced_weight(**(dict(target_prob=np.full(4, .5), propensity=np.full((4, 2), .5), logger=[0, 1, 0, 1]) | change))
    assert '\n' not in str(e.value) and str(e.value).count(';') >= 2

# ---------------------------------------------------------------- the bad tail
MEANS, SPREADS = np.random.default_rng(4).normal(size=(2, 10)); SPREADS = .3 + np.abs(SPREADS)
TILT = softmax(1.2*np.random.default_rng(6).normal(size=(1, 10)))[0]
def tail_log(rng, n=2000):
    a = rng.integers(10, size=n); return MEANS[a] + SPREADS[a]*rng.normal(size=n), 10*TILT[a]

def test_tail_intervals_cover():
    rng = np.random.default_rng(SEED); a = rng.choice(10, 2_000_000, p=TILT); lived = np.sort(MEANS[a] + SPREADS[a]*rng.normal(size=len(a)))
    logs = [tail_log(rng) for _ in range(500)]
    for at in (.1, .5, .9):
        true_q, true_c = lived[int(at*len(lived))], lived[:int(at*len(lived))].mean()
        quantiles = [reward_quantile(r, w, at) for r, w in logs]
        tails = [wald(v, standard_error(f), len(f)) for v, f in (cvar(r, w, at) for r, w in logs)]
        assert COVER[0] <= np.mean([covers(e, true_q) for e in quantiles]) <= COVER[1], at
        assert COVER[0] <= np.mean([covers(e, true_c) for e in tails]) <= COVER[1], at
        plain = [wald(v, standard_error(f), len(f)) for v, f in (cvar(r, np.ones_like(r), at) for r, w in logs)]
        assert np.mean([covers(e, true_c) for e in plain]) < .6, at   # the log's own tail is another policy's
    fixed = [wald(cvar(r, w, .1)[0], np.std(w*r*(r <= reward_quantile(r, w, .1).value)/.1)/np.sqrt(len(r)), len(r)) for r, w in logs]
    assert np.mean([e.ci_upper - e.ci_lower for e in fixed]) > 1.2*np.mean([2*1.96*standard_error(cvar(r, w, .1)[1]) for r, w in logs])

def test_the_mean_hides_what_the_tail_shows():
    rng, found = np.random.default_rng(SEED), []
    for _ in range(200):
        bold = rng.integers(2, size=2000); r = np.where(bold == 1, np.where(rng.random(2000) < .1, -1.25, 1.25), 1.) + .1*rng.normal(size=2000)
        calm, brave = np.array([.9, .1])[bold]/.5, np.array([.1, .9])[bold]/.5
        found.append([paired_difference(f(r, brave), f(r, calm)) for f in (snips, partial(cvar, at=.1))])
    assert np.mean([covers(m, 0) for m, _ in found]) > .9 and all(t.ci_upper < 0 for _, t in found)

def test_known_tails():
    r = np.random.default_rng(SEED).permutation(np.arange(1., 101.)); one = np.ones(100)
    assert cvar(r, one, .1)[0] == pytest.approx(5.5) and cvar(r, one, .105)[0] == pytest.approx((55 + .5*11)/10.5)   # half of the eleventh
    assert cvar(r, (r > 50)*1., .1)[0] == pytest.approx(53) and reward_quantile(r, one, .1).value == 10 and reward_quantile(r, (r > 50)*1., .5).value == 75
    assert cvar(np.repeat(r, 3), np.ones(300), .1)[0] == pytest.approx(cvar(r, 3*one, .1)[0]) and cvar(r, one, .1)[1].mean() == pytest.approx(0, abs=1e-9)
    assert cvar((r <= 4)*-1., one, .1)[0] == pytest.approx(-.4)       # ties: the worst tenth holds four of the four bad rows
    e = reward_quantile(r, one, .01); assert e.value == 1 and e.ci_lower is None and reward_quantile(r, one, .1, wide=None).ci_lower is None
    users = np.repeat(np.arange(50), 2); wide = lambda e: e.ci_upper - e.ci_lower
    assert wide(reward_quantile(np.repeat(r[:50], 2), one, .5, users)) > wide(reward_quantile(np.repeat(r[:50], 2), one, .5))
    for at in (0, 1, 1.5, -1):
        with pytest.raises(TelemetryError, match=f'at is {at}; it is a part'): cvar(r, one, at)

# ---------------------------------------------------------------- judges of candidates
def test_known_judgements():
    true = [1., 2., 3., 4., 10.]
    assert [regret_at_k(e, true, 2) for e in (true, [5, 4, 3, 2, 1], [0, 0, 0, 9, 8])] == [0, 8, 0] and regret_at_k([5, 4, 3, 2, 1], true, 5) == 0
    assert sharpe_at_k(true, true, 3, 2.) == pytest.approx(8/np.std([3, 4, 10])) and sharpe_at_k([9, 0, 0, 0, 8], true, 2, 2.) == pytest.approx(8/4.5)
    assert sharpe_at_k([9, 8, 0, 0, 0], true, 2, 2.5) < 0 and np.isnan(sharpe_at_k([2, 1], [3, 3], 2, 0.)) and np.isnan(rank_correlation([1, 1], [1, 2]))
    assert rank_correlation(true, true) == pytest.approx(1) and rank_correlation([-t for t in true], true) == pytest.approx(-1) and rank_correlation([1, 2, 3, 5, 4], true) == pytest.approx(.9)
    for k, f in ((0, regret_at_k), (6, regret_at_k), (1, partial(sharpe_at_k, logging=0.))):
        with pytest.raises(TelemetryError, match=f'k is {k} for 5 candidates'): f(true, true, k)
    for bad in ([1., 2.], [1., 2., 3., np.nan, 5.]):
        with pytest.raises(TelemetryError, match='they describe the same candidates'): regret_at_k(bad, true, 2)

def test_a_noisy_judge_ranks_worse():
    rng = np.random.default_rng(SEED); true = rng.normal(size=(200, 20))
    good, bad = true + .3*rng.normal(size=true.shape), true + 3*rng.normal(size=true.shape)
    mean = lambda f, e: np.mean([f(a, b) for a, b in zip(e, true)])
    assert mean(rank_correlation, good) > .9 > .5 > mean(rank_correlation, bad)
    assert mean(lambda a, b: regret_at_k(a, b, 3), good) < .1 < mean(lambda a, b: regret_at_k(a, b, 3), bad)
    assert mean(lambda a, b: sharpe_at_k(a, b, 3, 0.), good) > 2*mean(lambda a, b: sharpe_at_k(a, b, 3, 0.), bad)

# ---------------------------------------------------------------- the winner's curse
def twenty(rng, better=0., n=800):
    "Twenty targets over ten actions; name -> gain over logging. Nothing depends on the action, but the last target's favourite may be better."
    targets, action = rng.dirichlet(np.ones(10), 20), rng.integers(10, size=n); targets[19] = np.r_[.91, np.full(9, .01)]
    reward = rng.random(n) + better*(action == 0)
    def gain(t): return lambda rows: corrected(reward[rows], 10*t[action[rows]] - 1)
    return {i: gain(t) for i, t in enumerate(targets)}

def test_the_best_of_twenty_equals():
    rng, everyone, same, split = np.random.default_rng(SEED), np.ones(800, bool), [], []
    for s in range(600):
        candidates = twenty(rng); value, influence = max((f(everyone) for f in candidates.values()), key=lambda found: found[0])
        same.append(wald(value, standard_error(influence), 800)); split.append(choose_by_split(candidates, np.arange(800), s))
    promoted = lambda estimates: np.mean([e.ci_lower > 0 for e in estimates])
    assert promoted(same) > .12 and promoted([c.value for c in split]) <= .06
    inflated, honest, hoped = np.array([e.value for e in same]), np.array([c.value.value for c in split]), np.array([c.hoped for c in split])
    assert inflated.mean() > 10*noise(inflated) and hoped.mean() > 10*noise(hoped) and abs(honest.mean()) <= 4*noise(honest)
    assert COVER[0] <= np.mean([covers(c.value, 0) for c in split]) <= COVER[1]

def test_a_better_candidate_is_found_and_promoted():
    rng = np.random.default_rng(SEED); found = [choose_by_split(twenty(rng, better=1.), np.arange(800), s) for s in range(100)]
    assert np.mean([c.name == 19 and c.value.ci_lower > 0 for c in found]) >= .8
    assert found[0].all.columns.tolist() == ['name', 'chosen_on'] and found[0].all.name[0] == found[0].name and found[0].all.chosen_on.is_monotonic_decreasing

def test_nobody_is_in_both_halves():
    rng, seen = np.random.default_rng(SEED), []; user = rng.integers(40, size=400); x = rng.normal(size=400)
    def candidate(rows): seen.append(rows); return corrected(x[rows], np.ones(rows.sum()))
    c = choose_by_split({'a': candidate}, user, 1)
    first, second = seen
    assert not set(user[first]) & set(user[second]) and (first ^ second).all() and .3 < first.mean() < .7
    assert c.value.value == pytest.approx(x[second].mean()) and c.hoped == pytest.approx(x[first].mean())
    half = 1.959964*standard_error(x[second] - x[second].mean(), user[second]); assert c.value.ci_upper == pytest.approx(c.value.value + half)
    assert choose_by_split({'a': candidate}, user, 1).value == c.value and choose_by_split({'a': candidate}, user, 2).value != c.value
    assert choose_by_split({'a': candidate}, user, 1, wide=None).value.ci_lower is None
    with pytest.raises(TelemetryError, match='candidates has 0 entries'): choose_by_split({}, user, 1)

def test_the_vectors_of_a_trained_model_tell_which_items_stand_in_for_which(tiny_run):
    "The first place of the small product's slates, from the weights that were logged: like items vouch for each other, the answer stays and its error falls."
    read = lambda name: pd.read_parquet(tiny_run/'artifacts'/name)
    bundle, would = Recommender.load(tiny_run/'artifacts/train'), read('policy/candidates.parquet').query('position == 0')
    d = read('sessions/decisions').merge(would[['decision_id']].drop_duplicates(), on='decision_id')
    each = d[['decision_id', 'candidates', 'weights']].explode(['candidates', 'weights']).rename(columns={'candidates': 'item_id'}).merge(would, on=['decision_id', 'item_id'])
    kind = dict(zip(bundle.items, clusters_of(bundle.model.table().detach().numpy(), 8, SEED)))
    row, cluster = pd.Series(range(len(d)), d['decision_id'])[each['decision_id']].to_numpy(), each['item_id'].map(kind).to_numpy()
    reward, item, user = d['reward'].str[0].to_numpy(float), d['slate'].str[0], d['user_id'].to_numpy()
    mine, n = (each['item_id'].to_numpy() == item.to_numpy()[row]), len(d)
    p, target = (np.bincount(row[mine], each[name][mine].astype(float), n) for name in ('weights', 'target_prob'))
    assert np.allclose(p, d['propensities'].str[0].astype(float), rtol=1e-8)
    of = lambda name: cluster_prob(each[name].to_numpy(float), cluster, row, item.map(kind).to_numpy())
    plain, like = ips(reward, target/p), mips(reward, of('target_prob'), of('weights'))
    apart, one = paired_difference(like, plain, user), standard_error(plain[1], user)
    assert standard_error(like[1], user) < .9*one and abs(apart.value) < 3*one and plain[0] > reward.mean() + 2*one
