"The stage and the ad-hoc door: the same questions to every model, nothing lost on bad input."
import functools, gzip, json, os, subprocess, sys, tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, yaml
from telemetry_loop import baselines, train
from telemetry_loop.config import TelemetryError, file_digest, folder_digest
from telemetry_loop.fit import Sequences, Targets, network_scores, rank_targets
from telemetry_loop.model import acts
from telemetry_loop.train import Aged, Positives, Recommender, learn, leave_one_out, read_sequences, refit, train_on_sequences
from circle import ASK, CFG, CYCLE, N

def frame(rows):
    log = pd.DataFrame(rows, columns=['user_id', 'item', 'event_time', 'known_time', 'split'])
    return log.assign(event_time=pd.to_datetime(log.event_time), known_time=pd.to_datetime(log.known_time))

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
    lines, items, users, skipped = read_sequences(write(tmp_path/'a.txt', 'u x y z x\n\nv x y\n'))
    pairs, *_ = read_sequences(write(tmp_path/'b.txt', 'u x\nu y\nv x\nu z\nu x\nv y\n'))
    assert [s.tolist() for s in lines] == [s.tolist() for s in pairs] == [[0, 1, 2, 0]] and items.tolist() == ['x', 'y', 'z'] and users.tolist() == ['u'] and skipped == 1

def test_a_packed_file_is_read_and_half_of_one_is_refused(tmp_path):
    packed = gzip.compress(b'u x y z x\n'*200)
    assert read_sequences(write(tmp_path/'a.txt.gz', packed))[1].tolist() == ['x', 'y', 'z']
    with pytest.raises(TelemetryError, match='not UTF-8'): read_sequences(write(tmp_path/'b.txt.gz', packed[:-9]))

def test_leave_one_out_asks_what_it_should():
    seqs = [np.array([1, 2, 3, 4]), np.array([5, 6, 5])]
    assert leave_one_out(seqs).item.tolist() == [4] and leave_one_out(seqs).history[0].tolist() == [1, 2, 3]
    assert leave_one_out([s[:-1] for s in seqs]).item.tolist() == [3, 6]

def test_sequence_door_has_the_promised_shape(tmp_path):
    text = '\n'.join(f'u{u} ' + ' '.join(f'i{i}' for i in s) for u, s in enumerate(CYCLE)) + '\nlone i1\n'
    found = train_on_sequences(write(tmp_path/'c.txt', text), 'leave-one-out', CFG, 5, 1)
    assert set(found['models']) == {'sequence', 'sequence_refit', 'gap_markov', 'gap_markov_refit', 'most_popular', 'most_popular_with_test', 'item_knn', 'ease', 'network', 'network_refit'}
    assert all(set(m) == {'ndcg@10', 'recall@10'} and set(m['ndcg@10']) == {'value', 'ci_lower', 'ci_upper', 'n'} for m in found['models'].values())
    assert found['skipped_users'] == 1 and found['cpu_seconds'] > 0 and found['models']['sequence']['ndcg@10']['value'] > found['models']['most_popular']['ndcg@10']['value']
    assert json.dumps(found, allow_nan=False) and sorted(p.name for p in tmp_path.iterdir()) == ['c.txt']

def test_some_people_are_told_apart_and_learning_again_can_be_left_out(tmp_path):
    rng = np.random.default_rng(0)
    text = '\n'.join(f'u{u} ' + ' '.join(f'i{i}' for i in (s if u % 4 else rng.permutation(s))) for u, s in enumerate(CYCLE)) # every fourth goes anywhere
    found = train_on_sequences(write(tmp_path/'c.txt', text), 'leave-one-out', CFG, 5, 1, write(tmp_path/'few.txt', '\n'.join(f'u{u}' for u in range(0, 60, 4))), again=False)
    apart, others, all_ = [found[k]['gap_markov']['ndcg@10'] for k in ('apart', 'not_apart', 'models')]
    assert apart['n'] == 15 and others['n'] == 45 and all_['value'] == pytest.approx((15*apart['value'] + 45*others['value'])/60) and others['value'] > apart['value']
    assert not any('refit' in name for name in found['models']) and set(found['apart']) == set(found['models'])
    with pytest.raises(TelemetryError, match="'nobody'"): train_on_sequences(tmp_path/'c.txt', 'leave-one-out', CFG, 5, 1, write(tmp_path/'odd.txt', 'u1\nnobody'))

def test_asking_in_one_go_is_asking_each():
    blend, simple, _, _ = train.learn(CYCLE, N, np.zeros(N, int), CFG, 5, 1, ASK)
    both = train.asking(blend, simple, ASK)
    assert both['sequence'].tolist() == rank_targets(blend.score, ASK).tolist() and both['network'].tolist() == rank_targets(lambda h: network_scores(blend.model, h), ASK).tolist()
    assert set(both) == {'sequence', 'network', *simple} and both['ease'].tolist() == rank_targets(simple['ease'].score, ASK).tolist()

def test_a_sequence_file_tells_of_items_alone(tmp_path, monkeypatch):
    used, fit = [], train.fit
    monkeypatch.setattr(train, 'fit', lambda *a, **k: used.append((a[3].inputs, a[3].patience)) or fit(*a, **k))
    train_on_sequences(write(tmp_path/'c.txt', '\n'.join(f'u{u} ' + ' '.join(f'i{i}' for i in s) for u, s in enumerate(CYCLE))), 'leave-one-out', replace(CFG, inputs=['category', 'kind', 'dwell', 'time']), 5, 1)
    assert used == [([], 3*CFG.patience)]*2                           # and is learned with more patience

# --- the stage

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('params.yaml').write_text(yaml.safe_dump({'run': {'seed': 5, 'threads': 1, 'engine': 'duckdb', 'memory_gb': 1.}, 'train': asdict(CFG), 'quality': dict(min_users=5, categories=5, list_rows=1000, robust_rows=100, levels={'thinned': [.5]})}))
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
    assert set(shown['models']) == {'sequence', 'network', 'counts', 'most_popular', 'item_knn', 'ease', 'gap_markov'} and set(shown['models']['sequence']) == {'ndcg@10', 'recall@10', 'mrr'}
    assert set(shown['differences']) == {f'sequence_minus_{name}' for name in set(shown['models']) - {'sequence'}}
    assert shown['differences']['sequence_minus_most_popular']['ci_lower'] > 0 and shown['n_targets'] == 60 and shown['n_users'] == 60
    assert Recommender.load('artifacts/train').version == shown['version'] == bundle['version']
    assert bundle['lock_digest'] == file_digest('requirements.lock') and bundle['data_digest'] == folder_digest('artifacts/features') and bundle['params'] == asdict(CFG)
    for name in ('loss', 'valid_ndcg'): assert len(pd.read_csv(f'metrics/curves/plots/metrics/{name}.tsv', sep='\t')) >= shown['epochs']
    assert 'seconds' in json.loads(Path('runs/train.json').read_text()) and 'seconds' not in Path('metrics/train.json').read_text()

@pytest.mark.parametrize('env', [{}, dict(DVC_ROOT='.', DVC_EXP_NAME='try', DVC_EXP_BASELINE_REV='abc')]) # by hand; as a stage of an experiment
def test_curves_leave_the_repository_alone_also_before_its_first_commit(tmp_path, monkeypatch, env):
    monkeypatch.chdir(tmp_path); subprocess.run(['git', 'init', '-q'], check=True)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    with train.curves() as each: each(1, 2., .1); each(2, 1., None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.git', 'metrics'] and Path('metrics/curves/plots/metrics/loss.tsv').read_text().split() == ['step', 'loss', '1', '2.0', '2', '1.0']

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

def long_log(users, acts=40): # the last two of each are asked; every fifth act is only told of, every seventh has no dwell
    rng, n = np.random.default_rng(2), users*acts
    at = pd.Timestamp('2026-01-01') + pd.to_timedelta(np.tile(np.arange(acts), users), 'h')
    log = pd.DataFrame(dict(user_id=np.repeat([f'u{u:06}' for u in range(users)], acts), item=rng.integers(0, N, n).astype('int32'), event_time=at, known_time=at + pd.to_timedelta(rng.integers(0, 90, n), 'm')))
    log['kind'] = np.where(np.arange(n) % 5, 'satisfied', 'clicked'); log['positive'] = log.kind == 'satisfied'
    log['dwell'] = np.where(np.arange(n) % 7, rng.uniform(1, 99, n), np.nan); log['dwell_known'] = (log.known_time + pd.Timedelta(minutes=20)).where(log.dwell.notna())
    log['split'] = np.where(np.tile(np.arange(acts) < acts - 2, users), 'train', np.where(np.tile(np.arange(acts) == acts - 1, users) & (np.repeat(np.arange(users), acts) < 20), 'test', 'valid'))
    log.loc[(log.split == 'valid') & (np.repeat(np.arange(users), acts) >= 20), 'split'] = 'embargo'
    log.to_parquet('artifacts/features/interactions.parquet')

def test_a_few_people_at_a_time_say_what_all_at_once_say(home):
    long_log(30)
    for others in ((), ('clicked',)):
        whole, parts = train.read_task(others=others), train.read_task(others=others, rows=64)
        assert sum(1 for _ in train.people('artifacts/features/interactions.parquet', 64)) > 10 and whole.repeats == parts.repeats and len(whole.test) and len(whole.valid)
        assert parts.sequences.flat.tobytes() == whole.sequences.flat.tobytes() and (parts.sequences.start == whole.sequences.start).all() and len(whole.sequences) == 30
        for a, b in ((whole.valid, parts.valid), (whole.test, parts.test)):
            assert (a.item == b.item).all() and (a.user == b.user).all() and (a.time == b.time).all()
            assert a.history.flat.tobytes() == b.history.flat.tobytes() and a.acts.flat.tobytes() == b.acts.flat.tobytes() and (a.acts.start == b.acts.start).all()
        assert {s['kind'].min() for s in parts.sequences} == ({1} if others else {2}) # clicked, then satisfied

def test_memory_does_not_grow_with_the_log(home, monkeypatch):
    monkeypatch.setattr(baselines, 'some_people', functools.partial(baselines.some_people, most=2**11))
    def peak(users):
        long_log(users); tracemalloc.start()
        task = train.read_task(rows=2**11); counts = train.baselines(task.sequences, N, CFG, 5, task.valid)
        found = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert len(task.sequences) == users and counts
        return found
    small, large = peak(500), peak(4000)
    assert large - small < 4000*250, f'{small/1e6:.1f} and {large/1e6:.1f} MB'        # eight times the people: a few numbers for each of them, not their acts, which alone would be 4000*30*17 bytes

def test_two_processes_write_one_bundle(home):
    cfg = yaml.safe_load(Path('params.yaml').read_text()); cfg['train'] |= dict(dropout=0., epochs=2)
    Path('params.yaml').write_text(yaml.safe_dump(cfg)); train.run()
    alone = json.loads(Path('metrics/train.json').read_text()); Path('metrics/train.json').unlink()
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', Path(sys.executable).parent/'telemetry-loop', 'train'], capture_output=True, text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(train.__file__).parents[1])})
    assert run.returncode == 0, run.stderr[-2000:]
    both = json.loads(Path('metrics/train.json').read_text())
    assert both['models']['sequence']['mrr']['value'] == pytest.approx(alone['models']['sequence']['mrr']['value'], abs=.02) and Recommender.load('artifacts/train').version == both['version']

def test_only_positive_acts_are_counted():
    told = [acts(np.array([1, 2, 3]), [1, 2, 4])]
    assert Positives(told, ['clicked'])[0].tolist() == [2, 3] and Positives(told, [])[0].tolist() == [1, 2, 3] and Positives([np.array([4])], ['clicked'])[0].tolist() == [4]
    assert [p.tolist() for p in Positives(Sequences.of(told*2), ['clicked'])] == [[2, 3]]*2

def test_acts_age_by_their_time_and_those_without_one_count_in_full():
    told = Positives([acts(np.arange(3), [2, 1, 2], when=[0., 50., 100.]), acts(np.array([4]), 2), np.array([5])], ['clicked'])
    assert told.span == (0., 100.) and [w.tolist() for w in Aged(told, 50.)] == [[.25, 1.], [1.], [1.]]
    assert Positives([acts(np.arange(2))], []).span is None and Positives([acts(np.arange(2), when=5.)], []).span is None

def test_counts_follow_a_habit_that_changed_and_a_refit_keeps_their_half_life():
    month = lambda number, step, people: [acts((s + step*np.arange(5)) % N, when=1e6*3*number + 60*np.arange(5) + s) for s in range(people)]
    past, now = month(0, 1, 90), month(1, 5, 30)
    valid = Targets([s['item'][:3] for s in now], np.array([s['item'][3] for s in now]), np.arange(30), None, None)
    blend, simple, fitted, chosen = learn(past + now, N, np.zeros(N, int), replace(CFG, parts=['network', 'counts', 'age']), 5, 1, valid)
    right = lambda model: float((rank_targets(model.score, valid) == 1).mean())
    assert blend.markov is simple['counts'] and chosen['counts']['half_life'] and right(simple['counts']) > right(simple['gap_markov']) + .1
    late = refit(past + now, N, np.zeros(N, int), replace(CFG, parts=['network', 'counts', 'age']), 5, 1, fitted, chosen)
    assert (late.markov.follows != blend.markov.follows).nnz == 0
    assert learn(past + now, N, np.zeros(N, int), replace(CFG, parts=['network', 'counts']), 5, 1, valid)[0].markov.follows.sum() > late.markov.follows.sum() # without the part nothing ages
