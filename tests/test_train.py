"Questions as of their time, the same bytes twice, a bundle that knows when it was touched, and the two doors."
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from telemetry_loop import train
from telemetry_loop.baselines import MostPopular
from telemetry_loop.config import TelemetryError, file_digest, folder_digest
from telemetry_loop.metrics import ndcg
from telemetry_loop.train import (Recommender, Targets, TrainConfig, fit, leave_one_out, length_batches, network_scores, rank_targets,
                                  read_sequences, targets_as_of, train_on_sequences, windows)

CFG = TrainConfig(dim=16, blocks=1, heads=2, length=6, dropout=.1, batch=16, epochs=8, patience=3, lr=.01, weight_decay=.01, valid_rows=500, adhoc_epochs=3)
N = 12
START = np.random.default_rng(3).integers(0, N, 60)
CYCLE = [(np.arange(8) + s) % N for s in START]                        # 0 -> 1 -> 2 ..
ASK = Targets([(np.arange(3) + s) % N for s in range(N)], (np.arange(N) + 3) % N, np.arange(N), None, None)

@pytest.fixture(scope='module')
def fitted(): return fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK)

def recommender(fitted, **facts):
    return Recommender(fitted.model, np.array([f'i{i}' for i in range(len(fitted.model.item.weight))]), asdict(CFG), {'seed': 5, 'threads': 1} | facts)

# --- questions

def frame(rows):
    log = pd.DataFrame(rows, columns=['user_id', 'item', 'event_time', 'known_time', 'split'])
    return log.assign(event_time=pd.to_datetime(log.event_time), known_time=pd.to_datetime(log.known_time))

def test_history_holds_only_what_was_known_then():
    log = frame([('a', 0, '2026-01-01', '2026-01-01 01:00', 'train'),
                 ('a', 1, '2026-01-02', '2026-01-09 00:00', 'train'),      # happened before, known after
                 ('a', 2, '2026-01-03', '2026-01-03 01:00', 'test'),
                 ('b', 3, '2026-01-01', '2026-01-01 01:00', 'train'),
                 ('b', 4, '2026-01-04', '2026-01-04 00:00', 'test'),
                 ('b', 3, '2026-01-05', '2026-01-05 00:00', 'test')])      # a repeat
    asked, repeats = targets_as_of(log, 'test', np.full(5, np.datetime64('NaT', 'us')))
    assert [h.tolist() for h in asked.history] == [[0], [3]] and asked.item.tolist() == [2, 4] and asked.user.tolist() == ['a', 'b'] and repeats == 1

def test_known_at_the_very_moment_is_not_known_before():
    log = frame([('a', 0, '2026-01-01', '2026-01-02', 'train'), ('a', 1, '2026-01-02', '2026-01-02', 'test')])
    assert len(targets_as_of(log, 'test', np.full(2, np.datetime64('NaT', 'us')))[0].history[0]) == 0

def test_items_of_the_future_are_not_ranked():
    asked = Targets([np.array([], int)], np.array([1]), np.array(['a']), np.array(['2027', '2025', '2025'], 'datetime64[us]'), np.array(['2026'], 'datetime64[us]'))
    score = lambda h: np.array([[9., 1., 0.]])
    assert rank_targets(score, asked).tolist() == [1]
    assert rank_targets(score, replace(asked, available=None)).tolist() == [2]

def test_seen_is_the_whole_history_even_beyond_the_model_length():
    long = np.arange(11)                                               # longer than CFG.length
    score = lambda h: np.tile(np.arange(N, 0, -1.), (len(h), 1))       # prefers exactly the seen ones
    assert rank_targets(score, Targets([long], np.array([11]), np.array([0]), None, None)).tolist() == [1]

# --- fitting

def test_windows_and_batches_lose_nothing():
    seqs = [np.arange(n) for n in (1, 6, 7, 8, 20)]
    cut = windows(seqs, 7)
    assert sum(len(c) for c in cut) == sum(len(s) for s in seqs) and max(len(c) for c in cut) == 7 and cut[-3].tolist() == list(range(13, 20))
    batches = length_batches(np.arange(50) % 9, 8, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(50))

def test_learns_a_cycle_and_beats_popularity(fitted):
    network = ndcg(rank_targets(lambda h: network_scores(fitted.model, h), ASK)).mean()
    popular = ndcg(rank_targets(MostPopular().fit(CYCLE, N).score, ASK)).mean()
    assert network > .95 and network > popular + .2

def test_same_seed_same_bytes_and_another_seed_other_bytes(fitted, tmp_path):
    torch.manual_seed(999)                                             # the caller's generator must not matter
    again, other = fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK), fit(CYCLE, N, np.arange(N) % 2, CFG, 6, 1, ASK)
    for name, f in (('a', fitted), ('b', again), ('c', other)): recommender(f).save(tmp_path/name); time.sleep(.01)
    assert folder_digest(tmp_path/'a') == folder_digest(tmp_path/'b') != folder_digest(tmp_path/'c')

def test_fitting_leaves_the_callers_generator_alone():
    torch.manual_seed(1); a = torch.rand(1)
    torch.manual_seed(1); fit(CYCLE[:5], N, np.zeros(N, int), replace(CFG, epochs=1), 5, 1); assert torch.rand(1) == a

def test_stops_early_and_keeps_the_best_pass():
    wrong = replace(ASK, item=(ASK.item + 5) % N)                      # validation disagrees with the data: learning makes it worse
    found = fit(CYCLE, N, np.zeros(N, int), replace(CFG, epochs=30, patience=2), 5, 1, wrong)
    assert len(found.valid) == found.epochs + 2 < 30 and found.valid[-1] < max(found.valid) == found.valid[found.epochs - 1]
    assert ndcg(rank_targets(lambda h: network_scores(found.model, h), wrong)).mean() == pytest.approx(max(found.valid))

def test_a_new_item_is_worth_its_category():
    found = fit(CYCLE, N + 4, np.arange(N + 4) % 2, replace(CFG, epochs=2), 5, 1).model
    assert (found.item.weight[N:] == 0).all() and (found.item.weight[:N] != 0).any()
    scores = network_scores(found, np.array([[1, 2, 3]]))[0]
    assert scores[N] == scores[N+2] and scores[N] != scores[N+1]

def test_nothing_to_learn_is_refused():
    for few in ([], [np.array([1])]*9):
        with pytest.raises(TelemetryError, match='none with 2 items'): fit(few, N, np.zeros(N, int), CFG, 1, 1)
    with pytest.raises(TelemetryError, match='heads must divide'): fit(CYCLE, N, np.zeros(N, int), replace(CFG, heads=3), 1, 1)

# --- the bundle

def test_bundle_round_trip(fitted, tmp_path):
    rec = recommender(fitted, metrics={'x': 1}); rec.save(tmp_path/'b'); back = Recommender.load(tmp_path/'b')
    h, c = np.array([['', 'i1', 'i2']]), np.array([rec.items])
    assert back.version == rec.version and len(back.version) == 12 and back.facts['metrics'] == {'x': 1}
    assert np.array_equal(back.scores(h, c), rec.scores(h, c)) and sorted(p.name for p in tmp_path.iterdir()) == ['b']

def test_version_follows_the_content(fitted):
    rec = recommender(fitted)
    assert recommender(fitted, seed=99).version == rec.version
    assert Recommender(fitted.model, np.array([f'j{i}' for i in range(N)]), asdict(CFG), {'threads': 1}).version != rec.version

@pytest.mark.parametrize('name', ['weights.npz', 'vocabulary.json'])
def test_altered_or_missing_files_are_refused(fitted, tmp_path, name):
    recommender(fitted).save(tmp_path/'b'); file = tmp_path/'b'/name
    data = bytearray(file.read_bytes()); data[len(data)//2] ^= 1; file.write_bytes(bytes(data))
    with pytest.raises(TelemetryError, match=f'{name} has digest .* altered'): Recommender.load(tmp_path/'b')
    file.unlink()
    with pytest.raises(TelemetryError, match=f'{name} is missing'): Recommender.load(tmp_path/'b')

def test_altered_facts_are_refused(fitted, tmp_path):
    recommender(fitted).save(tmp_path/'b'); file = tmp_path/'b'/'bundle.json'; facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {'params': facts['params'] | {'heads': 4}}))
    with pytest.raises(TelemetryError, match='its contents are .* altered'): Recommender.load(tmp_path/'b')
    file.write_text('{}')
    with pytest.raises(TelemetryError, match="has no 'params'"): Recommender.load(tmp_path/'b')
    with pytest.raises(TelemetryError, match='is not there'): Recommender.load(tmp_path/'nowhere')

def test_scores_are_log_probabilities_whatever_the_company(fitted):
    rec, rng = recommender(fitted), np.random.default_rng(0)
    history = np.array([['']*(7-n) + [f'i{i}' for i in rng.integers(0, N, n)] for n in rng.integers(0, 8, 200)])
    everything = np.tile(rec.items, (200, 1))
    together = rec.scores(history, everything)
    assert together.dtype == np.float64 and np.allclose(np.exp(together).sum(1), 1, atol=1e-5)
    alone = np.concatenate([rec.scores(history[i:i+1], everything[i:i+1]) for i in range(200)])
    assert np.abs(together - alone).max() < 1e-5 and np.abs(together - rec.scores(history, everything, cells=1)).max() < 1e-5
    assert np.array_equal(together[:, [3, 1]], rec.scores(history, everything[:, [3, 1]]))

def test_unknown_ids(fitted):
    rec = recommender(fitted)
    s = rec.scores(np.array([['i1', 'i2', '']  , ['i1', '?', 'i2']]), np.array([['i3', '?', ''], ['i3', 'i4', '?']]))
    assert np.isnan(s).tolist() == [[False, True, True], [False, False, True]] and s[0, 0] == pytest.approx(s[1, 0], abs=1e-5)

def test_recommend(fitted):
    rec = recommender(fitted)
    assert rec.recommend(['i3', 'i4'], 1) == ['i5'] and not set(rec.recommend(['i3', 'i4'], 50)) & {'i3', 'i4'}
    assert len(rec.recommend(['i3'], 50)) == N - 1 and len(rec.recommend(['i3'], 50, exclude_seen=False)) == N and len(rec.recommend([], 4)) == 4
    with pytest.raises(TelemetryError, match='k is 0'): rec.recommend(['i3'], 0)

def test_duplicate_vocabulary_is_refused(fitted):
    with pytest.raises(TelemetryError, match="'a' stands twice"): Recommender(fitted.model, np.array(['a']*N), asdict(CFG), {})

# --- any sequence file

def write(path, text): path.write_bytes(text if isinstance(text, bytes) else text.encode()); return path

@pytest.mark.parametrize('text, said', [('', '0 users, none with 3'), ('u1 a b\nu2 c\n', '2 users, none with 3'), ('u1 a b c\nu2\n', "line 2 has user 'u2'"),
                                        (b'\xff\xfe\x00u1 a', 'not UTF-8'), (b'PK\x00\x03 a b c', 'not UTF-8')])
def test_malformed_files_are_refused_in_one_line(tmp_path, text, said):
    with pytest.raises(TelemetryError, match=said) as refused: read_sequences(write(tmp_path/'s.txt', text))
    assert '\n' not in str(refused.value)

def test_missing_file_and_unknown_protocol_are_refused(tmp_path):
    with pytest.raises(TelemetryError, match='not a file'): read_sequences(tmp_path/'none.txt')
    with pytest.raises(TelemetryError, match='leave-one-out'): train_on_sequences(tmp_path/'none.txt', 'random', CFG, 1, 1)

def test_short_users_are_counted_and_pairs_are_read_as_lines(tmp_path):
    lines, items, skipped = read_sequences(write(tmp_path/'a.txt', 'u x y z x\n\nv x y\n'))
    pairs, _, _ = read_sequences(write(tmp_path/'b.txt', 'u x\nu y\nv x\nu z\nu x\nv y\n'))
    assert [s.tolist() for s in lines] == [s.tolist() for s in pairs] == [[0, 1, 2, 0]] and items.tolist() == ['x', 'y', 'z'] and skipped == 1

def test_leave_one_out_asks_what_it_should():
    seqs = [np.array([1, 2, 3, 4]), np.array([5, 6, 5])]
    assert leave_one_out(seqs).item.tolist() == [4] and leave_one_out(seqs).history[0].tolist() == [1, 2, 3]
    assert leave_one_out([s[:-1] for s in seqs]).item.tolist() == [3, 6]

def test_sequence_door_has_the_promised_shape(tmp_path):
    text = '\n'.join(f'u{u} ' + ' '.join(f'i{i}' for i in s) for u, s in enumerate(CYCLE)) + '\nlone i1\n'
    found = train_on_sequences(write(tmp_path/'c.txt', text), 'leave-one-out', CFG, 5, 1)
    assert set(found['models']) == {'sequence', 'sequence_refit', 'gap_markov', 'gap_markov_refit', 'most_popular', 'most_popular_with_test', 'item_knn'}
    assert all(set(m) == {'ndcg@10', 'recall@10'} and set(m['ndcg@10']) == {'value', 'ci_lower', 'ci_upper', 'n'} for m in found['models'].values())
    assert found['skipped_users'] == 1 and found['cpu_seconds'] > 0 and found['models']['sequence']['ndcg@10']['value'] > found['models']['most_popular']['ndcg@10']['value']
    assert json.dumps(found, allow_nan=False) and sorted(p.name for p in tmp_path.iterdir()) == ['c.txt']

# --- the stage

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('params.yaml').write_text(yaml.safe_dump({'run': {'seed': 5, 'threads': 1, 'engine': 'duckdb', 'memory_gb': 1.}, 'train': asdict(CFG)}))
    Path('artifacts/features').mkdir(parents=True); start = pd.Timestamp('2026-01-01')
    pd.DataFrame({'item_id': [f'i{i:02}' for i in range(N)], 'category': ['', 'a']*(N//2), 'available_time': start}).to_parquet('artifacts/features/items.parquet')
    rows = [(f'u{u:02}', i, start + pd.Timedelta(days=d), start + pd.Timedelta(days=d, hours=1), split)
            for u, s in enumerate(CYCLE) for d, (i, split) in enumerate(zip(s, ['train']*6 + ['valid', 'test']))]
    frame(rows).astype({'item': 'int32'}).to_parquet('artifacts/features/interactions.parquet')
    return tmp_path

def keep(where): # rewrite the interactions with some rows only
    log = pd.read_parquet('artifacts/features/interactions.parquet'); log[where(log)].reset_index(drop=True).to_parquet('artifacts/features/interactions.parquet')

def test_stage_writes_metrics_and_a_loadable_bundle(home):
    Path('requirements.lock').write_text('x'); train.run()
    shown, bundle = json.loads(Path('metrics/train.json').read_text()), json.loads(Path('artifacts/train/bundle.json').read_text())
    assert set(shown['models']) == {'sequence', 'most_popular', 'item_knn', 'gap_markov'} and set(shown['models']['sequence']) == {'ndcg@10', 'recall@10', 'mrr'}
    assert set(shown['differences']) == {'sequence_minus_most_popular', 'sequence_minus_item_knn', 'sequence_minus_gap_markov'}
    assert shown['differences']['sequence_minus_most_popular']['ci_lower'] > 0 and shown['n_targets'] == 60 and shown['n_users'] == 60
    assert Recommender.load('artifacts/train').version == shown['version'] == bundle['version']
    assert bundle['lock_digest'] == file_digest('requirements.lock') and bundle['data_digest'] == folder_digest('artifacts/features') and bundle['params'] == asdict(CFG)
    assert 'seconds' in json.loads(Path('runs/train.json').read_text()) and 'seconds' not in Path('metrics/train.json').read_text()

def test_stage_twice_gives_the_same_bytes(home):
    train.run(); first = folder_digest('artifacts/train'), file_digest('metrics/train.json')
    train.run(); assert first == (folder_digest('artifacts/train'), file_digest('metrics/train.json'))

def test_no_test_targets_means_nothing_is_known(home):
    keep(lambda log: log.split != 'test'); train.run()
    shown = json.loads(Path('metrics/train.json').read_text())
    assert shown['n_targets'] == 0 and shown['models']['sequence']['mrr'] == {'value': None, 'ci_lower': None, 'ci_upper': None, 'n': 0}

def test_no_validation_targets_run_every_pass(home):
    keep(lambda log: log.split != 'valid'); train.run()
    assert json.loads(Path('metrics/train.json').read_text())['epochs'] == CFG.epochs

def test_too_little_to_learn_overwrites_nothing(home):
    train.run(); before = folder_digest('artifacts/train'), file_digest('metrics/train.json')
    keep(lambda log: log.split != 'train')
    with pytest.raises(TelemetryError, match='none with 2 items'): train.run()
    assert before == (folder_digest('artifacts/train'), file_digest('metrics/train.json'))

def test_absent_features_name_the_stage(home):
    Path('artifacts/features/items.parquet').unlink()
    with pytest.raises(TelemetryError, match='features stage'): train.run()
