"""Training and scoring of the sequence model against RecTools and RePlay, measured in one run.

`python benchmarks/train.py [--cpu-seconds 120] [--peers rectools replay] [--json OUT]`

Every program learns the same sequences for the same CPU-seconds: MovieLens 1M (../shared/data/ml1m/train_input.txt; of each person the last item is the test, the one before is kept from training), newest 200 items,
d=64, 2 blocks, cross-entropy over the whole catalogue, one thread, a process of its own. An interaction is a real position with a target: padding never counts. CPU-seconds are those of the training loop, start-up apart.
Ours learns as params.yaml says. The peers have a virtual environment each (runs/peers/NAME, made once), the settings below and their own step size, .001; their batch is smaller than their defaults because they are as fast
with it and learn more in the time. RecTools reads its own data set; RePlay gets padded tensors, which spares it the reading of Parquet, and its own length buckets. All hand back scores of every item, from which one function
here works out the ranks: full ranking, seen items removed, ties against the target.

Useful work of an interaction is 6*(N*d + W) + 12*d*blocks*c FLOPs: 2 per weight forward and 4 backward for the N x d table of answers and the W weights of that program's own block matrices, and attention over the c positions
up to this one, on average. It is held against the fp32 matrix product of one thread, the best seen before and after each program. Scoring is the ten best unseen items of everybody, 64 people of like length at a time; blended
is what is served, with counts and the linear model, their weights chosen on the item before the last. Growth of the catalogue is measured on made-up sequences with negatives shared in the batch."""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent/'shared/data/ml1m/train_input.txt'
TORCH, PEERS = 'torch==2.13.0', {'rectools': 'rectools[torch]==0.19.0', 'replay': 'replay-rec[torch]==0.22.0'}
DIM, BLOCKS, LENGTH, SEED = 64, 2, 200, 7
HEADS, DROPOUT, BATCH, BUCKET = 2, .2, 32, 16 # of the peers
COLUMNS = {'rate': ('interactions/CPU-s', '18,.0f'), 'cpu_s': ('CPU-s', '8.1f'), 'pass_s': ('CPU-s/epoch', '13.1f'), 'passes': ('epochs', '8.2f'), 'gb': ('peak GB', '9.2f'), 'share': ('share', '7.2f'), 'users': ('users/CPU-s', '13,.0f'), 'ndcg': ('NDCG@10', '10.4f')}

def people()->tuple: # what is learned of each person, what is known of them when asked, the item asked for, size of the catalogue
    "The sequences; nobody has an item twice."
    sequences = [np.array(line.split(), int) - 1 for line in DATA.read_text().splitlines()]
    return [s[:-2] for s in sequences], [s[:-1] for s in sequences], np.array([s[-1] for s in sequences]), int(1 + max(s.max() for s in sequences))

def learned(interactions:int, cpu_s:float, lengths, blocks)->dict: # lengths: targets of each sequence in one pass; blocks: the module whose matrices count
    "What training did, and the most memory the process has held."
    l, peak = np.asarray(lengths, float), int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
    work = 6*sum(p.numel() for p in blocks.parameters() if p.ndim > 1) + 12*DIM*BLOCKS*(l*(l + 1)/2).sum()/l.sum()
    return dict(rate=interactions/cpu_s, cpu_s=cpu_s, pass_s=l.sum()*cpu_s/interactions, passes=interactions/l.sum(), gb=peak/1e6, block_flops=work)

def scored(folder:Path, name:str, answer)->dict: # answer(list of b histories) -> (b, N) scores
    "Score everybody, timed, and hand the scores back."
    import torch
    _, history, _, n_items = people()
    scores = np.empty((len(history), n_items), np.float32)
    start, order = time.process_time(), np.argsort([len(h) for h in history], kind='stable')
    for rows in np.split(order, range(64, len(order), 64)):
        scores[rows] = found = answer([history[r] for r in rows])
        for row, r in zip(found, rows): row[history[r]] = -np.inf
        torch.from_numpy(found).topk(10)
    took = time.process_time() - start
    np.save(folder/f'{name}.npy', scores)
    return {'users': len(order)/took}

def gemm(folder:Path, seconds:float)->dict:
    "fp32 matrix products of one thread, GFLOP/s: the best of three sizes."
    import torch
    torch.set_num_threads(1); best = 0.
    for n in [512]*16 + [1024]*4 + [2048]*3:
        a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
        start = time.process_time(); torch.mm(a, b, out=out); best = max(best, 2e-9*n**3/(time.process_time() - start))
    return {'gflops': best}

def fitted(sequences:list, n_items:int, **change)->tuple: # network, its config, interactions, CPU-seconds
    "One pass of ours as params.yaml says, but for what is the same for all programs and `change`."
    from dataclasses import replace
    from telemetry_loop.config import load_params
    from telemetry_loop.fit import TrainConfig, fit
    cfg = replace(load_params(TrainConfig, 'train', ROOT/'params.yaml'), dim=DIM, blocks=BLOCKS, length=LENGTH, **change)
    start = time.process_time(); found = fit(sequences, n_items, np.zeros(n_items, int), cfg, SEED, 1, None, 1)
    return found.model, cfg, sum(map(len, sequences)), time.process_time() - start

def ours(folder:Path, seconds:float)->dict:
    "Train, score everybody with the network and with its blend, answer one by one, and start a bundle."
    from dataclasses import asdict
    from telemetry_loop.baselines import EASE, GapMarkov
    from telemetry_loop.fit import Sequences, Targets, network_scores, pad_left, windows
    from telemetry_loop.recommender import Blend, Recommender, blend_weights
    train, history, _, n_items = people()
    mixed = [train[i] for i in np.random.default_rng(SEED).permutation(len(train))]
    for n in (100, len(mixed)//5): took = fitted(mixed[:n], n_items, full_softmax=n_items)[3] # `fit` counts passes, not seconds: a fifth of the people, once warm, tells how many fit in,
    again = int(n*seconds/took)                                                               # as one pass over people who come again
    model, cfg, interactions, took = fitted([mixed[i % len(mixed)] for i in range(again)], n_items, full_softmax=n_items)
    found = learned(interactions, took, np.diff(windows(Sequences.of(train), LENGTH + 1)), model.blocks) | scored(folder, 'ours', lambda h: network_scores(model, pad_left(h)))
    valid, simple = Targets(train, np.array([h[-1] for h in history]), np.arange(len(train)), None, None).take(np.arange(0, len(train), 4)), (GapMarkov().fit(train, n_items), EASE().fit(train, n_items).lean())
    tried = blend_weights(Blend(model, *simple, 1., 0.), valid)
    blend, names = Blend(model, *simple, *max(tried, key=tried.get)), np.array([f'i{i}' for i in range(n_items)])
    found['blend'], took = scored(folder, 'blend', lambda h: blend.score(pad_left(h))) | {'weight': blend.weight, 'linear': blend.linear}, []
    live = Recommender(blend, names, asdict(cfg), dict(seed=SEED, threads=1)); live.save(folder/'bundle')
    for h in history[:1000]:
        words = names[h].tolist()
        start = time.perf_counter(); live.recommend(words, 10); took.append(1000*(time.perf_counter() - start))
    codes, starts = ("import torch", "import sys; from telemetry_loop.recommender import Recommender; Recommender.load(sys.argv[1]).recommend(['i1', 'i2'], 10)"), {}
    for code in codes*3:
        start = time.perf_counter(); subprocess.run([sys.executable, '-c', code, folder/'bundle'], check=True); starts.setdefault(code, []).append(time.perf_counter() - start)
    return found | {'p50_ms': np.percentile(took, 50), 'p99_ms': np.percentile(took, 99)} | dict(zip(('torch_s', 'start_s'), map(min, starts.values())))

def growth(folder:Path, seconds:float)->dict:
    "CPU-seconds per interaction with 100 k items over that with 3.4 k, sampled negatives in both; best of 2 rounds by turns."
    rng, best = np.random.default_rng(SEED), {3_400: np.inf, 100_000: np.inf}
    for n_items in [*best]*2:
        _, _, interactions, took = fitted([rng.integers(0, n_items, 100) for _ in range(2000)], n_items, full_softmax=0)
        best[n_items] = min(best[n_items], took/interactions)
    return {'growth': best[100_000]/best[3_400]}

def trainer(pl, seconds:float, count)->tuple: # count(batch) -> interactions; -> a Lightning trainer, where it counts
    "Stop after so many CPU-seconds of training."
    class Budget(pl.Callback): # counts on the class: RecTools copies its trainer
        start, interactions, cpu_s = None, 0, 0.
        def on_train_batch_start(self, *_): Budget.start = Budget.start or time.process_time()
        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            Budget.interactions += int(count(batch)); Budget.cpu_s = time.process_time() - Budget.start
            trainer.should_stop = Budget.cpu_s >= seconds
    return pl.Trainer(accelerator='cpu', devices=1, min_epochs=0, max_epochs=1000, callbacks=[Budget()], logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False), Budget

def left_padded(histories:list, length:int, fill:int): # -> (n, length) tensor
    "The newest items at the right edge."
    import torch
    return torch.stack([torch.nn.functional.pad(torch.from_numpy(h[-length:]), (max(length - len(h), 0), 0), value=fill) for h in histories])

def rectools(folder:Path, seconds:float)->dict:
    "RecTools SASRec with its softmax loss."
    import pandas as pd, pytorch_lightning as pl, torch
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    torch.set_num_threads(1); pl.seed_everything(SEED)
    train, _, _, n_items = people()
    size = [len(s) for s in train]
    rows = pd.DataFrame({'user_id': np.repeat(np.arange(len(train)), size), 'item_id': np.concatenate(train), 'weight': 1., 'datetime': pd.date_range('2025-01-06', periods=sum(size), freq='s')})
    model = SASRecModel(n_blocks=BLOCKS, n_heads=HEADS, n_factors=DIM, dropout_rate=DROPOUT, session_max_len=LENGTH, loss='softmax', batch_size=BATCH)
    model._trainer, done = trainer(pl, seconds, lambda b: (b['y'] != 0).sum())
    model.fit(Dataset.construct(rows))
    known, net, index = model.data_preparator.item_id_map.external_ids[1:].astype(int), model.torch_model.eval(), np.zeros(n_items, int)
    index[known] = np.arange(1, len(known) + 1) # 0 is padding
    @torch.inference_mode()
    def answer(histories):
        read, table, out = [index[h] for h in histories], net.item_model.get_all_embeddings(), np.full((len(histories), n_items), -np.inf, np.float32)
        out[:, known] = (net.encode_sessions({'x': left_padded([h[h > 0] for h in read], LENGTH, 0)}, table)[:, -1] @ table[1:].T).numpy()
        return out
    return learned(done.interactions, done.cpu_s, [min(len(s), LENGTH + 1) - 1 for s in train], net.transformer_layers) | scored(folder, 'rectools', answer)

def replay(folder:Path, seconds:float)->dict:
    "RePlay SasRec with its cross-entropy."
    import lightning as pl, torch
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorSchema
    from replay.nn.lightning import LightningModule
    from replay.nn.sequential import LengthBucketedQueryEncoder, SasRec
    torch.set_num_threads(1); pl.seed_everything(SEED)
    train, _, _, n_items = people()
    schema = TensorSchema([TensorFeatureInfo('item_id', FeatureType.CATEGORICAL, is_seq=True, feature_hint=FeatureHint.ITEM_ID, cardinality=n_items, padding_value=n_items, embedding_dim=DIM)])
    model = SasRec.from_params(schema, embedding_dim=DIM, num_heads=HEADS, num_blocks=BLOCKS, max_sequence_length=LENGTH, dropout=DROPOUT)
    model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, BUCKET)
    asking = lambda x: {'feature_tensors': {'item_id': x}, 'padding_mask': x != n_items}
    def learning(rows):
        x = torch.stack(rows)
        return asking(x[:, :-1]) | {'positive_labels': x[:, 1:, None], 'target_padding_mask': (x[:, 1:] != n_items)[..., None]}
    fitting, done = trainer(pl, seconds, lambda b: b['target_padding_mask'].sum())
    fitting.fit(LightningModule(model), torch.utils.data.DataLoader(list(left_padded(train, LENGTH + 1, n_items)), batch_size=BATCH, shuffle=True, collate_fn=learning))
    model.eval()
    @torch.inference_mode()
    def answer(histories): return model(**asking(left_padded(histories, LENGTH, n_items)))['logits'].numpy()
    return learned(done.interactions, done.cpu_s, [min(len(s), LENGTH + 1) - 1 for s in train], model.body.encoder) | scored(folder, 'replay', answer)

def environment(peer:str)->Path|None: # its Python
    "A virtual environment with the peer in it; torch first, by itself, so that no other build of it comes along."
    home = ROOT/'runs/peers'/peer; python, ready = home/'bin/python', home/'ready'
    if ready.is_file() and ready.read_text() == PEERS[peer]: return python
    print(f'{peer}: installing {PEERS[peer]} into runs/peers/{peer}', flush=True)
    if any(subprocess.run(s).returncode for s in ([sys.executable, '-m', 'venv', home], [python, '-m', 'pip', 'install', '-q', TORCH], [python, '-m', 'pip', 'install', '-q', TORCH, PEERS[peer]])):
        print(f'left out: {peer} cannot be installed here'); return None
    ready.write_text(PEERS[peer])
    return python

def child(name:str, folder:Path, seconds:float=0., python=sys.executable)->dict:
    "Run one program in a process of its own; what it measured."
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'} | ({'PYTHONPATH': str(ROOT)} if name not in PEERS else {})
    p = subprocess.run([python, '-W', 'ignore', __file__, '--child', name, folder, str(seconds)], cwd=folder, env=env, capture_output=True, text=True)
    if p.returncode: raise SystemExit(f'{name} ended with status {p.returncode}\n{p.stderr[-2000:]}')
    return json.loads(p.stdout.splitlines()[-1])

def measure(folder:Path, seconds:float, peers:list)->tuple: # program -> what it did and its ranks, GFLOP/s measured in between
    "Ours, the peers and the models without a network, one after another."
    from telemetry_loop.baselines import GapMarkov, MostPopular
    from telemetry_loop.fit import Targets, rank_targets
    train, history, item, n_items = people()
    ask, found, rates = Targets(history, item, np.arange(len(item)), None, None), {}, [child('gemm', folder)['gflops']]
    def ranks(name):
        parts = iter(np.split(np.load(folder/f'{name}.npy'), range(256, len(ask), 256)))
        return rank_targets(lambda h: next(parts), ask)
    for name, python in [('ours', sys.executable), *((p, python) for p in peers if (python := environment(p)))]:
        found[name] = child(name, folder, seconds, python) | {'ranks': ranks(name)}; rates.append(child('gemm', folder)['gflops'])
        print(f'{name}: {found[name]["rate"]:,.0f} interactions/CPU-s ..', flush=True)
    for f in found.values(): f['share'] = 1e-9*f['rate']*(6*n_items*DIM + f['block_flops'])/max(rates)
    found['blended'] = found['ours'].pop('blend') | {'ranks': ranks('blend')}
    for name, model in (('gap_markov', GapMarkov()), ('most_popular', MostPopular())):
        start = time.process_time(); model.fit(train, n_items); took = time.process_time() - start
        found[name] = {'cpu_s': took, 'ranks': rank_targets(model.score, ask)}
    return found, rates

def verdict(found:dict, growth:float)->dict: # what -> (value, limit, whether larger is better)
    "The limits of the issue, where this run measured them."
    mine, share, peers = found['ours'], .4 if 'avx512_bf16' in Path('/proc/cpuinfo').read_text() else .3, [p for p in PEERS if p in found]
    return {f'ours / {p}, interactions per CPU-s': (mine['rate']/found[p]['rate'], {'rectools': 5., 'replay': 3.}[p], True) for p in peers} | {f'NDCG@10, ours; limit: {p}': (mine['ndcg'], found[p]['ndcg'], True) for p in peers} | {
        'share of fp32 matrix product': (mine['share'], share, True), 'peak GB': (mine['gb'], 1.5, False), '100 k / 3.4 k items, per interaction': (growth, 1.25, False), 'scoring the blend, users per CPU-s': (found['blended']['users'], 2000., True),
        'one user, p50 ms': (mine['p50_ms'], 1.5, False), 'one user, p99 ms': (mine['p99_ms'], 8., False), 'start-up of a bundle, s': (mine['start_s'], 2., False)}

def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--cpu-seconds', type=float, default=120.); cli.add_argument('--peers', nargs='*', choices=PEERS, default=list(PEERS)); cli.add_argument('--json', type=Path)
    args = cli.parse_args()
    if not DATA.is_file(): print('left out: ../shared/data/ml1m/train_input.txt is not here'); return
    sys.path.insert(0, str(ROOT))
    from telemetry_loop.metrics import paired, summarise
    with tempfile.TemporaryDirectory() as tmp: (found, rates), growth = measure(Path(tmp), args.cpu_seconds, args.peers), child('growth', Path(tmp))['growth']
    ranks = {name: f.pop('ranks') for name, f in found.items()}
    who = np.arange(len(ranks['ours']))
    print(f'{len(who):,} people; fp32 matrix product {max(rates):.0f} GFLOP/s ({", ".join(f"{r:.0f}" for r in rates)})\n{"":14}' + ''.join(f'{title:>{f.split(".")[0].strip(",")}}' for title, f in COLUMNS.values()) + '   ours minus it')
    for name, f in found.items():
        f['ndcg'], less = summarise(ranks[name], who)['ndcg@10'].value, paired(ranks['ours'], ranks[name], who)
        cells = ''.join(f'{f[k]:{form}}' if k in f else ' '*int(form.split('.')[0].strip(',')) for k, (_, form) in COLUMNS.items())
        print(f'{name:14}{cells}' + f'   {less.value:+.4f} [{less.ci_lower:+.4f}, {less.ci_upper:+.4f}]'*(name != 'ours'))
    told = verdict(found, growth)
    for what, (value, limit, more) in told.items(): print(f'{what:40} {value:10.4g}   at {"least" if more else "most"} {limit:.4g}   {"kept" if (value >= limit if more else value <= limit) else "NOT KEPT"}')
    print(f'of the start-up, importing torch alone takes {found["ours"]["torch_s"]:.2f} s')
    if args.json: args.json.write_text(json.dumps({'measured': found, 'gflops': rates, 'against_limits': {k: {'value': v, 'limit': l} for k, (v, l, _) in told.items()}, 'load': os.getloadavg()[0]}, indent=1) + '\n')

if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: print(json.dumps(dict(gemm=gemm, ours=ours, growth=growth, rectools=rectools, replay=replay)[sys.argv[2]](Path(sys.argv[3]), float(sys.argv[4]))))
    else: main()
