"Longterm: the glossary computed by hand, holdouts, promises and decisions."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import Estimate
from telemetry_loop.longterm import GLOSSARY, NEEDED, holdout_effect, kept, outcomes, ship_decisions
from telemetry_loop.survival import kaplan_meier, staying

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

def test_a_small_holdout_gets_students_interval():
    from scipy.stats import ttest_ind
    rng = np.random.default_rng(SEED); a, b = rng.normal(size=5), rng.normal(1, 2, 9); t = pd.DataFrame(dict(v=['holdout']*5 + ['treatment']*9, r=np.r_[a, b]))
    welch, found = ttest_ind(b, a, equal_var=False).confidence_interval(), holdout_effect(t, 'v', ['r'])['r']
    assert [found.ci_lower, found.ci_upper] == pytest.approx([welch.low, welch.high], rel=1e-9)
    assert holdout_effect(t.assign(r=1.), 'v', ['r'])['r'] == Estimate(0., 0., 0., 14)
