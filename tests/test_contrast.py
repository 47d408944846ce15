"Two variants side by side: sums that add up, differences as other libraries give them, and every bad table refused by name."
import time
import numpy as np, pandas as pd, pytest
from scipy.special import ndtri, stdtr
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.contrast import Moments, adjusted, contrast, difference, lift, moments, non_inferior, ratio, read_units, srm
from telemetry_loop.estimate import Estimate

SEED = 52
def people(n=4000, effect=.2, seed=SEED):
    rng = np.random.default_rng(seed); before = rng.gamma(4, 1, n); arm = rng.random(n) < .4
    visits = 1 + rng.poisson(before)
    return pd.DataFrame(dict(user_id=np.arange(n), variant=np.where(arm, 'new', 'old'), before=before, clicks=rng.poisson(visits*(.3 + .05*effect*arm)).astype(float), visits=visits.astype(float), spend=.8*before + rng.normal(0, 1, n) + effect*arm))
TABLE = people()

# --- sums

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e3, 1e3)), min_size=6, max_size=40), st.integers(2, 4), st.floats(-1e9, 1e9))
def test_parts_add_up_and_are_taken_away(rows, cut, shift):
    x = np.array(rows) + shift
    of = lambda part: Moments(('a', 'b'), len(part), part.mean(0), np.cov(part.T))
    whole, one, two = of(x), of(x[:cut]), of(x[cut:])
    scale = 1 + np.abs(whole.cov).max() + 1e-9*shift**2
    assert np.allclose((one + two).cov, whole.cov, atol=1e-7*scale) and np.allclose((one + two).mean, whole.mean)
    back = (one + two) - two
    assert back.n == cut and np.allclose(back.mean, one.mean, atol=1e-6*(1 + np.abs(x).max())) and np.allclose(back.cov, one.cov, atol=1e-6*scale*len(x))

def test_moments_of_a_frame_a_csv_and_a_parquet_file_are_numpys(tmp_path):
    TABLE.to_csv(tmp_path/'t.csv', index=False); TABLE.to_parquet(tmp_path/'t.parquet', index=False)
    for source in (TABLE, tmp_path/'t.csv', str(tmp_path/'t.parquet')):
        found = moments(source, 'variant', ['spend', 'before'])
        assert list(found) == ['new', 'old']
        for v, m in found.items():
            x = TABLE.loc[TABLE.variant == v, ['spend', 'before']].to_numpy()
            assert m.n == len(x) and np.allclose(m.mean, x.mean(0), rtol=1e-12) and np.allclose(m.cov, np.cov(x.T), rtol=1e-10)

def test_the_mean_over_rows_has_errors_by_unit():
    "As statsmodels' cluster-robust regression on the rows; rows counted as people are far too sure."
    import statsmodels.formula.api as smf
    rng = np.random.default_rng(SEED); who = np.repeat(np.arange(600), 1 + rng.poisson(5, 600)); arm = (rng.random(600) < .5)[who]
    rows = pd.DataFrame(dict(user_id=who, variant=np.where(arm, 'new', 'old'), spend=rng.normal(size=600)[who] + rng.normal(size=len(who)) + .2*arm))
    found = read_units(rows, 'user_id', 'variant', 'spend/rows', per='sum'); c = contrast(found['old'], found['new'], 'spend/rows')
    fit = smf.ols('spend ~ variant', rows.assign(variant=arm*1.)).fit(); robust = fit.get_robustcov_results('cluster', groups=who, use_correction=False)
    assert c.value == pytest.approx(fit.params['variant'], rel=1e-9) and c.se == pytest.approx(robust.bse[1], rel=3e-3) and fit.bse['variant'] < .6*c.se
    one = read_units(TABLE, 'user_id', 'variant', 'spend/rows', per='sum'); assert contrast(one['old'], one['new'], 'spend/rows').value == pytest.approx(difference(*[moments(TABLE, 'variant', ['spend'])[v] for v in ('old', 'new')], 'spend').value)
    with pytest.raises(TelemetryError, match="no column 'rows'"): read_units(TABLE, 'user_id', 'variant', 'spend/rows')

@pytest.mark.parametrize('n', [3, 8, 40])
def test_few_units_find_only_large_effects(n):
    "Noncentral t, as statsmodels: with 3 + 3 units the normal sum promises a third less than it takes."
    from statsmodels.stats.power import TTestIndPower
    from telemetry_loop.plan import mde_of
    m = lambda mean: Moments(('y',), n, np.array([mean]), np.array([[1.]])); c = contrast(m(5.), m(5.5), 'y')
    assert c.se*c.few()*mde_of(4, 1.) == pytest.approx(TTestIndPower().solve_power(nobs1=n, alpha=.05, power=.8), rel=1e-3)
    assert c.score == pytest.approx(-ndtri(c.p_value/2), rel=1e-9) and c.reach(1.959964) == pytest.approx(c.z(), rel=1e-6)

def test_what_next_to_nobody_finds_is_told_in_no_time():
    "Two and two units, a hundred questions: the inverse of noncentral t would not end there. Both ways of asking meet at the seam."
    pair = lambda var: contrast(*(Moments(('y',), 2, np.array([mean]), np.array([[v]])) for mean, v in ((5., 1.), (6., var))), 'y')
    begun = time.process_time(); far = [pair(v).few(a, p) for v in (1., 1e-6, 1e-12) for a in (.05, 5e-4, 1e-8) for p in (.6, .8, .99)]
    assert time.process_time() - begun < 1 and np.isfinite(far).all() and min(far) > 1
    seam = [pair(1e-12).few(2*(1 - stdtr(1., t)), .8) for t in (39.9, 40.1)]; assert seam[0] == pytest.approx(seam[1], rel=.02)

def test_large_values_lose_no_digits():
    t = TABLE.assign(spend=1e9 + TABLE.spend)
    assert moments(t, 'variant', ['spend'])['old'].cov[0, 0] == pytest.approx(TABLE.spend[TABLE.variant == 'old'].var(), rel=1e-6)

def test_caps_bind_both_variants():
    found = moments(TABLE, 'variant', ['spend'], caps={'spend': 3.})
    assert found['new'].mean[0] == pytest.approx(TABLE.spend[TABLE.variant == 'new'].clip(upper=3).mean(), rel=1e-12)
    quantile = read_units(TABLE, 'user_id', 'variant', ['spend'], caps={'spend': .9}); cap = TABLE.spend.quantile(.9)
    assert quantile['old'].mean[0] == pytest.approx(TABLE.spend[TABLE.variant == 'old'].clip(upper=cap).mean(), rel=1e-9)

# --- differences

def test_as_tea_tasting_says():
    "Means and ratios to nine digits; with a covariate to what centring it on one mean for both or on each arm's makes."
    import tea_tasting as tt
    found, arrow = moments(TABLE, 'variant', ['spend', 'before', 'clicks', 'visits']), TABLE.assign(variant=(TABLE.variant == 'new')*1)
    peer = tt.Experiment(spend=tt.Mean('spend'), rate=tt.RatioOfMeans('clicks', 'visits'), cuped=tt.Mean('spend', 'before')).analyze(arrow, control=0)
    o, n = found['old'], found['new']
    for e, p, tol in ((difference(o, n, 'spend'), peer['spend'], 1e-9), (ratio(o, n, 'clicks', 'visits'), peer['rate'], 1e-9), (difference(o, n, 'spend', 'before'), peer['cuped'], 1e-2)):
        assert [e.value, e.ci_lower, e.ci_upper] == pytest.approx([p.effect_size, p.effect_size_ci_lower, p.effect_size_ci_upper], rel=tol)
    assert contrast(o, n, 'spend').p_value == pytest.approx(peer['spend'].pvalue, rel=1e-9) and contrast(o, n, 'spend', 'before').removed > .6

def test_adjustment_is_regression():
    import statsmodels.formula.api as smf
    found = moments(TABLE, 'variant', ['spend', 'before'])
    c = contrast(found['old'], found['new'], 'spend', 'before')
    fit = smf.ols('spend ~ variant + before', TABLE.assign(variant=(TABLE.variant == 'new')*1.)).fit(cov_type='HC2')
    assert c.value == pytest.approx(fit.params['variant'], rel=1e-8) and c.se == pytest.approx(fit.bse['variant'], rel=2e-2)

def test_the_lift_has_no_bounds_where_control_may_be_nothing():
    rng = np.random.default_rng(SEED); t = pd.DataFrame(dict(variant=np.repeat(['a', 'b'], 50), y=np.r_[rng.normal(.1, 1, 50), rng.normal(.5, 1, 50)]))
    found = moments(t, 'variant', ['y']); e = lift(found['a'], found['b'], 'y')
    assert e.ci_lower is None and e.ci_upper is None
    sure = lift(*[moments(TABLE, 'variant', ['spend'])[v] for v in ('old', 'new')], 'spend')
    assert sure.ci_lower < sure.value < sure.ci_upper and sure.value == pytest.approx(TABLE.groupby('variant').spend.mean().pipe(lambda m: m['new']/m['old'] - 1), rel=1e-9)

@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.floats(.01, 1e3), st.integers(0, 10**6))
def test_units_of_measurement_do_not_matter(scale, seed):
    t = people(300, seed=seed); a, b = moments(t, 'variant', ['spend', 'before']), moments(t.assign(spend=scale*t.spend, before=7*t.before), 'variant', ['spend', 'before'])
    one, two = difference(a['old'], a['new'], 'spend', 'before'), difference(b['old'], b['new'], 'spend', 'before')
    assert [scale*one.value, scale*one.ci_lower, scale*one.ci_upper] == pytest.approx([two.value, two.ci_lower, two.ci_upper], rel=1e-6, abs=1e-9*scale)

def test_corrected_p_values_are_statsmodels():
    from statsmodels.stats.multitest import multipletests
    p = np.random.default_rng(SEED).random(15)**3
    for how in ('holm', 'fdr_bh'): assert adjusted(p, how) == pytest.approx(multipletests(p, method=how)[1].tolist(), rel=1e-12)
    assert adjusted([], 'holm') == [] and adjusted([.03]) == [.03]

@pytest.mark.parametrize('n, k', [(5, 3), (10, 5), (30, 3)])
def test_few_people_and_many_covariates_keep_their_level(n, k):
    "The line is fitted to the very units it explains; without its price the interval for 5 + 5 units and 3 covariates held 80 % of the time."
    rng, cols, hit = np.random.default_rng(SEED), ('y', *[f'x{i}' for i in range(k)]), 0
    for _ in range(1500):
        rows = rng.normal(size=(2*n, 1 + k)); rows[:, 0] += .3*rows[:, 1:].sum(1)
        try: e = difference(*(Moments(cols, n, part.mean(0), np.cov(part.T)) for part in (rows[:n], rows[n:])), 'y', cols[1:])
        except TelemetryError as refusal: assert 'differs between the variants' in str(refusal); hit += .95; continue
        hit += e.ci_lower <= 0 <= e.ci_upper
    assert .93 < hit/1500 < .97

def test_adjusted_for_few_is_regression_and_its_interval_students():
    import statsmodels.formula.api as smf
    t = people(24, seed=3); t['variant'] = np.repeat(['old', 'new'], 12); found = moments(t, 'variant', ['spend', 'before'])
    c, fit = contrast(found['old'], found['new'], 'spend', 'before'), smf.ols('spend ~ variant + before', t.assign(variant=(t.variant == 'new')*1.)).fit()
    assert c.value == pytest.approx(fit.params['variant'], rel=1e-9) and c.se == pytest.approx(fit.bse['variant'], rel=1e-9) and c.df < 21   # as many in both: the classical error
    one = contrast(found['old'], found['new'], 'spend').mean('control'); half = (one.ci_upper - one.ci_lower)/2
    from scipy.stats import t as student
    assert half == pytest.approx(student.ppf(.975, 11)*t.spend[t.variant == 'old'].sem(), rel=1e-9)

# --- may it be read

def test_shares():
    assert srm({'a': 5000, 'b': 5200})['verdict'] == 'pass' and srm({'a': 50_000, 'b': 52_000})['verdict'] == 'fail' and srm({'a': 900, 'b': 100}, {'a': .9, 'b': .1})['p_value'] == pytest.approx(1)
    for counts, shares, said in (({'a': 5}, None, 'one variant'), ({'a': 5, 'b': 0}, None, "'b' has 0 units"), ({'a': 5, 'c': 5}, {'a': .5, 'b': .5}, "'c' has no declared share"), ({'a': 5, 'b': 5}, {'a': 1, 'b': 0}, 'not above 0'), ({'a': 5, 'b': 5}, {'a': .9, 'b': .01}, 'shares sum to 0.91')):
        with pytest.raises(TelemetryError, match=said): srm(counts, shares)

def test_shares_of_a_small_holdout_are_asked_exactly():
    from scipy.stats import binomtest
    assert srm({'held': 5, 'open': 15}, {'held': .05, 'open': .95})['p_value'] == pytest.approx(2*binomtest(5, 20, .05, 'greater').pvalue) and srm({'held': 1, 'open': 19}, {'held': .05, 'open': .95})['p_value'] == 1
    rng = np.random.default_rng(SEED); n = rng.binomial(40, .05, 20_000); n = n[n > 0]
    assert np.mean([srm({'held': k, 'open': 40 - k}, {'held': .05, 'open': .95})['verdict'] == 'fail' for k in n]) < .002    # chi-squared: .8 %

@pytest.mark.parametrize('bounds, direction, answer', [((-.004, .03), 'up', 'pass'), ((-.03, .01), 'up', 'inconclusive'), ((-.03, -.011), 'up', 'fail'), ((-.03, .004), 'down', 'pass'), ((.011, .03), 'down', 'fail')])
def test_a_guardrail_is_kept_when_a_loss_is_refuted(bounds, direction, answer): assert non_inferior(Estimate(sum(bounds)/2, *bounds, 100), 1., .01, direction).answer == answer

# --- bad tables

both = pd.concat([TABLE, TABLE.head(3).assign(variant=np.where(TABLE.variant.head(3) == 'new', 'old', 'new'))])
BAD = {'a metric that is not there': (dict(metrics=['spent']), "no column 'spent'; its columns are user_id"), 'no metric': (dict(metrics=[]), 'metrics is empty'),
       'words': (dict(table=TABLE.assign(spend='much')), "spend is VARCHAR ('much' and such in 4000 rows)"), 'a variant that is no name': (dict(table=TABLE.assign(variant=TABLE.variant.where(TABLE.index > 1, ''))), 'variant is empty in 2 rows'),
       'a row of a unit without a variant': (dict(table=pd.concat([TABLE, TABLE.head(3).assign(variant=None)]), per='sum'), 'variant is empty in 3 rows'), 'nobody known to be exposed': (dict(table=TABLE.assign(met=pd.Timestamp('2025-01-02')).assign(met=lambda t: t.met.where(t.index > 8), came=pd.Timestamp('2025-01-03')), exposed='met', outcome='came'), 'met is empty in 9 rows'),
       'times that are words': (dict(table=TABLE.assign(met='10.1.2025', came='9.2.2025'), exposed='met', outcome='came'), 'met is VARCHAR; a time is a date'), 'times of two kinds': (dict(table=TABLE.assign(met=5, came=pd.Timestamp('2025-01-03')), exposed='met', outcome='came'), 'times are compared where they are of one kind'), 'gaps': (dict(table=TABLE.assign(spend=TABLE.spend.where(TABLE.index > 4))), 'spend has 5 empty values'), 'endless': (dict(table=TABLE.assign(spend=np.inf)), 'no finite numbers'),
       'two variants for a unit': (dict(table=both), '3 units of user_id are in two variants'), 'a unit twice': (dict(table=pd.concat([TABLE, TABLE.head(3)])), '3 units of user_id have several rows'), 'nobody': (dict(table=TABLE.head(0)), '0 rows'), 'rows that are neither added nor averaged': (dict(per='max'), "per is 'max'"),
       'a variant of blanks': (dict(table=TABLE.assign(variant=TABLE.variant.where(TABLE.index > 2, '  '))), 'variant is empty in 3 rows'), 'a cap without end': (dict(caps={'spend': np.inf}), 'the cap of spend is inf'),
       'a unit without a name': (dict(table=TABLE.assign(user_id=TABLE.user_id.where(TABLE.index > 1))), 'user_id is empty in 2 rows'), 'a variant without a name': (dict(table=TABLE.assign(variant=TABLE.variant.where(TABLE.index > 1))), 'variant is empty in 2 rows'),
       'a million variants': (dict(table=TABLE.assign(variant=TABLE.user_id.astype(str))), 'more than 100 distinct values'), 'metric and covariate': (dict(covariates=['spend']), 'metric and covariate at once'), 'a cap on nothing': (dict(caps={'x': 1.}), "cap is given for 'x'"),
       'an outcome before its exposure': (dict(table=TABLE.assign(met=pd.Timestamp('2025-01-02'), came=pd.Timestamp('2025-01-01')), exposed='met', outcome='came'), 'met is later than came in 4000 rows'),
       'a covariate measured after exposure': (dict(table=TABLE.assign(met=pd.Timestamp('2025-01-02'), seen=pd.Timestamp('2025-01-03')), covariates=['before'], exposed='met', covariate_end='seen'), 'seen is later than met in 4000 rows')}

@pytest.mark.parametrize('name', BAD)
def test_bad_tables_are_refused_in_one_line(name):
    change, said = BAD[name]; change = dict(change); table = change.pop('table', TABLE)
    with pytest.raises(TelemetryError) as e: read_units(table, 'user_id', 'variant', **(dict(metrics=['spend']) | change))
    assert said in str(e.value) and '\n' not in str(e.value) and ';' in str(e.value)

def test_a_day_is_not_before_its_hours():
    t = TABLE.assign(met=pd.Timestamp('2025-01-02 10:00'), came=pd.Timestamp('2025-01-02').date())
    assert read_units(t, 'user_id', 'variant', ['spend'], exposed='met', outcome='came')['old'].n

def test_what_a_csv_writes_in_letters(tmp_path):
    "Truth values are 0 and 1; inf and a column of nothing are told by name, not as words; variants stay as written."
    t = TABLE.head(200).assign(won=lambda t: t.spend > 3, nothing=np.nan, endless=lambda t: t.spend.where(t.index > 1, np.inf)); t.to_csv(tmp_path/'t.csv', index=False); t.to_parquet(tmp_path/'t.parquet')
    for path in (tmp_path/'t.csv', tmp_path/'t.parquet', t):
        assert read_units(path, 'user_id', 'variant', ['won'])['old'].mean[0] == pytest.approx(t.won[t.variant == 'old'].mean())
        for name, said in (('nothing', 'nothing has 200 empty values'), ('endless', 'endless has 0 empty values and 2 that are no finite numbers')):
            with pytest.raises(TelemetryError, match=said): read_units(path, 'user_id', 'variant', [name])
    for names in (('007', '7'), ('True', 'False'), ('0.0', '1.0')):
        t.assign(variant=np.where(t.variant == 'old', *names)).to_csv(tmp_path/'v.csv', index=False); assert set(read_units(tmp_path/'v.csv', 'user_id', 'variant', 'spend')) == set(names)

def test_files_by_their_names(tmp_path):
    "Signs of a pattern stand for themselves: t[1].csv once read t1.csv."
    TABLE.to_csv(tmp_path/'t[1].csv', index=False); TABLE.assign(spend=0.).to_csv(tmp_path/'t1.csv', index=False); TABLE.to_parquet(tmp_path/'T.PARQUET')
    want = TABLE.spend[TABLE.variant == 'old'].mean()
    for name in ('t[1].csv', 'T.PARQUET'): assert moments(tmp_path/name, 'variant', ['spend'])['old'].mean[0] == pytest.approx(want)
    TABLE.head(0).to_csv(tmp_path/'head.csv', index=False); (tmp_path/'empty.csv').touch()
    for name, said in (('head.csv', 'the table has 0 rows'), ('empty.csv', 'is empty; a table has a header and rows')):
        with pytest.raises(TelemetryError, match=said): read_units(tmp_path/name, 'user_id', 'variant', ['spend'])

def test_what_cannot_be_compared():
    flat, touched = moments(TABLE.assign(spend=3.), 'variant', ['spend']), moments(TABLE.assign(before=TABLE.before + (TABLE.variant == 'new')), 'variant', ['spend', 'before'])
    with pytest.raises(TelemetryError, match='the same .3. for every unit'): difference(flat['old'], flat['new'], 'spend')
    with pytest.raises(TelemetryError, match='covariate before differs between the variants'): difference(touched['old'], touched['new'], 'spend', 'before')
    whole = moments(TABLE.assign(spend=2*TABLE.before), 'variant', ['spend', 'before'])
    with pytest.raises(TelemetryError, match='spend follows from before to the last digit'): difference(whole['old'], whole['new'], 'spend', 'before')
    arm = (TABLE.variant == 'new')*1.; ones = moments(TABLE.assign(spend=arm, visits=TABLE.visits - TABLE.visits.mean(), small=1e-150*TABLE.spend, large=1e120*TABLE.spend), 'variant', ['spend', 'visits', 'small', 'large', 'clicks'])
    for metric, said in (('spend', 'spend does not vary within the variants'), ('clicks/visits', 'visits averages .*; a ratio needs a denominator that is surely not 0'), ('small', 'small is around .*e-150'), ('large', 'large is around .*e.120')):
        with pytest.raises(TelemetryError, match=said): contrast(ones['old'], ones['new'], metric)
    few = moments(TABLE.head(4).assign(variant=['old', 'new', 'old', 'new']), 'variant', ['spend', 'before', 'clicks'])
    with pytest.raises(TelemetryError, match='4 units for 2 covariates'): difference(few['old'], few['new'], 'spend', ['before', 'clicks'])
