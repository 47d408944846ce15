"""Does an experiment's verdict keep its promises? Thousands of experiments whose truth is known, with the usual mistakes failing beside.

`python tests/validity/test_experiment.py` is the full study (a few minutes of one core); the suite runs a part of it. Sample means and covariances of normal units are drawn from their exact
laws (normal and Wishart), which is the same as drawing the units, and faster; where shape matters (skewed metrics, sessions) units are drawn. Seeds are declared here, once."""
import argparse
import numpy as np
from telemetry_loop.experiment import Moments, analyse, contrast, srm
from telemetry_loop.plan import Plan

SEED = 20266
FULL = dict(aa=10_000, ratio=4_000, cuped=40_000, srm=5_000, gate=4_000, many=4_000, peek=4_000, lift=20_000, candidates=4_000)
PART = dict(aa=2_000, ratio=1_200, cuped=0, srm=5_000, gate=600, many=200, peek=500, lift=3_000, candidates=250)
RHOS = (.3, .5, .7, .9)

def of(x, columns): # (n, k) units -> moments
    return Moments(columns, len(x), x.mean(0), np.cov(x.T).reshape(x.shape[1], -1))

def drawn(rng, n, mean, cov, columns): # moments of n normal units
    mean, root = np.asarray(mean, float), np.linalg.cholesky(np.atleast_2d(cov)); k = len(mean)
    bartlett = np.tril(rng.normal(size=(k, k)), -1) + np.diag(np.sqrt(rng.chisquare(n - 1 - np.arange(k))))
    half = root @ bartlett
    return Moments(columns, n, mean + root @ rng.normal(size=k)/np.sqrt(n), half @ half.T/(n - 1))

def study_aa(runs)->dict: # test 10: p of nothing
    from scipy.stats import kstest
    rng, columns = np.random.default_rng(SEED), ('spend',)
    p = np.array([contrast(*(of(rng.lognormal(0, .8, (500, 1)), columns) for _ in 'ct'), 'spend').p_value for _ in range(runs)])
    return dict(ks=float(kstest(p, 'uniform').pvalue), alarms=float((p < .05).mean()))

def study_ratio(runs)->dict: # test 10: sessions of a user belong together
    from scipy.stats import kstest
    rng, p = np.random.default_rng(SEED + 1), np.empty((runs, 2))
    for i in range(runs):
        arms = []
        for _ in 'ct':
            n = 1 + rng.poisson(6, 300); clicks = rng.binomial(n, rng.beta(2, 6, 300)); rate, total = clicks.sum()/n.sum(), int(n.sum())
            arms.append((of(np.c_[clicks, n].astype(float), ('clicks', 'sessions')), Moments(('clicks',), total, np.array([rate]), np.array([[rate*(1 - rate)*total/(total - 1)]]))))
        p[i] = contrast(arms[0][0], arms[1][0], 'clicks/sessions').p_value, contrast(arms[0][1], arms[1][1], 'clicks').p_value
    return dict(delta=float((p[:, 0] < .05).mean()), ks=float(kstest(p[:, 0], 'uniform').pvalue), sessions=float((p[:, 1] < .05).mean()))

def study_cuped(runs)->dict: # test 11: rho -> variance ratio, bias in standard errors; and a covariate touched by the treatment, waved through
    rng, out, columns = np.random.default_rng(SEED + 2), {}, ('y', 'x')
    for rho in RHOS:
        found = np.full((runs, 3), np.nan); cov = np.array([[1, rho], [rho, 1]])
        for i in range(runs):
            c, t = drawn(rng, 1000, [5, 5], cov, columns), drawn(rng, 1000, [5.1, 5], cov, columns)
            try: found[i] = contrast(c, t, 'y', 'x').value, contrast(c, t, 'y').value, 1 - contrast(c, t, 'y', 'x').removed
            except ValueError: pass # one in a thousand covariates differs by chance
        told = found[~np.isnan(found[:, 0])]
        out[rho] = dict(ratio=float(told[:, 0].var()/told[:, 1].var()), said=float(told[:, 2].mean()), bias_se=float((told[:, 0].mean() - .1)/told[:, 0].std()*np.sqrt(len(told))), refused=1 - len(told)/runs)
    return out

def study_srm(runs)->dict: # test 12
    rng, n = np.random.default_rng(SEED + 3), 100_000
    alarm = lambda share: float(np.mean([srm({'c': n - k, 't': k})['verdict'] == 'fail' for k in rng.binomial(n, share, runs)]))
    return dict(even=alarm(.5), at_49=alarm(.49), at_505=alarm(.505))

N, SD, MARGIN_SE = 5_000, 2., 4. # units a variant; means are 10; the margin is four standard errors of a difference
SE = SD*np.sqrt(2/N)
def plan_of(**change): return Plan(**(dict(experiment='gate', hypothesis='It helps.', unit='user_id', control='c', shares={'c': .5, 't': .5}, primary=['p'], guardrails={'g': MARGIN_SE*SE/10}, directions={'p': 'up', 'g': 'up'}, secondary=[], segments=[], covariate_days=0, outliers={}, alpha=.05, power=.8, mde=3*SE/10, days=14, looks=[14], stopping='fixed') | change))

def study_gate(runs)->dict: # test 18: share of wins where the primary truly moves by so many standard errors, the guardrail by so many margins
    out, plan, cov = {}, plan_of(), SD**2*np.eye(2)
    for i, (name, (primary, guard)) in enumerate({'null': (0, 0), 'powered': (3, 0), 'harmful': (3, -2), 'at the margin': (3, -1), 'worse': (-3, 0)}.items()):
        rng, kinds, naive = np.random.default_rng([SEED + 4, i]), [], []
        for _ in range(runs):
            c, t = drawn(rng, N, [10, 10], cov, ('p', 'g')), drawn(rng, N, [10 + primary*SE, 10 + guard*MARGIN_SE*SE], cov, ('p', 'g'))
            kinds.append(analyse({'c': c, 't': t}, 'c', plan=plan).verdicts['t']['kind']); naive.append((t.mean[0] > c.mean[0], t.mean[0] - c.mean[0] > 1.96*SE))
        out[name] = {k: float(np.mean([x == k for x in kinds])) for k in ('win', 'harm', 'no difference shown', 'inconclusive')} | dict(zip(('higher', 'primary_alone'), np.mean(naive, 0).tolist()))
    rng, weak = np.random.default_rng(SEED + 5), []                                    # a tenth of the units: a loss of two margins is rarely significant
    for _ in range(runs):
        c, t = (drawn(rng, N//40, [10, 10 + (-2*MARGIN_SE*SE if v else 0)], cov, ('p', 'g')) for v in (0, 1))
        row = analyse({'c': c, 't': t}, 'c', plan=plan).metrics['t']['g']; weak.append((row['p_value'] > .05, row['kept']['answer'] == 'pass'))
    out['small and harmful'] = dict(zip(('no significant loss', 'kept'), np.mean(weak, 0).tolist()))
    return out

def study_many(runs)->dict: # test 18: twenty metrics in which nothing happens
    rng, names = np.random.default_rng(SEED + 6), tuple(f'm{i}' for i in range(20)); cov = SD**2*np.eye(20)
    plan, found = plan_of(primary=list(names), guardrails={}, directions={m: 'up' for m in names}), []
    for _ in range(runs):
        r = analyse({v: drawn(rng, N, [10.]*20, cov, names) for v in 'ct'}, 'c', plan=plan)
        found.append((any(m['significant'] for m in r.metrics['t'].values()), any(m['p_value'] < .05 for m in r.metrics['t'].values())))
    return dict(zip(('holm', 'uncorrected'), np.mean(found, 0).tolist()))

def study_candidates(runs)->dict: # test 18: twenty treatments that do nothing; wins or harms called by whoever picks the best and looks at it again, picks on one half of the people and tests on the other, or asks all twenty by the plan
    rng, cov, out = np.random.default_rng(SEED + 9), [[SD**2]], []
    variants = ['c', *(f't{i:02}' for i in range(20))]; plan = plan_of(shares={v: 1/21 for v in variants}, guardrails={}, directions={'p': 'up'})
    for _ in range(runs):
        halves = [{v: drawn(rng, 500, [10.], cov, ('p',)) for v in variants} for _ in range(2)]; every = {v: halves[0][v] + halves[1][v] for v in variants}
        p = lambda found, t: contrast(found['c'], found[t], 'p').p_value
        best = lambda found: min(variants[1:], key=lambda t: p(found, t))
        out.append((p(every, best(every)) < .05, p(halves[1], best(halves[0])) < .05, any(v['kind'] in ('win', 'harm') for v in analyse(every, 'c', plan=plan).verdicts.values())))
    return dict(zip(('best of twenty on the same people', 'picked on one half, tested on the other', 'all twenty by the plan'), np.mean(out, 0).tolist()))

def study_peek(runs)->dict: # wins or harms called at any of seven looks, nothing there
    looks = [2, 4, 6, 8, 10, 12, 14]; out = {}
    plans = {s: plan_of(guardrails={}, directions={'p': 'up'}, looks=looks, stopping=s) for s in ('group-sequential', 'anytime')}
    for effect, word in ((0., 'null'), (3.4, 'powered')):
        rng, called = np.random.default_rng([SEED + 7, int(effect)]), []
        for _ in range(runs):
            c, t, hit = None, None, dict.fromkeys((*plans, 'naive'), False)
            for day in looks:
                new = [drawn(rng, N//7, [10 + e], [[SD**2]], ('p',)) for e in (0, effect*SE)]
                c, t = (new[0], new[1]) if c is None else (c + new[0], t + new[1])
                for s, plan in plans.items(): hit[s] |= analyse({'c': c, 't': t}, 'c', plan=plan, day=day).verdicts['t']['kind'] in ('win', 'harm')
                hit['naive'] |= contrast(c, t, 'p').p_value < .05
            called.append(list(hit.values()))
        out[word] = dict(zip(hit, np.mean(called, 0).tolist()))
    return out

def study_lift(runs)->dict: # coverage of a lift of .1, CUPED, control's mean eight standard errors from 0; and of "the difference's interval over control's mean"
    rng, inside = np.random.default_rng(SEED + 8), []
    for _ in range(runs):
        cov = np.array([[9., 5], [5, 9]]); c, t = drawn(rng, 200, [1.7, 1], cov, ('y', 'x')), drawn(rng, 200, [1.7*1.5, 1], cov, ('y', 'x'))
        try: found = contrast(c, t, 'y', 'x')
        except ValueError: continue
        e, d = found.lift(found.z()), found.difference(found.z()).scale(1/found.control)
        inside.append((e.ci_lower is not None and e.ci_lower <= .5 <= e.ci_upper, d.ci_lower <= .5 <= d.ci_upper))
    return dict(zip(('fieller', 'divided'), np.mean(inside, 0).tolist()))

def check(name, found, runs):
    "The bars; each within chance of its nominal value."
    slack = 2.6*np.sqrt(.05*.95/runs) if runs else 0
    if name == 'aa': assert found['ks'] > .001 and abs(found['alarms'] - .05) < max(.01, slack), found
    if name == 'ratio': assert found['ks'] > .001 and abs(found['delta'] - .05) < max(.01, slack) and found['sessions'] > .1, found
    if name == 'cuped':
        for rho, f in found.items(): assert abs(f['ratio'] - (1 - rho**2)) < .01 and abs(f['said'] - (1 - rho**2)) < .01 and abs(f['bias_se']) < 4 and f['refused'] < .003, (rho, f)
    if name == 'srm': assert found['even'] <= .003 and found['at_49'] >= .99 and abs(found['at_505'] - .455) < .03, found
    if name == 'gate':
        assert found['null']['win'] <= .06 and found['null']['higher'] > .4 and found['powered']['win'] >= .8 and found['harmful']['win'] <= .01, found
        assert abs(found['harmful']['harm'] - .979) < 3*np.sqrt(.979*.021/runs), found # a loss eight standard errors deep is shown to be beyond a margin of four: P(z < 8 - 4 - 1.96)
        assert found['harmful']['primary_alone'] > .8 and found['at the margin']['win'] <= .025 + slack and found['worse']['harm'] >= .8 and found['worse']['win'] <= .01, found
        assert found['small and harmful']['no significant loss'] > .25 and found['small and harmful']['kept'] <= .01, found
    if name == 'many': assert found['holm'] <= .06 + (slack if runs < 1000 else 0) and found['uncorrected'] > .3, found
    if name == 'peek': assert found['null']['group-sequential'] <= .055 + (slack if runs < 2000 else 0) and found['null']['anytime'] <= .05 + (slack if runs < 2000 else 0) and found['null']['naive'] > .12 and found['powered']['group-sequential'] > .85 and found['powered']['anytime'] > .6, found
    if name == 'candidates': assert found['best of twenty on the same people'] > .2 and max(found['picked on one half, tested on the other'], found['all twenty by the plan']) <= .06 + (slack if runs < 1000 else 0), found
    if name == 'lift': assert abs(found['fieller'] - .95) < max(.005, slack) and found['divided'] < found['fieller'] - .05, found

STUDIES = {name[6:]: f for name, f in list(globals().items()) if name.startswith('study_')}

def test_nothing_is_found_where_nothing_is():
    for name in ('aa', 'ratio', 'many', 'peek'): check(name, STUDIES[name](PART[name]), PART[name])

def test_shares_gate_and_lift():
    for name in ('srm', 'gate', 'candidates', 'lift'): check(name, STUDIES[name](PART[name]), PART[name])

def test_cuped_takes_away_what_was_known():
    found = study_cuped(1_500)
    for rho, f in found.items(): assert abs(f['said'] - (1 - rho**2)) < .01 and abs(f['ratio'] - (1 - rho**2)) < .06 and abs(f['bias_se']) < 4, (rho, f)

def main():
    from tqdm import tqdm
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0]); cli.add_argument('--only', nargs='*', default=list(FULL)); args = cli.parse_args()
    failed = []
    for name in (bar := tqdm(args.only, unit='study')):
        bar.set_description(name); found = STUDIES[name](FULL[name])
        try: check(name, found, FULL[name]); kept = 'kept'
        except AssertionError: kept = 'NOT KEPT'; failed.append(name)
        tqdm.write(f'{name}, {FULL[name]:,} runs: {kept}')
        for k, v in found.items(): tqdm.write(f'    {k}: ' + (', '.join(f'{a} {b:.4f}' for a, b in v.items()) if isinstance(v, dict) else f'{v:.4f}'))
    if failed: raise SystemExit(f'bars not kept: {", ".join(failed)}')

if __name__ == '__main__': main()
