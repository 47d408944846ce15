"Longterm: the glossary computed by hand, staying under censoring, visits and value, holdouts and decisions."
import os
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import Estimate
from telemetry_loop.longterm import (GLOSSARY, NEEDED, Visits, _log_likelihood, bgnbd, cox, holdout_effect, kaplan_meier, kept, log_rank, outcomes, plot_staying, restricted_mean, ship_decisions, staying)

SEED = 5501 # declared once
inside = lambda e, v: e.ci_lower <= v <= e.ci_upper
table = lambda *rows: pd.DataFrame(rows, columns=NEEDED)

def test_glossary_by_hand():
    days = table(*[('ann', d, 2, 3, 1, 0, 0) for d in (0, 1, 7)], ('bob', 25, 1, 0, 0, 1, 25), *[('cat', d, 1, 1, 0, 0, 10) for d in (10, 17, 24, 29)], ('dan', 5, 0, 0, 0, 0, 5), ('late', 31, 1, 1, 1, 0, 31))
    found = outcomes(days, 0, 30).set_index('user_id')
    assert list(found.index) == ['ann', 'bob', 'cat', 'dan']                                                    # who joined after the analysis date is not there
    ann, bob, cat, dan = (found.loc[u] for u in found.index)
    assert (ann.engagement, ann.satisfaction, ann.complaints) == (6/7, 2/7, 0) and ann.activated == 1
    assert (ann.retained_d7, ann.retained_d14, ann.retained_d28, ann.return_rate) == (1, 0, 0, 2/28)
    assert (ann.last_seen, ann.duration, ann.censored) == (7, 8, False)                                        # known until day 17
    assert (bob.observed, bob.complaints, bob.return_rate, bob.censored, bob.duration) == (6, 1/6, 0, True, 0)
    assert bob[['activated', 'retained_d7', 'retained_d14', 'retained_d28']].isna().all()                      # the future is not 0
    assert (cat.retained_d7, cat.retained_d14, cat.activated, cat.return_rate) == (1, 1, 0, 3/20) and np.isnan(cat.retained_d28)
    assert (cat.last_seen, cat.duration, cat.censored) == (29, 7, True)                                        # seen since day 17, where the clock stops: 21 observed - 14
    assert np.isnan(dan.last_seen) and (dan.duration, dan.censored, dan.activated) == (0, False, 0)
    assert set(GLOSSARY) <= set(found.columns)

def test_dates_are_days():
    days = table(('ann', 0, 1, 2, 1, 0, 0), ('ann', 7, 1, 1, 1, 0, 0)); stamp = lambda d: pd.Timestamp('2025-01-06') + pd.to_timedelta(d, unit='D')
    a, b = outcomes(days, 0, 30), outcomes(days.assign(day=stamp(days.day), joined=stamp(days.joined)), '2025-01-06', '2025-02-05')
    same = [c for c in a if c not in ('joined', 'last_seen')]
    pd.testing.assert_frame_equal(a[same], b[same]); assert b.last_seen[0] == pd.Timestamp('2025-01-13')

def product(n, rng, stay=40., comes=.6, join=60, end=90):
    "People who come with probability `comes` on every day until they leave."
    joined, gone = rng.integers(0, join, n), rng.geometric(1/stay, n)
    user, age = np.nonzero((rng.random((n, end)) < comes) & (np.arange(end) < gone[:, None]) | (np.arange(end) == 0))
    keep = joined[user] + age < end
    user, age = user[keep], age[keep]
    return pd.DataFrame(dict(user_id=np.char.mod('u%05d', user), day=joined[user] + age, decisions=1, clicks=1, satisfied=1, complaints=0, joined=joined[user]))

def test_churn_is_judged_where_it_is_known():
    "An early analysis date with censoring says what waiting for everyone would; the naive retention does not."
    days = product(6000, np.random.default_rng(SEED), end=160)
    early, late = outcomes(days, 0, 70), outcomes(days, 0, 159)
    truth = (late.duration > 28).mean()                                                       # everyone watched long enough
    found = staying(kaplan_meier(early.duration, ~early.censored), 28)
    assert abs(found.value - truth) < .02 and inside(found, truth)
    naive = (early.duration[~early.censored] > 28).mean(), (early.duration > 28).mean()
    assert all(abs(v - truth) > .1 for v in naive)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 30))
def test_outcomes_hold_for_any_log(seed, window, gap):
    rng = np.random.default_rng(seed); days = product(30, rng, join=20, end=40).sample(frac=1, random_state=seed)
    found = outcomes(days, 0, 30, window, gap)
    rates = found[['activated', 'retained_d7', 'retained_d14', 'return_rate']].stack().dropna().astype(float)
    assert found.user_id.is_unique and rates.between(0, 1).all() and (found.duration <= found.observed).all() and (found.duration >= 0).all()
    assert (found[~found.censored].duration + found[~found.censored].joined - 1 <= 30 - gap).all()  # silent for the whole gap
    future = outcomes(days[days.day <= 30], 0, 30, window, gap)
    pd.testing.assert_frame_equal(found, future)                                              # what comes after the analysis date is not used

def test_bad_logs_are_refused_by_name():
    days = table(('ann', 0, 1, 1, 1, 0, 0), ('ann', 1, 1, 1, 1, 0, 0))
    for words, call in {"lacks the column 'joined'": lambda: outcomes(days.drop(columns='joined'), 0, 9), 'after the analysis date': lambda: outcomes(days, 9, 0), 'window is 0': lambda: outcomes(days, 0, 9, 0),
                        'negative or missing': lambda: outcomes(days.assign(clicks=-1), 0, 9), 'rows for a user and day': lambda: outcomes(pd.concat([days, days]), 0, 9), 'joined differs': lambda: outcomes(days.assign(joined=[0, 1]), 0, 9),
                        'nobody has day 0': lambda: outcomes(days, 5, 9), 'day has 1 missing': lambda: outcomes(days.assign(day=[0, np.nan]), 0, 9), 'must be a date': lambda: outcomes(days.assign(day='soon'), 0, 9)}.items():
        with pytest.raises(TelemetryError, match=words) as told: call()
        assert '\n' not in str(told.value)

def test_curve_by_hand():
    "Textbook product-limit: 1 leaves of 4, one censored, 1 of 2, 1 of 1."
    t = kaplan_meier([1, 2, 2, 3, 4], [1, 1, 0, 0, 1])
    assert t.staying.tolist() == pytest.approx([.8, .6, 0]) and t.at_risk.tolist() == [5, 4, 1]
    assert staying(t, 0).value == 1 and staying(t, 2.5).value == pytest.approx(.6) and staying(t, 9, watched=4).value is None
    assert restricted_mean([1, 2, 2, 3, 4], [1, 1, 0, 0, 1], 3).value == pytest.approx(1 + .8 + .6)
    assert ((t.ci_lower <= t.staying) & (t.staying <= t.ci_upper)).all()

def joiners(n, mean, rng, end=60): joined, stay = rng.uniform(0, end, n), rng.exponential(mean, n); return np.minimum(stay, end - joined), stay <= end - joined

def test_curve_and_restricted_mean_cover():
    rng, s, days = np.random.default_rng(SEED + 1), [], []
    for _ in range(200):
        d, e = joiners(400, 30., rng)
        s.append(inside(staying(kaplan_meier(d, e), 28), np.exp(-28/30))); days.append(inside(restricted_mean(d, e, 28), 30*(1 - np.exp(-28/30))))
    assert np.mean(s) >= .91 and np.mean(days) >= .91 and max(np.mean(s), np.mean(days)) <= .99

def test_twenty_thousand():
    d, e = joiners(20_000, 30., np.random.default_rng(SEED + 2)); truth = np.exp(-28/30)
    assert abs(staying(kaplan_meier(d, e), 28).value - truth) < .01
    assert abs((d[e] > 28).mean() - truth) > .1 and abs((d > 28).mean() - truth) > .1

def test_hazard_ratio_and_log_rank():
    rng = np.random.default_rng(SEED + 3); a, b, c = joiners(3000, 30., rng), joiners(3000, 30*np.exp(-.2), rng), joiners(3000, 30., rng)
    both = lambda p, q: pd.DataFrame(dict(t=np.r_[p[0], q[0]], e=np.r_[p[1], q[1]], z=np.repeat([0, 1], 3000)))
    found = cox(both(a, b), 't', 'e', ['z'])['z']
    assert abs(np.log(found.value) - .2) < 3*np.log(found.ci_upper/found.ci_lower)/3.92 and found.ci_lower > 1
    assert log_rank(*[both(a, b)[k] for k in 'tez'])['p_value'] < .001 < .01 < log_rank(*[both(a, c)[k] for k in 'tez'])['p_value']

def test_bad_durations_are_refused_by_name():
    t = pd.DataFrame(dict(t=[1., 2, 3, 4], e=[1, 1, 0, 1], z=[0, 1, 0, 1], k=1, w=[np.nan, 1, 2, 3], s='u'))
    for words, call in {'duration has 1 values that are negative': lambda: kaplan_meier([-1, 2], [1, 1]), 'all are censored': lambda: kaplan_meier([1, 2], [0, 0]), 'other than 0 and 1': lambda: kaplan_meier([1, 2], [1, 2]),
                        'one length': lambda: kaplan_meier([1, 2], [1]), 'duration has 0 values': lambda: kaplan_meier([], []), 'group has 1 variant': lambda: log_rank([1, 2], [1, 1], ['a', 'a']), 'group has 1 values': lambda: log_rank([1, 2], [1, 1], ['a']),
                        "lacks the column 'y'": lambda: cox(t, 't', 'e', ['y']), "'k' is constant": lambda: cox(t, 't', 'e', ['k']), "'w' has 1 values": lambda: cox(t, 't', 'e', ['w']), 'not numeric': lambda: cox(t, 't', 'e', ['s']),
                        'covariates is empty': lambda: cox(t, 't', 'e', []), 'same thing twice': lambda: cox(t.assign(y=1 - t.z), 't', 'e', ['z', 'y']), 'same for everyone who left': lambda: cox(t.assign(e=[0, 1, 0, 1]), 't', 'e', ['z']),
                        'horizon is 9': lambda: restricted_mean([1, 2], [1, 1], 9)}.items():
        with pytest.raises(TelemetryError, match=words) as told: call()
        assert '\n' not in str(told.value)

# ---- BG/NBD
CDNOW = (.243, 4.414, .793, 2.426)
point = lambda *values: Visits(*[Estimate(v, None, None, 0) for v in values], 0.)

def shoppers(n, rng, r=.243, alpha=4.414, a=.793, b=2.426, ahead=0.):
    rate, drop, T = rng.gamma(r, 1/alpha, n), rng.beta(a, b, n), rng.uniform(27, 39, n)
    x, t_x, later, now, on = *np.zeros((4, n)), np.ones(n, bool)
    while on.any():
        now = now + rng.exponential(1/np.maximum(rate, 1e-12)); on = on & (now <= T + ahead); early = on & (now <= T)
        x += early; t_x = np.where(early, now, t_x); later += on & (now > T); on = on & (rng.random(n) >= drop)
    return x, t_x, T, later

def test_published_person():
    assert point(*CDNOW).expected(39., [2], [30.43], [38.86])[0] == pytest.approx(1.226, abs=1e-3)
    assert point(*CDNOW).alive([0, 2], [0, 30.43], [38.86, 38.86])[0] == 1

def test_likelihood_is_the_integral():
    "One customer, integrated numerically over rate and dropout."
    from scipy import integrate, stats
    r, alpha, a, b = 1.2, 3., .8, 2.5; x, t_x, T = 3, 10., 14.
    def density(p, lam): return stats.gamma.pdf(lam, r, scale=1/alpha)*stats.beta.pdf(p, a, b)*((1 - p)**x*lam**x*np.exp(-lam*T) + p*(1 - p)**(x - 1)*lam**x*np.exp(-lam*t_x))
    total, _ = integrate.dblquad(density, 0, 8, 0, 1, epsabs=1e-12)
    assert _log_likelihood(np.log([r, alpha, a, b]), np.array([x]), np.array([t_x]), np.array([T]))[0] == pytest.approx(np.log(total), abs=1e-4)

def test_parameters_come_back_and_the_forecast_holds():
    x, t_x, T, later = shoppers(20_000, np.random.default_rng(SEED + 4), ahead=39.); model = bgnbd(x, t_x, T)
    for e, v in zip((model.r, model.alpha, model.a, model.b), CDNOW): assert abs(np.log(e.value/v)) < 3*np.log(e.ci_upper/e.ci_lower)/3.92
    promised, naive = model.expected(39., x, t_x, T).mean(), (x/T*39).mean()
    assert abs(promised/later.mean() - 1) < .06 and naive/later.mean() > 1.3                              # the naive takes the silent for alive
    chance = model.alive(x, t_x, T); assert ((chance > 0) & (chance <= 1)).all()
    day = bgnbd(x, 7*t_x, 7*T)                                                                            # weeks or days: the same people
    assert day.r.value == pytest.approx(model.r.value, rel=1e-4) and day.alpha.value == pytest.approx(7*model.alpha.value, rel=1e-4)
    assert day.log_likelihood == pytest.approx(model.log_likelihood - x.sum()*np.log(7), rel=1e-8)

def test_longer_silence_less_alive():
    chance = point(*CDNOW).alive([4]*20, [20.]*20, np.linspace(20, 200, 20)); assert (np.diff(chance) < 0).all()

@pytest.mark.skipif(not os.environ.get('CDNOW'), reason='the CDNOW summary (ID, frequency, recency, T; 2,357 customers) is not part of the repository; name its CSV file in CDNOW')
def test_published_fit():
    d = pd.read_csv(os.environ['CDNOW']); m = bgnbd(d.frequency, d.recency, d['T'])
    assert [round(e.value, 3) for e in (m.r, m.alpha, m.a, m.b)] == pytest.approx(CDNOW, abs=1.1e-3) and m.log_likelihood == pytest.approx(-9582.4, abs=.05)

def test_impossible_visits_are_refused_by_name():
    for words, call in {'x has 1 values that are no counts': lambda: bgnbd([1.5], [1], [2]), 'T has 1 values': lambda: bgnbd([0], [0], [0]), 't_x has 1 impossible': lambda: bgnbd([1], [3], [2]), 't_x has 2 impossible': lambda: bgnbd([0, 1], [1, 0], [2, 2]),
                        'x is 0 for everyone': lambda: bgnbd([0, 0], [0, 0], [2, 2]), 'same people': lambda: bgnbd([1], [1, 1], [2]), 't is 0': lambda: point(*CDNOW).expected(0, [1], [1], [2])}.items():
        with pytest.raises(TelemetryError, match=words): call()

# ---- holdout and decisions
def test_holdout_by_hand_and_the_unknown_left_out():
    t = pd.DataFrame(dict(v=['holdout']*3 + ['treatment']*3, r=[0, 1, np.nan, 1, 1, 0]))
    found = holdout_effect(t, 'v', ['r'])['r']
    assert found.value == pytest.approx(2/3 - 1/2) and found.n == 5
    for words, call in {"in 'control'": lambda: holdout_effect(t, 'v', ['r'], holdout='control'), "lacks the column 'q'": lambda: holdout_effect(t, 'v', ['q'])}.items():
        with pytest.raises(TelemetryError, match=words): call()

def test_promises_kept_and_broken():
    e = lambda v, h=.1: Estimate(v, v - h, v + h, 100)
    assert kept(e(.2), e(.1))[1].answer == 'pass' and kept(e(.3), e(-.1))[1].answer == 'fail' and 'less' in kept(e(.3), e(-.1))[1].reason
    assert kept(Estimate(.2, None, None, 1), e(.1))[1].answer == 'inconclusive'

def test_decisions():
    e = lambda v: Estimate(v, v - .1, v + .1, 100); gains = {'click-only': e(.3), 'index': e(.05), 'LOPE': e(-.2)}
    assert ship_decisions(gains, -.2).wrong.tolist() == [True, True, False] and ship_decisions(gains, -.2, 'sure').wrong.tolist() == [True, False, False]
    assert ship_decisions(gains, .2).wrong.tolist() == [False, False, True] and ship_decisions(gains).wrong.isna().all()
    for words, call in {'rule is': lambda: ship_decisions(gains, rule='hope'), 'gains is empty': lambda: ship_decisions({}), "'x' has no value": lambda: ship_decisions({'x': Estimate(None, None, None, 0)}), "'x' has no interval": lambda: ship_decisions({'x': Estimate(1., None, None, 0)}, rule='sure')}.items():
        with pytest.raises(TelemetryError, match=words): call()

def test_picture():
    import matplotlib; matplotlib.use('Agg')
    ax = plot_staying([1, 2, 3, 4], [1, 1, 0, 1], ['a', 'a', 'b', 'b']); assert len(ax.get_legend().get_texts()) == 2
