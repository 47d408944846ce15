"""Times and memory, each as a share of its limit, measured in one run.

`make bench` runs all of it and writes metrics/bench.json; `python benchmarks/run.py help import` measures only those."""
import argparse, json, os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ENV = os.environ | {'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}', 'DVC_NO_ANALYTICS': '1'}

def timed(*words, cwd=ROOT)->tuple: # wall seconds, peak resident GB of the largest child so far
    "Run a command to its end."
    start = time.perf_counter()
    subprocess.run([str(w) for w in words], cwd=cwd, env=ENV, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1e6

def clone(to:Path, **sections)->Path: # sections of params.yaml to change
    "A fresh clone of the committed tree, with other values if asked."
    import yaml
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(to)], check=True)
    path = to/'params.yaml'; params = yaml.safe_load(path.read_text())
    for name, change in sections.items(): params[name] |= change
    if sections: path.write_text(yaml.safe_dump(params))
    return to

def best(n:int, *words): return min(timed(*words)[0] for _ in range(n))

def bench_import(tmp): return {'import telemetry_loop, s': (best(5, BIN/'python', '-c', 'import telemetry_loop'), 1.)}
def bench_help(tmp): return {'telemetry-loop --help, s': (best(5, BIN/'telemetry-loop', '--help'), 1.5)}

def bench_simulate(tmp):
    repo = clone(tmp/'large', simulate=dict(users=20_000, days=28))
    seconds, gb = timed(BIN/'telemetry-loop', 'simulate', '--to', tmp/'log', cwd=repo)
    lines = sum(1 for p in (tmp/'log').iterdir() for _ in p.open('rb'))
    assert lines >= 5_000_000, f'{lines} events; the benchmark asks for 5 million'
    shutil.rmtree(tmp/'log')
    return {f'simulate 20,000 users x 28 days ({lines/1e6:.1f} M lines), s': (seconds, 120.), 'simulate, peak GB': (gb, 4.)}

def bench_pipeline(tmp):
    repo = clone(tmp/'default')
    subprocess.run([BIN/'telemetry-loop', 'simulate', '--if-missing'], cwd=repo, env=ENV, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, second = timed(BIN/'dvc', 'repro', '--force', cwd=repo)[0], timed(BIN/'dvc', 'repro', cwd=repo)[0]
    return {'dvc repro, default world, s': (first, 240.), 'dvc repro with nothing to do, s': (second, 5.)}

def bench_loop(tmp):
    sys.path.insert(0, str(ROOT/'tests'))
    from conftest import TINY
    repo = clone(tmp/'tiny', **TINY)
    return {'loop --rounds 2, tiny world, s': (timed(BIN/'telemetry-loop', 'loop', '--rounds', '2', cwd=repo)[0], 180.)}

ONE_USER = """
import json, time, numpy as np
from telemetry_loop.recommender import Recommender
start = time.perf_counter(); model = Recommender.load('artifacts/train'); load = time.perf_counter() - start
rng, took = np.random.default_rng(0), []
for _ in range(1020):
    history = model.items[rng.integers(0, len(model.items), 50)].tolist()
    start = time.perf_counter(); model.recommend(history, 10); took.append(1e3*(time.perf_counter() - start))
print(json.dumps([load, *np.quantile(took[20:], [.5, .99])]))"""

def bench_train(tmp): # the features are those of this checkout's pipeline
    if not (ROOT/'artifacts/features').is_dir(): print('left out: run `make loop` first'); return {}
    repo = clone(tmp/'train'); (repo/'artifacts').mkdir(exist_ok=True); (repo/'artifacts/features').symlink_to(ROOT/'artifacts/features')
    start = time.perf_counter()
    child = subprocess.Popen([BIN/'telemetry-loop', 'train'], cwd=repo, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    _, code, used = os.wait4(child.pid, 0); seconds = time.perf_counter() - start
    assert code == 0, 'the train stage failed'
    load, half, most = json.loads(subprocess.run([BIN/'python', '-c', ONE_USER], cwd=repo, env=ENV, check=True, capture_output=True, text=True).stdout)
    return {'train, default world, s': (seconds, 60.), 'train, CPU-s': (used.ru_utime + used.ru_stime, 60.), 'train, peak GB': (used.ru_maxrss/1e6, 1.5),
            'load a bundle, s': (load, 2.), 'recommend to one user, p50 ms': (half, 1.5), 'recommend to one user, p99 ms': (most, 8.)}

def bench_sequences(tmp):
    beauty = ROOT.parent/'shared/data/s3rec_beauty/Beauty.txt'
    if not beauty.is_file(): print('left out: ../shared/data/s3rec_beauty is not here'); return {}
    return {'train --sequences Beauty, leave-one-out, s': (timed(BIN/'telemetry-loop', 'train', '--sequences', beauty, '--protocol', 'leave-one-out', '--json', tmp/'beauty.json')[0], 600.)}

def bench_ope(tmp):
    from ope import child, draw
    draw(tmp, 1_000_000, 50); found = {'': child('ours', tmp), ', per user': child('ours, users', tmp)}
    return {f'ope, a million decisions x 50 actions{who}, {k}': (f[k.lower()], limit) for who, f in found.items() for k, limit in (('s', 2.), ('MB', 400.))}

def bench_policy(tmp):
    subprocess.run([BIN/'python', ROOT/'benchmarks/policy.py', '--json', tmp/'policy.json'], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) # its own limits are judged below
    found = json.loads((tmp/'policy.json').read_text())
    return {'20,000 slates with propensities, s': (20_000/found['slates_per_s'], 1.), 'one slate of 1,000 candidates, p99 ms': (found['p99_ms'], 3.)}

ALL = {name.removeprefix('bench_'): f for name, f in globals().items() if name.startswith('bench_')}

def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0]); cli.add_argument('names', nargs='*', help=', '.join(ALL))
    names = cli.parse_args().names or list(ALL)
    if (odd := set(names) - set(ALL)): cli.error(f'{sorted(odd)[0]!r} is not a benchmark; they are {", ".join(ALL)}')
    found = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in names:
            print(f'{name} ..', flush=True)
            for what, (value, limit) in ALL[name](Path(tmp)).items():
                found[what] = {'value': round(value, 3), 'limit': limit, 'share_of_limit': round(value/limit, 3)}
                print(f'  {what:70} {value:9.2f}   {value/limit:6.0%} of {limit:g}', flush=True)
    if set(names) == set(ALL):
        sys.path.insert(0, str(ROOT))
        from telemetry_loop.config import code_digest, write_json
        write_json(ROOT/'metrics/bench.json', {'measured': found, 'code_digest': code_digest(), 'cores': os.cpu_count()})

if __name__ == '__main__': main()
