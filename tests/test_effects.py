"Effects: closed forms against statsmodels, known answers, and what is refused by name."
import time
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop import effects
from telemetry_loop.config import TelemetryError
from telemetry_loop.effects import Averages, cell_averages, factorial, layer_checks, novelty, novelty_by, segment_effects

SEED = 20265
LEVELS = dict(screen=('old', 'new'), ranking=('A', 'B'))
around = lambda e: (e.ci_upper - e.ci_lower)/2/1.959963984540054    # the standard error
inside = lambda e, truth: e.ci_lower <= truth <= e.ci_upper

def people(n=2000, seed=SEED, gain=lambda t: 0.):
    rng = np.random.default_rng(seed)
    t = pd.DataFrame(dict(user=np.arange(n), variant=rng.choice(['control', 'new'], n, p=[.6, .4]), usage=rng.choice(['heavy', 'light', 'never'], n, p=[.5, .3, .2]), age=rng.normal(40, 9, n), screen=rng.choice(['old', 'new'], n), ranking=rng.choice(['A', 'B'], n, p=[.7, .3])))
    return t.assign(clicks=rng.normal(3, 1 + (t.variant == 'new'), n) + .03*t.age + (t.variant == 'new')*gain(t))

def days(n=200, k=10, seed=SEED, gain=lambda d: 0.*d, since=0):
    rng = np.random.default_rng(seed); u, d = np.repeat(np.arange(n), k), np.tile(np.arange(k), n); arm, person = rng.random(n) < .4, rng.normal(size=n)
    return pd.DataFrame(dict(user=u, day=d, variant=np.where(arm, 'new', 'control')[u], kind=np.where(rng.random(n) < .5, 'new', 'returning')[u], visits=person[u] + rng.normal(size=len(u)) + arm[u]*gain(d)*(d >= since)))

def refused(says, f, *a, **k):
    "One line that names what is wrong."
    with pytest.raises(TelemetryError, match=says) as e: f(*a, **k)
    assert '\n' not in str(e.value) and len(str(e.value)) < 300

# ---- averages
def test_averages_are_regression_with_hc2():
    import statsmodels.formula.api as smf
    t = people(); code = pd.factorize(t.usage, sort=True)[0]; found = cell_averages(t.clicks.to_numpy(), code, 3)
    fit = smf.ols('clicks ~ C(usage) - 1', t).fit(cov_type='HC2')
    assert np.allclose(found.value, fit.params) and np.allclose(np.diag(found.cov), fit.bse**2)
    assert np.isclose(found.p_value([1, -1, 0], [1, 0, -1]), fit.wald_test('C(usage)[heavy] = C(usage)[light], C(usage)[heavy] = C(usage)[never]', use_f=False, scalar=True).pvalue)

def test_a_test_does_not_depend_on_how_its_question_is_put():
    found = cell_averages(*(lambda t: (t.clicks.to_numpy(), pd.factorize(t.usage)[0]))(people(300)), 3)
    assert np.isclose(found.p_value([1, -1, 0], [1, 0, -1]), found.p_value([0, 5, -5], [1, 1, -2]))
    assert np.isclose(found.p_value([1, -1, 0], [1, 0, -1]), found.p_value([1, -1, 0], [1, 0, -1], [0, 1, -1])) # a question repeated is no new question

@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.floats(.05, 3), st.floats(-.9, .9), st.floats(.01, .5))
def test_fieller_bounds_are_where_the_difference_is_just_significant(top, bottom, rho, se):
    a = Averages(np.array([top, bottom]), se**2*np.array([[1, rho], [rho, 1]]), 9); e = a.ratio([1, 0], [0, 1])
    if bottom/se < 1.95: assert e.ci_lower is None and e.ci_upper is None
    elif bottom/se > 1.97:
        assert e.ci_lower - 1e-9 <= e.value <= e.ci_upper + 1e-9
        for r in (e.ci_lower, e.ci_upper): z = (top - r*bottom)/(se*np.sqrt(1 - 2*r*rho + r*r)); assert np.isclose(abs(z), 1.959964, atol=1e-3)

# ---- segments
def test_segments_are_differences_of_means_and_their_interaction_is_statsmodels():
    import statsmodels.formula.api as smf
    from scipy.stats import ttest_ind
    t = people(gain=lambda t: .3*(t.usage == 'heavy')); found = segment_effects(t, 'clicks', 'variant', ['usage'], unit='user')
    fit = smf.ols('clicks ~ C(usage)*C(variant)', t).fit(cov_type='HC2'); names = [p for p in fit.params.index if ':' in p]
    assert np.isclose(found.tests['usage']['p_value'], fit.wald_test(', '.join(f'{n} = 0' for n in names), use_f=False, scalar=True).pvalue)
    for name, e in found.effects.items():
        part = t[t.usage == name.split('=')[1]]; a, b = (part.clicks[part.variant == v] for v in ('control', 'new'))
        welch = ttest_ind(b, a, equal_var=False); bounds = welch.confidence_interval()
        assert np.isclose(e.value, b.mean() - a.mean()) and np.allclose([e.ci_lower, e.ci_upper], [bounds.low, bounds.high]) and e.n == len(part) and np.isclose(found.table.set_index('segment').p_value[name.split('=')[1]], welch.pvalue)
    assert found.table[['control', 'treatment']].to_numpy().sum() == len(t)

def test_adjustment_is_benjamini_hochberg():
    from statsmodels.stats.multitest import multipletests
    rng = np.random.default_rng(SEED); t = people().assign(**{f's{i}': rng.integers(3, size=2000) for i in range(6)})
    found = segment_effects(t, 'clicks', 'variant', [f's{i}' for i in range(6)])
    assert np.allclose(found.table.adjusted, multipletests(found.table.p_value, method='fdr_bh')[1])
    assert np.allclose([x['adjusted'] for x in found.tests.values()], multipletests([x['p_value'] for x in found.tests.values()], method='fdr_bh')[1])

def test_small_segments_are_left_out_by_name_and_counted():
    t = people(); t.loc[:30, 'usage'] = 'robots'; found = segment_effects(t, 'clicks', 'variant', 'usage', least=50)
    assert list(found.left_out) == ['usage=robots'] and 'fewer than 50' in found.left_out['usage=robots'] and 'usage=robots' not in found.effects and len(found.effects) == 3
    without = segment_effects(t[t.usage != 'robots'], 'clicks', 'variant', 'usage', least=50)
    assert found.effects == without.effects and found.tests == without.tests

def test_a_segment_formed_after_the_exposure_gets_no_interval():
    t = people(8000, gain=lambda t: .5); t['active'] = np.where(t.clicks > t.clicks.median(), 'yes', 'no')
    found = segment_effects(t, 'clicks', 'variant', ['active', 'usage'])
    assert found.tests['active']['balance'] < .001 and found.effects['active=yes'].ci_lower is None and not found.tests['active']['differs'] and np.isnan(found.table.adjusted[0])
    assert found.effects['usage=heavy'].ci_lower is not None

def test_units_without_a_variant_are_left_aside():
    t = people(); more = pd.concat([t, t.head(50).assign(user=range(9000, 9050), variant='', clicks=1e6), t.head(50).assign(user=range(9100, 9150), variant=None, clicks=1e6)])
    assert segment_effects(more, 'clicks', 'variant', 'usage', unit='user').effects == segment_effects(t, 'clicks', 'variant', 'usage').effects

@settings(max_examples=15, deadline=None)
@given(st.floats(.01, 100), st.floats(-100, 100), st.integers(0, 5))
def test_units_of_measurement_and_order_of_rows_do_not_matter(scale, shift, seed):
    t = people(600, gain=lambda t: .5*(t.usage == 'heavy')); moved = t.assign(clicks=t.clicks*scale + shift).sample(frac=1, random_state=seed)
    a, b = (segment_effects(x, 'clicks', 'variant', 'usage', least=20) for x in (t, moved))
    assert np.allclose([e.value*scale for e in a.effects.values()], [e.value for e in b.effects.values()], rtol=1e-5, atol=1e-7*scale) and np.isclose(a.tests['usage']['p_value'], b.tests['usage']['p_value'], rtol=1e-4)

# ---- factorial
def test_factorial_is_effect_coding_in_statsmodels():
    import statsmodels.formula.api as smf
    t = people(gain=lambda t: .1); t['s'], t['r'] = (t.screen == 'new') - .5, (t.ranking == 'B') - .5; found = factorial(t, 'clicks', LEVELS, unit='user')
    fit = smf.ols('clicks ~ s*r', t).fit(cov_type='HC2')
    for name, term in {'screen': 's', 'ranking': 'r', 'screen x ranking': 's:r'}.items():
        assert np.isclose(found.effects[name].value, fit.params[term]) and np.isclose(around(found.effects[name]), fit.bse[term], rtol=.003) and np.isclose(found.p_values[name], fit.pvalues[term], rtol=.02)

def test_main_effects_average_over_the_other_factor_not_over_its_people():
    y = {('old', 'A'): 0., ('new', 'A'): 1., ('old', 'B'): 2., ('new', 'B'): 7.}; n = {('old', 'A'): 400, ('new', 'A'): 400, ('old', 'B'): 4, ('new', 'B'): 4}
    t = pd.DataFrame([dict(screen=s, ranking=r, clicks=v + (i % 2)) for (s, r), v in y.items() for i in range(n[s, r])]); e = factorial(t, 'clicks', LEVELS).effects
    assert np.allclose([e[k].value for k in ('screen', 'ranking', 'screen x ranking')], [3, 4, 4])      # (1 + 5)/2, (2 + 6)/2, 5 - 1

def test_cells_of_four_keep_their_level():
    "By the normal curve the interaction's interval held 92 % of the time."
    rng, hit = np.random.default_rng(SEED), []
    for _ in range(1000):
        f = factorial(pd.DataFrame(dict(a=np.tile([0, 0, 1, 1], 4), b=np.tile([0, 1], 8), y=rng.normal(size=16))), 'y', dict(a=(0, 1), b=(0, 1)))
        hit.append([inside(e, 0.) for e in f.effects.values()]); assert hit[-1] == [p > .05 for p in f.p_values.values()]
    assert (np.mean(hit, 0) > .938).all() and (np.mean(hit, 0) < .975).all()

def test_three_factors():
    rng = np.random.default_rng(SEED); n = 8000; t = pd.DataFrame(rng.integers(2, size=(n, 3)), columns=list('abc')); t['y'] = rng.normal(size=n) + .5*t.a - .3*t.b + .4*t.a*t.c + t.a*t.b*t.c
    e = factorial(t, 'y', {k: (0, 1) for k in 'abc'}).effects
    truth = {'a': .5 + .2 + .25, 'b': -.3 + .25, 'c': .2 + .25, 'a x b': .5, 'a x c': .4 + .5, 'b x c': .5, 'a x b x c': 1.}
    assert set(e) == set(truth) and all(abs(e[k].value - v) < 4*around(e[k]) for k, v in truth.items())

# ---- layers
def layered(n=6000, clash=0., seed=SEED):
    rng = np.random.default_rng(seed); t = pd.DataFrame({e: rng.choice(['control', 'x', 'y'][:2 + (e == 'c')], n) for e in 'abc'})
    return t.assign(m=rng.normal(size=n) + clash*((t.a == 'x') & (t.c == 'y')))

def test_pairs_of_layers():
    found = layer_checks(layered(clash=.5), 'm', ['a', 'b', 'c'], margin=.3).set_index(['first', 'second'])
    assert found.verdict['a', 'c'].answer == 'fail' and inside(found.largest['a', 'c'], .5) and 'a and c influence' in found.verdict['a', 'c'].reason
    assert {v.answer for v in found.verdict.drop(('a', 'c'))} <= {'pass', 'inconclusive'} and found.verdict['a', 'b'].answer == 'pass'
    assert all(v.answer != 'pass' for v in layer_checks(layered(), 'm', ['a', 'b', 'c']).verdict)           # without a margin nothing is shown to be absent

def test_the_largest_interaction_holds_together_with_the_others():
    from scipy.stats import norm
    t = layered(); e = layer_checks(t, 'm', ['a', 'c']).largest[0]; cell = t.groupby(['a', 'c']).m.agg(['mean', 'var', 'size'])
    gaps = {v: sum(sign*cell['mean'][a, c] for a, c, sign in (('x', v, 1), ('x', 'control', -1), ('control', v, -1), ('control', 'control', 1))) for v in ('x', 'y')}; most = max(gaps, key=lambda v: abs(gaps[v]))
    se = np.sqrt(sum(cell['var'][a, c]/cell['size'][a, c] for a in ('x', 'control') for c in (most, 'control')))
    assert np.isclose(e.value, gaps[most]) and np.isclose(e.ci_upper - e.value, norm.ppf(1 - .05/4)*se, rtol=.003)          # two contrasts

def test_holm_and_dependence():
    from statsmodels.stats.multitest import multipletests
    p = np.random.default_rng(SEED).random(12)**3; assert np.allclose(effects.adjusted(p), multipletests(p, method='holm')[1])
    t = layered(); t['b'] = np.where(np.random.default_rng(1).random(len(t)) < .1, t.a, t.b)
    assert 'not independent' in layer_checks(t, 'm', ['a', 'b']).verdict[0].reason

def test_only_units_in_both_count():
    t = layered(); t.loc[:2000, 'a'] = ''; t.loc[5000:, 'b'] = None
    both = t[(t.a != '') & t.b.notna()]; found, alone = (layer_checks(x, 'm', ['a', 'b']) for x in (t, both))
    assert found.units[0] == len(both) and found.interaction[0] == alone.interaction[0] and found.largest[0] == alone.largest[0]

# ---- novelty
def test_daily_effects_and_slope_are_cluster_robust_regression():
    import statsmodels.formula.api as smf
    t = days(gain=lambda d: .3 - .02*d).sample(frac=.9, random_state=1); found = novelty(t, 'user', 'day', 'visits', 'variant', least=10)
    fit = smf.ols('visits ~ C(day):C(variant) - 1', t).fit(); g, n, k = t.user.nunique(), len(t), 20
    x = found.days - found.days.mean(); w = x/(x @ x); order = [f'C(day)[{int(d)}]:C(variant)[{v}]' for v in ('control', 'new') for d in found.days]; weights = np.r_[-w, w]
    robust = fit.get_robustcov_results('cluster', groups=t.user, use_correction=False); at = [list(fit.params.index).index(o) for o in order]
    se = np.sqrt(weights @ robust.cov_params()[np.ix_(at, at)] @ weights)
    assert np.isclose(found.slope.value, weights @ fit.params[order]) and np.isclose(around(found.slope), se, rtol=.01) and around(found.slope) > se     # ours corrects for few units

def test_courses_are_named():
    named = lambda gain: novelty(days(3000, 12, gain=gain), 'user', 'day', 'visits', 'variant')
    fades, lasts, grows, none = named(lambda d: np.exp(-d/3.)), named(lambda d: .5 + 0*d), named(lambda d: .05*d), named(lambda d: 0*d)
    assert [x.kind for x in (fades, lasts, grows, none)] == ['fades', 'lasts', 'grows', 'cannot tell']
    truth = np.exp(-np.arange(12)/3.); assert inside(fades.remains, truth[-4:].mean()/truth[:4].mean()) and inside(fades.last, truth[-4:].mean()) and inside(lasts.remains, 1.)
    assert named(lambda d: -np.exp(-d/3.)).kind == 'fades'                                              # a harm fades too
    assert none.remains.ci_lower is None
    vague = novelty(days(300, 12, gain=lambda d: .5 + 0*d), 'user', 'day', 'visits', 'variant', keep=.99); assert vague.p_value > .05 and vague.remains.value > .99 > vague.remains.ci_lower and vague.kind == 'cannot tell'

def test_missing_days_that_differ_between_the_arms_conclude_nothing():
    t = days(3000, 12, gain=lambda d: .5 + 0*d); rng = np.random.default_rng(1); gone = (t.variant == 'new') & (t.day > 6) & (rng.random(len(t)) < .1)
    assert novelty(t[~gone], 'user', 'day', 'visits', 'variant').kind == 'cannot tell' and novelty(t[rng.random(len(t)) > .1], 'user', 'day', 'visits', 'variant').kind == 'lasts'

def test_days_with_few_units_are_left_out():
    t = days(300, 6); t = t[(t.day < 5) | (t.user < 20)]; found = novelty(t, 'user', 'day', 'visits', 'variant')
    assert list(found.left_out) == [5.] and found.days.tolist() == [0, 1, 2, 3, 4]

def test_new_against_returning():
    t = days(3000, 12); effect = np.where(t.kind == 'returning', np.exp(-t.day/3.), .1)*(t.variant == 'new'); found = novelty_by(t.assign(visits=t.visits + effect), 'user', 'day', 'visits', 'variant', 'kind')
    assert found['returning'].kind == 'fades' and found['new'].kind != 'fades' and found['difference'].ci_upper < 0
    assert np.isclose(found['difference'].value, found['returning'].slope.value - found['new'].slope.value)

# ---- refused by name
def test_bad_tables_are_refused_by_name():
    t = people(); seg = lambda t, **k: segment_effects(t, 'clicks', 'variant', 'usage', **k)
    refused('0 rows', seg, t.head(0)); refused("column 'usage' is not in the table", seg, t.drop(columns='usage')); refused("'variant' has 1 variant", seg, t[t.variant == 'new'])
    refused("'variant' has 0 variant", seg, t.assign(variant='')); refused("control 'off' is not among", seg, t, control='off'); refused('3 variants', seg, t.assign(variant=np.where(t.user < 300, 'third', t.variant)))
    refused("treatment 'x' is not among", seg, t, treatment='x'); refused('2 units are in two variants', seg, pd.concat([t, t.head(2).assign(variant=t.variant.head(2).map(dict(control='new', new='control')))]), unit='user')
    refused('3 rows repeat a unit', seg, pd.concat([t, t.head(3)]), unit='user'); refused("metric 'clicks' has 5 of 2000 values missing", seg, t.assign(clicks=t.clicks.where(t.user >= 5))); refused('same in all 2000 rows', seg, t.assign(clicks=1.))
    refused('no numbers', seg, t.assign(clicks='many')); refused('missing or no numbers', seg, t.assign(clicks=t.clicks.where(t.user > 0, np.inf)))
    refused("'usage' has 1 of 1 values", seg, t.assign(usage='all')); refused("segment 'usage' has 0 of 3", seg, t, least=10_000); refused("'usage' is not in the plan, which names age", seg, t, declared=['age']); refused("'usage' is not in the plan, which names none", seg, t, declared=[])
    refused("'usage' has 2000 of 2000 values missing", seg, t.assign(usage=None)); refused('segments is empty', segment_effects, t, 'clicks', 'variant', [])
    refused("constant in both arms of usage=never", seg, t.assign(clicks=t.clicks.where(t.usage != 'never', 0.))); refused("'user' has 2000 distinct values; at most 1000", segment_effects, t, 'clicks', 'variant', 'user'); refused('level is -1', seg, t, alpha=2)
    refused("unit 'user' has 1 of 2000 values missing", seg, t.assign(user=t.user.where(t.user > 0)), unit='user')

@pytest.mark.parametrize('as_type', [bool, int, 'category', 'string'])
def test_variants_of_any_type(as_type):
    t = people(gain=lambda t: .3); on = t.variant == 'new'; other = t.assign(variant=on.astype(as_type) if as_type in (bool, int) else t.variant.astype(as_type)); control = {bool: False, int: 0}.get(as_type, 'control')
    assert segment_effects(other, 'clicks', 'variant', 'usage', control=control).effects == segment_effects(t, 'clicks', 'variant', 'usage').effects

def test_one_of_many_variants():
    t = people(3000); t['variant'] = np.where(t.user % 3 == 0, 'third', t.variant); found = segment_effects(t, 'clicks', 'variant', 'usage', treatment='third')
    assert found.effects == segment_effects(t[t.variant != 'new'], 'clicks', 'variant', 'usage').effects

def test_bad_factors_and_layers_are_refused_by_name():
    t = people(); refused('cell new x B has 0 units', factorial, t[(t.screen == 'old') | (t.ranking == 'A')], 'clicks', LEVELS); refused('factors are 1', factorial, t, 'clicks', dict(screen=('old', 'new')))
    refused("factor 'usage' has 3 levels", factorial, t, 'clicks', dict(screen=('old', 'new'), usage=('heavy', 'light', 'never'))); refused("'screen' has .* rows that are neither", factorial, t, 'clicks', dict(screen=('old', 'newest'), ranking=('A', 'B')))
    refused('same in all', factorial, t.assign(clicks=2), 'clicks', LEVELS); refused('picture shows two', factorial(t.assign(c=t.user % 2), 'clicks', LEVELS | {'c': (0, 1)}).plot); refused('repeat a unit', factorial, pd.concat([t, t]), 'clicks', LEVELS, unit='user')
    refused('experiments are 1', layer_checks, t, 'clicks', ['screen']); refused("'screen' has 1 variant", layer_checks, t.assign(screen='old'), 'clicks', ['screen', 'ranking']); refused('has 0 units', layer_checks, t.assign(screen=t.ranking), 'clicks', ['screen', 'ranking'])

def test_bad_days_are_refused_by_name():
    t = days(); f = nov = lambda t, **k: novelty(t, 'user', 'day', 'visits', 'variant', **k)
    refused('has 1 day', f, t[t.day == 0]); refused('1 units are in two variants', f, t.assign(variant=np.where(t.index == 0, 'x', t.variant)).replace({'variant': {'x': 'new' if t.variant[0] == 'control' else 'control'}}))
    refused('2 pairs of unit and day', f, pd.concat([t, t.head(2)])); refused("'variant' has 1 variant", f, t[t.variant == 'new']); refused('days are numbers', f, t.assign(day='d' + t.day.astype(str))); refused('same in all', f, t.assign(visits=0))
    refused("'day' has 10 of 2000 values missing", f, t.assign(day=t.day.where(t.user > 0)))
    refused('0 days with at least 500', nov, t, least=500)
    refused("'kind' changes within 1 units", novelty_by, t.assign(kind=np.where(t.index == 0, 'other', 'returning')), 'user', 'day', 'visits', 'variant', 'kind'); refused('has 1 kinds of unit', novelty_by, t.assign(kind='new'), 'user', 'day', 'visits', 'variant', 'kind')

def test_pictures_are_drawn():
    import matplotlib; matplotlib.use('Agg'); import matplotlib.pyplot as plt
    t, d = people(), days(gain=lambda d: .5*(d > 5))
    axes = [segment_effects(t, 'clicks', 'variant', 'usage').plot(), factorial(t, 'clicks', LEVELS).plot('clicks'), novelty(d, 'user', 'day', 'visits', 'variant').plot()]
    assert [len(a.lines) > 1 for a in axes] == [True]*3 and [x.get_text() for x in axes[1].get_xticklabels()] == ['old', 'new']; plt.close('all')

def test_a_million_units_take_two_seconds():
    rng = np.random.default_rng(SEED); n = 1_000_000; t = pd.DataFrame(dict(variant=rng.choice(['control', 'new'], n), screen=rng.choice(['old', 'new'], n), ranking=rng.choice(['A', 'B'], n), place=rng.choice([f'p{i}' for i in range(30)], n), y=rng.normal(size=n)))
    begun = time.process_time(); segment_effects(t, 'y', 'variant', ['place']); factorial(t, 'y', LEVELS); assert time.process_time() - begun < 2
