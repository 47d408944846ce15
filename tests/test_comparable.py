"Comparable: difference-in-differences and adjustment against statsmodels, few people by Student, and what is refused by name."
import numpy as np, pandas as pd, pytest
from telemetry_loop.comparable import adjusted_effect, did, post_stratified
from telemetry_loop.effects import segment_effects
from test_effects import SEED, around, days, inside, people, refused

# ---- difference-in-differences
def test_did_is_two_way_fixed_effects_with_errors_by_unit():
    import statsmodels.formula.api as smf
    t = days(120, 8, gain=lambda d: .4, since=5); t['on'] = ((t.variant == 'new') & (t.day >= 5))*1.; found = did(t, 'user', 'day', 'visits', 'variant', 5)
    fit = smf.ols('visits ~ on + C(user) + C(day)', t).fit(cov_type='cluster', cov_kwds=dict(groups=t.user, use_correction=False))
    assert np.isclose(found.effect.value, fit.params['on']) and np.isclose(around(found.effect), fit.bse['on'], rtol=.02)

def test_did_judges_the_time_before():
    fine = did(days(2000, 10, gain=lambda d: .4, since=5), 'user', 'day', 'visits', 'variant', 5)
    assert fine.verdict.answer == 'pass' and inside(fine.effect, .4) and inside(fine.cautious, .4) and inside(fine.placebo, 0) and fine.cautious.ci_upper - fine.cautious.ci_lower > 2*(fine.effect.ci_upper - fine.effect.ci_lower)
    t = days(2000, 10, gain=lambda d: .4, since=5); drifting = did(t.assign(visits=t.visits + .2*t.day*(t.variant == 'new')), 'user', 'day', 'visits', 'variant', 5)
    assert drifting.verdict.answer == 'fail' and drifting.effect.value is None and drifting.effect.ci_lower is None and inside(drifting.cautious, .4) and inside(drifting.trend, .2) and drifting.placebo.ci_lower > 0
    one = did(t[t.day >= 4], 'user', 'day', 'visits', 'variant', 5)
    assert one.verdict.answer == 'inconclusive' and one.cautious.ci_lower is None and one.trend.value is None and inside(one.effect, .4)

def test_did_counts_units_that_lack_a_day():
    t = days(200, 6); found = did(t.drop(index=[3, 4, 100]), 'user', 'day', 'visits', 'variant', 3)
    assert found.left_out == 2 and found.effect == did(t[~t.user.isin(t.user[[3, 4, 100]])], 'user', 'day', 'visits', 'variant', 3).effect

# ---- adjustment
def test_adjustment_is_lin_2013():
    import statsmodels.formula.api as smf
    rng = np.random.default_rng(SEED); t = people(500); t['x'] = t.age - t.age.mean(); t['z'] = rng.normal(size=500); t['z'] -= t.z.mean(); t['arm'] = (t.variant == 'new')*1.; t['clicks'] += .05*t.arm*t.x
    found = adjusted_effect(t, 'clicks', 'variant', ['age', 'z'], unit='user'); fit = smf.ols('clicks ~ arm*(x + z)', t).fit(cov_type='HC2')
    line = fit.params[['arm:x', 'arm:z']].to_numpy(); extra = (t[['x', 'z']].to_numpy() @ line).var()/len(t)
    assert np.isclose(found.effect.value, fit.params['arm']) and np.isclose(around(found.effect), np.sqrt(fit.bse['arm']**2 + extra), rtol=.005) and extra > 0

def test_adjustment_without_randomisation_owns_up():
    t = people(); apart = t.assign(age=t.age + 9*(t.variant == 'new'))
    assert adjusted_effect(apart, 'clicks', 'variant', ['age'], randomised=False).effect.ci_lower is None and adjusted_effect(apart, 'clicks', 'variant', ['age']).verdict.answer == 'fail'
    near = adjusted_effect(t, 'clicks', 'variant', ['age'], randomised=False); assert near.verdict.answer == 'inconclusive' and near.effect.ci_lower is not None
    assert adjusted_effect(t, 'clicks', 'variant', ['age']).verdict.answer == 'pass'

def test_post_stratification_by_hand():
    t = people(gain=lambda t: .5*(t.usage == 'heavy')); each = segment_effects(t, 'clicks', 'variant', 'usage').effects; share = t.usage.value_counts(normalize=True)
    found, given = post_stratified(t, 'clicks', 'variant', 'usage'), post_stratified(t, 'clicks', 'variant', 'usage', dict(heavy=.1, light=.1, never=.8))
    assert np.isclose(found.value, sum(share[k.split('=')[1]]*e.value for k, e in each.items())) and np.isclose(given.value, .1*each['usage=heavy'].value + .1*each['usage=light'].value + .8*each['usage=never'].value)
    assert np.isclose(around(given)**2, rtol=.02, b=sum(w**2*around(each[f'usage={k}'])**2 for k, w in dict(heavy=.1, light=.1, never=.8).items()))
    spread = sum(share[k.split('=')[1]]*(e.value - found.value)**2 for k, e in each.items())/len(t)
    assert np.isclose(around(found)**2, rtol=.02, b=sum((share[k.split('=')[1]]*around(e))**2 for k, e in each.items()) + spread)

def test_few_people_get_students_interval():
    "Twelve and sixteen people: the normal interval held 93.5 % of the time."
    from scipy.stats import ttest_ind
    t = people(28).assign(variant=np.r_[['control']*12, ['new']*16]); raw = adjusted_effect(t, 'clicks', 'variant', ['age']).raw
    a, b = (t.clicks[t.variant == v] for v in ('control', 'new')); welch = ttest_ind(b, a, equal_var=False).confidence_interval()
    assert [raw.ci_lower, raw.ci_upper] == pytest.approx([welch.low, welch.high], rel=1e-9)
    rng, hit = np.random.default_rng(SEED), []
    for _ in range(1500):
        x = rng.normal(size=28); t = pd.DataFrame(dict(variant=np.r_[['control']*12, ['new']*16], x=x, half=np.tile(['a', 'b'], 14), y=x + rng.normal(size=28)))
        hit.append([inside(adjusted_effect(t, 'y', 'variant', ['x']).effect, 0), inside(post_stratified(t, 'y', 'variant', 'half', least=2), 0)])
    assert (np.mean(hit, 0) > .942).all() and (np.mean(hit, 0) < .975).all()

# ---- refused by name
def test_bad_starts_are_refused_by_name():
    t = days(); dif = lambda t, start=5, **k: did(t, 'user', 'day', 'visits', 'variant', start, **k)
    refused('has 1 day', dif, t[t.day == 0]); refused('2 pairs of unit and day', dif, pd.concat([t, t.head(2)])); refused("'variant' has 1 variant", dif, t[t.variant == 'new']); refused('days are numbers', dif, t.assign(day='d' + t.day.astype(str)))
    refused('no time before it', dif, t, 0); refused('no time after it', dif, t, 99); refused('each group needs 500', dif, t, least=500)

def test_bad_covariates_are_refused_by_name():
    t = people(); adj = lambda t, c, **k: adjusted_effect(t, 'clicks', 'variant', c, **k)
    refused('covariates is empty', adj, t, []); refused("metric 'age' is the same", adj, t.assign(age=1.), ['age']); refused('repeat one another', adj, t.assign(twice=2*t.age), ['age', 'twice']); refused('needs at least 12', adj, t.head(15), ['age']); refused("'age' has 1 of", adj, t.assign(age=t.age.where(t.user > 0)), ['age'])
    refused('stratum usage=robot has', post_stratified, t.assign(usage=np.where(t.user < 9, 'robot', t.usage)), 'clicks', 'variant', 'usage'); refused('add up to 1', post_stratified, t, 'clicks', 'variant', 'usage', dict(heavy=.5, light=.5)); refused('add up to 1', post_stratified, t, 'clicks', 'variant', 'usage', dict(heavy=.5, light=.5, never=.5))

def test_picture():
    import matplotlib; matplotlib.use('Agg'); import matplotlib.pyplot as plt
    assert len(did(days(gain=lambda d: .5*(d > 5)), 'user', 'day', 'visits', 'variant', 5).plot().lines) > 1; plt.close('all')
