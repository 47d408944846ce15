"A refresh learns what is fresh, in any order, and lets the old model answer where that is not clearly better."
from dataclasses import asdict, replace
import numpy as np, pandas as pd, pytest, torch
from telemetry_loop.baselines import EASE, GapMarkov
from telemetry_loop.config import TelemetryError, from_dict, load_params
from telemetry_loop.fit import Targets, TrainConfig, fit
from telemetry_loop.recommender import Blend, Recommender
from telemetry_loop.refresh import RefreshConfig, Refresher, cut, fresh_chain, mixed_chain, questions, tried, tuned_network, unseen
from conftest import ROOT, small_params

N = 12
TRAIN = from_dict(TrainConfig, small_params(train=dict(dim=16, blocks=1, length=8, dropout=.1, batch=16, epochs=6, lr=.01, weight_decay=.01, average=.9, half='no', inputs=['category'], others=[], rewards={}))['train'], 'train')
CFG = RefreshConfig(shares=[.3, .9], half_life_hours=24., passes=3, lr=.01, batch=32, parts=4, least=10, level=.9)
START = np.random.default_rng(1).integers(0, N, 80)
UP = [(s + np.arange(6)) % N for s in START]
ITEMS = np.array([f'i{i}' for i in range(N)])

def recommender(weight=.5, linear=1.):
    return Recommender(Blend(fit(UP, N, np.zeros(N, int), TRAIN, 1, 1).model, GapMarkov().fit(UP, N), EASE().fit(UP, N).lean() if linear else None, weight, linear), ITEMS, asdict(TRAIN), {'threads': 1, 'metrics': 'kept'})

@pytest.fixture(scope='module')
def old(): return recommender()

def walk(step, people=60, acts=4, first=0):
    "People walk the circle of items by `step`, one act an hour."
    rows = [(f'u{p}', f'i{(START[p] + step*(a + first)) % N}', pd.Timestamp('2025-01-06') + pd.Timedelta(minutes=7*p + 60*a)) for p in range(people) for a in range(acts)]
    return pd.DataFrame(rows, columns=['user_id', 'item', 'event_time'])

def asked(history, item, hours=None):
    return Targets([np.array(h, int) for h in history], np.array(item), np.arange(len(item)).astype(str), None, np.datetime64('2025-01-06', 'ms') + np.array(hours if hours is not None else range(len(item)))*np.timedelta64(3_600_000, 'ms'))

# --- what is asked

def test_histories_hold_what_was_known_before(old):
    events = pd.DataFrame(dict(user_id=['b', 'a', 'a', 'a'], item=['i5', 'i2', 'i1', 'i3'], event_time=pd.to_datetime(['2025-01-06 01:00', '2025-01-06 02:00', '2025-01-06 00:00', '2025-01-06 02:00'])))
    q, left_out = questions(old, events, {'a': ['i9', 'gone', 'i8'], 'nobody': ['i1']})
    assert q.item.tolist() == [1, 5, 2, 3] and q.user.tolist() == ['a', 'b', 'a', 'a'] and left_out == 0
    assert [h.tolist() for h in q.history] == [[9, 8], [], [9, 8, 1], [9, 8, 1]]                # of one moment: neither knows the other

def test_the_order_of_rows_and_what_says_nothing_change_nothing(old):
    bad = pd.DataFrame(dict(user_id=['u1', None, 'u1', 'u2'], item=['?', 'i1', 'i1', None], event_time=[pd.Timestamp('2025-01-06')]*2 + [pd.NaT, pd.Timestamp('2025-01-06')]))
    messy = pd.concat([walk(-1), walk(-1).head(3), bad]).sample(frac=1, random_state=0)
    a, b = old.update(walk(-1), cfg=CFG), old.update(messy, cfg=CFG)
    assert a.version == b.version and b.facts['refresh']['left_out'] == 7 and a.facts['refresh']['left_out'] == 0
    assert old.update(walk(-1).rename(columns={'item': 'item_id'}).assign(event_time=lambda t: t.event_time.dt.tz_localize('UTC')), cfg=CFG).version == a.version

def test_missing_columns_are_named(old):
    for name in ('user_id', 'item', 'event_time'):
        with pytest.raises(TelemetryError, match=f'no column {name!r}'): old.update(walk(1).drop(columns=name), cfg=CFG)

def test_parts_are_cut_by_time_and_moments_stay_together():
    q = asked([[]]*8, [0]*8, [0, 1, 2, 2, 2, 2, 6, 7])
    assert cut(q, 4).tolist() == [0, 2, 2, 6, 8] and cut(q.take(np.arange(0)), 4).tolist() == [0]*5

def test_what_a_person_had_before_is_not_asked(old):
    twice = pd.concat([walk(-1), walk(-1).assign(event_time=lambda t: t.event_time + pd.Timedelta(hours=9))])
    q = questions(old, twice)[0]
    assert len(q) == 480 and len(unseen(q)) == 240 and len(tried(old.blend, q, CFG).old) < 240

# --- what is learned

def test_counts_weigh_distance_and_age():
    chain = fresh_chain(GapMarkov(decay=.5, gaps=2, power=0.).fit([[0, 1]], 4), asked([[0, 1, 2], [2]], [3, 3], [0, 24]), 24.)
    assert np.allclose(chain.follows.toarray()[:, 3], [0, .5*.25, .5*.5 + .5, 0]) and chain.counts.tolist() == [0, 0, 0, 1.5]

def test_a_share_is_a_share_of_the_evidence():
    old, new = GapMarkov(power=0.).fit([[0, 1]]*6, 3), GapMarkov(power=0.).fit([[1, 2]]*2, 3)
    mix = mixed_chain(old, new, .25)
    assert mix.follows.sum() == pytest.approx(old.follows.sum()) and mix.follows[1, 2]/mix.follows.sum() == pytest.approx(.25)
    assert mix.counts.sum() == old.counts.sum() and mix.counts[2]/mix.counts.sum() == pytest.approx(.125)
    assert (mixed_chain(old, GapMarkov(power=0.).fit([], 3), .25).follows != old.follows).nnz == 0

def test_the_network_learns_the_fresh_and_the_old_one_stays(old):
    before, q = {k: v.clone() for k, v in old.model.state_dict().items()}, questions(old, walk(-1))[0]
    new = tuned_network(old.model, q, CFG)
    score = lambda m: Blend(m, old.blend.markov, None, 1., 0.).score(np.array([[6, 5]]))[0]
    assert score(new)[4] - score(new)[6] > score(old.model)[4] - score(old.model)[6] + .1
    assert all(torch.equal(v, before[k]) for k, v in old.model.state_dict().items())

def test_share_zero_is_the_old_blend(old):
    q, h = questions(old, walk(-1))[0], np.array([[1, 2], [6, 5]])
    assert np.allclose(Refresher(old.blend, q, CFG).at(0.).score(h), old.blend.score(h), atol=1e-6)
    assert Refresher(old.blend, q, CFG).at(.9).linear == pytest.approx(.1*old.blend.linear)

# --- who answers

def test_a_turn_of_fashion_is_learned(old, tmp_path):
    version = old.version
    new = old.update(walk(-1), cfg=CFG); said = new.facts['refresh']
    assert said['accepted'] and said['from'] == version == old.version != new.version and said['guard']['ci_lower'] > 0 and said['events'] == 240
    assert old.recommend(['i4', 'i5'], 1) == ['i6'] and new.recommend(['i6', 'i5'], 1) == ['i4'] and 'refresh' not in old.facts and new.facts['metrics'] == 'kept'
    new.save(tmp_path/'b'); back = Recommender.load(tmp_path/'b')
    assert back.version == new.version and back.facts['refresh'] == said and back.recommend(['i6', 'i5'], 3) == new.recommend(['i6', 'i5'], 3)
    assert old.update(walk(-1), cfg=CFG).version == new.version

@pytest.mark.parametrize('seed', range(5))
def test_noise_falls_back(old, seed):
    noise = walk(-1).assign(item=lambda t: np.random.default_rng(seed).choice(ITEMS, len(t)))
    same = old.update(noise, cfg=CFG); said = same.facts['refresh']
    assert same.version == old.version and not said['accepted'] and 'clearly above 0' in said['reason'] and said['guard']['ci_lower'] <= 0
    assert same.recommend(['i4', 'i5'], 3) == old.recommend(['i4', 'i5'], 3) and 'refresh' not in old.facts
    assert old.update(noise, cfg=CFG, guard=False).version != old.version

def test_every_part_is_asked_before_it_is_learned(old):
    "A change of the newest events changes none of the answers to the older ones."
    q = questions(old, walk(-1))[0]; edge = cut(q, CFG.parts)[-2]
    other = q.take(np.arange(len(q))); other.item[edge:] = (other.item[edge:] + 5) % N
    a, b = tried(old.blend, q, CFG), tried(old.blend, other, CFG)
    n = len(a.new) - (len(q) - edge)
    assert n > 50 and np.array_equal(a.new[:n], b.new[:n]) and a.gain(.9).value > b.gain(.9).value

@pytest.mark.parametrize('events', [walk(-1, 0), walk(-1, 1, 1), walk(-1, 8), walk(-1).assign(item='?'), walk(-1).assign(event_time=pd.Timestamp('2025-01-06'))], ids=['none', 'one', 'few people', 'unknown', 'one moment'])
def test_too_few_events_are_said_so(old, events):
    same = old.update(events, cfg=CFG)
    assert same.version == old.version and 'wait for more events' in same.facts['refresh']['reason']

def test_one_part_alone_and_no_linear_model():
    for weight in (0., 1.):
        old = recommender(weight, 0.); new = old.update(walk(-1), cfg=CFG)
        assert new.facts['refresh']['accepted'] and new.recommend(['i6', 'i5'], 1) == ['i4']

def test_histories_help(old):
    late = walk(-1, acts=3, first=2)
    known = {u: s.tolist() for u, s in walk(-1, acts=2).groupby('user_id')['item']}
    assert old.update(late, known, CFG).facts['refresh']['guard']['n'] > 0 and old.update(late, known, CFG).version != old.update(late, cfg=CFG).version

# --- values

@pytest.mark.parametrize('change,match', [(dict(shares=[]), 'shares is'), (dict(shares=[0.]), 'shares is'), (dict(level=1.), 'level is 1'), (dict(half_life_hours=0.), 'half_life_hours is 0'), (dict(parts=2), 'parts is 2'), (dict(least=1), 'least is 1'), (dict(batch=0), 'batch is 0')])
def test_senseless_values_are_refused(old, change, match):
    with pytest.raises(TelemetryError, match=match): old.update(walk(-1), cfg=replace(CFG, **change))

def test_values_come_from_params(old, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_params(RefreshConfig, 'refresh').check()
    assert old.update(walk(-1)).facts['refresh']['accepted']
