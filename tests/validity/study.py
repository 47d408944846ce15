"""Does the evaluation tell the truth? Whole pipelines on small worlds, judged by what the simulator knows.

`make validity` runs the full study and writes metrics/validity.json; `make test` runs a part of it. Seeds are declared here, once."""
import argparse, contextlib, json, sys, tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
SEEDS = list(range(101, 121)) # twenty worlds, fixed before any was run
USERS = 1500 # enough for a network to be told from plain popularity; with 500 the gate could only say that it cannot tell (sized on seeds 901 to 903)

def small_world(seed:int, rounds:int)->dict: # one world: what was promised and what came true, round by round
    "Turn the loop in a temporary folder."
    import yaml
    from conftest import small_params
    from telemetry_loop.loop import live_rounds
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        params = small_params(simulate=dict(users=USERS))
        params['run'] = params['run'] | dict(seed=seed)
        Path('params.yaml').write_text(yaml.safe_dump(params))
        told = live_rounds(rounds, progress=False)
        return told | {'ope': json.loads(Path('metrics/ope.json').read_text())}

def worlds(seeds, rounds:int, workers:int)->list: # told, one a seed
    "Many worlds, two at a time."
    from tqdm import tqdm
    if workers == 1: return [small_world(s, rounds) for s in seeds]
    with ProcessPoolExecutor(workers) as pool: return list(tqdm(pool.map(small_world, seeds, [rounds]*len(seeds)), total=len(seeds), desc='worlds', unit='world'))

def study(told:list)->dict: # counts and estimates over worlds
    "What the worlds say together."
    import numpy as np
    from telemetry_loop.estimate import mean
    inside = lambda promise, truth: promise and promise['ci_lower'] is not None and promise['ci_lower'] <= truth <= promise['ci_upper']
    first, last = [t['rounds'][0] for t in told], [t['rounds'][-1] for t in told]
    life = lambda name: mean(np.array([r['life_minus_bootstrap'][name]['value'] for r in last])).as_dict()
    return {'worlds': len(told), 'seeds': [t['seed'] for t in told], 'refused': sum(r['support'] == 'refuse' for r in first),
        'value_in_interval': sum(bool(inside(r['promised_value'], r['true_value']['value'])) for r in first),
        'gain_in_interval': sum(bool(inside(r['promised_gain'], r['true_gain']['value'])) for r in first),
        'model_opinion_error': mean(np.array([r['model_opinion']['value'] - r['true_value']['value'] for r in first])).as_dict(), # the direct method, which claims no interval
        'promoted_at_least_once': sum(any(r['promoted'] for r in t['rounds']) for t in told),
        'promised_gain_minus_true': mean(np.array([r['promised_gain']['value'] - r['true_gain']['value'] for r in first if r['promised_gain'] and r['promised_gain']['value'] is not None])).as_dict(),
        **{f'last_round_{name}_minus_bootstrap': life(name) for name in ('return_rate', 'satisfaction', 'engagement', 'return_d7')}}

if __name__ == '__main__':
    from telemetry_loop.config import code_digest, write_json
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--worlds', type=int, default=len(SEEDS), help='how many of the declared seeds'); cli.add_argument('--workers', type=int, default=2, help='processes')
    asked = cli.parse_args()
    found = study(worlds(SEEDS[:asked.worlds], 2, asked.workers)) | {'code_digest': code_digest()}
    if asked.worlds == len(SEEDS): write_json('metrics/validity.json', found)
    print(json.dumps(found, indent=1))
