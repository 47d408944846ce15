"""Do the methods for looking repeatedly keep their promise, where the plain test does not? Tests 8 and 9 of the acceptance figures, and the sequential check of shares.

`python tests/validity/test_peeking.py` is the full study at its declared sizes; the suite runs a part. Seeds are declared here, once. Every method judges the same streams as the plain test beside it."""
import argparse, sys
import numpy as np

SEED, FULL, PART = 20268, dict(peeking=40_000, limits=20_000, shares=5_000), dict(peeking=6_000, limits=20_000, shares=1_500)
UNITS, EFFECT, PLAIN = 1000, .1, 1.959964
NAIVE = {5: .142, 10: .195, 20: .249, 100: .375}                                   # share of false alarms by number of looks
FIVE, UNEVEN = np.arange(1, 6)/5, np.array([.1, .15, .5, .55, 1.])

def chunks(runs:int, size:int, what:str):
    "Sizes of parts, with a bar."
    from tqdm import tqdm
    for start in tqdm(range(0, runs, size), desc=what, unit='part', disable=runs < 20_000, leave=False): yield min(size, runs - start)

def peeking(runs:int)->dict: # shares of `runs` experiments called an effect
    "Test 8: a thousand units, looked at after every one; no effect, and a tenth of a standard deviation."
    from telemetry_loop.sequential import always_valid_p, mixture
    rng, n, hits = np.random.default_rng(SEED), np.arange(1, UNITS + 1), {}
    def count(name, crossed): hits[name] = hits.get(name, 0) + int(crossed.sum())
    for size in chunks(runs, 500, 'peeking'):
        noise = rng.normal(size=(size, UNITS))
        for name, x in (('null', noise), ('effect', noise + EFFECT)):
            mean = x.cumsum(1)/n; se = np.sqrt(np.maximum((x**2).cumsum(1)/n - mean**2, 0)/np.maximum(n - 1, 1))
            z = mean*np.sqrt(n)                                                   # the spread is known to the plain test: the published figures
            lower, upper = mixture(mean, se, n, UNITS)
            out = ((lower > 0) | (upper < 0)).any(1); count(f'band, {name}', out)
            count(f'p disagrees with band, {name}', out != (always_valid_p(mean, se, n, UNITS)[:, -1] <= .05))
            count(f'one look, {name}', np.abs(z[:, -1]) > PLAIN)
            if name == 'null':
                for looks in NAIVE: count(f'naive {looks}', (np.abs(z[:, UNITS//looks - 1::UNITS//looks]) > PLAIN).any(1))
                count('naive every unit', (np.abs(z) > PLAIN).any(1))
                one = mixture(mean, se, n, UNITS, sides=1); count('lower bound', (one[0] > 0).any(1)); count('upper bound', (one[1] < 0).any(1))
    return {name: k/runs for name, k in hits.items()}

def limits(runs:int)->dict: # shares of `runs` experiments that crossed
    "Test 9: five looks at units whose spread is estimated; simulated type I of each kind of limit, even and uneven looks, and the plain test at the same looks."
    from telemetry_loop.sequential import CLASSIC, SPENDING, boundaries
    rng, hits, kinds = np.random.default_rng(SEED + 1), {}, (*SPENDING, *CLASSIC)
    bounds = {(kind, name): boundaries(f, kind=kind) for kind in kinds for name, f in (('even', FIVE), ('uneven', UNEVEN))}
    for size in chunks(runs, 500, 'limits'):
        x = rng.normal(size=(size, UNITS)); sums, squares = x.cumsum(1), (x**2).cumsum(1)
        for name, f in (('even', FIVE), ('uneven', UNEVEN)):
            n = np.round(f*UNITS).astype(int); mean = sums[:, n - 1]/n
            z = np.abs(mean)/np.sqrt((squares[:, n - 1]/n - mean**2)/(n - 1))
            for kind in kinds: hits[kind, name] = hits.get((kind, name), 0) + int((z > bounds[kind, name]).any(1).sum())
            hits['plain', name] = hits.get(('plain', name), 0) + int((z > PLAIN).any(1).sum())
    return {' '.join(k): v/runs for k, v in hits.items()}

def shares(runs:int)->dict: # shares of `runs` experiments called a mismatch at .001, looked at on each of a hundred days of a thousand units
    "The sequential check of shares beside the chi-square test at every look."
    from scipy.special import chdtrc
    from telemetry_loop.sequential import srm_sequence
    rng, days, found = np.random.default_rng(SEED + 2), np.arange(1, 101)*1000, {}
    for share in (.5, .505, .49):
        k = rng.binomial(1000, share, (runs, 100)).cumsum(1)
        naive = chdtrc(1, (2*k - days)**2/days) < .001
        found |= {f'naive {share}': float(naive.any(1).mean()), f'fixed {share}': float(naive[:, -1].mean()), f'sequence {share}': float(np.mean([srm_sequence(np.c_[a, b], [.5, .5])[-1] < .001 for a, b in zip(k, days - k)]))}
    return found

def table(counts:dict)->list: # (what, asked, low, high, measured)
    "What is asked, and what came out."
    from telemetry_loop.sequential import boundaries, crossing
    p, g, s = peeking(counts['peeking']), limits(counts['limits']), shares(counts['shares'])
    wide = .01*max(1, np.sqrt(40_000/counts['peeking']))                          # one point is four standard errors at 40,000; as many at fewer
    rows = [(f'plain test, {k} looks', f'{a:.1%} +-1 point', a - wide, a + wide, p[f'naive {k}']) for k, a in NAIVE.items()]
    rows += [(f'the same, integrated, {k} looks', f'{a:.1%} +-1 point', a - .01, a + .01, float(crossing(np.arange(1, k + 1)/k, PLAIN)[-1])) for k, a in NAIVE.items()]
    rows += [('plain test, every unit', '53 %, must fail', .5, .56, p['naive every unit']), ('band, every unit, no effect', '<= 5 %', 0, .05, p['band, null']), ('one lower bound, no effect', '<= 5 %', 0, .05, p['lower bound']), ('one upper bound, no effect', '<= 5 %', 0, .05, p['upper bound']),
        ('band, every unit, d = .1', '>= 55 %', .55, 1, p['band, effect']), ('one look at the end, d = .1', 'about 88 %', .86, .91, p['one look, effect']),
        ('p and band disagree', 'never', 0, 0, p['p disagrees with band, null'] + p['p disagrees with band, effect'])]
    rows += [(f'O\'Brien-Fleming limit {k + 1}', f'{a} +-.001', a - .001, a + .001, float(z)) for k, (a, z) in enumerate(zip((4.877, 3.357, 2.680, 2.290, 2.031), boundaries(FIVE)))]
    rows += [(f'{name} constant', f'{a} +-.001', a - .001, a + .001, float(boundaries(FIVE, kind=f'{name}-classic')[-1])) for name, a in (('pocock', 2.413), ('obrien-fleming', 2.040))]
    rows += [(f'{name}, five looks', '14.2 %, must fail' if name == 'plain even' else 'must fail' if 'plain' in name else '5.0 +-.5 %', *((.1, 1) if 'plain' in name else (.045, .055)), v) for name, v in g.items()]
    return rows + [('chi-square at every look, honest split', 'must exceed .3 %', .003, 1, s['naive 0.5']), ('sequential, honest split', '<= .1 %', 0, .001 + 2.6*np.sqrt(.001/counts['shares']), s['sequence 0.5']),
        ('sequential, 49 %, 100,000 units', '>= 97 %', .97, 1, s['sequence 0.49']), ('chi-square once at the end, 49 %', '>= 99 %', .99, 1, s['fixed 0.49']), ('sequential, 50.5 %', 'less than once at the end', 0, s['fixed 0.505'], s['sequence 0.505']), ('chi-square once at the end, 50.5 %', 'about 45 %', .41, .49, s['fixed 0.505'])]

def test_peeking_limits_and_shares():
    for what, asked, low, high, measured in table(PART): assert low <= measured <= high, f'{what}: {measured:.4f}, asked {asked}'

def main()->int: # 0: everything as asked
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = table(FULL)
    for what, asked, low, high, measured in rows: print(f'{"ok  " if low <= measured <= high else "FAIL"} {what:<42} {asked:<24} {measured:.4f}')
    return int(not all(low <= m <= high for _, _, low, high, m in rows))

if __name__ == '__main__': sys.exit(main())
