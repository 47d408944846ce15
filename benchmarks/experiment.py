"""How long does it take to analyse an experiment? Ten million users, five metrics, each with its covariate, from a Parquet file, against plain pandas in one run; and what one more day costs.

`python benchmarks/experiment.py [--rows 10000000] [--json FILE]`
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path

METRICS, BEFORE = [f'm{i}' for i in range(5)], [f'b{i}' for i in range(5)]

def write(path:Path, rows:int):
    import duckdb
    columns = ', '.join(f'4 + 2*r{i} + random() + .02*(v > .5)::INT AS m{i}, 3*r{i} + random() AS b{i}' for i in range(5))
    duckdb.sql(f"COPY (SELECT i AS user_id, CASE WHEN v > .5 THEN 'new' ELSE 'old' END AS variant, {columns} FROM (SELECT i, random() AS v, {', '.join(f'random() AS r{i}' for i in range(5))} FROM range({rows}) t(i))) TO '{path}' (FORMAT parquet)")

def ours(path):
    from telemetry_loop.experiment import evaluate_table
    return evaluate_table(path, 'user_id', 'variant', 'old', METRICS, BEFORE)['metrics']['m0']['difference']

def pandas(path):
    import numpy as np, pandas as pd
    t = pd.read_parquet(path); found = {}
    if t.duplicated('user_id').any(): raise SystemExit('a unit twice')
    for m, b in zip(METRICS, BEFORE):
        theta = np.cov(t[m], t[b])[0, 1]/t[b].var(); y = (t[m] - theta*(t[b] - t[b].mean())).groupby(t['variant']).agg(['mean', 'var', 'count'])
        found[m] = dict(value=y.loc['new', 'mean'] - y.loc['old', 'mean'], se=float(np.sqrt((y['var']/y['count']).sum())))
    return found['m0']

def day(rows=100_000):
    "One day's people added to what is known: five metrics, their bands and the shares."
    import numpy as np
    from telemetry_loop.contrast import Moments, contrast, srm
    rng = np.random.default_rng(0); of = lambda n: Moments(tuple(METRICS + BEFORE), n, rng.normal(5, .01, 10), np.eye(10))
    so_far, new = {v: of(5_000_000) for v in ('old', 'new')}, {v: of(rows) for v in ('old', 'new')}
    begun = time.perf_counter()
    now = {v: so_far[v] + new[v] for v in so_far}
    for m in METRICS: c = contrast(now['old'], now['new'], m); c.difference(c.anytime_z()); c.lift(c.z())
    srm({v: m.n for v, m in now.items()})
    return time.perf_counter() - begun

def alone(name, path): # in a process of its own: seconds, CPU seconds, peak MB
    code = f"import sys, time, json, resource; sys.path.insert(0, {str(Path(__file__).parent)!r}); import experiment; t, c = time.perf_counter(), time.process_time(); found = experiment.{name}({str(path)!r}); print(json.dumps(dict(seconds=time.perf_counter() - t, cpu=time.process_time() - c, mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, found=found), default=float))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])

def main():
    args = argparse.ArgumentParser(description=__doc__); args.add_argument('--rows', type=int, default=10_000_000); args.add_argument('--json', type=Path); args = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'ab.parquet'; write(path, args.rows)
        found = {name: alone(name, path) for name in ('ours', 'pandas')}
    found['day_seconds'] = day()
    print(f'{args.rows:,} users, 5 metrics with CUPED\n{"":8} seconds    CPU  peak MB   share of the limits (10 s, 2,048 MB)')
    for name in ('ours', 'pandas'): f = found[name]; print(f'{name:8} {f["seconds"]:7.2f} {f["cpu"]:6.2f} {f["mb"]:8.0f}   {f["seconds"]/10:.2f}, {f["mb"]/2048:.2f}')
    print(f'pandas over ours: {found["pandas"]["seconds"]/found["ours"]["seconds"]:.2f}x; one more day: {1000*found["day_seconds"]:.2f} ms, {found["day_seconds"]:.5f} of the limit (1 s)')
    if args.json: args.json.write_text(json.dumps(found, indent=1) + '\n')

if __name__ == '__main__': main()
