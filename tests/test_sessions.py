"Visits and outcomes against a slow reading of their definitions; every outcome answers one decision, and is worth what was declared."
import contextlib, json
from datetime import datetime, timedelta
import ibis, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import small_params
from telemetry_loop import sessions
from telemetry_loop.config import RunConfig, TelemetryError, folder_digest
from telemetry_loop.ingest import connect
from telemetry_loop.schema import columns
from telemetry_loop.sessions import acts, decisions_with_outcomes, outcomes, visits

SEED = 21                                                              # of the shuffle
HOURS, LONG, GAP = 2., 30., 30.
NOON = datetime(2025, 1, 6, 12)
at = lambda seconds: NOON + timedelta(milliseconds=round(1000*float(seconds)))
ARROW = {'integer': pa.int64(), 'number': pa.float64(), 'boolean': pa.bool_(), 'string': pa.string()}
SCHEMA = pa.schema([(n, pa.timestamp('ms') if 'pattern' in r else pa.list_(ARROW[r['items']['type']]) if r['type'] == 'array' else ARROW[r['type']]) for n, r in columns().items()])
quick = settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

def arrow(rows): return pa.Table.from_pylist([dict(received_time=r['event_time'], event_id=f'e{i}') | r for i, r in enumerate(rows)], schema=SCHEMA)
def log(rows): return ibis.memtable(arrow(rows))
def event(type, seconds, user='u', **more): return dict(type=type, user_id=user, event_time=at(seconds)) | more
def decision(name, seconds, slate, user='u', **more): return event('decision', seconds, user, decision_id=name, slate=slate, candidates=slate) | more
def act(kind, seconds, name, item, user='u', **more): return event(kind, seconds, user, decision_id=name, item_id=item) | more

@pytest.fixture(scope='module')
def con(): return connect(RunConfig(seed=0, threads=2, engine='duckdb'))

# --- visits

OWN, NOT_OWN = ['decision', 'impression', 'click', 'heartbeat', 'conversion', 'complaint', 'survey', 'control', 'interaction'], ['account', 'consent', 'exposure', 'item', 'request']

def slow_visits(rows): # -> {event_id: visit} of one user
    number, last, found = 0, None, {}
    for r in sorted((r for r in rows if r['type'] in OWN), key=lambda r: r['event_time']):
        if last is None or (r['event_time'] - last).total_seconds() > 60*GAP: number += 1
        last, found[r['event_id']] = r['event_time'], number
    return found

def test_visits_read_the_same_slowly(con):
    "Random days of many users in one query: gaps just under, at and over the limit, events at the same moment, events that are not the user's own."
    days = []
    @quick
    @given(st.lists(st.tuples(st.sampled_from([0, 0, .001, 60, 1799.999, 1800, 1800.001, 4000]), st.sampled_from(OWN + NOT_OWN), st.integers(0, 3)), max_size=9))
    def collect(day): days.append(day)
    collect()
    logs = []
    for u, day in enumerate(days):
        clock = np.cumsum([gap for gap, *_ in day])
        logs.append([event(kind, t, f'u{u}', event_id=f'{u}.{i}', received_time=at(t + late)) for i, (t, (_, kind, late)) in enumerate(zip(clock, day))])
    rows = [r for day in logs for r in day] + [event('request', 5, None, event_id='nobody'), event('click', 5, None, event_id='nobody either')]
    rows = [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))]
    found = con.execute(visits(log(rows), GAP))
    expected = {k: v for day in logs for k, v in slow_visits(day).items()}
    assert len(found) == len(expected) > 500 and dict(zip(found['event_id'], found['session_id'])) == expected and max(expected.values()) > 3

# --- outcomes

KINDS = ['click', 'heartbeat', 'heartbeat', 'conversion', 'complaint', 'impression', 'survey']

def slow_outcomes(rows): # -> {(decision, position): (item, clicked, converted, hidden, dwell, satisfied)}
    first, found = {}, {}
    for d in sorted((r for r in rows if r['type'] == 'decision'), key=lambda r: r['received_time']): first.setdefault(d['decision_id'], d)
    for name, d in first.items():
        for j, item in enumerate(d['slate']):
            mine = [r for r in rows if r['type'] != 'decision' and (r['decision_id'], r['item_id']) == (name, item) and 0 <= (r['event_time'] - d['event_time']).total_seconds() <= 3600*HOURS]
            has = lambda kind: any(r['type'] == kind for r in mine)
            dwell = max([r['elapsed'] for r in mine if r['type'] == 'heartbeat'], default=0.)
            found[name, j] = (item, has('click'), has('conversion'), has('complaint'), dwell, has('click') and dwell >= LONG)
    return found

def test_outcomes_read_the_same_slowly(con):
    """Random decisions that share items and users, delivered once or twice, with acts before, within and after the window, on items shown and not shown, for decisions logged
    and lost; one query. Each act counts for the one decision it names, if at all."""
    rng, rows = np.random.default_rng(SEED), []
    one = lambda values: values[rng.integers(len(values))]
    for n in range(400):
        started = {}
        for i in range(rng.integers(1, 5)):
            d, t = int(rng.integers(0, 3)), int(rng.integers(0, 5000))
            started.setdefault(d, t)                                     # a second delivery may even say something else
            rows.append(decision(f'{n}.{d}', t, list(rng.permutation(list('abcd'))[:rng.integers(0, 5)]), f'u{n}', received_time=at(10_000 + i)))
        for _ in range(rng.integers(0, 40)):
            d, kind = one([0, 1, 2, *started, *started, *started]), one(KINDS)
            rows.append(act(kind, started.get(d, 0) + one([-.001, 0, 5, 3000, 7200, 7200.001]), f'{n}.{d}', one('abcd'), f'u{n}', elapsed=one([10., 29.9, 30., 60.]) if kind == 'heartbeat' else None))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    found = con.execute(outcomes(log(rows), HOURS, LONG))
    names = ['item_id', 'clicked', 'converted', 'hidden', 'dwell', 'satisfied']
    got = {(r['decision_id'], r['position']): tuple(r[n] for n in names) for r in found.to_dict('records')}
    by_log = {}
    for r in rows: by_log.setdefault(r['user_id'], []).append(r)
    expected = {k: v for mine in by_log.values() for k, v in slow_outcomes(mine).items()}
    assert len(found) == len(got) > 500 and got == expected
    assert min(sum(v[i] for v in expected.values()) for i in (1, 2, 3, 5)) > 20

def test_lists_follow_the_slate_and_reward_is_the_declared_worth(con):
    slate = [f'i{j}' for j in (7, 11, 2, 10, 1, 9, 3, 12, 5, 4, 8, 6)]                    # neither alphabetical nor numerical
    rows = [decision('d', 0, slate, seq=5, policy_id='p', position_propensities=[.5]*12, propensities=[.25]*12), decision('e', 9, ['i7']), act('click', 5, 'd', 'i11'), act('click', 6, 'd', 'i12'),
            act('heartbeat', 50, 'd', 'i12', elapsed=44.), act('complaint', 60, 'd', 'i12'), act('conversion', 61, 'd', 'i7', value=9.), act('click', 70, 'e', 'i7')]
    worth = dict(clicked=.25, satisfied=1., converted=4., hidden=-8.)
    d, e = con.execute(decisions_with_outcomes(visits(log(rows), GAP), outcomes(log(rows), HOURS, LONG), worth)).to_dict('records')
    at_ = lambda *places: [j in places for j in range(12)]
    assert (d['decision_id'], d['seq'], d['policy_id'], d['session_id'], list(d['slate'])) == ('d', 5, 'p', 1, slate)
    assert [list(d[n]) for n in ('clicked', 'satisfied', 'converted', 'hidden')] == [at_(1, 7), at_(7), at_(0), at_(7)]
    assert list(d['dwell']) == [44.*x for x in at_(7)] and list(d['reward']) == [4., .25, 0, 0, 0, 0, 0, .25 + 1 - 8, 0, 0, 0, 0]
    assert list(e['reward']) == [.25] and len(d['propensities']) == 12
    for one in worth:
        got = con.execute(decisions_with_outcomes(visits(log(rows), GAP), outcomes(log(rows), HOURS, LONG), {one: 3.}))
        assert [3.*x for x in d[one]] == list(got['reward'][0])

def test_an_unknown_reward_is_refused_by_name(con):
    with pytest.raises(TelemetryError, match="sessions.reward names 'clicks'; the outcomes are clicked, satisfied, converted, hidden") as refused:
        decisions_with_outcomes(log([]), log([]), dict(satisfied=1., clicks=2.))
    assert len(str(refused.value).splitlines()) == 1

# --- acts

def test_a_satisfying_act_is_known_when_its_first_proof_arrives(con):
    beat = lambda elapsed, received, name='d', item='x': act('heartbeat', 5 + elapsed, name, item, elapsed=float(elapsed), received_time=at(received))
    rows = [act('click', 5, 'd', 'x', received_time=at(6)), beat(10, 16), beat(29.9, 36), beat(30, 500), beat(40, 46), beat(50, 56), act('click', 900, 'e', 'x', received_time=at(901)), beat(20, 930, 'e'),
            act('conversion', 70, 'd', 'x', received_time=at(71)), event('conversion', 80, item_id='y', received_time=at(81)), event('interaction', 90, item_id='z', kind='cart', received_time=at(95))]
    found = con.execute(acts(log(rows), LONG))
    assert found.columns.tolist() == ['user_id', 'item_id', 'event_time', 'known_time', 'kind']
    assert [(r['item_id'], r['kind'], r['event_time'], r['known_time']) for r in found.to_dict('records')] == [('x', 'clicked', at(5), at(6)), ('x', 'satisfied', at(35), at(46)),
        ('y', 'conversion', at(80), at(81)), ('z', 'cart', at(90), at(95)), ('x', 'clicked', at(900), at(901))]

# --- the stage

@contextlib.contextmanager
def home(folder, rows, **section):
    "A folder where ingest left these events."
    (folder/'artifacts/ingest').mkdir(parents=True)
    (folder/'params.yaml').write_text(yaml.safe_dump(small_params(sessions=section)))
    pq.write_table(arrow(rows), folder/'artifacts/ingest/events.parquet')
    with contextlib.chdir(folder): yield folder

ROWS = [decision('d1', 0, ['x', 'y']), decision('d2', 100, ['x', 'z']), decision('d3', 4000, ['y'], 'v'), act('impression', 1, 'd1', 'x'),
        act('click', 5, 'd1', 'y'), act('click', 7, 'd1', 'y', event_id='again'), act('heartbeat', 40, 'd1', 'y', elapsed=30.), # joined, twice
        act('click', 8000, 'd1', 'x'),                                   # hours too late
        act('click', 110, 'd2', 'y'),                                    # not on that slate
        act('click', 120, 'd9', 'x'),                                    # its decision was lost
        act('click', 4010, 'd3', 'y', 'v'), act('complaint', 4020, 'd3', 'y', 'v')]

def test_clicks_are_joined_or_counted_as_unjoined(tmp_path):
    with home(tmp_path/'a', ROWS):
        sessions.run()
        said, d = json.loads((tmp_path/'a/metrics/sessions.json').read_text()), pd.read_parquet('artifacts/sessions/decisions.parquet')
    assert (said['clicks_joined'], said['clicks_unjoined'], said['decisions'], said['positions'], said['sessions'], said['users']) == (3, 3, 3, 5, 3, 2)
    assert [[list(x) for x in d[n]] for n in ('clicked', 'reward')] == [[[False, True], [False, False], [True]], [[0., 1.], [0., 0.], [-.5]]]
    assert said['clicked_rate']['value'] == pytest.approx(2/5) and said['clicked_rate']['n'] == 5

def test_the_order_of_events_changes_no_byte(tmp_path):
    for name, order in dict(a=range(len(ROWS)), b=np.random.default_rng(SEED).permutation(len(ROWS))).items():
        with home(tmp_path/name, [ROWS[i] for i in order]): sessions.run()
    assert folder_digest(tmp_path/'a/artifacts/sessions') == folder_digest(tmp_path/'b/artifacts/sessions')

def test_a_refused_reward_overwrites_nothing(tmp_path):
    with home(tmp_path/'a', ROWS, reward={'clicks': 1.}) as here:
        for name in ('sessions', 'decisions', 'acts'): (here/'artifacts/sessions').mkdir(exist_ok=True); (here/f'artifacts/sessions/{name}.parquet').write_text('as it was')
        before = folder_digest(here/'artifacts')
        with pytest.raises(TelemetryError, match="sessions.reward names 'clicks'"): sessions.run()
        assert folder_digest(here/'artifacts') == before

# --- the tiny world

@pytest.fixture(scope='module')
def tiny(tiny_run):
    read = lambda path: pd.read_parquet(tiny_run/'artifacts'/path)
    return dict(events=read('ingest/events.parquet'), decisions=read('sessions/decisions.parquet'), acts=read('sessions/acts.parquet'), sessions=read('sessions/sessions.parquet'),
                said=json.loads((tiny_run/'metrics/sessions.json').read_text()), params=yaml.safe_load((tiny_run/'params.yaml').read_text())['sessions'])

def shown(decisions, *names): return decisions[['decision_id', 'user_id', 'event_time', 'slate', *names]].explode(['slate', *names]).rename(columns={'slate': 'item_id'})

def test_every_click_of_the_tiny_world_answers_one_decision(tiny):
    e, d, said = tiny['events'], tiny['decisions'], tiny['said']
    assert d['decision_id'].is_unique and len(d) == (e['type'] == 'decision').sum() == said['decisions']
    lists = ['candidates', 'slate', 'propensities', 'position_propensities', 'clicked', 'dwell', 'satisfied', 'converted', 'hidden', 'reward']
    assert all((d[n].str.len() == d['slate'].str.len()).all() for n in lists[2:])
    clicks = e[e['type'] == 'click'][['decision_id', 'item_id', 'user_id', 'event_time', 'position']]
    assert said['clicks_joined'] + said['clicks_unjoined'] == len(clicks) and 0 < said['clicks_unjoined'] < .02*len(clicks)
    s = shown(d, 'clicked').astype({'clicked': bool}); s['place'] = s.groupby('decision_id').cumcount()
    met = clicks.merge(s, on=['decision_id', 'item_id'], suffixes=('', '_decided'))
    assert not met.duplicated(['decision_id', 'item_id', 'event_time']).any()            # one decision each
    assert (met['user_id'] == met['user_id_decided']).all() and (met['position'] == met['place']).all()
    intime = (met['event_time'] - met['event_time_decided']).between(pd.Timedelta(0), pd.Timedelta(hours=tiny['params']['attribution_hours']))
    assert met[intime]['clicked'].all() and s['clicked'].sum() == len(met[intime].drop_duplicates(['decision_id', 'item_id'])) == said['clicks_joined']

def test_reward_of_the_tiny_world_is_the_declared_worth(tiny):
    s = shown(tiny['decisions'], 'clicked', 'satisfied', 'converted', 'hidden', 'dwell', 'reward')
    worth = sum(value*s[name].astype(float) for name, value in tiny['params']['reward'].items())
    assert np.array_equal(worth, s['reward'].astype(float)) and {-.5, 0., 1.} <= set(worth)
    assert (s['satisfied'].astype(bool) == s['clicked'].astype(bool) & (s['dwell'] >= tiny['params']['satisfied_seconds'])).all()

def test_satisfaction_of_the_tiny_world_is_known_at_the_heartbeat_that_crossed(tiny):
    e, threshold = tiny['events'], tiny['params']['satisfied_seconds']
    known = tiny['acts'][tiny['acts']['kind'] == 'satisfied']
    beats = {}
    for r in e[e['type'] == 'heartbeat'][['user_id', 'item_id', 'decision_id', 'elapsed', 'event_time', 'received_time']].itertuples():
        if r.elapsed >= threshold: beats.setdefault((r.user_id, r.item_id, r.decision_id), []).append((r.elapsed, r.event_time, r.received_time))
    first = sorted((u, i, min(t for _, t, _ in b), min(got for *_, got in b)) for (u, i, _), b in beats.items())
    assert sorted(known[['user_id', 'item_id', 'event_time', 'known_time']].itertuples(index=False, name=None)) == first and len(first) > 1000
    clicked = tiny['acts'][tiny['acts']['kind'] == 'clicked'].merge(known, on=['user_id', 'item_id'], suffixes=('', '_long'))
    stayed = (clicked['event_time_long'] - clicked['event_time']).dt.total_seconds()
    assert (stayed == threshold).mean() > .97 and (known['known_time'] > known['event_time']).all()   # else that very heartbeat was lost

def test_visits_of_the_tiny_world_are_apart_and_hold_every_decision(tiny):
    s, quiet = tiny['sessions'], pd.Timedelta(minutes=tiny['params']['gap_minutes'])
    assert (s['session_id'] == s.groupby('user_id').cumcount() + 1).all() and (s['end'] >= s['start']).all()
    same = s['user_id'] == s['user_id'].shift()
    assert (s['start'] - s['end'].shift())[same].min() > quiet and same.sum() > 1000
    d = tiny['decisions'].merge(s, on=['user_id', 'session_id'])
    assert len(d) == len(tiny['decisions']) == s['decisions'].sum() and d['event_time'].between(d['start'], d['end']).all()
    assert s['clicks'].sum() == (tiny['events']['type'] == 'click').sum()
