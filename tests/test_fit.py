"Questions that know no future, batches that lose nothing, the same bytes after a kill, alone or together."
import copy, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from telemetry_loop import fit as chapter
from telemetry_loop.baselines import MostPopular
from telemetry_loop.config import TelemetryError
from telemetry_loop.metrics import ndcg
from telemetry_loop.model import acts
from telemetry_loop.fit import AdamW, Learner, Sequences, Targets, fit, gathered, length_batches, network_scores, Questions, Spill, rank_targets, targets_as_of, windows
from circle import ASK, CFG, CYCLE, N

@pytest.fixture(scope='module')
def fitted(): return fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK)

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

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
    seqs = Sequences.of([np.arange(n) for n in (1, 6, 7, 8, 20)])
    cut = [seqs.flat[a:b] for a, b in windows(seqs, 7)]
    assert sum(len(c) for c in cut) == len(seqs.flat) and max(len(c) for c in cut) == 7 and cut[-3].tolist() == list(range(13, 20))
    batches = length_batches(np.arange(50) % 9, 8, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(50))

def test_learns_a_cycle_and_beats_popularity(fitted):
    network = ndcg(rank_targets(lambda h: network_scores(fitted.model, h), ASK)).mean()
    popular = ndcg(rank_targets(MostPopular().fit(CYCLE, N).score, ASK)).mean()
    assert network > .95 and network > popular + .2

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=15), min_size=1, max_size=6), st.integers(1, 6))
def test_gathered_windows_are_the_sequences(rows, size):
    seqs = Sequences.of([np.array(r, int) for r in rows])
    assert [s.tolist() for s in seqs] == rows
    if not len(seqs.flat): return
    back, cut = [], windows(seqs, size)
    for r in gathered(seqs.flat, cut):
        assert (r[np.argmax(r < 0):] < 0).all() if (r < 0).any() else True
        back += [r[r >= 0].tolist()]
    assert sorted(sum(back, [])) == sorted(sum(rows, [])) and max(map(len, back)) <= size

def test_a_mapped_file_is_as_good_as_memory(fitted, tmp_path):
    seqs = Sequences.of(CYCLE)
    np.save(tmp_path/'flat.npy', seqs.flat)
    mapped = Sequences(np.load(tmp_path/'flat.npy', mmap_mode='r'), seqs.start)
    assert same(fit(mapped, N, np.arange(N) % 2, CFG, 5, 1, ASK).model, fitted.model)

def test_same_seed_same_weights_and_another_seed_other_weights(fitted):
    torch.manual_seed(999)                                             # the caller's generator must not matter
    again, other = fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK), fit(CYCLE, N, np.arange(N) % 2, CFG, 6, 1, ASK)
    assert same(again.model, fitted.model) and again.valid == fitted.valid and not same(other.model, fitted.model)

@pytest.mark.parametrize('full_softmax', [1000, 1])
def test_two_threads_write_the_same_bytes_on_batches_they_share(full_softmax):
    rng = np.random.default_rng(4)                                     # long enough that threads share the sums behind a gradient
    told = [acts(rng.integers(0, 900, 80), rng.integers(1, 3, 80), rng.exponential(20, 80), np.cumsum(rng.exponential(3000, 80))) for _ in range(192)]
    cfg = replace(CFG, length=80, batch=64, epochs=2, full_softmax=full_softmax, inputs=['category', 'kind', 'dwell', 'time'], rewards={'clicked': 0., 'satisfied': 1.})
    first, *others = [fit(told, 1000, np.arange(1000) % 7, cfg, 5, 2).model for _ in range(4)]
    assert all(same(first, o) for o in others)

@pytest.mark.parametrize('full_softmax', [1000, 1])
def test_killed_at_twenty_points_it_ends_with_the_same_weights(tmp_path, monkeypatch, full_softmax):
    cfg = replace(CFG, epochs=6, full_softmax=full_softmax)
    ask = replace(ASK, item=(ASK.item + 5) % N)
    whole = fit(CYCLE, N, np.arange(N) % 2, cfg, 5, 1, ask)
    update, calls, dead = Learner.update, [], set(np.random.default_rng(0).choice(np.arange(1, 24), 20, replace=False).tolist())
    def fragile(self, batch):
        calls.append(1)
        if len(calls) in dead: raise KeyboardInterrupt
        return update(self, batch)
    monkeypatch.setattr(Learner, 'update', fragile)
    kills = 0
    while True:
        try: found = fit(CYCLE, N, np.arange(N) % 2, cfg, 5, 1, ask, keep=tmp_path, every=0.); break
        except KeyboardInterrupt: kills += 1
    assert kills == 20 and same(found.model, whole.model) and found.valid == whole.valid and found.loss == whole.loss and not list(tmp_path.iterdir())

def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path, monkeypatch):
    def die(self, batch): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(chapter, '_judged', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK, keep=tmp_path, every=0.)
    assert len(list(tmp_path.glob('*.pt'))) == 1
    for change in (dict(cfg=replace(CFG, lr=.02)), dict(seed=6)):
        args = dict(cfg=CFG, seed=5) | change
        assert same(fit(CYCLE, N, np.arange(N) % 2, args['cfg'], args['seed'], 1, ASK, keep=tmp_path).model, fit(CYCLE, N, np.arange(N) % 2, args['cfg'], args['seed'], 1, ASK).model)

# --- what is told of an act

def story(name, people=240, length=8, seed=11): # the step to the next item is told by one thing alone: +1 or +3
    rng = np.random.default_rng(seed)
    far = rng.random((people, length)) < .5                            # of each act: what comes after it is far
    item = (rng.integers(0, N, (people, 1)) + np.cumsum(np.c_[np.zeros((people, 1), int), np.where(far, 3, 1)[:, :-1]], 1)) % N
    known = dict(kind=np.where(far, 2, 1)) if name == 'kind' else dict(dwell=np.where(far, 200., 4.)) if name == 'dwell' else dict(when=np.cumsum(np.c_[np.zeros((people, 1)), np.where(far, 1e6, 100.)], 1)[:, :-1])
    told = acts(item, **known); asked = told[200:]
    now = (asked['when'][:, -2] + np.where(far[200:, -2], 1e6, 100.)) if name == 'time' else np.zeros(40)
    return list(told[:200]), Targets(list(item[200:, :-1]), item[200:, -1], np.arange(40), None, (1000*now).astype('datetime64[ms]'), list(asked[:, :-1]))

@pytest.mark.parametrize('name', ['kind', 'dwell', 'time'])
def test_each_input_is_used_where_it_tells(name):
    sequences, ask = story(name)
    ask = replace(ask, history=[h[:0] for h in ask.history])           # nothing is removed as seen: items come back
    cfg = replace(CFG, epochs=25, patience=25, inputs=[name], rewards={})
    with_, without = (fit(sequences, N, np.zeros(N, int), replace(cfg, inputs=i), 5, 1, ask) for i in ([name], []))
    best = lambda found: max(found.valid)
    assert best(with_) > .95 and best(without) < .9                    # of two places one is right: .82 by chance

def test_two_heads_ask_for_different_things():
    rng = np.random.default_rng(2)
    opened = [np.r_[rng.integers(0, 4), rng.choice([5, 6], p=[.8, .2])] for _ in range(300)] # 5 is opened most, 6 is stayed with
    told = [acts(o, np.where(o == 6, 2, 1)) for o in opened]
    found = fit(told, N, np.zeros(N, int), replace(CFG, inputs=['kind'], rewards={'clicked': 0., 'satisfied': 1.}, epochs=20), 5, 1)
    ask = acts(np.array([[2]]), 1)
    assert network_scores(found.model, ask, objective='engagement')[0].argmax() == 5 and network_scores(found.model, ask)[0].argmax() == 6
    assert fit(told, N, np.zeros(N, int), replace(CFG, rewards={}, epochs=1), 5, 1).model.aim is None

def test_killed_while_told_ends_the_same(tmp_path, monkeypatch):
    sequences, ask = story('time')
    cfg = replace(CFG, epochs=3, inputs=['kind', 'dwell', 'time'])
    whole, update, calls = fit(sequences, N, np.zeros(N, int), cfg, 5, 1, ask), Learner.update, []
    def fragile(self, batch):
        calls.append(1)
        if len(calls) in (5, 20): raise KeyboardInterrupt
        return update(self, batch)
    monkeypatch.setattr(Learner, 'update', fragile)
    while True:
        said = []
        try: found = fit(sequences, N, np.zeros(N, int), cfg, 5, 1, ask, keep=tmp_path, every=0., each=lambda *pass_: said.append(pass_)); break
        except KeyboardInterrupt: pass
    assert len(calls) > 20 and same(found.model, whole.model)
    assert said == list(zip(range(1, len(found.loss) + 1), found.loss, found.valid)) # the passes before the kill are told again

def test_updates_are_those_of_torch_without_its_compiler():
    def walk(make):
        torch.manual_seed(3); ps = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(2, 2))]
        optimiser = make(ps)
        for n in range(9):
            optimiser.zero_grad(set_to_none=True)
            loss = ((ps[0] @ ps[1])**2).sum() + (ps[2]**3).sum()*(n % 2)
            if n % 3 == 0: ps[2].requires_grad_(False)                       # now and then one has no gradient
            loss.backward(); ps[2].requires_grad_(True); optimiser.step()
            if n == 4: held = copy.deepcopy(optimiser.state_dict()); optimiser = make(ps); optimiser.load_state_dict(held)
        return ps
    ours = walk(lambda ps: AdamW([(ps[:1] + ps[2:], .1), (ps[1:2], 0.)], .01, (.9, .98)))
    theirs = walk(lambda ps: torch.optim.AdamW([dict(params=ps[:1] + ps[2:], weight_decay=.1), dict(params=ps[1:2], weight_decay=0.)], lr=.01, betas=(.9, .98), fused=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    alone = 'import sys; import numpy as np; from circle import *; from telemetry_loop.fit import fit; fit(CYCLE, N, np.zeros(N, int), CFG, 5, 1, None, 1); sys.exit("torch._dynamo" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', alone], cwd=Path(__file__).parent).returncode == 0

def test_what_is_spilled_comes_back_and_lies_in_a_file(tmp_path):
    spill, given = Spill(acts(0).dtype, tmp_path/'new'), [acts(np.arange(n), 1, 2., 3.) for n in (3, 0, 5)]
    for a in given: spill.add(a)
    kept = spill.kept()
    assert len(kept) == 3 and all((a == b).all() for a, b in zip(kept, given)) and not list((tmp_path/'new').iterdir()) # without a name: nothing is left behind
    assert isinstance(kept.flat.base, np.memmap) and len(Spill('i8', tmp_path).kept()) == 0
    whole = Targets([np.array([1, 2]), np.zeros(0, int)], np.array([3, 4]), np.array(['a', 'b']), np.array([], 'M8[ms]'), np.array(['2026-01-01', '2026-01-02'], 'M8[ms]'), given[:2])
    questions = Questions(whole.available, tmp_path)
    for r in (0, 1): questions.add(whole.take([r]))
    again = questions.kept()
    assert again.item.tolist() == [3, 4] and again.user.tolist() == ['a', 'b'] and (again.time == whole.time).all()
    assert [h.tolist() for h in again.history] == [[1, 2], []] and all((a == b).all() for a, b in zip(again.take([0, 1]).acts, given))

def test_questions_carry_what_was_known_of_each_act():
    log = frame([('a', 0, '2026-01-01', '2026-01-01', 'train'), ('a', 1, '2026-01-02', '2026-01-02', 'train'), ('a', 2, '2026-01-03', '2026-01-03', 'test'), ('a', 3, '2026-01-04', '2026-01-04', 'test')])
    log = log.assign(kind=['satisfied', 'clicked', 'clicked', 'satisfied'], positive=[True, False, False, True], dwell=[40., 3., 5., 50.], dwell_known=pd.to_datetime(['2026-01-02', '2026-01-05', '2026-01-03', None]))
    ask, _ = targets_as_of(log, 'test', np.full(5, np.datetime64('NaT', 'us')))
    assert ask.item.tolist() == [3] and ask.history[0].tolist() == [0]   # what is not positive is neither asked nor counted ..
    assert ask.acts[0]['item'].tolist() == [0, 1, 2] and ask.acts[0]['kind'].tolist() == [2, 1, 1]
    assert np.array_equal(ask.acts[0]['dwell'], np.array([40, np.nan, 5], np.float32), equal_nan=True) # .. and a dwell is told once it is known

TWO = """
import sys, numpy as np, torch
from torch import distributed
sys.path[:0] = [{root!r}, {here!r}]
from test_fit import *
found = fit(CYCLE, N, np.arange(N) % 2, replace(CFG, dropout=0., half='no', full_softmax={full}, epochs=4), 5, 1, ASK)
if distributed.get_rank() == 0: torch.save(found.model.state_dict(), {to!r})
"""

@pytest.mark.parametrize('full_softmax', [1000, 1])
def test_two_processes_learn_what_one_does(tmp_path, full_softmax):
    here = Path(__file__).parent
    (tmp_path/'two.py').write_text(TWO.format(root=str(here.parent), here=str(here), full=full_softmax, to=str(tmp_path/'two.pt')))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', tmp_path/'two.py'], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr[-2000:]
    one, two = fit(CYCLE, N, np.arange(N) % 2, replace(CFG, dropout=0., half='no', full_softmax=full_softmax, epochs=4), 5, 1, ASK).model.state_dict(), torch.load(tmp_path/'two.pt', weights_only=True)
    assert max((one[k] - two[k]).abs().max() for k in one) < 2e-3

def test_sampled_negatives_learn_the_cycle_too():
    found = fit(CYCLE, N, np.arange(N) % 2, replace(CFG, full_softmax=1, epochs=20, patience=20), 5, 1, ASK)
    assert max(found.valid) > .95

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
    for change, said in ((dict(heads=3), 'heads must divide'), (dict(half='maybe'), 'train.half'), (dict(device='tpu'), 'cpu or cuda')):
        with pytest.raises(TelemetryError, match=said): fit(CYCLE, N, np.zeros(N, int), replace(CFG, **change), 1, 1)

