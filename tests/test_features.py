"As of a moment, by both clocks: slow readings, backfills, seeded leaks, consent, and what must never be a feature."
import contextlib, hashlib, json
from pathlib import Path
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, yaml
from hypothesis import example, given, settings, strategies as st
from conftest import small_params
from telemetry_loop import features
from telemetry_loop.config import TelemetryError, folder_digest
from telemetry_loop.splits import split_of, time_cuts
from telemetry_loop.features import contexts_of, history_matrix, leakage, may_personalise, popularity_asof, read_features
from telemetry_loop.schema import SENSITIVE, columns
from telemetry_loop.views import VIEWS, FeatureView

SEED = 23                                                              # of every random frame
T0 = np.datetime64('2025-01-06T00:00:00.000', 'ms')
moment = lambda ms: T0 + np.asarray(ms, dtype='int64').astype('timedelta64[ms]')
hours = lambda h: np.timedelta64(int(3600*h), 's')
quick = settings(max_examples=120, deadline=None, derandomize=True, database=None)

def frame(rows): # (user, item, event ms, known ms) -> interactions as the stage sorts them
    t = pd.DataFrame(rows, columns=['user_id', 'item', 'event_time', 'known_time']).astype({'user_id': str, 'item': 'int32'})
    return t.assign(event_time=moment(t['event_time']), known_time=moment(t['known_time'])).sort_values(['user_id', 'event_time'], kind='stable').reset_index(drop=True)

# --- histories

happened = st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 9), st.integers(0, 12), st.sampled_from([0, 0, 1, 5, 20, -2])).map(lambda r: (*r[:2], r[2], r[2] + r[3])), max_size=16) # some clocks run ahead
asked = st.lists(st.tuples(st.sampled_from('abcd'), st.integers(0, 30)), max_size=8)

def slow_history(acts, user, as_of, length):
    past = [r.item for r in acts.itertuples() if r.user_id == user and r.event_time < as_of and r.known_time < as_of][-length:]
    return [-1]*(length - len(past)) + past

@quick
@given(happened, asked, st.integers(1, 5))
@example([('a', 1, 5, 3)], [('a', 5), ('a', 6)], 1)                    # told before it happened, by a clock that runs ahead
def test_histories_read_the_same_slowly(rows, ask, length):
    acts, when = frame(rows), moment([t for _, t in ask])
    got = history_matrix(acts, np.array([u for u, _ in ask], dtype=object), when, length)
    assert got.shape == (len(ask), length) and got.tolist() == [slow_history(acts, u, t, length) for (u, _), t in zip(ask, when)]

def test_long_histories_read_the_same_slowly():
    rng, n = np.random.default_rng(SEED), 1500
    event = rng.integers(0, 10**6, n)
    acts = frame(list(zip(rng.choice(list('abcdefg'), n), rng.integers(0, 99, n), event, event + np.where(rng.random(n) < .02, rng.integers(0, 10**5, n), 7))))
    who, when = rng.choice(list('abcdefgh'), 100), moment(rng.integers(0, 10**6, 100))
    assert history_matrix(acts, who, when, 20).tolist() == [slow_history(acts, u, t, 20) for u, t in zip(who, when)]

@quick
@given(happened, st.lists(st.tuples(st.sampled_from('abc'), st.integers(10, 19), st.integers(0, 30), st.integers(0, 50)), max_size=8), st.integers(0, 30), st.integers(1, 5))
def test_what_becomes_known_later_changes_no_earlier_history(rows, late, as_of, length):
    "Acts backfilled at `as_of` or after, wherever they happened, leave every history up to `as_of` as it was; so the batch reads what a stream would have."
    backfill = [(u, i, e, max(e, as_of + wait)) for u, i, e, wait in late]
    who, when = np.array(list('abcabc')), moment([as_of]*3 + [as_of//2]*3)
    past = history_matrix(frame(rows), who, when, length)
    assert np.array_equal(past, history_matrix(frame(rows + backfill), who, when, length))
    assert np.array_equal(past, history_matrix(frame([r for r in rows if r[3] < as_of]), who, when, length))

def test_one_clock_far_ahead_changes_no_other_history():
    n = 60_000
    acts = frame([(f'u{i:05d}', i % 7, 10, 11) for i in range(n)])
    ahead = acts.assign(event_time=np.where(np.arange(n) == 0, np.datetime64('9999-12-31', 'ms'), acts['event_time'].to_numpy().astype('datetime64[ms]')))
    assert history_matrix(ahead, np.array(['u00001', f'u{n - 1}']), moment([99, 99]), 1).tolist() == [[1], [(n - 1) % 7]]

# --- popularity and permission

@quick
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(1, 9)), max_size=12), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 86_399_999)), max_size=5))
def test_popularity_counts_every_earlier_day_and_nothing_of_today(rows, when):
    day = lambda d: np.datetime64('2025-01-06', 'D') + np.asarray(d, dtype=int)
    popularity = pd.DataFrame(dict(date=day([r[0] for r in rows]).astype('datetime64[ms]'), item=[r[1] for r in rows], clicks=[r[2] for r in rows])).astype(dict(item=int, clicks=int))
    item = np.tile([3, -1, 0, 4], (len(when), 1))
    got = popularity_asof(popularity, item, moment([86_400_000*d + ms for d, ms in when]), 5)
    assert got.tolist() == [[0. if i < 0 else float(sum(c for d, j, c in rows if j == i and d < today)) for i in (3, -1, 0, 4)] for today, _ in when]

@quick
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 9), st.booleans()), max_size=8, unique_by=lambda r: r[:2]), asked)
def test_the_last_word_known_before_decides(changes, ask):
    said = pd.DataFrame(changes, columns=['user_id', 'known_time', 'allowed']).astype({'user_id': str, 'allowed': bool})
    said['known_time'] = moment(said['known_time'])
    last = lambda user, t: max([(k, a) for u, k, a in changes if u == user and k < t], default=(0, True))[1]
    assert may_personalise(said, np.array([u for u, _ in ask], dtype=object), moment([t for _, t in ask])).tolist() == [last(u, t) for u, t in ask]

def asked_for(decision_id, candidates): # contexts where `d` may not be personalised and the items are a and b
    f = features.Features(items=pd.DataFrame(dict(item_id=['a', 'b'], category=['x', ''])), interactions=frame([('u', 1, 0, 1)]), history=2, decisions=pd.DataFrame(dict(decision_id=['d'], personalise=[False])), controls=pd.DataFrame(columns=['user_id', 'event_time', 'known_time', 'action', 'target']),
                          popularity=pd.DataFrame(dict(date=[T0], item=[0], clicks=[4])))
    return contexts_of(pd.DataFrame(dict(decision_id=[decision_id], user_id=['u'], event_time=moment([90_000_000]), candidates=[candidates])), f)

def test_contexts_keep_what_was_offered(): assert asked_for('d', ['b', 'a']).candidates.tolist() == [['b', 'a']] and not asked_for('d', ['a']).personalise.any()

def test_an_unknown_candidate_is_not_taken_for_a_known_one():
    c = asked_for('d', ['apple', 'b'])
    assert c.candidates.tolist() == [['apple', 'b']] and c.popularity.tolist() == [[0., 0.]]

def test_a_decision_nobody_checked_is_not_personalised(): assert not asked_for('unknown', ['a']).personalise.any()

# --- leakage

CUTS, EMBARGO = (moment(600_000), moment(800_000)), np.timedelta64(20_000, 'ms')

def clean(): # interactions split as the stage splits them
    rng, n = np.random.default_rng(SEED), 500
    event = rng.integers(0, 10**6, n)
    acts = frame(list(zip(rng.choice(list('abcde'), n), rng.integers(0, 40, n), event, event + rng.choice([0, 0, 500, 90_000], n))))
    return acts.assign(split=split_of(acts['event_time'].to_numpy(), acts['known_time'].to_numpy(), CUTS, EMBARGO))

def when(t): return (t['event_time'].to_numpy().astype('datetime64[ms]'), t['known_time'].to_numpy().astype('datetime64[ms]'))

SEEDED = { # kind of leak -> (rows that would leak, the split they are smuggled into)
    'training on what happened after the cut':  (lambda e, k: (e >= CUTS[0]), 'train'),
    'training on what was known after the cut': (lambda e, k: (e < CUTS[0]) & (k >= CUTS[0]), 'train'),
    'validating on the training window':        (lambda e, k: (k < CUTS[0]), 'valid'),
    'validating within the embargo':            (lambda e, k: (e >= CUTS[0]) & (e < CUTS[0] + EMBARGO), 'valid'),
    'validating on what was known in the test': (lambda e, k: (e >= CUTS[0] + EMBARGO) & (e < CUTS[1]) & (k >= CUTS[1]), 'valid'),
    'testing within the embargo':               (lambda e, k: (e >= CUTS[1]) & (e < CUTS[1] + EMBARGO), 'test'),
    'testing on the validation window':         (lambda e, k: (e >= CUTS[0] + EMBARGO) & (e < CUTS[1]), 'test'),
}

@pytest.mark.parametrize('kind', SEEDED)
def test_every_smuggled_row_is_counted(kind):
    t = clean()
    assert leakage(t, CUTS, EMBARGO, 5) == 0
    rows = np.flatnonzero(SEEDED[kind][0](*when(t)))
    assert len(rows) > 0
    for some in (rows[:1], rows):
        split = t['split'].to_numpy(dtype=object).copy(); split[some] = SEEDED[kind][1]
        assert leakage(t.assign(split=split), CUTS, EMBARGO, 5) == len(some)

HINDSIGHT = {
    'sees the present':       lambda t, u, at, n: history_matrix(t, u, at + np.timedelta64(1, 'ms'), n),
    'sees tomorrow':          lambda t, u, at, n: history_matrix(t, u, at + np.timedelta64(100_000, 'ms'), n),
    'knows before it is told': lambda t, u, at, n: history_matrix(t.assign(known_time=t['event_time']), u, at, n),
}

@pytest.mark.parametrize('kind', HINDSIGHT)
def test_histories_with_hindsight_are_counted(monkeypatch, kind):
    t = clean()
    monkeypatch.setattr(features, 'history_matrix', HINDSIGHT[kind])
    assert leakage(t.assign(item=np.arange(len(t))), CUTS, EMBARGO, 5) > 20

# --- the stage

def lay(folder, events, acts, decisions): # as ingest and sessions leave them: one file a window
    rules = columns()
    kind = lambda rule: pa.timestamp('ms') if rule.get('pattern', '').startswith('^\\d') else pa.list_({'string': pa.string(), 'number': pa.float64()}[rule['items']['type']]) if rule['type'] == 'array' else dict(string=pa.string(), integer=pa.int64(), number=pa.float64(), boolean=pa.bool_())[rule['type']]
    whole = pa.table({c: pa.array(events[c], kind(rule), from_pandas=True) if c in events else pa.nulls(len(events), kind(rule)) for c, rule in rules.items()})
    for name, table in {'ingest/events': whole, 'sessions/acts': acts, 'sessions/decisions': decisions}.items():
        (folder/'artifacts'/name).mkdir(parents=True)
        if isinstance(table, pd.DataFrame): table = pa.Table.from_pandas(table, preserve_index=False)
        clock = 'received_time' if name == 'ingest/events' else 'event_time'
        day = table[clock].cast(pa.timestamp('ms')).to_numpy().astype('datetime64[D]')
        for d in np.unique(day) if len(table) else ['2025-01-06']: pq.write_table(table.filter(day == d) if len(table) else table, folder/'artifacts'/name/f'{d}.parquet')

def stage(folder, acts, decisions=(), said=(), items=('i0', 'i1'), clicks=()): # said: (user, ms known, type, purpose or action, granted)
    "A folder where ingest and sessions left these tables."
    times = lambda name, ms: {name: moment(list(ms))}
    none = dict(type=None, user_id=None, item_id=None, category=None, purpose=None, granted=None, action=None)
    events = pd.DataFrame([none | dict(type='item', item_id=i, category='c', at=0) for i in items] + [none | dict(type=k, user_id=u, at=t) | (dict(purpose=what, granted=g) if k == 'consent' else dict(action=what)) for u, t, k, what, g in said] + [none | dict(type='click', user_id='u', item_id='i0', at=t) for t in clicks])
    events = events.assign(**times('event_time', events['at'] - 1), **times('received_time', events['at'])).drop(columns='at')
    table = pd.DataFrame(acts, columns=['user_id', 'item_id', 'event', 'known', 'kind'])
    made = pd.DataFrame([dict(decision_id=f'd{i}', user_id=u, at=t, candidates=['i0', 'i1'], slate=['i0']) for i, (u, t) in enumerate(decisions)], columns=['decision_id', 'user_id', 'at', 'candidates', 'slate'])
    lay(folder, events.assign(event_id=[f'e{i}' for i in range(len(events))]), table.assign(**times('event_time', table['event']), **times('known_time', table['known'])).drop(columns=['event', 'known']), made.assign(**times('event_time', made['at'])).drop(columns='at'))
    (folder/'params.yaml').write_text(yaml.safe_dump(small_params(features=dict(embargo_hours=0., valid_share=.2, test_share=.2))))
    return contextlib.chdir(folder)

ACTS = [('u', f'i{i % 2}', 1000*i, 1000*i + 5, 'satisfied') for i in range(10)] + [('u', 'late', 500, 501, 'clicked')]

def permitted(folder, said, decisions):
    with stage(folder, ACTS, decisions, [(u, 1000*t, *what) for u, t, *what in said]):
        features.run(); return read_features().decisions.set_index('decision_id')['personalise'].reindex([f'd{i}' for i in range(len(decisions))]).tolist()

def test_consent_and_controls_bind_from_when_they_are_known(tmp_path):
    said = [('b', 3, 'consent', 'personalisation', False), ('c', 3, 'consent', 'training', False), ('d', 3, 'control', 'off', None), ('e', 2, 'control', 'off', None), ('e', 3, 'control', 'on', None),
            ('f', 3, 'control', 'mute', None), ('g', 2, 'consent', 'personalisation', False), ('g', 3, 'consent', 'personalisation', True)]
    decisions = [(u, t) for u in 'abcdefg' for t in (2500, 3000, 3001)]
    assert permitted(tmp_path/'x', said, decisions) == [True]*3 + [True, True, False] + [True]*3 + [True, True, False] + [False, False, True] + [True]*3 + [False, False, True]

@pytest.mark.parametrize('first,then', [(('consent', 'personalisation', False), ('control', 'on', None)), (('control', 'off', None), ('consent', 'personalisation', True))], ids=['consent refused, then switched on', 'switched off, then consent given'])
def test_personalisation_needs_consent_and_the_switch(tmp_path, first, then):
    assert permitted(tmp_path/'x', [('a', 1, *first), ('a', 2, *then)], [('a', 3000)]) == [False]

def test_items_that_were_never_announced_are_items_too(tmp_path):
    with stage(tmp_path/'x', ACTS):
        features.run(); f = read_features()
    assert f.items['item_id'].tolist() == ['i0', 'i1', 'late'] and f.items['category'].tolist() == ['c', 'c', ''] and f.items['available_time'][2] == moment(500)
    assert f.interactions['item'][f.interactions['positive']].tolist() == [0, 1]*5 and f.popularity[['item', 'clicks']].values.tolist() == [[2, 1]]

@pytest.mark.parametrize('how,says', [('no such kind', 'holds no act of kind view .*; it holds clicked, satisfied'), ('bad shares', 'valid_share 0.9'), ('not registered', 'signal .clicked. is not in signals.registry'), ('unknown view', "names 'user_clicks_1d@9'"), ('leak', r'\d+ rows know their future')])
def test_refusals_are_one_line_and_overwrite_nothing(tmp_path, monkeypatch, how, says):
    with stage(tmp_path/'x', ACTS):
        features.run(); before = folder_digest('artifacts'), folder_digest('metrics')
        change = {'no such kind': dict(positive=['view']), 'bad shares': dict(valid_share=.9), 'not registered': dict(positive=['clicked']), 'unknown view': dict(views=['user_clicks_1d@9']), 'leak': {}}[how]
        (tmp_path/'x/params.yaml').write_text(yaml.safe_dump(small_params(features=dict(embargo_hours=0., valid_share=.2, test_share=.2) | change)))
        if how == 'leak': monkeypatch.setattr(features, 'split_of', lambda e, *_: np.full(len(e), 'train', dtype=object))
        with pytest.raises(TelemetryError, match=says) as refused: features.run()
        assert len(str(refused.value).splitlines()) == 1 and (folder_digest('artifacts'), folder_digest('metrics')) == before
    with pytest.raises(TelemetryError, match='holds no features; .*dvc repro features'): read_features(tmp_path/'nowhere')

# --- the tiny world

def parsed(folder): # the first delivery of every line, times read
    t = pd.DataFrame([json.loads(line) for p in sorted(folder.glob('*.jsonl')) for line in p.open(encoding='utf-8')])
    for c in ('event_time', 'received_time', 'sent_time'): t[c] = pd.to_datetime(t[c], format='%Y-%m-%dT%H:%M:%S.%fZ')
    t['event_time'] = t[['event_time', 'received_time']].min(axis=1)
    return t.sort_values(['received_time', 'event_id'], kind='stable').drop_duplicates('event_id').sort_values(['event_time', 'event_id'], kind='stable').reset_index(drop=True)

def acted(e): # what sessions leaves of it
    first = lambda t, kind: t.groupby(['user_id', 'item_id', 'decision_id'], as_index=False).agg(event_time=('event_time', 'min'), known_time=('received_time', 'min')).assign(kind=kind).drop(columns='decision_id')
    return pd.concat([first(e[e['type'] == 'click'], 'clicked'), first(e[(e['type'] == 'heartbeat') & (e['elapsed'] >= 30)], 'satisfied')]).sort_values(['user_id', 'event_time', 'known_time', 'item_id', 'kind'])

@pytest.fixture(scope='module')
def tiny_folder(tmp_path_factory):
    "A tiny world whose people withdraw, whose deliveries come late and twice, and the stage run on it; read only."
    from telemetry_loop.loop import first_world
    folder = tmp_path_factory.mktemp('features')
    params = small_params(simulate=dict(users=300, days=10))
    params['simulate']['faults'] |= dict(late=.05, backfilled=.01, malformed=0., violating=0., clock_skew=0., bots=0., withdrawn=.2)
    (folder/'params.yaml').write_text(yaml.safe_dump(params))
    with contextlib.chdir(folder): first_world(folder/'data', progress=False)
    events = parsed(folder/'data')
    lay(folder, events, acted(events), events.loc[events['type'] == 'decision', ['decision_id', 'user_id', 'event_time', 'candidates', 'slate']])
    with contextlib.chdir(folder): features.run()
    return folder

@pytest.fixture(scope='module')
def tiny(tiny_folder):
    with contextlib.chdir(tiny_folder): f = read_features()
    read = lambda path: pd.read_parquet(tiny_folder/'artifacts'/path)
    return dict(features=f, events=read('ingest/events'), acts=read('sessions/acts').sort_values(['user_id', 'event_time', 'known_time', 'item_id', 'kind']), logged=read('sessions/decisions').sort_values(['event_time', 'decision_id']).reset_index(drop=True),
                said=json.loads((tiny_folder/'metrics/features.json').read_text()), params=yaml.safe_load((tiny_folder/'params.yaml').read_text())['features'])

def test_no_sensitive_column_and_no_segment_is_a_feature(tiny, tiny_folder):
    "Neither by name nor by value, although the log has them."
    private = [*SENSITIVE, 'segment']
    values = {v for n in private for v in tiny['events'][n].dropna().unique()}
    assert len(values) == 7
    files = sorted((tiny_folder/'artifacts/features').glob('*'))
    assert [p.name for p in files] == ['controls.parquet', 'decisions.parquet', 'interactions.parquet', 'items.parquet', 'popularity.parquet', 'views.parquet']
    for path in files:
        t = pd.read_parquet(path)
        assert not set(t.columns) & set(private)
        assert not any(values & set(t[c].explode().dropna().astype(str)) for c in t.columns if not pd.api.types.is_numeric_dtype(t[c]))

def test_who_refused_or_switched_off_is_not_personalised(tiny):
    "Read slowly from the log: the last consent known by then was given, and the last switch was not off."
    e = tiny['events']
    said = e[(e['type'] == 'consent') & (e['purpose'] == 'personalisation')]
    turned = e[(e['type'] == 'control') & e['action'].isin(['on', 'off'])].sort_values('received_time')
    def consent_of(user, at): return ([r.granted for r in sorted(by[user], key=lambda r: (r.event_time, not r.granted)) if r.received_time < at] or [True])[-1]
    def switch_of(user, at): return ([r.action == 'on' for r in turns[user] if r.received_time < at] or [True])[-1]
    by, turns = ({u: list(t[t['user_id'] == u].itertuples()) for u in e['user_id'].dropna().unique()} for t in (said, turned))
    asked = list(zip(tiny['logged']['user_id'], tiny['logged']['event_time']))
    consent, switch = (np.array([of(u, at) for u, at in asked], bool) for of in (consent_of, switch_of))
    assert contexts_of(tiny['logged'], tiny['features']).personalise.tolist() == (consent & switch).tolist()
    assert (~consent).sum() > 50 and (~switch).sum() > 5

def test_contexts_of_the_tiny_world_read_the_same_slowly(tiny):
    f, a, some = tiny['features'], tiny['acts'], tiny['logged'].iloc[::151]
    c = contexts_of(some, f)
    clicks = {}
    for r in a[a['kind'] == 'clicked'].itertuples(): clicks.setdefault(r.item_id, []).append(max(r.event_time, r.known_time))
    good, name = a[a['kind'].isin(tiny['params']['positive'])], f.items['item_id'].to_numpy()
    assert f.interactions['positive'].sum() == len(good) and f.interactions.sort_values(['user_id', 'event_time'], kind='stable').index.is_monotonic_increasing
    for i, d in enumerate(some.itertuples()):
        offered = list(d.candidates)
        assert c.candidates[i].tolist() == offered + ['']*(c.candidates.shape[1] - len(offered)) and c.user_id[i] == d.user_id
        assert c.popularity[i].tolist() == [float(sum(t < d.event_time.floor('D') for t in clicks.get(x, []))) for x in offered] + [0.]*(c.candidates.shape[1] - len(offered))
        mine = good[(good['user_id'] == d.user_id) & (good['event_time'] < d.event_time) & (good['known_time'] < d.event_time)].sort_values('event_time')
        assert c.history[i][(c.history[i] != '') & (c.kind[i] != 1)].tolist() == mine['item_id'].tolist()[-f.history:]
    assert (c.popularity > 0).mean() > .5 and (c.history != '').any(1).mean() > .5

def test_acts_beside_the_positive_ones_read_the_same_slowly(tiny):
    "What was opened and left again is told of once that is clear; how long an act lasted once the last beat has arrived."
    f, e, some = tiny['features'], tiny['events'], tiny['logged'].iloc[::91]
    beats = e[e['type'].isin(['click', 'heartbeat', 'close'])].groupby(['user_id', 'item_id'])          # nobody is offered an item twice
    told, lasted, stayed = beats['received_time'].max(), beats['elapsed'].max(), set(tiny['acts'].query("kind == 'satisfied'")[['user_id', 'item_id']].itertuples(index=False, name=None))
    left, c, timed = tiny['acts'].query("kind == 'clicked'"), contexts_of(some, f), 0
    for i, d in enumerate(some.itertuples()):
        mine = [r for r in left[left['user_id'] == d.user_id].sort_values('event_time').itertuples() if (r.user_id, r.item_id) not in stayed and r.event_time < d.event_time
                and max(r.known_time + pd.Timedelta(seconds=tiny['params']['settle_seconds']), told[r.user_id, r.item_id]) < d.event_time]
        assert c.history[i][c.kind[i] == 1].tolist() == [r.item_id for r in mine] and c.when[i][c.kind[i] == 1].tolist() == [r.event_time.floor('ms') for r in mine]
        for item, dwell in zip(c.history[i], c.dwell[i]):
            if item and not np.isnan(dwell): assert dwell == np.float32(lasted[d.user_id, item]) and told[d.user_id, item] < d.event_time; timed += 1
            elif item: assert np.isnan(lasted[d.user_id, item]) or told[d.user_id, item] >= d.event_time
    assert (c.kind == 1).sum() > 50 and timed > 100

def test_other_acts_must_be_others(tmp_path):
    with stage(tmp_path/'x', ACTS):
        for odd in ('nothing', 'satisfied'):
            Path('params.yaml').write_text(yaml.safe_dump(small_params(features=dict(others=[odd]))))
            with pytest.raises(TelemetryError, match=f"features.others names '{odd}'"): features.run()

def test_splits_of_the_tiny_world_keep_their_distance(tiny):
    f, said, gap = tiny['features'], tiny['said'], pd.Timedelta(hours=tiny['params']['embargo_hours'])
    valid, test = pd.Timestamp(said['valid_from']), pd.Timestamp(said['test_from'])
    x = f.interactions[f.interactions['positive']]; n = len(x)
    span = lambda t, s, clock, how: getattr(t.loc[t['split'] == s, clock], how)()
    for t in (x, f.decisions.assign(known_time=f.decisions['event_time'])):
        assert set(t['split']) - {'forgotten'} == {'train', 'embargo', 'valid', 'test', 'withheld'}
        assert max(span(t, 'train', 'event_time', 'max'), span(t, 'train', 'known_time', 'max')) < valid
        assert span(t, 'valid', 'event_time', 'min') >= valid + gap and span(t, 'valid', 'known_time', 'max') < test and span(t, 'test', 'event_time', 'min') >= test + gap
    assert abs((x['event_time'] >= test).sum() - n*tiny['params']['test_share']) <= 1 and (x['split'] == 'embargo').mean() < .1
    end = tiny['events']['event_time'].max()
    late = f.decisions['event_time'] > end - gap
    assert late.any() and (f.decisions.loc[late, 'split'] == 'embargo').all()             # their outcomes are still coming
    assert said['leakage']['value'] == 0 and said['interactions_by_split'] == x['split'].value_counts().to_dict() and sum(said['decisions_by_split'].values()) == len(tiny['logged'])

# --- consent to training

def test_who_withdrew_training_teaches_nothing(tiny):
    "No row of theirs is learned from or steers learning; their histories stay."
    e, f = tiny['events'], tiny['features']
    said = e[(e['type'] == 'consent') & (e['purpose'] == 'training')].sort_values(['event_time', 'granted'], ascending=[True, False])
    refused = set(said.drop_duplicates('user_id', keep='last').pipe(lambda t: t[t['granted'] == False])['user_id'])
    assert len(refused) > 10 and tiny['said']['withheld_users'] > 5
    for t in (f.interactions, f.decisions):
        theirs = t['user_id'].isin(refused)
        assert theirs.any() and set(t.loc[theirs, 'split']) <= {'withheld', 'embargo', 'test'} and not (t.loc[~theirs, 'split'] == 'withheld').any()
    assert f.interactions['positive'].sum() == tiny['acts']['kind'].isin(tiny['params']['positive']).sum()

@pytest.mark.parametrize('said,left', [([], 5), ([('u', 3, False)], 0), ([('u', 3, False), ('u', 4, True)], 5), ([('v', 3, False)], 5), ([('u', 9999, False)], 0)], ids=['silent', 'withdrew', 'and came back', 'another', 'withdrew at the very end'])
def test_a_withdrawal_counts_from_when_it_is_known(tmp_path, said, left):
    with stage(tmp_path/'x', ACTS, [], [(u, 1000*t, 'consent', 'training', g) for u, t, g in said]):
        features.run(); split = read_features().interactions['split']
    assert (split == 'train').sum() == (left and 6) and (split == 'withheld').sum() == (0 if left else 8)

# --- views at logged decisions

def digest(t): return hashlib.md5(t.to_csv(index=False).encode()).hexdigest()

def test_views_of_logged_decisions_read_the_same_slowly(tiny, tiny_folder):
    v, e = pd.read_parquet(tiny_folder/'artifacts/features/views.parquet'), tiny['events']
    assert v['decision_id'].tolist() == tiny['logged']['decision_id'].tolist() and v.columns[1:].tolist() == tiny['said']['views'] == tiny['params']['views']
    clicks, scores, week = e[e['type'] == 'click'], e[e['type'] == 'survey'], pd.Timedelta(days=7)
    for i, d in list(enumerate(tiny['logged'].itertuples()))[::97]:
        before = lambda t: t[(t['event_time'] < d.event_time) & (t['received_time'] < d.event_time)]
        recent = before(clicks[clicks['event_time'] >= d.event_time - week])
        mine = recent[recent['user_id'] == d.user_id]
        assert v['user_clicks_7d@1'][i] == len(mine) and v['user_items_7d@1'][i] == mine['item_id'].nunique()
        assert v['user_clicks_1d@1'][i] == (mine['event_time'] >= d.event_time - pd.Timedelta(days=1)).sum()
        assert list(v['item_clicks_7d@1'][i]) == [(recent['item_id'] == x).sum() for x in d.slate]
        assert np.allclose(v['item_satisfaction@1'][i], [(15 + s.sum())/(5 + len(s)) for s in (before(scores)[before(scores)['item_id'] == x]['score'] for x in d.slate)], atol=1e-9)
    assert tiny['said']['parity'] == {'value': 0., 'ci_lower': None, 'ci_upper': None, 'n': 400} and (v['user_clicks_7d@1'] > 0).mean() > .3

def test_a_second_run_and_a_candidate_view_leave_the_training_input_as_it_was(tiny_folder, tmp_path, monkeypatch):
    "The same bytes when a new definition merely exists; the same columns when it is pinned beside the old one."
    import shutil
    shutil.copytree(tiny_folder, tmp_path/'x', ignore=shutil.ignore_patterns('data'))
    candidate = FeatureView('user_clicks_7d', 2, 'openings, fading', ('user_id',), ('click',), 'decayed', days=7)
    monkeypatch.setattr(features, 'VIEWS', (*VIEWS, candidate))
    with contextlib.chdir(tmp_path/'x'):
        before, told = folder_digest('artifacts/features'), folder_digest('metrics'); features.run()
        assert (folder_digest('artifacts/features'), folder_digest('metrics')) == (before, told)
        old = pd.read_parquet('artifacts/features/views.parquet')
        params = yaml.safe_load(open('params.yaml')); params['features']['views'].append(candidate.id); open('params.yaml', 'w').write(yaml.safe_dump(params))
        features.run()
        new = pd.read_parquet('artifacts/features/views.parquet')
    assert digest(new[old.columns]) == digest(old) and list(new.columns) == [*old.columns, candidate.id]

def test_a_backfill_changes_nothing_that_was_asked_before_it(tiny_folder, tmp_path):
    "Late news about the past: features as of earlier decisions keep their bytes; so do popularity, histories and training rows known before."
    import shutil
    shutil.copytree(tiny_folder, tmp_path/'x', ignore=shutil.ignore_patterns('data'))
    events = pd.read_parquet(tmp_path/'x/artifacts/ingest/events')
    T = events['received_time'].quantile(.8)
    old = events[(events['type'] == 'click') & (events['event_time'] < T)].head(400)
    late = old.assign(event_id=['late' + i for i in old['event_id']], decision_id=['late' + i for i in old['decision_id']], received_time=T + pd.Timedelta(hours=1))
    schema = pq.read_schema(next((tmp_path/'x/artifacts/ingest/events').glob('*.parquet')))
    pq.write_table(pa.Table.from_pandas(late, schema=schema, preserve_index=False), tmp_path/'x/artifacts/ingest/events/9999.parquet')
    more = late[['user_id', 'item_id', 'event_time']].assign(known_time=late['received_time'], kind='clicked')
    more.to_parquet(tmp_path/'x/artifacts/sessions/acts/9999.parquet', index=False)
    with contextlib.chdir(tmp_path/'x'): features.run(); f = read_features()
    with contextlib.chdir(tiny_folder): g = read_features()
    logged = pd.read_parquet(tiny_folder/'artifacts/sessions/decisions').sort_values(['event_time', 'decision_id']).reset_index(drop=True)
    was = logged['event_time'] < T
    one, two = (pd.read_parquet(folder/'artifacts/features/views.parquet') for folder in (tiny_folder, tmp_path/'x'))
    assert digest(one[was]) == digest(two[was]) and digest(one) != digest(two)
    before = logged[was].reset_index(drop=True).iloc[::7]
    assert np.array_equal(contexts_of(before, f).popularity, contexts_of(before, g).popularity) and not np.array_equal(contexts_of(logged.tail(50), f).popularity, contexts_of(logged.tail(50), g).popularity)

def test_a_batch_that_differs_from_the_stream_stops_before_anything_is_written(tmp_path, monkeypatch):
    good = features.views_sql
    monkeypatch.setattr(features, 'views_sql', lambda *a: good(*a).replace('event_time AS as_of', "event_time + INTERVAL 1 DAY AS as_of", 1))
    with stage(tmp_path/'x', ACTS, [('u', 5000)], clicks=[1000, 2000, 80_000_000]):
        with pytest.raises(TelemetryError, match='batch and stream differ by up to'): features.run()
        assert not list((tmp_path/'x').glob('artifacts/features/*')) and not (tmp_path/'x/metrics').exists()

@pytest.mark.parametrize('name', ['ingest/events', 'sessions/acts', 'sessions/decisions'])
def test_a_missing_table_is_named(tmp_path, name):
    import shutil
    with stage(tmp_path/'x', ACTS):
        shutil.rmtree(f'artifacts/{name}')
        with pytest.raises(TelemetryError, match=f'artifacts/{name}/ holds no table; .*dvc repro {name.split("/")[0]}'): features.run()

def test_what_a_user_muted_or_reset_binds_the_next_slate_and_the_next_training_set(tiny_run):
    "From the log alone: what the policy showed after a wish, what the candidate would show, and what may teach."
    at = lambda name: pd.read_parquet(tiny_run/'artifacts'/name)
    items, wishes, acts = at('features/items.parquet'), at('features/controls.parquet'), at('features/interactions.parquet')
    shown = at('sessions/decisions')[['decision_id', 'user_id', 'event_time', 'slate']].explode('slate').rename(columns={'slate': 'item_id'}).merge(items[['item_id', 'category']], on='item_id')
    muted = wishes[wishes['action'] == 'mute'].rename(columns={'target': 'category', 'event_time': 'asked'})[['user_id', 'category', 'asked', 'known_time']]
    assert len(muted) > 3 and {'mute', 'less_like_this', 'reset'} == set(wishes['action'])
    both = shown.merge(muted, on=['user_id', 'category'])
    assert (both['event_time'] < both['asked']).any() and not (both['event_time'] > both['known_time']).any()     # shown before, never after
    would = at('policy/candidates.parquet').merge(items[['item_id', 'category']], on='item_id').merge(at('features/decisions.parquet')[['decision_id', 'user_id', 'event_time']], on='decision_id').merge(muted, on=['user_id', 'category'])
    assert len(late := would[would['event_time'] > would['known_time']]) and (late['target_prob'] == 0).all()
    mine = acts.assign(category=items['category'].to_numpy()[acts['item']], item_id=items['item_id'].to_numpy()[acts['item']], row=np.arange(len(acts))).merge(wishes.rename(columns={'event_time': 'asked', 'known_time': 'heard'}), on='user_id')
    bound = np.where(mine['action'] == 'reset', mine['event_time'] <= mine['asked'], (mine['target'] == mine['category']) | (mine['target'] == mine['item_id']))
    assert bound.any() and not mine.loc[bound, 'split'].isin(['train', 'valid']).any()
    assert set(acts.index[acts['split'] == 'forgotten']) <= set(mine.loc[bound, 'row'])                            # nobody else's
