"""All estimators on a million decisions over fifty actions, with intervals and the verdict on the log, against obp 0.5.7 without either; measured in one run.

`python benchmarks/ope.py [--decisions N] [--actions A] [--peers obp] [--stream ROWS ..] [--json OUT]`

What both are given is made up front and saved: both policies' choice, (n, A) float32 target probabilities and reward model, and what was done and earned. Each program is a process of its own with one thread. Ours reduces the
two tables in chunks to four n-vectors (propensity, target probability, model at the logged action and averaged over the target policy) and calls `assess`: nine estimators, four of them with a knob tried at eight settings, the
standard error of each, of its gain and of its relative gain; then once more with rows that belong to users, twenty each, and to five
positions. obp gets the same tables as it wants them, (n, A, 1), and answers IPS, SNIPS, DM, DR, SNDR, clipped and sub-Gaussian IPS at one setting, Switch-DR and DRos tuned over
the same number of settings by its SLOPE: values only. Seconds are on the clock and of the CPU; the latter are judged where the machine has more to do than cores. Memory is the most the process has held (VmHWM) less what it held once the inputs were there; obp lives in runs/peers/obp, made once.

`--stream 1e6 1e7 1e8` evaluates Parquet logs of so many rows instead, through the door, with and without users: four estimators, two of them with a knob, and the checks of the log. Seconds are those of `evaluate_log`, on the clock and of all threads together, which other work on the machine disturbs less; memory is the most the process
has held, all of it. The logs (and what the door puts aside) lie in a temporary folder and take some 50 bytes a row."""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

ROOT = Path(__file__).parents[1]
SEED, CHUNK, SETTINGS, USER_ROWS, POSITIONS = 12, 16_384, 8, 20, 5
LIMITS = {'s': 2., 'mb': 400.}
STREAM_LIMITS = {'CPU seconds per row, largest / smallest': 1.5, 'peak MB': 1500.}

def draw(folder:Path, n:int, actions:int):
    "A log drawn by a flat softmax, a sharper target, and a reward model that is half right."
    from numpy.lib.format import open_memmap
    rng, taste = np.random.default_rng(SEED), np.random.default_rng(5).normal(size=(5, actions)).astype('float32')/np.sqrt(5)
    target, q = (open_memmap(folder/f'{name}.npy', 'w+', 'float32', (n, actions)) for name in ('target', 'q'))
    small = {'action': np.empty(n, np.int64), 'reward': np.empty(n), 'propensity': np.empty(n)}
    for a in range(0, n, CHUNK):
        rows = slice(a, min(a + CHUNK, n)); i = np.arange(rows.stop - a)
        score = rng.normal(size=(len(i), 5)).astype('float32') @ taste
        p, e = (np.exp(t*score) for t in (.3, 1.2)); p, like = p/p.sum(1, keepdims=True), 1/(1 + np.exp(.5 - score))
        done = (p.cumsum(1) > rng.random((len(i), 1))*(1 - 1e-6)).argmax(1)
        target[rows], q[rows] = e/e.sum(1, keepdims=True), .5*like + .2
        small['action'][rows], small['propensity'][rows], small['reward'][rows] = done, p[i, done], rng.random(len(i)) < like[i, done]
    target.flush(); q.flush()
    for name, x in small.items(): np.save(folder/f'{name}.npy', x)

def inputs(folder:Path)->dict: return {name: np.load(folder/f'{name}.npy') for name in ('action', 'reward', 'propensity', 'target', 'q')}

def held(peak:bool=False)->float: # MB
    return int(Path('/proc/self/status').read_text().split('VmHWM:' if peak else 'VmRSS:')[1].split()[0])/1e3

def reduced(x:dict)->tuple: # (n,) target probability, model at the logged action, model averaged over the target policy
    "Two tables to three vectors, a chunk at a time."
    n = len(x['action']); out = np.empty((3, n))
    for a in range(0, n, CHUNK):
        rows = slice(a, a + CHUNK); p, q, done = x['target'][rows], x['q'][rows], x['action'][rows, None]
        out[0, rows], out[1, rows] = np.take_along_axis(p, done, 1)[:, 0], np.take_along_axis(q, done, 1)[:, 0]
        out[2, rows] = np.einsum('na,na->n', p, q)
    return tuple(out)

def ours(folder:Path, users:bool=False)->dict:
    "Reduce, check, judge, estimate."
    from telemetry_loop.ope import assess, checked_log
    x = inputs(folder); n = len(x['action'])
    user, position = (np.random.default_rng(SEED).integers(0, n//USER_ROWS, n), np.arange(n) % POSITIONS) if users else (None, None)
    before = held(); steps, cpu = [time.perf_counter()], time.process_time()
    def lap(): steps.append(time.perf_counter())
    target, q, v = reduced(x); lap()
    log = checked_log(x['reward'], x['propensity'], target, q, v, user); lap()
    found = assess(log, group=position); lap()
    return dict(s=steps[-1] - steps[0], cpu=time.process_time() - cpu, mb=held(peak=True) - before, steps=dict(zip(('reduce', 'check', 'assess'), np.diff(steps).tolist())), verdict=found.support.verdict, ess=found.support.ess, values={k: e.value for k, e in found.estimates.items()}, intervals=sum(e.ci_lower is not None for e in found.estimates.values()))

def obp(folder:Path)->dict:
    "The same questions, values only."
    import obp.ope as o
    x = inputs(folder); before = held(); start, cpu = time.perf_counter(), time.process_time(); top = float((x['target'][np.arange(len(x['action'])), x['action']]/x['propensity']).max())
    data = dict(reward=x['reward'], action=x['action'], pscore=x['propensity'], action_dist=x['target'][:, :, None], estimated_rewards_by_reg_model=x['q'][:, :, None], position=np.zeros(len(x['action']), int))
    each = {'ips': o.InverseProbabilityWeighting(), 'snips': o.SelfNormalizedInverseProbabilityWeighting(), 'dm': o.DirectMethod(), 'dr': o.DoublyRobust(), 'sndr': o.SelfNormalizedDoublyRobust(), 'clipped': o.InverseProbabilityWeighting(lambda_=10.),
        'sub_gaussian': o.SubGaussianInverseProbabilityWeighting(lambda_=.01), 'switch_dr': o.SwitchDoublyRobustTuning(lambdas=np.geomspace(top, .1, SETTINGS).tolist()), 'dr_os': o.DoublyRobustWithShrinkageTuning(lambdas=np.geomspace(.1, 10*top**2, SETTINGS).tolist())}
    values, took = {}, {}
    for name, e in each.items(): begin = time.perf_counter(); values[name] = float(e.estimate_policy_value(**data)); took[name] = time.perf_counter() - begin
    return dict(s=time.perf_counter() - start, cpu=time.process_time() - cpu, mb=held(peak=True) - before, steps=took, values=values, intervals=0)

def draw_log(path:Path, n:int):
    "A Parquet log of fifty actions in row groups of a million, no two propensities alike, users anywhere."
    import pyarrow as pa, pyarrow.parquet as pq
    rng, step, actions, writer = np.random.default_rng(SEED), 1_000_000, 50, None
    p = np.exp(np.random.default_rng(5).normal(size=actions)*.5); p /= p.sum()
    for a in range(0, n, step):
        rows = min(step, n - a); sure = rng.random(rows); done = np.where(rng.random(rows) < sure, rng.choice(actions, rows, p=p), rng.integers(0, actions, rows))
        table = pa.table(dict(item=done, reward=(rng.random(rows) < .02 + .1*p[done]).astype('int8'), propensity=sure*p[done] + (1 - sure)/actions, user=rng.integers(0, n//USER_ROWS, rows), position=(np.arange(rows) % POSITIONS).astype('int8')))
        writer = writer or pq.ParquetWriter(path, table.schema, compression='zstd'); writer.write_table(table)
    writer.close()

def stream(folder:Path, users:bool=False)->dict:
    "A log on disk through the door."
    from telemetry_loop.stream import evaluate_log
    start, cpu = time.perf_counter(), time.process_time(); found = evaluate_log(folder/'log.parquet', 'item', 'reward', 'propensity', 'uniform', position='position', cluster='user' if users else None)
    return dict(s=time.perf_counter() - start, cpu=time.process_time() - cpu, mb=held(peak=True), verdict=found['support']['verdict'], estimates=found['estimates'])

def streams(sizes:list, out):
    "Every size, without and with users."
    found = {}
    print(f'{"rows":>12}  {"":8}{"s":>8}{"CPU s":>8}{"rows/s":>12}{"peak MB":>9}{"file MB":>9}   verdict')
    for n in map(int, sizes):
        with tempfile.TemporaryDirectory() as tmp:
            draw_log(path := Path(tmp)/'log.parquet', n); size = path.stat().st_size/1e6
            for name, who in (('stream', 'alone'), ('stream, users', 'users')):
                f = found.setdefault(who, {})[n] = child(name, Path(tmp)); print(f'{n:12,}  {who:8}{f["s"]:8.2f}{f["cpu"]:8.2f}{n/f["s"]:12,.0f}{f["mb"]:9.0f}{size:9.0f}   {f["verdict"]}', flush=True)
    for who, of in found.items():
        a, b = min(of), max(of); ratio = of[b]['cpu']/b/(of[a]['cpu']/a)
        kept = {'CPU seconds per row, largest / smallest': ratio, 'peak MB': max(f['mb'] for f in of.values())}
        print(f'{who}: {b/a:g} x the rows take {of[b]["mb"]/of[a]["mb"]:.2f} x the memory')
        for k, limit in STREAM_LIMITS.items(): print(f'{who}, {k}: {kept[k]:.2f} of at most {limit:g}   {"kept" if kept[k] <= limit else "NOT KEPT"}')
    if out: out.write_text(json.dumps({'stream': found, 'limits': STREAM_LIMITS, 'load': os.getloadavg()[0]}, indent=1) + '\n')

def child(name:str, folder:Path, python=sys.executable)->dict:
    "Run one program in a process of its own; what it measured."
    env = os.environ | {k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')} | ({'PYTHONPATH': str(ROOT)} if name != 'obp' else {})
    p = subprocess.run([python, '-W', 'ignore', __file__, '--child', name, folder], env=env, capture_output=True, text=True)
    if p.returncode: raise SystemExit(f'{name} ended with status {p.returncode}\n{p.stderr[-2000:]}')
    return json.loads(p.stdout.splitlines()[-1])

def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--decisions', type=int, default=1_000_000); cli.add_argument('--actions', type=int, default=50); cli.add_argument('--peers', nargs='*', choices=['obp'], default=['obp']); cli.add_argument('--stream', nargs='+', type=float, metavar='ROWS', help='evaluate Parquet logs of so many rows instead'); cli.add_argument('--json', type=Path)
    args = cli.parse_args()
    if args.stream: return streams(args.stream, args.json)
    from obp_vectors import environment
    with tempfile.TemporaryDirectory() as tmp:
        draw(Path(tmp), args.decisions, args.actions)
        found = {name: child(name, Path(tmp)) for name in ('ours', 'ours, users')} | {'obp': child('obp', Path(tmp), python) for python in [environment() if args.peers else None] if python}
    print(f'{args.decisions:,} decisions x {args.actions} actions\n{"":12}{"s":>8}{"CPU s":>8}{"MB":>9}{"estimators":>12}{"intervals":>11}   where the time goes')
    for name, f in found.items(): print(f'{name:12}{f["s"]:8.2f}{f["cpu"]:8.2f}{f["mb"]:9.0f}{len(f["values"]):12}{f["intervals"]:11}   ' + ', '.join(f'{k} {v:.2f}' for k, v in f['steps'].items()))
    if 'obp' in found:
        apart = max(abs(found['ours']['values'][k]/found['obp']['values'][k] - 1) for k in ('ips', 'snips', 'dm', 'dr', 'sndr'))
        print(f'obp / ours: {found["obp"]["cpu"]/found["ours"]["cpu"]:.1f} x the time, {found["obp"]["mb"]/found["ours"]["mb"]:.1f} x the memory; the five estimators without a knob differ by at most {apart:.1e}')
    busy = os.getloadavg()[0] > os.cpu_count()
    for name in ('ours', 'ours, users'):
        for k, limit in LIMITS.items():
            had = found[name]['cpu' if k == 's' and busy else k]
            print(f'{name}, {"CPU s, on a machine with more to do than cores" if k == "s" and busy else k}: {had:.2f} of at most {limit:g}   {"kept" if had <= limit else "NOT KEPT"}')
    if args.json: args.json.write_text(json.dumps(found | {'limits': LIMITS, 'load': os.getloadavg()[0]}, indent=1) + '\n')

if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: print(json.dumps({'ours': ours, 'ours, users': lambda folder: ours(folder, users=True), 'stream': stream, 'stream, users': lambda folder: stream(folder, users=True), 'obp': obp}[sys.argv[2]](Path(sys.argv[3]))))
    else: main()
