"""Do effects by segment, factor, layer and day cover and err as often as they say? The naive reading beside each, in the same worlds.

A part of it runs in the suite; `python tests/validity/test_effects.py` runs the declared counts and prints what was asked and what was measured. Seeds, worlds and bars are declared here, once. Noise is skewed and
larger under treatment, groups are of unequal size, moods last from day to day."""
import numpy as np, pandas as pd, pytest
from telemetry_loop.comparable import adjusted_effect, did, post_stratified
from telemetry_loop.effects import factorial, layer_checks, novelty, segment_effects

SEED, RUNS, MANY = 20266, 2000, 4000   # MANY where the rate of a test is asked to within a point
LEVELS, FACTORS = dict(screen=('old', 'new'), ranking=('A', 'B')), {'screen': .05, 'ranking': -.1, 'screen x ranking': -.5}

inside = lambda e, truth: e.ci_lower is not None and e.ci_lower <= truth <= e.ci_upper
rate = lambda found: {k: float(v) for k, v in pd.DataFrame(found).mean().items()}
skewed = lambda rng, n, scale=1.: (rng.exponential(size=n) - 1)*scale
plain = lambda a, b: (b.mean() - a.mean(), np.sqrt(a.var(ddof=1)/len(a) + b.var(ddof=1)/len(b))) # rows as if each were a person
covers = lambda found, truth: abs(found[0] - truth) <= 1.959964*found[1]

def study_segments(runs, turns):
    "Everybody gains the same .15; then nobody gains anything and twenty segments are looked through."
    rng, out = np.random.default_rng(SEED), []
    for _ in turns(range(runs), 'segments'):
        n = 1800; arm = rng.random(n) < .4; t = pd.DataFrame(dict(variant=np.where(arm, 'new', 'control'), usage=rng.choice(['a', 'b', 'c'], n, p=[.6, .25, .15]))); t['y'] = skewed(rng, n, np.where(arm, 1.5, 1.)) + .15*arm
        found = segment_effects(t, 'y', 'variant', 'usage', least=50); p = found.table.p_value < .05
        out.append(dict(interaction_test=found.tests['usage']['p_value'] <= .05, one_significant_another_not=p.any() and not p.all(), coverage=np.mean([inside(e, .15) for e in found.effects.values()])))
    fish = []
    for _ in turns(range(runs//8), 'fishing'):
        t = pd.DataFrame(rng.integers(2, size=(800, 20)), columns=[f's{i}' for i in range(20)]).assign(variant=rng.choice(['control', 'new'], 800), y=rng.normal(size=800)); found = segment_effects(t, 'y', 'variant', [f's{i}' for i in range(20)])
        fish.append(dict(fished=(found.table.p_value < .05).any(), fished_adjusted=(found.table.adjusted < .05).any(), interactions_fished=any(x['p_value'] < .05 for x in found.tests.values()), interactions_adjusted=any(x['differs'] for x in found.tests.values())))
    return rate(out) | rate(fish)

def study_factorial(runs, turns):
    "Four unequal cells; alone the two gain .3 and .15, together they lose .05."
    rng, out = np.random.default_rng(SEED + 1), []
    for _ in turns(range(runs), 'factorial'):
        n = 600; s, r = rng.random(n) < .4, rng.random(n) < .3; t = pd.DataFrame(dict(screen=np.where(s, 'new', 'old'), ranking=np.where(r, 'B', 'A'), y=skewed(rng, n, 1 + s) + .3*s + .15*r - .5*s*r))
        found = factorial(t, 'y', LEVELS); c = lambda a, b: t.y[(s == a) & (r == b)]; parts = [c(a, b) for a, b in ((0, 0), (1, 0), (0, 1))]
        promised = parts[1].mean() + parts[2].mean() - 2*parts[0].mean(), np.sqrt(parts[1].var()/len(parts[1]) + parts[2].var()/len(parts[2]) + 4*parts[0].var()/len(parts[0]))
        out.append({k: inside(e, v) for k, v in FACTORS.items() for e in [found.effects[k]]} | dict(one_at_a_time=covers(promised, -.05)))
    return rate(out)

def study_layers(runs, turns):
    "Four experiments in layers, none of which influences another; then two of them do."
    rng, out = np.random.default_rng(SEED + 2), []
    for _ in turns(range(runs), 'layers'):
        t = pd.DataFrame({e: rng.choice(['control', 'new'], 1200) for e in 'abcd'}); noise = skewed(rng, 1200); clash = .4*((t.a == 'new') & (t.b == 'new'))
        null, hit = layer_checks(t.assign(y=noise), 'y', list('abcd')), layer_checks(t.assign(y=noise + clash), 'y', list('abcd'))
        out.append(dict(any_interaction=(null.interaction <= .05).any(), any_dependence=(null.independence <= .05).any(), clash_found=hit.interaction[0] <= .05))
    return rate(out)

def moods(rng, n, k, stay=.8):
    "(n, k) moods that last from day to day."
    x = rng.normal(size=(n, k))
    for d in range(1, k): x[:, d] = stay*x[:, d-1] + np.sqrt(1 - stay**2)*x[:, d]
    return x

def long(y, arm, name):
    n, k = y.shape
    return pd.DataFrame(dict(user=np.repeat(np.arange(n), k), day=np.tile(np.arange(k), n), variant=np.repeat(np.where(arm, name, 'control'), k), y=y.ravel()))

FADE = .5*np.exp(-np.arange(12)/3.) + .1
def known_power()->float: # of the slope test, 150 units an arm, a tenth of the days missing
    "What theory says: moods have covariance .8^|distance|."
    from scipy.special import ndtr
    x = np.arange(12) - 5.5; w = x/(x @ x); cov = .8**np.abs(np.subtract.outer(x, x)) + np.eye(12)*(1/.9 - 1)
    return float(ndtr(abs(w @ FADE)/np.sqrt(4/300*w @ cov @ w) - 1.959964))

def study_novelty(runs, turns):
    "An effect of .2 that lasts; one that fades from .6 to .1."
    rng, out = np.random.default_rng(SEED + 3), []
    for i in turns(range(runs), 'novelty'):
        arm = rng.random(300) < .4; x = moods(rng, 300, 12); x[rng.random(x.shape) < .1] = np.nan; tell = lambda gain: novelty(long(x + arm[:, None]*gain, arm, 'new').dropna(), 'user', 'day', 'y', 'variant')
        lasts = tell(np.full(12, .2)); seen = np.isfinite(x)
        row = dict(slope_test=lasts.p_value <= .05, called_fading=lasts.kind == 'fades', last_third=inside(lasts.last, .2), days_as_people=covers(plain(*((x + arm[:, None]*.2)[g][:, -4:][seen[g][:, -4:]] for g in (~arm, arm))), .2))
        if i < runs//2:
            fades = tell(FADE); row |= dict(power=fades.p_value <= .05, fading_found=fades.kind == 'fades', remains=inside(fades.remains, FADE[-4:].mean()/FADE[:4].mean()) if fades.remains.ci_lower is not None else np.nan, no_bounds=fades.remains.ci_lower is None, first_days_promised=inside(fades.first, FADE[-4:].mean()))
        out.append(row)
    return rate(out)

def study_did(runs, turns):
    "The treated were always .5 ahead, a season lifts all by .3, the effect is .2; then the treated also drift by .04 a day."
    rng, out = np.random.default_rng(SEED + 4), []
    for i in turns(range(runs), 'did'):
        arm = rng.random(200) < .35; after = np.arange(16) >= 8; y = moods(rng, 200, 16) + .5*arm[:, None] + .3*after + .2*arm[:, None]*after
        found = did(long(y, arm, 'new'), 'user', 'day', 'y', 'variant', 8); cell = [y[g][:, a] for g in (arm, ~arm) for a in (after, ~after)]
        rows = np.array([1, -1, -1, 1]) @ [c.mean() for c in cell], np.sqrt(sum(c.var()/c.size for c in cell))
        row = dict(refused=found.verdict.answer == 'fail', effect=inside(found.effect, .2) if found.effect.value is not None else np.nan, cautious=inside(found.cautious, .2), days_as_people=covers(rows, .2), before_after=covers(plain(y[arm][:, ~after].mean(1), y[arm][:, after].mean(1)), .2), treated_untreated=covers(plain(y[~arm][:, after].mean(1), y[arm][:, after].mean(1)), .2))
        if i < runs//2: drift = did(long(y + .04*np.arange(16)*arm[:, None], arm, 'new'), 'user', 'day', 'y', 'variant', 8); row |= dict(drift_refused=drift.verdict.answer == 'fail', drift_claimed_right=inside(drift.effect, .2) if drift.effect.value is not None else np.nan, drift_cautious=inside(drift.cautious, .2))
        out.append(row)
    return rate(out)

def study_adjusted(runs, turns):
    "Effects that differ with the covariate; once randomised, once chosen by it a little."
    rng, out = np.random.default_rng(SEED + 5), []
    for _ in turns(range(runs), 'adjusted'):
        row = {}
        for name, pull in (('randomised', 0.), ('chosen', .2)):
            x = rng.normal(size=500); arm = rng.random(500) < 1/(1 + np.exp(-pull*x + .5)); half = np.where(x > 0, 'high', 'low'); noise = skewed(rng, 500, .7 + .5*arm)
            t = pd.DataFrame(dict(variant=np.where(arm, 'new', 'control'), x=x, half=half, y=x + arm*(.2 + .3*x) + noise)); found = adjusted_effect(t, 'y', 'variant', ['x'])
            row |= {f'{name}_adjusted': inside(found.effect, .2), f'{name}_raw': inside(found.raw, .2)}
            if not pull: row |= dict(stratified=inside(post_stratified(t, 'y', 'variant', 'half'), .2), narrower=(found.effect.ci_upper - found.effect.ci_lower)/(found.raw.ci_upper - found.raw.ci_lower))
        out.append(row)
    return rate(out)

STUDIES = dict(segments=(study_segments, MANY), factorial=(study_factorial, RUNS), layers=(study_layers, RUNS//2), novelty=(study_novelty, MANY), did=(study_did, RUNS), adjusted=(study_adjusted, RUNS))
NOMINAL, SIZE = (.935, .965), (.04, .06)
BARS = {('segments', 'interaction_test'): SIZE, ('segments', 'coverage'): NOMINAL, ('segments', 'one_significant_another_not'): (.3, 1), ('segments', 'fished'): (.4, 1), ('segments', 'fished_adjusted'): (0, .07), ('segments', 'interactions_fished'): (.4, 1), ('segments', 'interactions_adjusted'): (0, .07),
    **{('factorial', k): NOMINAL for k in FACTORS}, ('factorial', 'one_at_a_time'): (0, .6), ('layers', 'any_interaction'): (0, .06), ('layers', 'any_dependence'): (0, .06), ('layers', 'clash_found'): (.5, 1),
    ('novelty', 'slope_test'): SIZE, ('novelty', 'called_fading'): (0, .06), ('novelty', 'last_third'): NOMINAL, ('novelty', 'days_as_people'): (0, .85), ('novelty', 'power'): (known_power() - .03, known_power() + .03), ('novelty', 'remains'): (.93, 1), ('novelty', 'first_days_promised'): (0, .5),
    ('did', 'effect'): NOMINAL, ('did', 'cautious'): (.95, 1), ('did', 'refused'): SIZE, ('did', 'days_as_people'): (0, .8), ('did', 'before_after'): (0, .6), ('did', 'treated_untreated'): (0, .3), ('did', 'drift_cautious'): (.95, 1),
    ('adjusted', 'randomised_adjusted'): NOMINAL, ('adjusted', 'chosen_adjusted'): NOMINAL, ('adjusted', 'stratified'): NOMINAL, ('adjusted', 'chosen_raw'): (0, .85), ('adjusted', 'narrower'): (0, .9)}

@pytest.mark.parametrize('name', STUDIES)
def test_a_part_of_the_study(name):
    "An eighth of the runs or less; bars wider by four standard errors of a rate."
    runs = {'segments': 320, 'factorial': 250, 'layers': 100, 'novelty': 250, 'did': 250, 'adjusted': 250}[name]; found = STUDIES[name][0](runs, lambda x, _: x)
    for (study, what), (low, high) in BARS.items():
        if study == name: n = runs//8 if 'fished' in what or what == 'interactions_adjusted' else runs; slack = 4*np.sqrt(.05*.95/n); assert low - slack <= found[what] <= high + slack, (what, found[what])

def main():
    "The declared counts."
    from tqdm import tqdm
    bad = 0
    for name, (study, runs) in STUDIES.items():
        for what, value in study(runs, lambda x, label: tqdm(x, desc=label, mininterval=5)).items():
            low, high = BARS.get((name, what), (None, None)); bad += (fine := low is None or low <= value <= high) is False
            print(f'{name:10} {what:32} {value:7.2%}  ' + ('' if low is None else f'asked {low:.1%} to {high:.1%}{"" if fine else "  MISSED"}'), flush=True)
    return bad

if __name__ == '__main__': raise SystemExit(main())
