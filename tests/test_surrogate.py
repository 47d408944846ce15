"Surrogate: promises of first days, with the model's own error, against direct effects, and proxies against luck."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import Estimate
from telemetry_loop.surrogate import GROUPS, agreement, choose_proxy, lope, plot_promises, proxy, surrogacy, surrogate_index

SEED = 5401 # declared once
ROLES = dict(outcome='r', surrogates=['s'], covariates=['x'])
PLAY = dict(action='a', target={2: 1.}, baseline={0: 1.}, dose=True)

def people(n, rng, direct=0., doses=(.5, .3, .2)):
    "x, dose a, first days s = x + .5 a + noise, long run r = x + 2 s + direct a + noise."
    x, a = rng.normal(size=n), rng.choice(3, n, p=doses)
    s = x + .5*a + rng.normal(size=n)
    return pd.DataFrame(dict(x=x, a=a, s=s, propensity=np.array(doses)[a], r=x + 2*s + direct*a + rng.normal(size=n)))

def short(n, rng): return pd.concat([people(n, rng, doses=d).assign(variant=v)[['x', 's', 'variant']] for v, d in (('control', (1., 0, 0)), ('treatment', (0, 0, 1.)))], ignore_index=True)

@pytest.fixture(scope='module')
def tables():
    rng = np.random.default_rng(SEED)
    return people(4000, rng), short(1500, rng)

inside = lambda e, v: e.ci_lower <= v <= e.ci_upper

def test_index_promises_what_comes_and_owns_up_to_its_model(tables):
    found = surrogate_index(*tables, **ROLES)
    assert inside(found.gain, 2.) and abs(found.gain.value - 2) < .25
    width = lambda e: e.ci_upper - e.ci_lower
    assert width(found.gain) > width(found.naive)
    assert abs(found.treatment.value - found.control.value - found.naive.value) < 1e-9
    assert abs(found.parts.mean() - (found.gain.value - found.naive.value)) < 1e-9 and len(found.parts) == GROUPS

def test_any_regressor(tables):
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import Ridge
    boosted = surrogate_index(*tables, **ROLES, model=HistGradientBoostingRegressor(max_iter=50, random_state=0))
    plain = surrogate_index(*tables, **ROLES, model=Ridge())
    assert inside(boosted.gain, 2.) and inside(plain.gain, 2.)
    assert abs(boosted.gain.value - plain.gain.value) < abs(boosted.naive.value - plain.naive.value) + .1

def test_coverage_when_surrogacy_holds_and_naive_does_not():
    rng = np.random.default_rng(SEED + 1)
    noisy = lambda h: h.assign(r=h.r + 4*rng.normal(size=len(h)))      # what the model must learn from
    found = [surrogate_index(noisy(people(400, rng)), short(2000, rng), **ROLES) for _ in range(300)]
    honest, naive = (np.mean([inside(getattr(i, name), 2.) for i in found]) for name in ('gain', 'naive'))
    assert .91 <= honest <= .985 and naive < .9 and naive < honest - .04

def test_direct_effect_deceives_the_index_not_lope(tables):
    rng = np.random.default_rng(SEED + 2)
    history = people(4000, rng, direct=-1.5)               # true gain 2 - 3 = -1
    index, long = surrogate_index(history, tables[1], **ROLES), lope(history, **ROLES, **PLAY)
    assert index.gain.ci_lower > 0 and inside(long.gain, -1.) and inside(long.dr, -1.) and inside(long.ips, -1.)
    assert surrogacy(index, long, .3)[1].answer == 'fail'
    width = lambda e: e.ci_upper - e.ci_lower
    helped = lope(history, **ROLES, **PLAY, test=tables[1])                # the short test shows which first days the target brings
    assert width(helped.gain) < width(long.gain) < width(long.ips) and width(long.dr) < width(long.ips) and inside(helped.gain, -1.)
    assert surrogacy(index, helped, .3)[1].answer == 'fail'

def test_surrogacy_passes_only_within_the_tolerance(tables):
    index, long = surrogate_index(*tables, **ROLES), lope(tables[0], **ROLES, **PLAY)
    gap, verdict = surrogacy(index, long, 1.)
    assert verdict.answer == 'pass' and inside(gap, 0.)
    assert surrogacy(index, long, .01)[1].answer == 'inconclusive'
    with pytest.raises(TelemetryError, match='tolerance is 0'): surrogacy(index, long, 0)

def test_lope_of_the_logging_policy_is_the_mean(tables):
    history, shares = tables[0], {0: .5, 1: .3, 2: .2}
    found = lope(history, **ROLES, action='a', target=shares)
    assert abs(found.ips.value - history.r.mean()) < 1e-9 and abs(found.gain.value - history.r.mean()) < .01 and abs(found.ess - len(history)) < 1e-6

@settings(max_examples=8, deadline=None)
@given(st.floats(-50, 50), st.floats(.1, 20))
def test_units_of_the_outcome_change_nothing(shift, scale):
    rng = np.random.default_rng(SEED + 3); history, test = people(600, rng), short(200, rng)
    moved = history.assign(r=history.r*scale + shift)
    for f in (lambda h: surrogate_index(h, test, **ROLES).gain, lambda h: lope(h, **ROLES, **PLAY).gain):
        a, b = f(history), f(moved)
        np.testing.assert_allclose([b.value, b.ci_lower, b.ci_upper], np.array([a.value, a.ci_lower, a.ci_upper])*scale, atol=2e-2*scale + 2e-3*abs(shift))

def test_same_seed_same_bytes(tables):
    assert surrogate_index(*tables, **ROLES).gain == surrogate_index(*tables, **ROLES).gain and lope(tables[0], **ROLES, **PLAY).gain == lope(tables[0], **ROLES, **PLAY).gain

def test_bad_tables_are_refused_by_name(tables):
    history, test = tables
    hole = history.assign(s=history.s.where(history.index != 3))
    for words, call in {
        "covariate|lacks the column 'y'": lambda: surrogate_index(history, test, 'r', ['s'], ['y']),
        "surrogate 's' is absent in the test": lambda: surrogate_index(history, test[['x', 'variant']], **ROLES),
        "history has no long-term outcome 'r'": lambda: surrogate_index(history.drop(columns='r'), test, **ROLES),
        "'s' has 1 values that are missing": lambda: surrogate_index(hole, test, **ROLES),
        "'r' is constant": lambda: surrogate_index(history.assign(r=1.), test, **ROLES),
        'surrogates is empty': lambda: surrogate_index(history, test, 'r', [], ['x']),
        'surrogate and something else': lambda: surrogate_index(history, test, 'r', ['s', 'r'], ['x']),
        'history has 50 rows': lambda: surrogate_index(history[:50], test, **ROLES),
        "variant 'other' has 0 units": lambda: surrogate_index(history, test, **ROLES, treatment='other'),
        "test lacks the column 'arm'": lambda: surrogate_index(history, test, **ROLES, variant='arm'),
        'the history must be over before': lambda: surrogate_index(history, test, **ROLES, windows=((0, 30), (30, 37))),
        'must begin before it ends': lambda: surrogate_index(history, test, **ROLES, windows=((30, 0), (40, 47))),
        "'x' is not numeric": lambda: surrogate_index(history.assign(x='u'), test, **ROLES),
        'features is': lambda: surrogate_index(history, test, **ROLES, features='rough'),
        'cells gives': lambda: surrogate_index(history, test, **ROLES, features='cells'),
        'history never did': lambda: lope(history, **ROLES, action='a', target={7: 1.}),
        'positive propensity': lambda: lope(history.assign(propensity=0.), **ROLES, **PLAY),
        "lacks the action 'b'": lambda: lope(history, **ROLES, action='b', target={0: 1.}),
        'target is missing': lambda: lope(history, **ROLES, action='a'),
        'no probabilities': lambda: lope(history, **ROLES, action='a', target={0: .5}),
        'must be an amount': lambda: lope(history.assign(a=np.array(['p', 'q', 'z'])[history.a]), **ROLES, action='a', target={'p': 1.}, dose=True),
        'baseline is missing': lambda: lope(history, **ROLES, action='a', target={0: 1.}, test=test),
        'agree wherever': lambda: lope(history, **ROLES, action='a', target={0: 1.}, baseline={0: 1.})}.items():
        with pytest.raises(TelemetryError, match=words) as told: call()
        assert '\n' not in str(told.value)

def past(rng, slope=-.5, tests=300, within=.6):
    true, noise = .0507*rng.normal(size=tests), 2/500*np.array([[1, within], [within, 1]])
    return np.c_[true, slope*true + .01*rng.normal(size=tests)] + rng.multivariate_normal([0, 0], noise, tests), noise

def test_proxy_slope_has_the_right_sign_and_the_naive_one_not():
    rng = np.random.default_rng(SEED + 4); found = [proxy(*past(rng)) for _ in range(40)]
    assert abs(np.median([p.slope.value for p in found]) + .5) < .08 and abs(np.median([p.naive for p in found]) - .17) < .05
    assert np.mean([inside(p.slope, -.5) for p in found]) >= .85

def test_proxy_without_noise_is_plain_regression():
    rng = np.random.default_rng(SEED + 5); x = rng.normal(size=(50, 2)); found = proxy(x, np.zeros((2, 2)))
    assert abs(found.slope.value - np.polyfit(x[:, 0], x[:, 1], 1)[0]) < 1e-9 and abs(found.slope.value - found.naive) < 1e-12
    same = proxy(np.c_[x[:, 0], 2*x[:, 0] + 1e-3*x[:, 1]], np.zeros((2, 2)))
    assert same.sign.value > .97 and same.correlation > .999

def test_choice_puts_the_truthful_proxy_first_and_says_who_cannot_be_judged():
    rng = np.random.default_rng(SEED + 6)
    still = (rng.normal(0, .001, (300, 2)), np.eye(2))
    found = choose_proxy({'bad': past(rng), 'silent': still, 'good': past(rng, slope=2.)})
    assert list(found) == ['good', 'bad', 'silent'] and 'vary no more than their errors' in found['silent']
    assert found['good'].sign.value > .9 > .5 > found['bad'].sign.value

def test_bad_proxies_are_refused_by_name():
    for words, call in {'at least 10 experiments': lambda: proxy(np.ones((3, 2)), np.eye(2)), 'noise has shape': lambda: proxy(np.ones((20, 2)), np.eye(3)),
                        'not finite': lambda: proxy(np.full((20, 2), np.nan), np.eye(2)), 'candidates is empty': lambda: choose_proxy({})}.items():
        with pytest.raises(TelemetryError, match=words): call()

def test_agreement_by_hand():
    e = lambda v: Estimate(v, v - 1, v + 1, 10)
    found = agreement([e(2), e(-2), e(.5), e(3)], [e(3), e(2), e(2), e(.2)])
    assert {k: v.value for k, v in found.items()} == dict(sign=.75, recall=1/3, precision=1/3, contradicted=.25, consistent=.25)
    assert agreement([e(.1)], [e(.1)])['recall'].value is None
    with pytest.raises(TelemetryError, match='short has 1 and long has 0'): agreement([e(1)], [])
    with pytest.raises(TelemetryError, match='without value or interval'): agreement([Estimate(1., None, None, 3)], [e(1)])

def test_picture():
    import matplotlib; matplotlib.use('Agg')
    e = Estimate(.1, 0., .2, 5); ax = plot_promises([0, 1], {'index': [e, e], 'LOPE': [e, e]}, [.1, -.2])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['truth', 'index', 'LOPE']
