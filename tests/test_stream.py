"A log read in pieces says what the same log says as arrays, in bounded memory."
import math, tempfile, tracemalloc
import numpy as np, pandas as pd, pytest
from telemetry_loop import stream
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import standard_error
from telemetry_loop.ope import assess, checked_log
from telemetry_loop.stream import CellSums, Moments, evaluate_log
from telemetry_loop.support import action_gaps, effective_sample_size, weights_of

SEED = 20264 # declared once
NAMED = dict(action='item', reward='pay', propensity='prob')

def drawn(n=30_000, seed=SEED, users=3000, actions=6, sharp=.4, hot=0., words=True):
    "A log whose users recur anywhere; `hot`: share of the rows that belong to one of them."
    rng = np.random.default_rng(seed)
    score = sharp*rng.normal(size=(n, actions)); p = np.exp(score); p /= p.sum(1, keepdims=True); q = np.exp(2*score); q /= q.sum(1, keepdims=True)
    i, a = np.arange(n), (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    user = np.where(rng.random(n) < hot, 0, rng.integers(users, size=n))
    return pd.DataFrame(dict(item=np.array(list('uvwxyz'))[a] if words else a + 7, pay=rng.gamma(1 + a)*(user % 3), place=rng.integers(3, size=n), prob=p[i, a], new=q[i, a], user=np.array([f'u{u}' for u in user]) if words else user - 5))

def in_memory(log, target, position=None, cluster=None, segment=None):
    "The same through arrays."
    names = log.item.unique(); even = target == 'uniform'
    rows = checked_log(log.pay, log.prob, np.full(len(log), 1/len(names)) if even else log[target], cluster=log[cluster] if cluster else None)
    return assess(rows, group={x: log[x].to_numpy() for x in (position, segment) if x}, action=log.item.to_numpy(), due=pd.Series(1/len(names), index=names) if even else None, actions=len(names)).as_dict()

def same(a, b):
    assert list(a['estimates']) == list(b['estimates']) and a['support']['reasons'] == b['support']['reasons'] and a['support']['verdict'] == b['support']['verdict']
    for x, y, zero in [(a['support'], b['support'], 0), (a['logging'], b['logging'], 0)] + [(a[part][k], b[part][k], zero) for part, zero in (('estimates', 0), ('gain', 1e-8)) for k in a['estimates']]: # the gain of a policy over itself
        assert set(x) == set(y)
        for k in set(x) - {'reasons', 'verdict'}: assert (x[k] is None) == (y[k] is None) and (x[k] is None or x[k] == pytest.approx(y[k], rel=1e-9, abs=zero)), k

@pytest.fixture
def small(monkeypatch):
    "Pieces so small that a short log has many."
    for name, rows in dict(BATCH=1000, PART=2000).items(): monkeypatch.setattr(stream, name, rows)

def saved(log, folder, kind='parquet'):
    path = folder/f'log.{kind}'
    log.to_parquet(path, row_group_size=1700) if kind == 'parquet' else log.to_csv(path, index=False)
    return path

@pytest.mark.parametrize('target', ['uniform', 'new'])
@pytest.mark.parametrize('position', [None, 'place'])
@pytest.mark.parametrize('cluster', [None, 'user'])
@pytest.mark.parametrize('kind', [dict(), dict(words=False, sharp=1.5, seed=1), dict(hot=.6, seed=2)])
def test_in_pieces_as_in_memory(tmp_path, small, target, position, cluster, kind):
    log = drawn(**kind)
    found = evaluate_log(saved(log, tmp_path), **NAMED, target=target, position=position, cluster=cluster)
    same(found, in_memory(log, target, position, cluster))
    if not kind and target == 'new': assert all(e['ci_lower'] is not None for e in found['estimates'].values())

@pytest.mark.parametrize('name, change', [
    ('mean_weight', lambda t: dict(prob=t.prob/2)), ('certain', lambda t: dict(prob=t.prob.mask(t.item == 'w', 1.))), ('floor', lambda t: dict(prob=t.prob.mask(t.index % 300 == 0, 1e-6))),
    ('calibration', lambda t: dict(prob=t.prob.mask(t.item == 'x', t.prob*.6))), ('mean_weight', lambda t: dict(prob=t.prob.mask(t.place == 1, t.prob*.7))),
    ('heavy_tail', lambda t: dict(prob=t.prob.mask(t.index % 100 == 0, t.prob*np.random.default_rng(0).uniform(size=len(t))**2))), ('few_clusters', lambda t: dict(user='one'))])
def test_faults_are_refused_in_the_same_words(tmp_path, small, name, change):
    log = (t := drawn()).assign(**change(t))
    found = evaluate_log(saved(log, tmp_path), **NAMED, target='uniform', position='place', cluster='user')
    same(found, in_memory(log, 'uniform', 'place', 'user'))
    assert found['support']['verdict'] == 'refuse' and name in [r.split(':')[0] for r in found['support']['reasons']]

def test_equal_policies_and_csv(tmp_path, small):
    log = drawn(4000); log['new'] = log.prob                                   # every weight is 1; every setting ties
    same(evaluate_log(saved(log, tmp_path), **NAMED, target='new', cluster='user'), in_memory(log, 'new', None, 'user'))
    log = pd.read_csv(saved(drawn(4000), tmp_path, 'csv'))
    same(evaluate_log(tmp_path/'log.csv', **NAMED, target='uniform', position='place', cluster='user'), in_memory(log, 'uniform', 'place', 'user'))

def test_a_segment_whose_propensities_are_off_is_named(tmp_path, small):
    log = drawn().assign(kind=lambda t: np.where(t.user.str[-1] < '4', 'new', 'old'))
    assert evaluate_log(saved(log, tmp_path), **NAMED, target='new', segment='kind', cluster='user')['support']['reasons'] == []
    log['prob'] = log.prob*np.where(log.kind == 'new', .8, 1.2).clip(max=1/log.prob)                                    # wrong in both, nearly right on the whole
    assert 'segment' not in str(evaluate_log(saved(log, tmp_path), **NAMED, target='new')['support']['reasons'])
    found = evaluate_log(saved(log, tmp_path), **NAMED, target='new', position='place', segment='kind', cluster='user')
    same(found, in_memory(log, 'new', 'place', 'user', 'kind'))
    assert found['support']['verdict'] == 'refuse' and any('the weights of kind new (1.2' in r and ', old (0.8' in r or 'the weights of kind old (0.8' in r and ', new (1.2' in r for r in found['support']['reasons'])

def test_gains_are_paired(tmp_path, small):
    log = drawn(8000).assign(new=lambda t: .9*t.prob + .1*t.new)                # a neighbour of the policy that ran
    found = evaluate_log(saved(log, tmp_path), **NAMED, target='new', cluster='user')
    same(found, in_memory(log, 'new', None, 'user'))
    long = lambda e: e['ci_upper'] - e['ci_lower']
    assert long(found['gain']['snips']) < .5*np.hypot(long(found['estimates']['snips']), long(found['logging']))
    refused = evaluate_log(saved(log.assign(prob=log.prob/2), tmp_path), **NAMED, target='new')
    assert refused['logging']['value'] is not None and all(g['value'] is None for g in refused['gain'].values())

def test_one_column_may_play_two_parts(tmp_path, small):
    log = drawn(4000)
    same(evaluate_log(saved(log, tmp_path), **NAMED, target='new', position='item', cluster='item'), in_memory(log, 'new', 'item', 'item'))

# ---------------------------------------------------------------- refusals
def spoiled(log, column, values):
    log = log.astype({column: object}) if any(v is None or isinstance(v, str) for v in values) else log
    log = log.copy(); log.loc[np.linspace(10, len(log) - 10, len(values)).astype(int), column] = values
    return log

@pytest.mark.parametrize('column, values', [('prob', [0., -1., 0.]), ('prob', [2., 1.5]), ('prob', [math.nan]*3), ('pay', [math.inf, math.nan]), ('new', [1.2, -.1, 3.]), ('user', [None]*4), ('prob', [1e-320, 1e-320])])
def test_rows_at_fault_are_counted_over_the_whole_file(tmp_path, small, column, values):
    log = spoiled(drawn(6000), column, values)
    with pytest.raises(TelemetryError) as want: in_memory(log, 'new', None, 'user')
    with pytest.raises(TelemetryError) as got: evaluate_log(saved(log, tmp_path), **NAMED, target='new', cluster='user')
    assert str(got.value) == str(want.value) and f' {len(values)} ' in str(got.value)

def test_words_among_numbers_and_missing_names(tmp_path, small):
    with pytest.raises(TelemetryError, match='propensity has 2 values that are missing or no finite numbers'): evaluate_log(saved(spoiled(drawn(6000), 'prob', ['high', 'low']), tmp_path, 'csv'), **NAMED, target='new')
    for column in ('item', 'place'):
        with pytest.raises(TelemetryError, match=f'{column} has 3 missing values; every row needs one'): evaluate_log(saved(spoiled(drawn(6000), column, [None]*3), tmp_path), **NAMED, target='new', position='place')
    with pytest.raises(TelemetryError, match='item has 1 distinct value in 6000 rows'): evaluate_log(saved(drawn(6000).assign(item='u'), tmp_path), **NAMED, target='uniform')
    with pytest.raises(TelemetryError, match='the log has 0 rows'): evaluate_log(saved(drawn(6000)[:0], tmp_path), **NAMED, target='uniform', cluster='user')
    with pytest.raises(TelemetryError, match='target_prob is 0 in all 6000 rows'): evaluate_log(saved(drawn(6000).assign(new=0.), tmp_path), **NAMED, target='new')

def test_a_piece_the_target_would_not_show_is_no_fault(tmp_path, small):
    log = drawn(6000); log.loc[:2999, 'new'] = 0.
    same(evaluate_log(saved(log, tmp_path), **NAMED, target='new'), in_memory(log, 'new'))

def test_a_file_of_faults_is_not_read_to_its_end(tmp_path, small, monkeypatch):
    monkeypatch.setattr(stream, 'FAULTY', 2000)
    with pytest.raises(TelemetryError, match=r'propensity has 3000 values <= 0; .* \(so far: 3000 of 6000 rows\)'): evaluate_log(saved(drawn(6000).assign(prob=0.), tmp_path), **NAMED, target='new')
    with pytest.raises(TelemetryError, match=r'is 0 in all 2000 rows; .* \(so far: 2000 of 6000 rows\)'): evaluate_log(saved(drawn(6000).assign(new=0.), tmp_path), **NAMED, target='new')

def test_a_damaged_file_is_refused_while_it_is_read(tmp_path, small):
    path = saved(drawn(6000), tmp_path); data = bytearray(path.read_bytes()); data[2000:20_000] = bytes(18_000); path.write_bytes(data)
    with pytest.raises(TelemetryError, match='cannot be read as a table'): evaluate_log(path, **NAMED, target='new')

def test_a_decision_that_is_there_twice_is_refused(tmp_path, small):
    log = drawn(6000).assign(told=lambda t: [f'd{i//3}' for i in range(len(t))], place=lambda t: np.arange(len(t)) % 3)  # three places a decision
    honest = evaluate_log(saved(log, tmp_path), **NAMED, target='new', position='place', decision='told')
    same(honest, in_memory(log, 'new', 'place', 'told'))                        # rows of a decision belong together
    same(evaluate_log(saved(log, tmp_path), **NAMED, target='new', position='place', decision='told', cluster='user'), in_memory(log, 'new', 'place', 'user'))
    again = pd.concat([log, log[300:420].assign(user='another')])               # sent once more, hours later, under another name
    for cluster in (None, 'user'):
        with pytest.raises(TelemetryError, match='told has 120 of 6120 rows that are there already at the same position; a decision counts once'): evaluate_log(saved(again, tmp_path), **NAMED, target='new', position='place', decision='told', cluster=cluster)
    with pytest.raises(TelemetryError, match='told has 4000 of 6000 rows that are there already; .* name the column of the position'): evaluate_log(saved(log, tmp_path), **NAMED, target='new', decision='told')
    with pytest.raises(TelemetryError, match='told has 2 missing values'): evaluate_log(saved(spoiled(log, 'told', [None, None]), tmp_path), **NAMED, target='new', position='place', decision='told')

@pytest.mark.parametrize('kind', ['csv', 'parquet'])
@pytest.mark.parametrize('times', [2, 3])
def test_a_log_joined_with_its_own_copy_is_named_without_a_decision(tmp_path, small, kind, times):
    log, few = drawn(6000), pd.DataFrame(dict(item=np.tile(list('uvwx'), 1500), pay=np.random.default_rng(SEED).integers(2, size=6000), prob=.25)) # few: eight different rows
    for honest in (log, few): assert evaluate_log(saved(honest, tmp_path, kind), **NAMED, target='uniform')['support']['reasons'] == []
    found = evaluate_log(saved(pd.concat([log]*times).sample(frac=1, random_state=1), tmp_path, kind), **NAMED, target='uniform')
    assert found['support']['verdict'] == 'refuse' and f'copied: every row is there {times} times over' in found['support']['reasons'][0] and found['estimates']['ips']['ci_lower'] is None
    found = evaluate_log(saved(pd.concat([few]*times), tmp_path, kind), **NAMED, target='uniform')                       # one honest log of so few rows in 250 looks like this
    assert found['support']['verdict'] == {2: 'widen', 3: 'refuse'}[times] and found['support']['reasons'][-1].startswith('copied')

def test_honest_logs_of_few_different_rows_are_no_copies(tmp_path):
    rng, said = np.random.default_rng(SEED), []
    for _ in range(2000):
        times = stream.Times(); times.add(np.rec.fromarrays([rng.integers(12, size=600)*1., rng.integers(2, size=600)*1.], names='a,b')); said.append(times.check())
    assert sum(bool(refuse) for refuse, _ in said) <= 6 and sum(bool(widen) for _, widen in said) <= 30

def test_rewards_are_held_to_their_declared_range(tmp_path, small):
    log = drawn(6000)
    assert evaluate_log(saved(log, tmp_path), **NAMED, target='new', reward_range=(-5, 1000))['support']['verdict'] == 'trust'
    for limits, bad in (((0, 6), (log.pay > 6).sum()), ((1, 1000), (log.pay < 1).sum())):
        with pytest.raises(TelemetryError, match=f'reward has {bad} values outside {limits[0]}..{limits[1]}; that range was declared'): evaluate_log(saved(log, tmp_path), **NAMED, target='new', reward_range=limits)

def test_rewards_that_hardly_differ_claim_no_interval(tmp_path, small):
    log = drawn(6000)
    for odd, verdict in ((0, 'refuse'), (9, 'refuse'), (10, 'trust')):
        for rest, other in ((0., 1.), (1., 0.)):
            some = log.assign(pay=np.where(np.arange(6000) % 600 < (odd > 0)*1, other, rest)); some.loc[np.flatnonzero(some.pay == other)[odd:], 'pay'] = rest
            found = evaluate_log(saved(some, tmp_path), **NAMED, target='new')
            assert found['support']['verdict'] == verdict and [r.split(':')[0] for r in found['support']['reasons']] == ['few_rewards']*(verdict == 'refuse')
            assert (found['estimates']['snips']['ci_lower'] is None) == (verdict == 'refuse') and found['estimates']['snips']['value'] is not None

# ---------------------------------------------------------------- sums
@pytest.mark.parametrize('clusters', [0, 40])
def test_short_vectors_stand_for_all_influences(clusters):
    rng = np.random.default_rng(SEED); x = rng.lognormal(size=(3, 4000))*np.array([[1e6], [1.], [1e-6]]) + 5; who = np.sort(rng.integers(40, size=4000)) if clusters else None
    sums = Moments()
    for a, b in ((0, 15), (15, 40)) if clusters else ((0, 700), (700, 4000)):
        if clusters:
            rows = np.flatnonzero((who >= a) & (who < b)); sums.add(list(x[:, rows[:9]]), who[rows[:9]] - a, b - a); sums.add(list(x[:, rows[9:]]), who[rows[9:]] - a, b - a)
        else: sums.add(list(x[:, a:b]))
        sums.close()
    short = sums.influences()
    for mix in np.eye(3).tolist() + [[1e-6, -1, 0], [0, 1, -1e6], [1, 2, 3]]: assert standard_error(short @ mix) == pytest.approx(standard_error(mix @ x, who), rel=1e-9)
    if clusters: assert effective_sample_size(np.bincount(who, x[1])) == pytest.approx(x[1].sum()**2/sums.squares[1], rel=1e-12)
    assert sums.clusters == (clusters or 4000) and sums.n == 4000 and abs(short.sum(0)).max() < 1e-9*abs(short).max()

@pytest.mark.parametrize('clusters', [0, 40])
def test_cells_know_rows_that_belong_together(clusters):
    rng = np.random.default_rng(SEED); n = 4000; w, cell, who = rng.lognormal(-.5, 1, n), rng.integers(3, size=n), np.sort(rng.integers(40, size=n))
    sums = CellSums(3)
    for rows in np.array_split(np.arange(n) if not clusters else rng.permutation(n), 4): # with clusters, pieces that share them
        sums.add(cell[rows], w[rows], w.max(), who[rows] if clusters else None)
        if not clusters: sums.close()
    if clusters: sums.close()
    due, who = pd.Series(1/3, index=range(3)), who if clusters else None
    pd.testing.assert_frame_equal(sums.gaps(range(3), due, clusters or n), action_gaps(w, cell, due, who), rtol=1e-9)
    for i, found in enumerate(sums.weights(w.max())):
        want = weights_of(w[cell == i], who[cell == i] if clusters else None)
        assert (found.n, found.mean, found.error, found.ess) == pytest.approx((want.n, want.mean, want.error, want.ess), rel=1e-9)

def test_memory_does_not_grow_with_the_log_and_nothing_is_left(tmp_path, small, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'aside')); (tmp_path/'aside').mkdir()
    def peak(n, cluster):
        path = saved(drawn(n, users=n//5, words=False), tmp_path); tracemalloc.start()
        evaluate_log(path, **NAMED, target='uniform', position='place', cluster=cluster); most = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return most
    peak(2000, 'user')
    for cluster in (None, 'user'): assert peak(80_000, cluster) < 1.5*peak(20_000, cluster)
    assert not list((tmp_path/'aside').iterdir())
