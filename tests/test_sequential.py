"Sequential: bands that hold at all times where the usual interval fails in the same harness."
import time
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats
from scipy.optimize import brentq
from scipy.special import ndtr
from telemetry_loop import sequential
from telemetry_loop.config import TelemetryError
from telemetry_loop.sequential import (BURN_IN, METHODS, PSI, STAKES, always_valid_p, boundaries, crossing, gain_sequence, judge_checkpoints, limits_so_far, lower_sequence, mixture,
    plot_peeks, spending, srm_sequence, value_sequence)

SEED, STREAMS, STEPS = 20261, 1000, 3000   # declared once
PAYS, EVEN = np.array([.5, .6]), .55

def thompson(plays, wins, t):
    "P(second arm) of a Thompson sampler with some exploration."
    explore, means = max(.05, (t + 1)**(-1/3)), wins/plays
    return (1 - explore)*ndtr((means[:, 1] - means[:, 0])/np.sqrt((.25/plays).sum(1))) + explore/2

def greedy(plays, wins, t):
    "P(second arm) of a greedy policy whose exploration decays."
    explore, means = max(.1, (t + 1)**-.5), wins/plays
    return (1 - explore)*(means[:, 1] > means[:, 0]) + explore/2

def adaptive(policy, pays=lambda t: PAYS, streams=STREAMS, seed=SEED):
    "(streams, steps) reward, weight of an even target, and what target and logging policy were expected to earn at each step."
    rng, who = np.random.default_rng(seed), np.arange(streams)
    plays, wins = np.ones((streams, 2)), np.full((streams, 2), .5)
    reward, weight, target, logged = np.zeros((4, STEPS, streams))
    for t in range(STEPS):
        second = policy(plays, wins, t); arm = (rng.random(streams) < second)*1; like = pays(t)
        reward[t], weight[t] = rng.random(streams) < like[arm], .5/np.where(arm == 1, second, 1 - second)
        target[t], logged[t] = like.mean(), (1 - second)*like[0] + second*like[1]
        plays[who, arm] += 1; wins[who, arm] += reward[t]
    return reward.T, weight.T, target.T, logged.T

average = lambda x: x.cumsum(1)/np.arange(1, x.shape[1] + 1)

def naive(x):
    "Mean and half width of the usual interval at every step."
    m = average(x)
    return m, 1.96*np.sqrt((average(x**2) - m**2)/np.arange(1, x.shape[1] + 1))

def ever_wrong(bands, truth): return np.mean([((b.lower > t) | (b.upper < t)).any() for b, t in zip(bands, truth)])
width = lambda b, t=-1: b.upper[t] - b.lower[t]

@pytest.fixture(scope='module', params=[thompson, greedy], ids=['thompson', 'greedy'])
def study(request): return adaptive(request.param)

def test_value_at_all_times_and_the_usual_interval_in_the_same_harness(study):
    reward, weight, target, _ = study
    bands = [value_sequence(r, w) for r, w in zip(reward, weight)]
    assert ever_wrong(bands, average(target)) <= .05
    m, half = naive(weight*reward); wrong = np.abs(m - EVEN) > half
    assert wrong[:, 299::300].any(1).mean() > .2 and wrong[:, 99:].any(1).mean() > .4      # ten looks; every step
    assert 1 < np.median([width(b) for b in bands]/(2*half[:, -1])) <= 3

def test_gain_at_all_times_against_a_policy_that_changes(study):
    reward, weight, target, logged = study
    bands = [gain_sequence(r, w) for r, w in zip(reward, weight)]
    assert ever_wrong(bands, average(target - logged)) <= .05
    assert np.mean([b.upper[-1] < 0 for b in bands]) > .05 or np.median([width(b) for b in bands]) < .3    # it says something

def test_the_band_follows_an_average_that_moves():
    reward, weight, target, _ = adaptive(thompson, lambda t: np.array([.2, .3]) + .5*(t > 1000), 300)
    bands = [value_sequence(r, w) for r, w in zip(reward, weight)]
    assert ever_wrong(bands, average(target)) <= .05
    assert np.mean([b.lower[-1] > .25 + .05 for b in bands]) > .9                          # it left the old value behind

def test_weights_cut_beforehand_keep_both_bounds_and_the_clipped_estimate_keeps_nothing():
    reward, weight, target, _ = adaptive(thompson, lambda t: np.array([.9, .2]), 300)
    bands = [value_sequence(r, w, cut=1.5) for r, w in zip(reward, weight)]
    assert ever_wrong(bands, average(target)) <= .05
    m, half = naive(np.minimum(weight, 1.5)*reward)
    assert (np.abs(m - .55) > half)[:, -1].mean() > .9
    r, w = reward[0], weight[0]
    assert np.array_equal(value_sequence(r, w, cut=w.max()).lower, value_sequence(r, w).lower)
    floored = w.copy(); floored[1500] = 1e6
    assert width(value_sequence(r, floored, cut=20.)) < 1.2*width(value_sequence(r, w)) and width(value_sequence(r, floored)) > .5

def test_weights_without_a_variance():
    rng = np.random.default_rng(SEED); a = 1.5
    weight = (rng.pareto(a, (500, STEPS)) + 1)*(a - 1)/a                                   # mean 1, infinite variance
    reward = (rng.random(weight.shape) < .5)*1.
    assert ever_wrong([value_sequence(r, w) for r, w in zip(reward, weight)], np.full((500, 1), .5)) <= .05
    m, half = naive(weight*reward)
    assert (np.abs(m - .5) > half)[:, -1].mean() > .07                                     # even one look is one too many

def test_bounded_means_peeked_at_and_power():
    rng = np.random.default_rng(SEED)
    null, better = (rng.random((1000, STEPS)) < .5)*1., (rng.random((200, STEPS)) < .6)*1.
    assert np.mean([value_sequence(x).first_above(.5) is not None for x in null]) <= .025
    stops = [value_sequence(x).first_above(.5) for x in better]
    assert all(stops) and np.median(stops) < 700
    m, half = naive(null)
    assert (m - half > .5)[:, 20:].any(1).mean() > .2                                      # one-sided, every step

def test_boundary_is_where_the_mixture_reaches_one_over_alpha():
    for alpha in (.025, .005):
        v, s = sequential._boundary(alpha)
        assert (np.diff(s) > 0).all() and (np.diff(v) > 0).all()
        wealth = np.exp(STAKES*s[:, None] - PSI*v[:, None] - np.log(len(STAKES))).sum(1)
        assert wealth == pytest.approx(1/alpha, rel=1e-9)
    v, s = sequential._boundary(.025)
    for at in (1e2, 1e4, 1e6, 1e8): assert s[np.searchsorted(v, at)] < 2.05*1.96*np.sqrt(at)

def test_each_bound_is_the_claim_at_which_the_bettor_is_rich():
    "Row by row, in plain loops: guesses made before the row and never above 1, one bettor for each stake."
    rng = np.random.default_rng(SEED)
    for x in (rng.random(300), 3*rng.exponential(size=300), np.r_[1., np.zeros(50)]):      # the second is above 1 on average
        lower, alpha, squares, guess = lower_sequence(x, 0., 1., .025), .025, [], .5
        for t in range(len(x)):
            squares.append((x[t] - guess)**2); guess = min((.5 + x[:t+1].sum())/(t + 2), 1)
            if t not in (0, 1, 9, 50, 299): continue
            rich = lambda claim: np.mean([np.exp(min(b*(x[:t+1] - claim).sum() - psi*sum(squares), 600)) for b, psi in zip(STAKES, PSI)]) - 1/alpha
            exact = brentq(rich, -100, x[:t+1].mean())
            assert exact - .01*(x[:t+1].mean() - exact) <= lower[t] <= exact + 1e-9, t

def test_wealth_of_a_true_claim_does_not_grow():
    "The inequality behind it all: E exp(b (y - m) - psi(b) (y - c)^2) <= 1 for y >= 0, any guess c <= 1."
    rng = np.random.default_rng(SEED)
    for y in (rng.random(200_000) < .3, rng.exponential(.5, 200_000), 10*(rng.random(200_000) < .02)):
        for c in (0., .3, 1.):
            growth = np.exp(np.outer(STAKES[::6], y - y.mean()) - np.outer(PSI[::6], (y - c)**2)).mean(1)
            assert (growth <= 1 + 1e-9).all()

def test_no_row_sees_the_future():
    rng = np.random.default_rng(SEED); r, w = rng.random(500), rng.exponential(size=500)
    other = np.r_[r[:200], 1 - r[200:]], np.r_[w[:200], w[:199:-1]]
    for kind in (value_sequence, gain_sequence):
        a, b, short = kind(r, w), kind(*other), kind(r[:200], w[:200])
        for name in ('value', 'lower', 'upper'):
            assert np.array_equal(getattr(a, name)[:200], getattr(b, name)[:200]) and np.array_equal(getattr(a, name)[:200], getattr(short, name))
            assert not np.array_equal(getattr(a, name), getattr(b, name))

def test_a_range_is_a_unit():
    rng = np.random.default_rng(SEED); r, w = rng.random(400), rng.exponential(size=400)
    for kind, shift in ((value_sequence, -5), (gain_sequence, 0)):
        a, b = kind(r, w), kind(10*r - 5, w, low=-5, high=5)
        for name in ('lower', 'upper'): assert getattr(b, name) == pytest.approx(10*getattr(a, name) + shift, abs=1e-9)
    assert value_sequence(10*r - 5, w, -5, 5).value[-1] == pytest.approx(np.mean(w*(10*r - 5))) and value_sequence(r).value[-1] == pytest.approx(r.mean())
    assert gain_sequence(r, w, -1, 1).value[-1] == pytest.approx(np.mean((w - 1)*r))      # the middle of the range is 0

def test_mirrored_rewards_mirror_the_band():
    rng = np.random.default_rng(SEED); r, w = rng.random(400), rng.exponential(size=400)
    a, b = value_sequence(r, w), value_sequence(1 - r, w)
    assert b.lower == pytest.approx(1 - a.upper) and b.upper == pytest.approx(1 - a.lower)
    assert (a.lower >= 0).all() and (a.upper <= 1).all() and (a.lower <= a.upper).all()
    same = gain_sequence(r, np.ones(400))
    assert (same.value == 0).all() and same.lower[-1] < 0 < same.upper[-1]

def test_at_and_first_above():
    s = value_sequence(np.ones(200)); e = s.at(200)
    assert (e.value, e.ci_lower, e.ci_upper, e.n) == (1, s.lower[-1], 1, 200)
    t = s.first_above(.5)
    assert s.at(t).ci_lower > .5 >= s.at(t - 1).ci_lower and s.first_above(1.) is None
    for t in (0, 201, -1):
        with pytest.raises(TelemetryError, match=f't is {t}; the sequence has 200 rows'): s.at(t)

def test_plot_and_words():
    import matplotlib; matplotlib.use('Agg')
    s = value_sequence(np.random.default_rng(SEED).random(1000)); ax = s.plot(ylabel='reward', reference=.5)
    assert ax.get_ylabel() == 'reward' and len(ax.lines) == 2 and 'valid at all times (95%)' in s._repr_markdown_()

def test_halved_propensities_contradict_themselves(study):
    reward, weight, _, _ = study
    for r, w in zip(reward[:20], weight):
        for kind in (value_sequence, gain_sequence):
            with pytest.raises(TelemetryError, match='weight contradicts itself: .* the logged propensities are not'): kind(r, 2*w)

@pytest.mark.parametrize('change, says', [
    (dict(reward=[0, 1.5, -1, 1]), r'reward has 2 values outside 0\.\.1; the band is only valid'),
    (dict(reward=[0, np.nan, 1, 1]), 'reward has 1 values outside'),
    (dict(reward=[0, 1, 1, 6.], low=-5, high=5), r'reward has 1 values outside -5\.\.5'),
    (dict(reward=[]), 'reward has 0 values'),
    (dict(weight=[1, -1, np.inf, 1]), 'weight has 2 values that are negative'),
    (dict(weight=[1, 1]), 'weight has 2 values and reward has 4'),
    (dict(low=1), 'low must be below high'),
    (dict(level=95), 'level is 95; it is a probability'),
    (dict(cut=0), 'cut has values not above 0'),
    (dict(cut=[1., 2.]), 'cut has 2 values and reward has 4')])
@pytest.mark.parametrize('kind', [value_sequence, gain_sequence])
def test_bad_input_is_refused_in_one_line(kind, change, says):
    with pytest.raises(TelemetryError, match=says) as e: kind(**(dict(reward=[0, 1, 1, 0], weight=np.ones(4)) | change))
    assert '\n' not in str(e.value) and str(e.value).count(';') >= 2

def test_a_million_rows_are_cheap():
    rng = np.random.default_rng(SEED); r, w = rng.random(1_000_000), rng.exponential(size=1_000_000)
    begun = time.process_time(); value_sequence(r, w); assert time.process_time() - begun < 2  # about .15 s

def test_a_poor_guess_costs_length_only():
    x = (np.random.default_rng(SEED).random((300, 2000)) < .9)*1.
    assert np.mean([(lower_sequence(r, -1., 1., .025) > .9).any() for r in x]) <= .025      # guesses end at 0, the mean is .9

# --- experiments: what peeking does, and what survives it

even = lambda looks: np.arange(1, looks + 1)/looks
PLAIN = 1.959964

def arms(runs, units, draw, seed=SEED):
    "(runs, units/2) running difference of two arms that take turns, its standard error, units so far."
    rng, k = np.random.default_rng(seed), np.arange(1, units//2 + 1); parts = []
    for _ in range(2):
        x = draw(rng, (runs, units//2)); m = x.cumsum(1)/k
        parts.append((m, np.maximum((x**2).cumsum(1)/k - m**2, 0)/np.maximum(k - 1, 1)))
    return parts[1][0] - parts[0][0], np.sqrt(parts[0][1] + parts[1][1]), 2*k

@pytest.mark.parametrize('draw', [lambda r, s: r.normal(size=s), lambda r, s: r.exponential(size=s), lambda r, s: (r.random(s) < .05)*1., lambda r, s: np.exp(1.5*r.normal(size=s))], ids=['normal', 'exponential', 'rate of 5 %', 'lognormal'])
def test_a_difference_looked_at_after_every_pair(draw):
    value, se, n = arms(1500, 1000, draw)
    lower, upper = mixture(value, se, n, 1000)
    assert ((lower > 0) | (upper < 0)).any(1).mean() <= .05
    with np.errstate(all='ignore'): assert (np.abs(value/se) > PLAIN)[:, BURN_IN//2:].any(1).mean() > .2

def test_the_rare_rate_of_one_arm_needs_more_than_the_burn_in():
    rng, n = np.random.default_rng(SEED), np.arange(1, 1001); x = (rng.random((3000, 1000)) < .05)*1.
    m = x.cumsum(1)/n; se = np.sqrt(np.maximum(m - m**2, 0)/np.maximum(n - 1, 1))
    missed = lambda burn_in: np.mean([((low > .05) | (high < .05)).any() for low, high in zip(*mixture(m, se, n, 1000, burn_in=burn_in))])
    assert missed(BURN_IN) > .055 and missed(500) <= .05                                   # as the chapter warns

def test_mixture_is_where_the_mixed_wealth_reaches_one_over_alpha():
    "Against the integral over stakes, normal for two sides and half-normal for one."
    for n, n_opt, alpha in ((200, 1000, .05), (5000, 1000, .01), (1000, 1000, .2)):
        for sides in (2, 1):
            low, high = mixture(0., 1/np.sqrt(n), n, n_opt, alpha, sides)
            s, rho = high*n, sequential._rho(n_opt, alpha*(3 - sides))
            wealth = integrate.quad(lambda b: np.exp(b*s - b**2*n/2)*stats.norm.pdf(b*np.sqrt(rho))*np.sqrt(rho)*(3 - sides), -1 if sides == 2 else 0, 1, limit=400)[0]
            assert low == -high
            if sides == 2: assert wealth == pytest.approx(1/alpha, rel=1e-6)
            else: assert 1/alpha*(1 - 1e-9) <= wealth <= 1.5/alpha                       # a closed form that is never too short

def test_mixture_is_tightest_near_n_opt_and_hardly_longer_elsewhere():
    n = np.geomspace(200, 1e6, 400); width = mixture(0., 1/np.sqrt(n), n, 1e4)[1]*np.sqrt(n)
    grid = np.geomspace(200, 1e6, 60); at_1e4 = [mixture(0., .01, 1e4, o)[1] for o in grid]
    assert grid[np.argmin(at_1e4)] == pytest.approx(1e4, rel=.2)
    near = (n > 1e3) & (n < 1e5)
    assert (width[near] < 1.3*width.min()).all() and 2.5 < width.min() < 3.5
    one, two = mixture(0., .01, 1e4, 1e4, sides=1)[1], mixture(0., .01, 1e4, 1e4)[1]
    assert one < two

@given(st.floats(-5, 5), st.floats(1e-3, 10), st.integers(100, 10**7), st.integers(10, 10**7), st.sampled_from([.001, .01, .05, .2]))
@settings(max_examples=200, deadline=None)
def test_band_and_p_say_the_same(value, se, n, n_opt, alpha):
    low, high = mixture(value, se, n, n_opt, alpha); p = always_valid_p(value, se, n, n_opt, alpha)
    assert low < value < high and high - low > 2*stats.norm.isf(alpha/2)*se and 0 <= p <= 1
    if abs(p - alpha) > 1e-9: assert (p < alpha) == (low > 0 or high < 0)
    shifted = mixture(3*value + 1, 3*se, n, n_opt, alpha)
    assert shifted == pytest.approx((3*low + 1, 3*high + 1), rel=1e-9, abs=1e-9)

def test_nothing_is_claimed_before_it_can_be():
    lower, upper = mixture([.1]*5, [.01, .01, 0, np.nan, .01], [99, 100, 1000, 1000, np.nan], 1000)
    assert np.isinf(lower[[0, 2, 3, 4]]).all() and np.isinf(upper[[0, 2, 3, 4]]).all() and np.isfinite([lower[1], upper[1]]).all()
    assert always_valid_p([.1]*4, [.01, 0, np.nan, .01], [99, 1000, 1000, np.nan], 1000).tolist() == [1]*4
    assert mixture(.1, .01, 50, 1000, burn_in=50)[0] > -np.inf and isinstance(float(mixture(.1, .01, 50, 1000)[0]), float)

def test_p_runs_down_and_a_single_look_stands_for_itself():
    p = always_valid_p([.3, .1, .2], .05, [200, 300, 400], 1000)
    assert (np.diff(p) <= 0).all() and p[1] == p[0] == always_valid_p(.3, .05, 200, 1000) < always_valid_p(.1, .05, 300, 1000)
    rows = always_valid_p([[.3, .1], [.1, .3]], .05, [200, 300], 1000)
    assert rows[0, 1] == rows[0, 0] and rows[1, 1] < rows[1, 0]                           # streams stay apart

def test_naive_peeking_integrated_and_published():
    assert [crossing(even(k), PLAIN)[-1] for k in (1, 2, 5, 10, 20, 100)] == pytest.approx([.05, .0831, .1417, .1934, .2479, .3736], abs=1e-4)
    assert crossing(even(1000), PLAIN)[-1] == pytest.approx(.530, abs=.001)
    assert crossing([.5, 1.], [np.inf, PLAIN])[-1] == pytest.approx(.05, abs=1e-7)        # no look at the first
    assert crossing([1.], PLAIN, drift=PLAIN + .841621)[-1] == pytest.approx(.8, abs=1e-6)
    assert crossing([.01, .5, 1.], [np.inf, 5, 5], drift=1e4) == pytest.approx([0, 1, 1]) and crossing([.5, 1.], 50).tolist() == [0, 0]
    assert crossing([.3, 1.], 2., drift=-2.5) == pytest.approx(crossing([.3, 1.], 2., drift=2.5))

def test_power_of_a_plan_with_looks():
    "Five O'Brien-Fleming looks need about 2.8 % more units than one (Lan-DeMets; the published inflation for 80 % power)."
    f = even(5); z = boundaries(f)
    need = brentq(lambda drift: crossing(f, z, drift)[-1] - .8, 1, 5)
    assert (need/(PLAIN + .841621))**2 == pytest.approx(1.026, abs=.004)
    rng = np.random.default_rng(SEED); t = rng.normal(size=(40_000, 5)).cumsum(1)/np.sqrt(5) + need*f
    crossed = np.abs(t/np.sqrt(f)) > z
    assert [crossed[:, :k].any(1).mean() for k in range(1, 6)] == pytest.approx(crossing(f, z, need), abs=.01)

def test_published_limits():
    assert boundaries(even(5)) == pytest.approx([4.8769, 3.3570, 2.6803, 2.2898, 2.0310], abs=1e-4)
    assert boundaries(even(5), kind='pocock') == pytest.approx([2.438, 2.427, 2.410, 2.397, 2.386], abs=.001)
    pocock = [boundaries(even(k), kind='pocock-classic')[-1] for k in (2, 3, 4, 5, 10)]
    assert pocock == pytest.approx([2.178, 2.289, 2.361, 2.413, 2.555], abs=.001)
    fleming = [boundaries(even(k), kind='obrien-fleming-classic')[-1] for k in (2, 3, 4, 5, 10)]
    assert fleming == pytest.approx([1.977, 2.004, 2.024, 2.040, 2.087], abs=.001)
    assert boundaries(even(3), kind='obrien-fleming-classic') == pytest.approx(2.004*np.sqrt(3/np.arange(1, 4)), abs=.002)
    assert boundaries(even(5), .01)[-1] > 2.57 and boundaries([1.]) == pytest.approx([PLAIN])

@given(st.lists(st.integers(1, 100), min_size=1, max_size=8, unique=True), st.sampled_from([.01, .05, .1]), st.sampled_from(['obrien-fleming', 'pocock']))
@settings(max_examples=60, deadline=None)
def test_limits_spend_what_is_allowed_at_any_looks(looks, alpha, kind):
    f = np.sort(looks)/100; z = boundaries(f, alpha, kind)
    assert crossing(f, z) == pytest.approx(spending(f, alpha, kind), abs=1e-7) and spending(1., alpha, kind) == pytest.approx(alpha)
    assert np.array_equal(boundaries(f[:1], alpha, kind), z[:1])                          # a limit does not know the looks to come

@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=7), st.sampled_from([.01, .05, .2]), st.sampled_from(['obrien-fleming', 'pocock']))
def test_whatever_came_alpha_is_spent_once_and_limits_do_not_move(new, alpha, kind):
    units = np.cumsum(new); z = limits_so_far(units, 1000, True, alpha, kind); told = np.isfinite(z)
    assert crossing(units[told]/units[told][-1], z[told])[-1] == pytest.approx(alpha, abs=1e-6)              # all of it, at the end or where the size was reached
    for k in range(1, len(units)): # what a look used is what later looks remember
        early = limits_so_far(units[:k], 1000, False, alpha, kind); same = np.isfinite(early)
        assert np.allclose(early[same], z[:k][same], rtol=1e-6)

def test_more_or_fewer_people_than_planned():
    assert np.isnan(limits_so_far([700, 1100, 1200], 1000, True)).tolist() == [False, False, True] and limits_so_far([700, 1100], 1000, False)[1] == limits_so_far([700, 1100, 1200], 1000, True)[1]
    assert np.isnan(limits_so_far([500, 500, 800], 1000, False)).tolist() == [False, True, False]           # nobody new: no test
    assert limits_so_far([100, 200, 200], 1000, True)[-1] == pytest.approx(1.96, abs=1e-3)                  # hardly anything spent on the way
    for units, planned, said in (([], 10, 'units is'), ([5, 3], 10, 'never less than before'), ([5], 0, 'planned is 0'), ([np.nan], 10, 'units is')):
        with pytest.raises(TelemetryError, match=said): limits_so_far(units, planned, True)

def test_spending_is_slow_or_even():
    t = np.linspace(0, 1, 101)
    for kind in ('obrien-fleming', 'pocock'):
        spent = spending(t, .05, kind); assert spent[0] == 0 and (np.diff(spent) >= 0).all() and spent[-1] == pytest.approx(.05)
    assert spending(.5) == pytest.approx(2*(2*stats.norm.sf(stats.norm.isf(.0125)/np.sqrt(.5)))) and spending(.5) < .0031 < .03 < spending(.5, kind='pocock')

def test_many_looks_are_quick():
    begun = time.process_time(); z = boundaries(even(100)); crossing(even(100), z)
    assert time.process_time() - begun < 1 and z[-1] == pytest.approx(2.185, abs=.002)    # about .06 s
    value, se = np.full(1000, .1), np.full(1000, .02)
    begun = time.process_time(); mixture(value, se, np.arange(1, 1001)*10_000, 10**7); assert time.process_time() - begun < .2

# --- shares

def test_srm_is_the_ratio_of_the_two_stories():
    "By hand, unit by unit: each next unit is guessed by the Dirichlet mean so far, against the declared share."
    rng = np.random.default_rng(SEED); shares = np.array([.5, .3, .2]); who = rng.choice(3, 400, p=[.4, .4, .2]); prior, log, lowest = 50*shares, 0., 1.
    counts = np.eye(3)[who].cumsum(0); p = srm_sequence(counts, shares, 50.)
    for k, w in enumerate(who):
        log += np.log((prior + np.eye(3)[who[:k]].sum(0))[w]/(50 + k)/shares[w]); lowest = min(lowest, np.exp(-log))
        assert p[k] == pytest.approx(lowest, rel=1e-9)

def test_srm_false_alarms_and_the_usual_test_in_the_same_harness():
    rng, days = np.random.default_rng(SEED), np.arange(1, 201)*100
    k = rng.binomial(100, .3, (1500, 200)).cumsum(1)
    ours = np.mean([srm_sequence(np.c_[a, days - a], [3, 7])[-1] <= .05 for a in k])
    assert ours <= .05 < .2 < (np.abs(k - .3*days)/np.sqrt(.21*days) > PLAIN).any(1).mean()
    k = rng.binomial(100, .35, (200, 200)).cumsum(1)
    assert np.mean([srm_sequence(np.c_[a, days - a], [3, 7])[-1] <= .001 for a in k]) > .99

def test_srm_edges():
    assert srm_sequence([[0, 0]], [1, 1]).tolist() == [1.] and srm_sequence([500, 500], [.5, .5]).tolist() == [1.]
    assert srm_sequence([[10**8, 10**8 + 10**6]], [1, 1])[0] < 1e-100
    a, b = srm_sequence([[100, 200, 310]], [1, 2, 3]), srm_sequence([[310, 100, 200]], [3, 1, 2]); assert a == pytest.approx(b)

# --- checkpoints

def checkpoints(effect=0., series=300, looks=20, a_day=500, seed=SEED):
    import pandas as pd
    rng, n = np.random.default_rng(seed), np.arange(1, looks + 1)*a_day
    mean = lambda at: (rng.normal(at*a_day, np.sqrt(a_day), (series, looks)).cumsum(1)/n).ravel()
    return pd.DataFrame(dict(experiment_id=np.repeat(np.arange(series), looks), variant_id=1, metric_id=1, time_since_start=np.tile(n/a_day, series), count_c=np.tile(n, series), count_t=np.tile(n, series), mean_c=mean(0.), mean_t=mean(effect), variance_c=1., variance_t=1.))

def test_archives_without_and_with_an_effect():
    judged, found = judge_checkpoints(checkpoints())
    assert found['naive']['significant'] == pytest.approx(.248, abs=.08) and found['anytime']['significant'] <= .05 and found['group-sequential']['significant'] == pytest.approx(.05, abs=.04)
    assert found['naive']['missed'] == 0 and found['naive']['disagree'] == found['naive']['taken_back'] > .12 > .03 > found['group-sequential']['taken_back']
    assert found['series'] == 300 and found['checkpoints'] == 6000 and found['not_judged'] == found['unusable'] == 0
    judged, found = judge_checkpoints(checkpoints(.08, 100))
    assert (judged.final == 1).mean() > .95 and (judged[[f'{m}_verdict' for m in METHODS]] != -1).all(axis=None)
    stop = {m: judged[f'{m}_stop'].median() for m in METHODS}
    assert stop['naive'] < stop['group-sequential'] < 20 and stop['naive'] < stop['anytime'] < 20 and all(found[m]['early'] > .7 for m in METHODS[1:])

def test_one_series_step_by_step():
    "The first crossing of each habit, in a plain loop."
    t = checkpoints(.05, 40, 12); judged, found = judge_checkpoints(t)
    limits = boundaries(even(12))
    for i, g in t.groupby('experiment_id'):
        row, first = judged.loc[i], {}
        for k, c in enumerate(g.itertuples()):
            value, se = c.mean_t - c.mean_c, np.sqrt(c.variance_c/c.count_c + c.variance_t/c.count_t)
            lower, upper = mixture(value, se, c.count_c + c.count_t, 12_000)
            for name, out in zip(METHODS, (abs(value/se) > PLAIN, lower > 0 or upper < 0, abs(value/se) > limits[k])):
                if out: first.setdefault(name, (c.time_since_start, np.sign(value)))
        for name in METHODS:
            stop, verdict = first.get(name, (np.nan, 0))
            assert row[f'{name}_verdict'] == verdict and (row[f'{name}_stop'] == stop or np.isnan(stop) and np.isnan(row[f'{name}_stop']))
        assert row.final == np.sign(value)*(abs(value/se) > PLAIN) and (row.ci_lower < row.value < row.ci_upper) and row.anytime_lower < row.ci_lower

def test_shares_of_the_summary_are_those_of_the_series():
    judged, found = judge_checkpoints(checkpoints(.04, 200, 12)); final = judged.final.to_numpy()
    for m in METHODS:
        verdict, stop = judged[f'{m}_verdict'].to_numpy(), judged[f'{m}_stop'].to_numpy()
        asked = dict(significant=np.mean(verdict != 0), early=np.mean([s in range(1, 12) for s in stop]), disagree=np.mean(verdict != final),
            taken_back=np.mean([v != 0 and v != f for v, f in zip(verdict, final)]), missed=np.mean([v == 0 and f != 0 for v, f in zip(verdict, final)]), median_stop=np.nanmedian(stop)/12)
        assert found[m] == pytest.approx(asked)
    assert found['naive']['early'] < found['naive']['significant'] and found['anytime']['missed'] > .05

def test_odd_checkpoints_are_left_out_and_counted():
    t = checkpoints(.1, 5, 10).set_index(['experiment_id', 'time_since_start'])
    t.loc[(0, 3.), 'variance_c'] = np.nan                                                 # a hole
    t.loc[1, ['variance_c', 'variance_t']] = 0                                            # nothing varies
    t.loc[(2, 5.), 'count_c'] = 100; t.loc[(2, 5.), 'mean_t'] = 99                        # fewer than before, and absurd
    t.loc[(3, 1.), ['count_c', 'count_t']] = 0                                            # nobody yet
    t.loc[4, 'mean_c'] = np.nan
    judged, found = judge_checkpoints(t.reset_index().sample(frac=1, random_state=0))     # in any order
    assert judged.looks.tolist() == [9, 0, 9, 9, 0] and judged.unusable.tolist() == [1, 10, 1, 1, 10] and found['not_judged'] == 2 and found['unusable'] == 23
    assert judged.final.isna().tolist() == [False, True, False, False, True] and judged.value.dropna().abs().max() < 1
    _, nothing = judge_checkpoints(t.loc[[1]].reset_index())
    assert nothing['final_significant'] is None and nothing['not_judged'] == 1 and 'naive' not in nothing

def test_other_names_for_the_keys():
    t = checkpoints(.1, 3, 5).rename(columns=dict(experiment_id='test', time_since_start='day'))
    judged, found = judge_checkpoints(t, keys=('test',), time='day')
    assert list(judged.test) == [0, 1, 2] and found['series'] == 3

def test_plot_of_peeks():
    import matplotlib; matplotlib.use('Agg')
    n = np.arange(1, 21)*100
    ax = plot_peeks(np.full(20, .1), 1/np.sqrt(n), n, 2000, fraction=np.where(np.arange(20) % 5 == 4, n/2000, np.nan), xlabel='units met')
    marks = [l for l in ax.lines if l.get_marker() == '_']
    assert ax.get_xlabel() == 'units met' and len(marks) == 2 and len(marks[0].get_xdata()) == 4 and len(ax.collections) == 2
    limit = boundaries([.25, .5, .75, 1])/np.sqrt([500, 1000, 1500, 2000])
    assert marks[0].get_ydata() == pytest.approx(.1 - limit) and marks[1].get_ydata() == pytest.approx(.1 + limit)
    assert plot_peeks(np.zeros(3), np.ones(3), [10, 20, 30], 30).get_ylabel() == 'difference'    # before the burn-in: no band, no fault

@pytest.mark.parametrize('call, says', [
    (lambda: mixture(.1, .1, 100, 0), 'n_opt is 0; it is the number of units'),
    (lambda: mixture(.1, .1, 100, 100, alpha=5), 'alpha is 5; it is a probability'),
    (lambda: mixture(.1, .1, 100, 100, sides=3), 'sides is 3; a band has two'),
    (lambda: always_valid_p(.1, .1, 100, -5), 'n_opt is -5'),
    (lambda: spending(.5, kind='haybittle'), "kind is 'haybittle'; alpha is spent"),
    (lambda: spending(.5, kind='pocock-classic'), "kind is 'pocock-classic'; alpha is spent"),
    (lambda: spending([.5, 1.2]), r'fraction has 1 values outside 0\.\.1'),
    (lambda: spending(np.nan), 'fraction has 1 values outside'),
    (lambda: spending(.5, 0), 'alpha is 0'),
    (lambda: boundaries([.5, .4]), r'fraction is \[0\.5 0\.4\]; it is the part of the planned information'),
    (lambda: boundaries([0, 1]), 'fraction is'),
    (lambda: boundaries([]), 'fraction is'),
    (lambda: boundaries([.5, 1.1]), 'fraction is'),
    (lambda: boundaries([.5, np.nan]), 'fraction is'),
    (lambda: boundaries([.5, .50001]), 'fraction has 1 looks less than .0001 of the plan'),
    (lambda: boundaries([.5, 1], kind='slow'), "kind is 'slow'"),
    (lambda: crossing([.5, 1], [2, -2]), 'z has 1 values that are not above 0'),
    (lambda: srm_sequence([[10, 20]], [1, 0]), r'shares is \[1.0, 0.0\]; it has one share above 0'),
    (lambda: srm_sequence([[10]], [1]), 'shares is'),
    (lambda: srm_sequence([[10, 20, 30]], [1, 1]), 'counts has 3 variants and shares has 2'),
    (lambda: srm_sequence([[10, 20], [9, 30]], [1, 1]), 'counts has 1 values that are missing or below'),
    (lambda: srm_sequence([[10, np.nan]], [1, 1]), 'counts has 1 values that are missing'),
    (lambda: srm_sequence([[-1, 5]], [1, 1]), 'counts has 1 values'),
    (lambda: judge_checkpoints(checkpoints().drop(columns='mean_t')), 'the table lacks mean_t; checkpoints need'),
    (lambda: judge_checkpoints(checkpoints().head(0)), 'the table has 0 rows'),
    (lambda: judge_checkpoints(checkpoints(series=2).assign(experiment_id=1)), 'the table has 20 rows with the keys and the time of another'),
    (lambda: judge_checkpoints(checkpoints(series=1).assign(time_since_start=np.arange(20))), 'time_since_start has 1 values that are not above 0'),
    (lambda: judge_checkpoints(checkpoints(series=1), alpha=1), 'alpha is 1')])
def test_experiments_refuse_bad_input_in_one_line(call, says):
    with pytest.raises(TelemetryError, match=says) as e: call()
    assert '\n' not in str(e.value) and str(e.value).count(';') >= 2
