"""Training and scoring of the sequence model against RecTools and RePlay, measured in one run.

`python benchmarks/train.py [--cpu-seconds 120] [--peers rectools replay] [--batch 32] [--json OUT]`

Every program learns the same sequences for the same CPU-seconds: MovieLens 1M (../shared/data/ml1m/train_input.txt; of each person the last item is the test, the one before is kept from training), newest 200 items,
d=64, 2 blocks, cross-entropy over the whole catalogue, one thread, a process of its own. An interaction is a real position with a target: padding never counts. CPU-seconds are those of the training loop, start-up apart.
Ours learns as params.yaml says. The peers have a virtual environment each (runs/peers/NAME, made once) and the settings below; their batch is smaller than their own defaults because they are as fast with it and learn more in
the time. RecTools reads its own data set; RePlay gets padded tensors, which spares it the reading of Parquet, and its own length buckets. All hand back scores of every item; ranks are worked out here, by one function.

Useful work of an interaction is 6*(N*d + W) + 12*d*blocks*c FLOPs: 2 per weight forward and 4 backward for the N x d table of answers and the W weights of that program's own block matrices, and attention over the c positions
up to this one, on average. It is held against the fp32 matrix product of one thread, the best seen before and after each program. Scoring is the ten best unseen items of everybody, 64 people of like length at a time."""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent/'shared/data/ml1m/train_input.txt'
TORCH, PEERS = 'torch==2.13.0', {'rectools': 'rectools[torch]==0.19.0', 'replay': 'replay-rec[torch]==0.22.0'}
DIM, BLOCKS, LENGTH, SEED = 64, 2, 200, 7
HEADS, DROPOUT, LR, BUCKET = 2, .2, .001, 16 # of the peers
LIMITS = {'rectools': 5., 'replay': 3., 'share': .3, 'share with bf16': .4, 'gb': 1.5, 'users': 2000., 'p50_ms': 1.5, 'p99_ms': 8., 'start_s': 2.}

# what every program does

def people(folder:Path)->tuple: # whole sequences, who is asked, size of the catalogue
    "The data as the parent wrote it."
    with np.load(folder/'people.npz') as f: return np.split(f['items'], f['ends'][:-1]), f['asked'], int(f['n_items'])

def left_padded(histories:list, length:int, fill:int)->np.ndarray: # (n, length)
    "The newest items at the right edge."
    out = np.full((len(histories), length), fill, np.int64)
    for row, h in enumerate(histories): out[row, length - len(h[-length:]):] = h[-length:]
    return out

def learned(interactions:int, cpu_s:float, lengths, blocks)->dict: # lengths: targets of each sequence in one pass; blocks: the module whose matrices count
    "What training did, and the memory it took so far."
    l, peak = np.asarray(lengths, float), int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
    return dict(interactions=interactions, cpu_s=cpu_s, epoch=l.sum(), gb=peak/1e6, context=(l*(l + 1)/2).sum()/l.sum(), weights=sum(p.numel() for p in blocks.parameters() if p.ndim > 1))

def scored(folder:Path, name:str, answer)->dict: # answer(list of b histories) -> (b, N) scores, a numpy array
    "Score everybody, time it, and hand the scores back."
    import torch
    sequences, asked, n_items = people(folder)
    history, scores = [sequences[u][:-1] for u in asked], np.empty((len(asked), n_items), np.float32)
    start, order = time.process_time(), np.argsort([len(sequences[u]) for u in asked], kind='stable')
    for rows in np.split(order, range(64, len(order), 64)):
        scores[rows] = found = answer([history[r] for r in rows])
        for row, r in zip(found, rows): row[history[r]] = -np.inf
        torch.from_numpy(found).topk(10)
    took = time.process_time() - start
    np.save(folder/f'{name}.npy', scores)
    return {'users': len(order)/took}

def gemm(folder:Path, seconds:float, batch:int)->dict:
    "fp32 matrix products of one thread, GFLOP/s: the best of three sizes."
    import torch
    torch.set_num_threads(1); best = 0.
    for n in (512, 1024, 2048):
        a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
        for _ in range(2 + 2**31//n**3):
            start = time.process_time(); torch.mm(a, b, out=out); best = max(best, 2e-9*n**3/(time.process_time() - start))
    return {'gflops': best}

# ours

def learn(sequences:list, n_items:int, seconds:float)->tuple: # network, config, interactions, CPU-seconds
    "Train for about this long: `fit` counts passes, so a tenth of the people tells how many fit in; less than one is a pass over fewer people."
    from dataclasses import replace
    from telemetry_loop.config import load_params
    from telemetry_loop.train import TrainConfig, fit
    cfg = replace(load_params(TrainConfig, 'train', ROOT/'params.yaml'), dim=DIM, blocks=BLOCKS, length=LENGTH)
    def timed(some, passes):
        start = time.process_time(); fitted = fit(some, n_items, np.zeros(n_items, int), cfg, SEED, 1, None, passes)
        return fitted.model, cfg, passes*sum(map(len, some)), time.process_time() - start
    *_, interactions, took = timed(sequences[::10], 1)
    passes = seconds*interactions/took/sum(map(len, sequences))
    mixed = [sequences[i] for i in np.random.default_rng(SEED).permutation(len(sequences))]
    return timed(mixed[:max(1, int(min(passes, 1)*len(mixed)))], max(1, int(passes)))

def ours(folder:Path, seconds:float, batch:int)->dict:
    "Train, score everybody, answer one by one, and leave a bundle."
    from dataclasses import asdict
    from telemetry_loop.train import Recommender, network_scores, pad_left, windows
    sequences, asked, n_items = people(folder)
    train, names = [s[:-2] for s in sequences], np.array([f'i{i}' for i in range(n_items)])
    model, cfg, interactions, took = learn(train, n_items, seconds)
    found = learned(interactions, took, [len(w) for w in windows(train, LENGTH + 1)], model.blocks) | scored(folder, 'ours', lambda h: network_scores(model, pad_left(h)))
    live, took = Recommender(model, names, asdict(cfg), dict(seed=SEED, threads=1)), []
    live.save(folder/'bundle')
    for u in asked[:1000]:
        words = names[sequences[u][:-1]].tolist()
        start = time.perf_counter(); live.recommend(words, 10); took.append(1000*(time.perf_counter() - start))
    found['p50_ms'], found['p99_ms'] = np.percentile(took, [50, 99])
    return found

def start_up(folder:Path)->float: # seconds
    "From the start of Python to the first recommendation of a saved bundle, best of 3."
    code = "import sys; from telemetry_loop.train import Recommender; Recommender.load(sys.argv[1]).recommend(['i1', 'i2'], 10)"
    def once():
        start = time.perf_counter(); subprocess.run([sys.executable, '-c', code, folder/'bundle'], env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
        return time.perf_counter() - start
    return min(once() for _ in range(3))

# peers

def trainer(pl, seconds:float, count)->tuple: # count(batch) -> interactions; -> a Lightning trainer, where it counts
    "Stop after so many CPU-seconds of training."
    class Budget(pl.Callback): # counts on the class: RecTools copies its trainer
        start, interactions, cpu_s = None, 0, 0.
        def on_train_batch_start(self, *_): Budget.start = Budget.start or time.process_time()
        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            Budget.interactions += int(count(batch)); Budget.cpu_s = time.process_time() - Budget.start
            trainer.should_stop = Budget.cpu_s >= seconds
    return pl.Trainer(accelerator='cpu', devices=1, min_epochs=0, max_epochs=1000, callbacks=[Budget()], logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False), Budget

def targets(train:list)->list: return [min(len(s), LENGTH + 1) - 1 for s in train] # of a longer sequence the peers learn the newest 200

def rectools(folder:Path, seconds:float, batch:int)->dict:
    "RecTools SASRec with its softmax loss."
    import pandas as pd, pytorch_lightning as pl, torch
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    torch.set_num_threads(1); pl.seed_everything(SEED)
    sequences, asked, n_items = people(folder)
    train = [s[:-2] for s in sequences]
    rows = pd.DataFrame({'user_id': np.repeat(np.arange(len(train)), [len(s) for s in train]), 'item_id': np.concatenate(train), 'weight': 1.})
    rows['datetime'] = pd.Timestamp('2025-01-06') + pd.to_timedelta(np.arange(len(rows)), 's')
    model = SASRecModel(n_blocks=BLOCKS, n_heads=HEADS, n_factors=DIM, dropout_rate=DROPOUT, session_max_len=LENGTH, loss='softmax', lr=LR, batch_size=batch)
    model._trainer, done = trainer(pl, seconds, lambda b: (b['y'] != 0).sum())
    model.fit(Dataset.construct(rows))
    known, net, index = model.data_preparator.item_id_map.external_ids[1:].astype(int), model.torch_model.eval(), np.zeros(n_items, int)
    index[known] = np.arange(1, len(known) + 1) # 0 is padding
    @torch.inference_mode()
    def answer(histories):
        read, table, out = [index[h] for h in histories], net.item_model.get_all_embeddings(), np.full((len(histories), n_items), -np.inf, np.float32)
        out[:, known] = (net.encode_sessions({'x': torch.from_numpy(left_padded([h[h > 0] for h in read], LENGTH, 0))}, table)[:, -1] @ table[1:].T).numpy()
        return out
    return learned(done.interactions, done.cpu_s, targets(train), net.transformer_layers) | scored(folder, 'rectools', answer)

def replay(folder:Path, seconds:float, batch:int)->dict:
    "RePlay SasRec with its cross-entropy."
    import lightning as pl, torch
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorSchema
    from replay.nn.lightning import LightningModule
    from replay.nn.lightning.optimizer import OptimizerFactory
    from replay.nn.sequential import LengthBucketedQueryEncoder, SasRec
    torch.set_num_threads(1); pl.seed_everything(SEED)
    sequences, asked, n_items = people(folder)
    train = [s[:-2] for s in sequences]
    schema = TensorSchema([TensorFeatureInfo('item_id', FeatureType.CATEGORICAL, is_seq=True, feature_hint=FeatureHint.ITEM_ID, cardinality=n_items, padding_value=n_items, embedding_dim=DIM)])
    model = SasRec.from_params(schema, embedding_dim=DIM, num_heads=HEADS, num_blocks=BLOCKS, max_sequence_length=LENGTH, dropout=DROPOUT)
    model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, BUCKET)
    asking = lambda x: {'feature_tensors': {'item_id': x}, 'padding_mask': x != n_items}
    def learning(rows):
        x = torch.stack(rows)
        return asking(x[:, :-1]) | {'positive_labels': x[:, 1:, None], 'target_padding_mask': (x[:, 1:] != n_items)[..., None]}
    fitting, done = trainer(pl, seconds, lambda b: b['target_padding_mask'].sum())
    fitting.fit(LightningModule(model, OptimizerFactory(learning_rate=LR)), torch.utils.data.DataLoader(list(torch.from_numpy(left_padded(train, LENGTH + 1, n_items))), batch_size=batch, shuffle=True, collate_fn=learning))
    model.eval()
    @torch.inference_mode()
    def answer(histories): return model(**asking(torch.from_numpy(left_padded(histories, LENGTH, n_items))))['logits'].numpy()
    return learned(done.interactions, done.cpu_s, targets(train), model.body.encoder) | scored(folder, 'replay', answer)

# one process each

CHILDREN = {f.__name__: f for f in (gemm, ours, rectools, replay)}

def environment(peer:str)->Path|None: # its Python
    "A virtual environment with the peer in it; torch first, by itself, so that no other build of it comes along."
    home = ROOT/'runs/peers'/peer; python, ready = home/'bin/python', home/'ready'
    if ready.is_file() and ready.read_text() == PEERS[peer]: return python
    print(f'{peer}: installing {PEERS[peer]} into runs/peers/{peer}', flush=True)
    if any(subprocess.run(s).returncode for s in ([sys.executable, '-m', 'venv', home], [python, '-m', 'pip', 'install', '-q', TORCH], [python, '-m', 'pip', 'install', '-q', TORCH, PEERS[peer]])):
        print(f'left out: {peer} cannot be installed here'); return None
    ready.write_text(PEERS[peer])
    return python

def child(name:str, python:Path, folder:Path, seconds:float=0, batch:int=0)->dict:
    "Run one program to its end; what it measured."
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'} | ({'PYTHONPATH': str(ROOT)} if name == 'ours' else {})
    p = subprocess.run([python, '-W', 'ignore', __file__, '--child', name, folder, str(seconds), str(batch)], cwd=folder, env=env, capture_output=True, text=True)
    if p.returncode: raise SystemExit(f'{name} ended with status {p.returncode}\n{p.stderr[-2000:]}')
    return json.loads(p.stdout.splitlines()[-1])

def measure(folder:Path, sequences:list, asked:np.ndarray, n_items:int, args)->tuple: # program -> what it did, GFLOP/s measured in between
    "Ours, the peers and the models without a network, one after another; everybody's ranks by the same function."
    from telemetry_loop.baselines import GapMarkov, MostPopular
    from telemetry_loop.train import leave_one_out, rank_targets
    np.savez(folder/'people.npz', items=np.concatenate(sequences), ends=np.cumsum([len(s) for s in sequences]), asked=asked, n_items=n_items)
    pythons = {'ours': Path(sys.executable)} | {p: python for p in args.peers if (python := environment(p))}
    found, rates, ask = {}, [child('gemm', pythons['ours'], folder)['gflops']], leave_one_out(sequences)
    for name, python in pythons.items():
        found[name] = f = child(name, python, folder, args.cpu_seconds, args.batch); rates.append(child('gemm', pythons['ours'], folder)['gflops'])
        parts = iter(np.split(np.load(folder/f'{name}.npy'), range(256, len(ask), 256)))
        f['ranks'], f['rate'] = rank_targets(lambda h: next(parts), ask), f['interactions']/f['cpu_s']
    for f in found.values(): f['share'] = 1e-9*f['rate']*(6*(n_items*DIM + f['weights']) + 12*DIM*BLOCKS*f['context'])/max(rates)
    found['ours']['start_s'] = start_up(folder)
    for name, model in (('gap_markov', GapMarkov()), ('most_popular', MostPopular())):
        start = time.process_time(); model.fit([s[:-2] for s in sequences], n_items); took = time.process_time() - start
        found[name] = {'cpu_s': took, 'ranks': rank_targets(model.score, ask)}
    return found, rates

def verdict(found:dict)->dict: # what -> (value, limit, whether larger is better)
    "The limits of the issue, where this run measured them."
    mine, peers = found['ours'], [p for p in PEERS if p in found]
    half = 'avx512_bf16' in Path('/proc/cpuinfo').read_text()
    out = {f'ours / {p}, interactions per CPU-s': (mine['rate']/found[p]['rate'], LIMITS[p], True) for p in peers} | {f'NDCG@10, ours; limit: {p}': (mine['ndcg'], found[p]['ndcg'], True) for p in peers}
    out |= {'share of fp32 matrix product': (mine['share'], LIMITS['share with bf16' if half else 'share'], True), 'peak GB': (mine['gb'], LIMITS['gb'], False), 'scoring, users per CPU-s': (mine['users'], LIMITS['users'], True)}
    return out | {what: (mine[k], LIMITS[k], False) for k, what in (('p50_ms', 'one user, p50 ms'), ('p99_ms', 'one user, p99 ms'), ('start_s', 'start-up of a bundle, s'))}

def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--cpu-seconds', type=float, default=120.); cli.add_argument('--peers', nargs='*', choices=PEERS, default=list(PEERS))
    cli.add_argument('--batch', type=int, default=32, help='sequences per update of the peers'); cli.add_argument('--json', type=Path)
    args = cli.parse_args()
    if not DATA.is_file(): print('left out: ../shared/data/ml1m/train_input.txt is not here'); return
    sys.path.insert(0, str(ROOT))
    from telemetry_loop.metrics import paired, summarise
    from telemetry_loop.train import leave_one_out
    sequences = [np.array(line.split(), int) - 1 for line in DATA.read_text().splitlines()]
    n_items, asked = int(max(s.max() for s in sequences)) + 1, leave_one_out(sequences).user
    with tempfile.TemporaryDirectory() as tmp: found, rates = measure(Path(tmp), sequences, asked, n_items, args)
    print(f'{len(sequences):,} people, {n_items:,} items; fp32 matrix product {max(rates):.0f} GFLOP/s ({", ".join(f"{r:.0f}" for r in rates)})')
    print(f'{"":14}{"interactions/CPU-s":>19}{"CPU-s":>8}{"CPU-s/epoch":>13}{"epochs":>8}{"peak GB":>9}{"share":>7}{"users/CPU-s":>13}   NDCG@10   ours minus it')
    for name, f in found.items():
        ranks = f.pop('ranks') if name != 'ours' else f['ranks']
        f['ndcg'], less = summarise(ranks, asked)['ndcg@10'].value, paired(found['ours']['ranks'], ranks, asked)
        speed = f'{f["rate"]:19,.0f}{f["cpu_s"]:8.1f}{f["epoch"]/f["rate"]:13.1f}{f["interactions"]/f["epoch"]:8.2f}{f["gb"]:9.2f}{f["share"]:7.2f}{f["users"]:13,.0f}' if 'rate' in f else f'{"":19}{f["cpu_s"]:8.1f}{"":50}'
        print(f'{name:14}{speed}   {f["ndcg"]:7.4f}' + f'   {less.value:+.4f} [{less.ci_lower:+.4f}, {less.ci_upper:+.4f}]'*(name != 'ours'))
    told = verdict(found)
    for what, (value, limit, more) in told.items(): print(f'{what:40} {value:10.4g}   at {"least" if more else "most"} {limit:.4g}   {"kept" if (value >= limit if more else value <= limit) else "NOT KEPT"}')
    del found['ours']['ranks']
    if args.json: args.json.write_text(json.dumps({'measured': found, 'gflops': rates, 'against_limits': {k: {'value': v, 'limit': l} for k, (v, l, _) in told.items()}, 'load': os.getloadavg()[0]}, indent=1) + '\n')

if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: print(json.dumps(CHILDREN[sys.argv[2]](Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))))
    else: main()
