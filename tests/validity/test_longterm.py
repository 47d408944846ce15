"""Do the first days tell the truth about staying? A world of tables and the simulated product, each lived in full for the truth.

`python tests/validity/test_longterm.py` runs the full declared study; `pytest` a part of it. Seeds are declared here, once."""
import argparse, dataclasses, json
import numpy as np, pandas as pd, pytest
from telemetry_loop.config import load_params
from telemetry_loop.longterm import ship_decisions
from telemetry_loop.survival import bgnbd, cox, kaplan_meier, staying
from telemetry_loop.estimate import Estimate, mean, wald
from telemetry_loop.schema import Slates
from telemetry_loop.simulate import DIMS, SimulateConfig, World
from telemetry_loop.surrogate import lope, proxy, surrogacy, surrogate_index

SEED = 60_001                                                    # of all that is drawn below
WORLDS, TRUTHS = range(7000, 7200), range(7900, 7906)            # seeds of the products that are judged, and of those lived twice
DIRECT, DOSES = (0., .5, 1.), (0., .25, .5, .75, 1.)
inside = lambda e, truth: bool(e.ci_lower <= truth <= e.ci_upper)
shown = lambda hits: round(float(np.mean(hits)), 4)

# ---- a world of tables: five kinds of people, five doses of bait, six patterns of first days
LOGGING, POLICY = np.array([.5, .25, .15, .07, .03]), dict(action='a', target={4: 1.}, baseline={0: 1.}, features='cells', dose=True)

class Tabular:
    "r = g(x, s) + direct h(x, a) + noise; the first days do not see h."
    def __init__(self, direct):
        rng = np.random.default_rng(SEED)
        self.direct, self.g, self.h = direct, rng.normal(0, 1, (5, 6)), (1 + .3*rng.normal(size=(5, 1)))*np.linspace(.6, -.6, 5)
        odds = np.exp(rng.normal(0, .8, (5, 5, 6))); self.to_s = odds/odds.sum(2, keepdims=True)
    def draw(self, n, policy, rng):
        x, a = rng.integers(0, 5, n), rng.choice(5, n, p=policy)
        s = (rng.random(n)[:, None] > self.to_s[x, a].cumsum(1)).sum(1).clip(0, 5)
        return pd.DataFrame(dict(x=x, a=a, s=s, propensity=policy[a], r=self.g[x, s] + self.direct*self.h[x, a] + rng.normal(size=n)))
    def value(self, a): return float(((self.to_s*self.g[:, None]).sum(2) + self.direct*self.h)[:, a].mean())
    def gain(self): return self.value(4) - self.value(0)
    def test(self, n, rng): return pd.concat([self.draw(n, np.eye(5)[a], rng).assign(variant=v)[['x', 's', 'variant']] for v, a in (('control', 0), ('treatment', 4))], ignore_index=True)

def study_table(runs:int)->dict: # direct effect -> method -> bias, rmse, wrong
    "The table of the reference: bias and RMSE at three direct effects."
    out = {}
    for direct in DIRECT:
        rng, world, rows, answers = np.random.default_rng([SEED, 1, int(2*direct)]), Tabular(direct), [], []
        for _ in range(runs):
            history, test = world.draw(5000, LOGGING, rng), world.test(1000, rng)
            index, long = surrogate_index(history, test, 'r', ['s'], ['x'], features='cells'), lope(history, 'r', ['s'], ['x'], test=test, **POLICY)
            rows.append([e.value - world.gain() for e in (index.gain, long.ips, long.dr, long.gain)] + [inside(e, world.gain()) for e in (index.gain, long.ips, long.dr, long.gain)])
            answers.append(surrogacy(index, long, .3)[1].answer)
        found = np.array(rows, float); error, hit = found[:, :4], found[:, 4:]
        out[direct] = {name: dict(bias=round(float(error[:, j].mean()), 3), rmse=round(float(np.sqrt((error[:, j]**2).mean())), 3), covered=shown(hit[:, j])) for j, name in enumerate(('index', 'ips', 'dr', 'lope'))} \
            | {'gain': round(world.gain(), 3), 'surrogacy': {a: answers.count(a)/runs for a in ('pass', 'inconclusive', 'fail')}}
    return out

def study_coverage(runs:int)->dict:
    "Does the index's interval hold when surrogacy does, and the naive one?"
    rng, world = np.random.default_rng([SEED, 2]), Tabular(0.)
    found = [surrogate_index(world.draw(2000, LOGGING, rng), world.test(3000, rng), 'r', ['s'], ['x'], features='cells') for _ in range(runs)]
    return dict(runs=runs, with_model_error=shown([inside(i.gain, world.gain()) for i in found]), naive=shown([inside(i.naive, world.gain()) for i in found]))

def study_proxy(runs:int)->dict:
    "True slope -.5; the naive regression has the wrong sign."
    rng, noise, out = np.random.default_rng([SEED, 3]), 2/500*np.array([[1, .6], [.6, 1]]), []
    for _ in range(runs):
        true = .0507*rng.normal(size=300)
        p = proxy(np.c_[true, -.5*true + .01*rng.normal(size=300)] + rng.multivariate_normal([0, 0], noise, 300), noise)
        out.append((p.slope.value, p.naive, inside(p.slope, -.5)))
    found = np.array(out, float); quarter = np.quantile(found[:, 0], [.25, .75])
    return dict(runs=runs, corrected=round(float(np.median(found[:, 0])), 3), iqr=quarter.round(3).tolist(), naive=round(float(np.median(found[:, 1])), 3), covered=shown(found[:, 2]))

def study_survival(runs:int)->dict:
    "S(28) at n = 20,000 and hazard ratios, under right censoring."
    rng, s28, ratios, covered = np.random.default_rng([SEED, 4]), [], [], []
    def joiners(n, hazard): joined, stay = rng.uniform(0, 60, n), rng.exponential(1/hazard, n); return np.minimum(stay, 60 - joined), stay <= 60 - joined
    for _ in range(runs):
        d, e = joiners(20_000, 1/30); at = staying(kaplan_meier(d, e), 28)
        s28.append([at.value, (d[e] > 28).mean(), (d > 28).mean()]); covered.append(inside(at, np.exp(-28/30)))
        a, b = joiners(2000, 1/30), joiners(2000, 1/30*np.exp(.2))
        h = cox(pd.DataFrame(dict(t=np.r_[a[0], b[0]], e=np.r_[a[1], b[1]], z=np.repeat([0, 1], 2000))), 't', 'e', ['z'])['z']
        ratios.append((np.log(h.value) - .2)/(np.log(h.ci_upper/h.ci_lower)/3.92))
    error = np.abs(np.array(s28) - np.exp(-28/30))
    return dict(runs=runs, km_worst_error=round(float(error[:, 0].max()), 4), km_within_a_hundredth=shown(error[:, 0] <= .01), km_covered=shown(covered), naive_gone_error=round(float(error[:, 1].mean()), 3), naive_censored_error=round(float(error[:, 2].mean()), 3),
                hazard_within_3_se=shown(np.abs(ratios) <= 3), hazard_within_2_se=shown(np.abs(ratios) <= 2))

# ---- the simulated product
PRE, FIRST, LONG = 7, 7, (14, 28)            # days before; first days; days of living with it on which return is counted
HISTORY = np.array([.4, .2, .15, .1, .15])   # shares of the doses in history
TEST = np.array([.35, .1, .1, .1, .35])      # and in the short test
SEEN = {'clicks': ['clicks', 'ctr'], 'everything': ['clicks', 'ctr', 'satisfied', 'complaints', 'visits']} # what the index may see of the first days

class Baited:
    "Ranks by taste and luck; everyone's dose ranks clickbait up."
    def __init__(self, world, dose): self.world, self.dose = world, dose # dose: (users,) 0..1
    def decide(self, contexts, rng):
        w, rows, there = self.world, np.searchsorted(self.world.user_ids, contexts.user_id), contexts.candidates != ''
        items = np.minimum(np.searchsorted(w.item_ids, contexts.candidates), len(w.item_ids) - 1)
        score = np.einsum('nd,nmd->nm', w.people['taste'][rows], w.stock['traits'][items])/np.sqrt(DIMS) + 3*self.dose[rows, None]*w.stock['clickbait'][items] + .5*rng.gumbel(size=items.shape)
        slate = np.take_along_axis(contexts.candidates, np.argsort(np.where(there, -score, np.inf), 1)[:, :w.cfg.slate], 1)
        return Slates(slate, np.ones(slate.shape), np.ones(slate.shape), np.ones(len(slate), bool), 'bait', 'study') # not used for evaluation by propensity of items

def product(seed, users=500):
    cfg = load_params(SimulateConfig, 'simulate')
    world = World(dataclasses.replace(cfg, days=1, users=users, new_items=1, clickbait=5., goodwill=2., no_consent=0., seasonality=0., faults=dataclasses.replace(cfg.faults, bots=0.)), seed)
    world.people['arrives'][:] = 0                                                   # everyone is there from the first day
    return world

def life(seed, shares, days): # -> one row a user: dose, propensity, days before, first days, return
    "A week without bait, then everyone at a dose drawn by `shares`."
    world = product(seed); n = world.cfg.users; level = np.random.default_rng([seed, SEED]).choice(5, n, p=shares); dose = np.array(DOSES)[level]
    before, first = world.live(Baited(world, np.zeros(n)), PRE), world.live(Baited(world, dose), FIRST)
    table = pd.DataFrame(dict(a=dose, propensity=shares[level], visits0=before.visited.mean(1), clicks0=before.clicks, clicks=first.clicks, ctr=first.clicks/np.maximum(first.decisions, 1),
                              satisfied=first.satisfied, complaints=first.complaints, visits=first.visited.mean(1)))
    if days > FIRST: table['r'] = world.live(Baited(world, dose), days - FIRST).visited[:, LONG[0] - FIRST:].mean(1)
    return table

def truths(seeds, days:int=LONG[1], start:int=LONG[0])->dict: # dose -> return under it minus return without, the same luck
    "Both policies lived by the same people in the same world."
    def lived(seed, dose):
        world = product(seed); n = world.cfg.users
        world.live(Baited(world, np.zeros(n)), PRE)
        return world.live(Baited(world, np.full(n, dose)), days).visited[:, start:].mean()
    doses = DOSES if days == LONG[1] else (0., 1.)
    table = np.array([[lived(s, d) for d in doses] for s in seeds])
    return {d: mean(table[:, j] - table[:, 0]) for j, d in enumerate(doses) if d}

def judged(seed:int)->dict: # method -> Estimate by dose
    "One history in one world, one short test in another, and what each method says."
    history, test = life(seed, HISTORY, LONG[1]), life(seed + 100_000, TEST, FIRST)
    out, x = {}, ['visits0', 'clicks0']
    for d in DOSES[1:]:
        arms = test[test.a.isin((0., d))].assign(variant=lambda t: np.where(t.a == d, 'treatment', 'control'))
        ctr = [arms.loc[arms.variant == v, 'ctr'] for v in ('control', 'treatment')]
        found = {'click-only': wald(float(ctr[1].mean() - ctr[0].mean()), float(np.sqrt(sum(c.var()/len(c) for c in ctr))), len(arms))}
        for name, s in SEEN.items(): found[f'index of {name}'] = surrogate_index(history, arms, 'r', s, x).gain
        if d == 1:
            for name, s in SEEN.items():
                long = lope(history, 'r', s, x, action='a', target={d: 1.}, baseline={0.: 1.}, dose=True)
                found |= {f'LOPE with {name}': long.gain}
            found |= {'ips': long.ips, 'dr': long.dr}
            held = [history.loc[history.a == v, 'r'] for v in (0., d)]
            found['holdout'] = wald(float(held[1].mean() - held[0].mean()), float(np.sqrt(sum(h.var()/len(h) for h in held))), sum(map(len, held)))
        out[d] = found
    return out

def study_world(seeds, truth_seeds, progress=False)->dict:
    "Ship decisions over many worlds."
    from tqdm import tqdm
    truth = truths(truth_seeds)
    runs = [judged(s) for s in tqdm(seeds, desc='worlds', unit='world', disable=not progress)]
    said = {rule: [ship_decisions(r[1.], truth[1.].value, rule)['wrong'].astype(float) for r in runs] for rule in ('sign', 'sure')}
    out = dict(worlds=len(runs), truth_worlds=len(truth_seeds), truth={d: str(e) for d, e in truth.items()}, wrong_by_sign=pd.concat(said['sign'], axis=1).mean(1).round(3).to_dict(), wrong_when_sure=pd.concat(said['sure'], axis=1).mean(1).round(3).to_dict())
    value = lambda d, name: np.array([r[d][name].value for r in runs])
    out['bias'] = {name: {d: round(float((value(d, name) - truth[d].value).mean()), 4) for d in DOSES[1:] if name in runs[0][d]} for name in runs[0][1.] if name != 'click-only'}
    out['rmse_at_full'] = {name: round(float(np.sqrt(((value(1., name) - truth[1.].value)**2).mean())), 4) for name in out['bias']}
    return out

# ---- a part of it in every test run
def test_index_covers_and_the_naive_interval_does_not():
    found = study_coverage(400)
    assert .93 <= found['with_model_error'] <= .975 and found['naive'] < .9

def test_the_index_degrades_with_the_direct_effect_and_lope_does_not():
    found = study_table(15)
    bias = {m: [abs(found[d][m]['bias']) for d in DIRECT] for m in ('index', 'lope')}
    assert bias['index'][0] < .05 and bias['index'][0] < bias['index'][1] < bias['index'][2] and bias['index'][2] > .5 and max(bias['lope']) < .12
    assert found[1.]['surrogacy']['fail'] >= .9 and found[0.]['surrogacy']['fail'] <= .2

def test_proxies():
    found = study_proxy(60)
    assert abs(found['corrected'] + .5) < .06 and abs(found['naive'] - .17) < .06

def test_survival_under_censoring():
    found = study_survival(5)
    assert found['km_worst_error'] <= .0125 and found['hazard_within_3_se'] == 1 and min(found['naive_gone_error'], found['naive_censored_error']) > .05

def test_clicks_ship_harm_and_lope_does_not():
    found = study_world(WORLDS[:4], TRUTHS[:1])
    wrong = found['wrong_by_sign']
    assert wrong['click-only'] >= .8 and wrong['LOPE with clicks'] <= .2 and wrong['LOPE with everything'] <= .2 and wrong['holdout'] <= .2
    bias = found['bias']['index of clicks']
    assert bias[1.] > bias[.5] > .01 and bias[1.] > 2*found['bias']['LOPE with clicks'][1.]

def main(scale:float=1., only=None): # scale: share of the declared runs; only: names of studies
    few = lambda n: max(2, int(n*scale))
    work = dict(coverage=lambda: study_coverage(few(2000)), proxy=lambda: study_proxy(few(200)), survival=lambda: study_survival(few(100)), table=lambda: study_table(few(200)),
                world=lambda: study_world(WORLDS[:few(len(WORLDS))], TRUTHS[:few(len(TRUTHS))], True), truth_90_days=lambda: {d: str(e) for d, e in truths(TRUTHS[:few(len(TRUTHS))], 90, 60).items()})
    for name in only or work: print(name, json.dumps(work[name](), indent=1), flush=True)

if __name__ == '__main__':
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--scale', type=float, default=1., help='share of the declared runs'); cli.add_argument('--only', nargs='*', help='names of studies')
    asked = cli.parse_args(); main(asked.scale, asked.only)
