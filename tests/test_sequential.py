"Sequential: bands that hold at all times where the usual interval fails in the same harness."
import time
import numpy as np, pytest
from scipy.optimize import brentq
from scipy.special import ndtr
from telemetry_loop import sequential
from telemetry_loop.config import TelemetryError
from telemetry_loop.sequential import PSI, STAKES, gain_sequence, lower_sequence, value_sequence

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
