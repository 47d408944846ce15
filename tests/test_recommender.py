"A bundle is whole, says what it is, and answers the same wherever it is asked."
import io, json, time
from dataclasses import asdict, replace
import numpy as np, pytest, torch
from telemetry_loop.baselines import EASE, GapMarkov
from telemetry_loop.config import TelemetryError, folder_digest
from telemetry_loop.fit import Targets, fit, rank_targets
from telemetry_loop.model import acts
from telemetry_loop.metrics import ndcg
from telemetry_loop.recommender import FILES, Blend, Recommender, blend_weights
from circle import ASK, CFG, CYCLE, N

@pytest.fixture(scope='module')
def blend(): return Blend(fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK).model, GapMarkov().fit(CYCLE, N), EASE().fit(CYCLE, N).lean(), .4, 3.)

def recommender(blend, **facts): return Recommender(blend, np.array([f'i{i}' for i in range(N)]), asdict(CFG), {'seed': 5, 'threads': 1} | facts)

def test_weights_are_judged_as_the_blend_would_rank(blend):
    asked = Targets([h[:2] for h in ASK.history], (ASK.item + 2) % N, ASK.user, None, None) # not what comes next: weights differ
    found = blend_weights(blend, asked)
    assert len(found) == 72 and len(set(found.values())) > 1
    for pair in ((0., 0.), (.3, 10.), (1., 3.)): assert found[pair] == pytest.approx(ndcg(rank_targets(Blend(blend.model, blend.markov, blend.ease, *pair).score, asked)).mean())

def test_without_a_linear_model_there_is_one_weight(blend, tmp_path):
    two = Blend(blend.model, blend.markov, None, .4, 0.)
    assert all(v == 0 for _, v in blend_weights(two, ASK)) and np.array_equal(two.score(np.array([[1, 2]])), Blend(blend.model, blend.markov, blend.ease, .4, 0.).score(np.array([[1, 2]])))
    recommender(two).save(tmp_path/'b')
    assert Recommender.load(tmp_path/'b').recommend(['i3', 'i4'], 3) == recommender(two).recommend(['i3', 'i4'], 3)

def test_same_bytes_twice(blend, tmp_path):
    for name in 'ab': recommender(blend).save(tmp_path/name); time.sleep(.01)
    assert folder_digest(tmp_path/'a') == folder_digest(tmp_path/'b')

def test_weights_that_are_no_numbers_are_refused(blend):
    bad = fit(CYCLE, N, np.arange(N) % 2, CFG, 5, 1, ASK).model
    with torch.no_grad(): bad.item.weight[3, 0] = torch.nan
    with pytest.raises(TelemetryError, match='item.weight .* no numbers'): recommender(Blend(bad, blend.markov, blend.ease, .4, 3.))

# --- what is told of an act

@pytest.fixture(scope='module')
def told():
    cfg = replace(CFG, inputs=['kind', 'dwell', 'time'], others=['clicked'], rewards={'clicked': 0.})
    rng = np.random.default_rng(1)
    rows = [acts(s, rng.integers(1, 3, 8), rng.exponential(40, 8), np.cumsum(rng.exponential(9000, 8))) for s in CYCLE]
    return Recommender(Blend(fit(rows, N, np.zeros(N, int), cfg, 5, 1).model, GapMarkov().fit(CYCLE, N), EASE().fit(CYCLE, N).lean(), .4, 3., ('clicked', 'satisfied'), ('clicked',)), np.array([f'i{i}' for i in range(N)]), asdict(cfg), {'seed': 5, 'threads': 1})

def test_what_is_told_reaches_the_scores_and_survives_the_bundle(told, tmp_path):
    told.save(tmp_path/'b'); back = Recommender.load(tmp_path/'b')
    h, c, t = np.array([['i1', 'i2']]), np.array([told.items]), np.array([['2026-01-01', '2026-01-02']], 'datetime64[ms]')
    plain = told.scores(h, c)
    for known in (dict(kind=np.array([[1, 2]])), dict(dwell=np.array([[2., 300.]])), dict(when=t, now=t[:, 1] + 10**8)):
        assert not np.allclose(told.scores(h, c, **known), plain) and np.array_equal(back.scores(h, c, **known), told.scores(h, c, **known))
    assert not np.allclose(told.scores(h, c, 'engagement', kind=np.array([[1, 2]])), told.scores(h, c, kind=np.array([[1, 2]])))
    with pytest.raises(TelemetryError, match="objective is 'clicks'; it is satisfaction or engagement"): told.scores(h, c, 'clicks')

def test_acts_that_are_not_positive_are_told_but_not_counted(told):
    read = told.acts(np.array([['i1', 'i2']]), np.array([[1, 2]]))
    assert told.blend.positive(read).tolist() == [[-1, 2]] and read['item'].tolist() == [[1, 2]]

def test_kinds_it_has_not_learned_from_are_ignored(told):
    h, c = np.array([['i7', 'i2']]), np.array([told.items])
    assert np.allclose(told.scores(h, c, kind=np.array([[4, 2]])), told.scores(np.array([['', 'i2']]), c, kind=np.array([[0, 2]])), atol=1e-6)

# --- the bundle

def test_bundle_round_trip(blend, tmp_path):
    rec = recommender(blend, metrics={'x': 1}); rec.save(tmp_path/'b'); back = Recommender.load(tmp_path/'b')
    h, c = np.array([['', 'i1', 'i2']]), np.array([rec.items])
    assert back.version == rec.version and len(back.version) == 12 and back.facts['metrics'] == {'x': 1}
    assert np.array_equal(back.scores(h, c), rec.scores(h, c)) and sorted(p.name for p in tmp_path.iterdir()) == ['b']

def test_version_follows_the_content(blend):
    rec = recommender(blend)
    assert recommender(blend, seed=99).version == rec.version
    assert Recommender(blend, np.array([f'j{i}' for i in range(N)]), asdict(CFG), {'threads': 1}).version != rec.version

@pytest.mark.parametrize('name', FILES)
def test_altered_or_missing_files_are_refused(blend, tmp_path, name):
    recommender(blend).save(tmp_path/'b'); file = tmp_path/'b'/name
    data = bytearray(file.read_bytes()); data[len(data)//2] ^= 1; file.write_bytes(bytes(data))
    with pytest.raises(TelemetryError, match=f'{name} has digest .* altered'): Recommender.load(tmp_path/'b')
    file.unlink()
    with pytest.raises(TelemetryError, match=f'{name} is missing'): Recommender.load(tmp_path/'b')

def test_altered_facts_are_refused(blend, tmp_path):
    recommender(blend).save(tmp_path/'b'); file = tmp_path/'b'/'bundle.json'; facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {'params': facts['params'] | {'heads': 4}}))
    with pytest.raises(TelemetryError, match='its contents are .* altered'): Recommender.load(tmp_path/'b')
    file.write_text('{}')
    with pytest.raises(TelemetryError, match="has no 'params'"): Recommender.load(tmp_path/'b')
    with pytest.raises(TelemetryError, match='is not there'): Recommender.load(tmp_path/'nowhere')

def test_a_bundle_of_another_version_is_refused_in_one_line(blend, tmp_path):
    mine = recommender(blend); weights = dict(np.load(io.BytesIO(mine._files['weights.npz'])))
    for change in ({'gate.bias': np.zeros(3)}, {'norm.bias': np.zeros(3, np.float32)}):
        np.savez(held := io.BytesIO(), **weights | change)
        Recommender(blend, mine.items, mine.params, mine.facts, mine._files | {'weights.npz': held.getvalue()}).save(tmp_path/'b')
        with pytest.raises(TelemetryError, match=f'{list(change)[0]} of shape .* another version') as refused: Recommender.load(tmp_path/'b')
        assert '\n' not in str(refused.value)

def test_scores_are_log_probabilities_whatever_the_company(blend):
    rec, rng = recommender(blend), np.random.default_rng(0)
    history = np.array([['']*(7-n) + [f'i{i}' for i in rng.integers(0, N, n)] for n in rng.integers(0, 8, 200)])
    everything = np.tile(rec.items, (200, 1))
    together = rec.scores(history, everything)
    assert together.dtype == np.float64 and np.allclose(np.exp(together).sum(1), 1, atol=1e-5)
    alone = np.concatenate([rec.scores(history[i:i+1], everything[i:i+1]) for i in range(200)])
    assert np.abs(together - alone).max() < 1e-5 and np.abs(together - rec.scores(history, everything, cells=1)).max() < 1e-5
    assert np.array_equal(together[:, [3, 1]], rec.scores(history, everything[:, [3, 1]]))

def test_unknown_ids(blend):
    rec = recommender(blend)
    s = rec.scores(np.array([['i1', 'i2', '']  , ['i1', '?', 'i2']]), np.array([['i3', '?', ''], ['i3', 'i4', '?']]))
    assert np.isnan(s).tolist() == [[False, True, True], [False, False, True]] and s[0, 0] == pytest.approx(s[1, 0], abs=1e-5)

def test_recommend(blend):
    rec = recommender(blend)
    assert rec.recommend(['i3', 'i4'], 1) == ['i5'] and not set(rec.recommend(['i3', 'i4'], 50)) & {'i3', 'i4'}
    assert len(rec.recommend(['i3'], 50)) == N - 1 and len(rec.recommend(['i3'], 50, exclude_seen=False)) == N and len(rec.recommend([], 4)) == 4
    with pytest.raises(TelemetryError, match='k is 0'): rec.recommend(['i3'], 0)

def test_duplicate_vocabulary_is_refused(blend):
    with pytest.raises(TelemetryError, match="'a' stands twice"): Recommender(blend, np.array(['a']*N), asdict(CFG), {})

