"Visits and outcomes against a slow reading of their definitions; every outcome answers one decision; new windows change nothing but what they bring."
import shutil
from datetime import datetime, timedelta
from pathlib import Path
import ibis, numpy as np, pandas as pd, pyarrow as pa, pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from evidence import CFG, DAY, GAP, HOURS, LONG, NOON, SEED, SLACK, STAY, act, arrow, at, decision, digest, event, home, lay, log, read, said
from telemetry_loop import sessions
from telemetry_loop.config import RunConfig, TelemetryError, folder_digest
from telemetry_loop.engine import connect
from telemetry_loop.sessions import acts, answers, decisions_with_outcomes, outcomes, repeats, visits

quick = settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

@pytest.fixture(scope='module')
def con(): return connect(RunConfig(seed=0, threads=2, engine='duckdb', memory_gb=2.))

# --- visits

OWN, NOT_OWN = ['decision', 'impression', 'click', 'heartbeat', 'conversion', 'complaint', 'survey', 'control', 'interaction'], ['account', 'consent', 'exposure', 'item', 'request']
ms = lambda t: round((t - datetime(1970, 1, 1)).total_seconds()*1000)

def slow_visits(rows): # -> {event_id: visit} of one user
    start, last, found = None, None, {}
    for r in sorted((r for r in rows if r['type'] in OWN), key=lambda r: r['event_time']):
        if last is None or (r['event_time'] - last).total_seconds() > 60*GAP: start = r['event_time']
        last, found[r['event_id']] = r['event_time'], f"{r['user_id']}-{ms(start)}"
    return found

def test_visits_read_the_same_slowly_whole_and_in_two_pieces(con):
    "Random days of many users in one query: gaps just under, at and over the limit, events at the same moment, events that are not the user's own; and the log cut anywhere."
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
    expected = {k: v for day in logs for k, v in slow_visits(day).items()}
    found = con.execute(visits(log(rows), GAP))
    assert len(found) == len(expected) > 500 and dict(zip(found['event_id'], found['session_id'])) == expected and len(set(expected.values())) > len(logs)
    cut = at(3000)
    first = con.execute(visits(log([r for r in rows if r['event_time'] < cut]), GAP))
    open = first.groupby('user_id').agg(start=('start', 'max'), end=('event_time', 'max')).reset_index()
    then = con.execute(visits(log([r for r in rows if r['event_time'] >= cut]), GAP, ibis.memtable(open)))
    assert dict(zip([*first['event_id'], *then['event_id']], [*first['session_id'], *then['session_id']])) == expected and len(then) > 100

# --- outcomes

KINDS = ['click', 'heartbeat', 'heartbeat', 'conversion', 'complaint', 'impression', 'survey']

def once(rows): # no decision twice: the first received stands
    first = {}
    for i, r in sorted(enumerate(rows), key=lambda x: (x[1].get('received_time', x[1]['event_time']), x[1]['event_time'], x[1].get('event_id', f'e{x[0]}'))):
        if r['type'] == 'decision': first.setdefault(r['decision_id'], i)
    return [r for i, r in enumerate(rows) if r['type'] != 'decision' or first[r['decision_id']] == i]

def slow_reason(r, named): # named: decision_id -> decision
    d = named.get(r['decision_id'])
    if d is None or not -SLACK <= (r['event_time'] - d['event_time']).total_seconds() <= 3600*HOURS: return 'no decision in time', None
    if r['user_id'] != d['user_id']: return 'another user', None
    if r['item_id'] not in d['slate']: return 'not on the slate', None
    place = d['slate'].index(r['item_id'])
    return (None, place) if r.get('position') in (None, place) else ('wrong position', None)

def random_log(rng, n):
    rows, one = [], lambda values: values[rng.integers(len(values))]
    for k in range(n):
        started = {}
        for i in range(rng.integers(1, 5)):
            d, t = int(rng.integers(0, 3)), int(rng.integers(0, 5000))
            started.setdefault(d, t)                                     # a second delivery may even say something else
            rows.append(decision(f'{k}.{d}', t, [str(x) for x in rng.permutation(list('abcd'))[:rng.integers(0, 5)]], f'u{k}', received_time=at(10_000 + i)))
        for _ in range(rng.integers(0, 40)):
            d, kind = one([0, 1, 2, *started, *started, *started]), one(KINDS)
            rows.append(act(kind, started.get(d, 0) + one([-5.001, -5, 0, 5, 3000, 7200, 7200.001]), f'{k}.{d}', one('abcd'), one([f'u{k}']*12 + [f'v{k}']),
                position=one([None, None, 0, 1, 2, 3]), elapsed=one([10., 29.9, 30., 60.]) if kind == 'heartbeat' else None))
    return [rows[i] | dict(event_id=f'e{i}') for i in rng.permutation(len(rows))]

def test_repeated_decisions_are_named_and_the_first_received_stands(con):
    rows = random_log(np.random.default_rng(SEED), 200)
    gone = set(con.execute(repeats(log([r for r in rows if r['type'] == 'decision'])))['event_id'])
    assert gone == {r['event_id'] for r in rows} - {r['event_id'] for r in once(rows)} and len(gone) > 50

def test_outcomes_read_the_same_slowly(con):
    """Random decisions that share items and users, with acts before, within and after the window, on items shown and not shown, at right and wrong positions, by the same and another user, for decisions
    logged and lost; one query. Each act counts for the one decision it names, or says why not."""
    rows = once(random_log(np.random.default_rng(SEED), 400))
    named = {r['decision_id']: r for r in rows if r['type'] == 'decision'}
    events = log(rows); answered = answers(events, CFG)
    found = con.execute(answered).set_index('event_id')
    expected = {r['event_id']: slow_reason(r, named) for r in rows if r['type'] in sessions.OUTCOMES}
    assert len(found) == len(expected) > 2000 and found.index.is_unique
    assert {k: (None if pd.isna(v) else v) for k, v in found['reason'].items()} == {k: why for k, (why, _) in expected.items()}
    assert all(found.loc[k, 'place'] == place for k, (why, place) in expected.items() if why is None)
    assert min(pd.Series([why or 'joined' for why, _ in expected.values()]).value_counts()) > 20
    got = {(r['decision_id'], r['position']): r for r in con.execute(outcomes(events, answered, CFG, STAY)).to_dict('records')}
    joined = {}
    for r in rows:
        if r['event_id'] in expected and expected[r['event_id']][0] is None: joined.setdefault((r['decision_id'], expected[r['event_id']][1]), []).append(r)
    assert set(got) == {(d, j) for d, r in named.items() for j in range(len(r['slate']))}
    for key, r in got.items():
        kinds = {x['type'] for x in joined.get(key, [])}
        assert (r['clicked'], r['converted'], r['hidden']) == ('click' in kinds, 'conversion' in kinds, 'complaint' in kinds)
        assert r['satisfied'] == (r['clicked'] and r['dwell'] >= LONG) and (r['dwell'] == 0 or 'heartbeat' in kinds)
    assert sum(r['satisfied'] for r in got.values()) > 8

def test_a_conversion_counts_to_the_second(con):
    rows = [decision('d', 0, ['x']), act('conversion', 7200, 'd', 'x', event_id='inside'), act('conversion', 7201, 'd', 'x', event_id='outside')]
    assert con.execute(answers(log(rows), CFG)).set_index('event_id')['reason'].fillna('joined').to_dict() == {'inside': 'joined', 'outside': 'no decision in time'}

def test_lists_follow_the_slate_and_reward_is_the_declared_worth(con):
    slate = [f'i{j}' for j in (7, 11, 2, 10, 1, 9, 3, 12, 5, 4, 8, 6)]                    # neither alphabetical nor numerical
    rows = [decision('d', 0, slate, seq=5, policy_id='p', position_propensities=[.5]*12, propensities=[.25]*12), decision('e', 9, ['i7']), act('click', 5, 'd', 'i11'), act('click', 6, 'd', 'i12'),
            act('heartbeat', 50, 'd', 'i12', elapsed=44.), act('complaint', 60, 'd', 'i12'), act('conversion', 61, 'd', 'i7', value=9.), act('click', 70, 'e', 'i7')]
    worth = dict(clicked=.25, satisfied=1., converted=4., hidden=-8.)
    events = log(rows); o = outcomes(events, answers(events, CFG), CFG, STAY)
    d, e = con.execute(decisions_with_outcomes(visits(events, GAP), o, worth).order_by(['event_time', 'decision_id'])).to_dict('records')
    at_ = lambda *places: [j in places for j in range(12)]
    assert (d['decision_id'], d['seq'], d['policy_id'], d['session_id'], list(d['slate'])) == ('d', 5, 'p', f'u-{ms(NOON)}', slate)
    assert [list(d[n]) for n in ('clicked', 'satisfied', 'converted', 'hidden')] == [at_(1, 7), at_(7), at_(0), at_(7)]
    assert list(d['dwell']) == [44.*x for x in at_(7)] and list(d['reward']) == [4., .25, 0, 0, 0, 0, 0, .25 + 1 - 8, 0, 0, 0, 0]
    assert list(e['reward']) == [.25] and len(d['propensities']) == 12
    for one in worth:
        got = con.execute(decisions_with_outcomes(visits(events, GAP), o, {one: 3.}).order_by(['event_time', 'decision_id']))
        assert [3.*x for x in d[one]] == list(got['reward'][0])

def test_an_unknown_reward_is_refused_by_name():
    with pytest.raises(TelemetryError, match="sessions.reward names 'clicks'; the outcomes are clicked, satisfied, converted, hidden") as refused:
        decisions_with_outcomes(log([]), log([]), dict(satisfied=1., clicks=2.))
    assert len(str(refused.value).splitlines()) == 1

# --- acts

def test_a_satisfying_act_is_known_when_its_first_proof_arrives(con):
    beat = lambda elapsed, received, name='d', item='x': act('heartbeat', 5 + elapsed, name, item, elapsed=float(elapsed), received_time=at(received))
    rows = [act('click', 5, 'd', 'x', received_time=at(6)), beat(10, 16), beat(29.9, 36), beat(30, 500), beat(40, 46), beat(50, 56), act('click', 900, 'e', 'x', received_time=at(901)), beat(20, 930, 'e'),
            act('conversion', 70, 'd', 'x', received_time=at(71)), event('conversion', 80, item_id='y', received_time=at(81)), event('interaction', 90, item_id='z', kind='cart', received_time=at(95)),
            act('click', 1000, 'd', 'x'), act('click', 8201, 'd', 'x', received_time=at(8202))]     # again: once soon after, once more than two hours later
    found = con.execute(acts(log(rows), CFG).order_by('event_time'))
    assert found.columns.tolist() == ['user_id', 'item_id', 'kind', 'event_time', 'known_time']
    assert [(r['item_id'], r['kind'], r['event_time'], r['known_time']) for r in found.to_dict('records')] == [('x', 'clicked', at(5), at(6)), ('x', 'satisfied', at(35), at(46)),
        ('y', 'conversion', at(80), at(81)), ('z', 'cart', at(90), at(95)), ('x', 'clicked', at(900), at(901)), ('x', 'clicked', at(8201), at(8202))]

# --- the stage

ROWS = [decision('d1', 0, ['x', 'y']), decision('d2', 100, ['x', 'z']), decision('d3', 4000, ['y'], 'v'), act('impression', 1, 'd1', 'x'),
        act('click', 5, 'd1', 'y'), act('click', 7, 'd1', 'y', event_id='again'), act('heartbeat', 40, 'd1', 'y', elapsed=35.), # joined, twice
        act('click', 8000, 'd1', 'x'),                                   # hours too late
        act('conversion', 8000, 'd1', 'x'), act('conversion', 50, 'd1', 'x'),
        act('click', 110, 'd2', 'y'),                                    # not on that slate
        act('click', 110, 'd2', 'z', position=0),                        # not there
        act('click', 111, 'd2', 'z', 'v'),                               # somebody else's slate
        act('click', 120, 'd9', 'x'),                                    # its decision was lost
        act('click', 4010, 'd3', 'y', 'v'), act('complaint', 4020, 'd3', 'y', 'v'), decision('d3', 4100, ['q'], 'v', event_id='repeat')]

def test_outcomes_are_joined_or_counted_with_their_reason(tmp_path):
    with home(tmp_path/'a', ROWS):
        sessions.run()
        m, d, s = said(), read('decisions'), read('sessions')
    assert (m['clicks_joined'], m['clicks_unjoined'], m['decisions'], m['positions'], m['sessions'], m['users']) == (3, 5, 3, 5, 4, 2)
    assert m['outcomes_unjoined'] == {'too late': 2, 'not on the slate': 1, 'wrong position': 1, 'another user': 1, 'no such decision': 1}
    assert (m['conversions_attributed'], m['conversions_late'], m['bots']['users']) == (1, 1, 0)
    assert [[list(x) for x in d[n]] for n in ('clicked', 'reward')] == [[[False, True], [False, False], [True]], [[0., 1.], [0., 0.], [-.5]]]
    assert m['clicked_rate']['value'] == pytest.approx(2/5) and m['clicked_rate']['n'] == 5
    assert s['events'].sum() == len(ROWS) - 1 and s['decisions'].sum() == 3 and s.columns.tolist() == ['user_id', 'session_id', 'start', 'end', 'decisions', 'clicks', 'events']

def test_logged_probabilities_that_cannot_be_are_counted(tmp_path):
    p = lambda i, own, marginal, items='xy', **more: decision(f'd{i}', i, list(items), propensities=own, position_propensities=marginal, **more)
    rows = [p(0, [.5, .5], [.5, .4]), p(1, None, None), p(2, [.5], [.5, .4]), p(3, [.5, .5], [.4, .4]), p(4, [.9, .9], [.9, .3]), p(5, [.5], [.5], 'x'), p(6, [1.2, .5], [1.2, .6]), p(7, [1., 1.], [1., 1.])]
    with home(tmp_path/'a', rows):
        sessions.run()
        assert said()['propensity_checks'] == dict(checked=7, lengths=1, first=1, product=1, lone=1, bounds=1)

def test_the_order_of_events_changes_no_byte(tmp_path):
    rows, found = [r | dict(event_id=f'e{i}') for i, r in enumerate(ROWS)], []
    for name, order in dict(a=range(len(rows)), b=np.random.default_rng(SEED).permutation(len(rows))).items():
        with home(tmp_path/name, [rows[i] for i in order]): sessions.run(); found.append(digest())
    assert found[0] == found[1]

def test_a_refused_reward_overwrites_nothing(tmp_path):
    with home(tmp_path/'a', ROWS, reward={'clicks': 1.}) as here:
        (here/'artifacts/sessions').mkdir(); (here/'artifacts/sessions/bots.parquet').write_text('as it was')
        before = folder_digest(here/'artifacts')
        with pytest.raises(TelemetryError, match="sessions.reward names 'clicks'"): sessions.run()
        assert folder_digest(here/'artifacts') == before

# --- a window at a time

def messy(rng, users, days): # rows with late and backfilled deliveries, visits across midnight and across several midnights
    rows, n = [], 0
    def add(row, late):
        nonlocal n
        n += 1; rows.append(row | dict(event_id=f'e{n:06d}', received_time=row['event_time'] + timedelta(seconds=float(late))))
    delay = lambda: rng.choice([1., 1., 1., 1., 1., 1., 600., 7200., 2*DAY, 5*DAY], p=[.155]*6 + [.02, .02, .02, .01])
    for u in range(users):
        for day in range(days):
            if rng.random() < .4: continue
            t = day*DAY + float(rng.choice([rng.uniform(-12, 12)*3600, 11.99*3600]))                       # NOON + 12 h is midnight
            for k in range(rng.integers(1, 6)):
                name, slate = f'd{u}.{day}.{k}' if rng.random() > .02 else f'd{u}.0.0', [str(x) for x in rng.choice(list('abcdefgh'), 3, replace=False)]
                add(decision(name, t, slate, f'u{u}', seq=n, propensities=[.5, .5, .5], position_propensities=[.5, .4, .3]), 0)
                for j, item in enumerate(slate):
                    if rng.random() < .4:
                        add(act('impression', t + .4, name, item, f'u{u}', position=j), delay())
                        add(act('click', t + 3 + j, name, item, f'u{u}', position=j), delay())
                        for b in range(rng.integers(0, 5)): add(act('heartbeat', t + 13 + j + 10*b, name, item, f'u{u}', elapsed=10. + 10*b), delay())
                        if rng.random() < .2: add(act('conversion', t + float(rng.choice([60, 7000, 9000])), name, item, f'u{u}', value=1.), delay())
                t += float(rng.choice([20., 300., 1500., 2000., 7200.]))
    for u in ('night', 'owl'):                                                                             # never silent for half an hour, for three days
        for k in range(3*50): add(event('impression', DAY + 1740.*k + (u == 'owl'), u), 0)
        for k in (0, 60, 149): add(decision(f'{u}.{k}', DAY + 1740.*k + 7, ['a', 'b', 'c'], u, seq=n), 0)
    return rows

@pytest.fixture(scope='module')
def long_log(): return messy(np.random.default_rng(SEED), 30, 9)

def test_windows_one_by_one_equal_all_at_once(tmp_path, long_log, monkeypatch):
    "Late and backfilled events, visits over one and three midnights, repeated decisions: a run that goes on equals a run from nothing, and one with fewer slabs at a time."
    table = arrow(long_log); received = table['received_time'].to_numpy().astype('M8[D]')
    dates, built = np.unique(received), []
    with home(tmp_path/'grows', long_log[:1]):
        cached = sessions.cached
        monkeypatch.setattr(sessions, 'cached', lambda kind, key, build: cached(kind, key, lambda f: (built.append(kind), build(f))))
        for n in (6, 9, len(dates)):
            shutil.rmtree('artifacts/ingest'); lay(table.filter(pa.array(received <= dates[n - 1])), Path('artifacts/ingest/events'))
            built.clear(); sessions.run(); grown = digest()
        built.clear(); sessions.run(); assert not built and digest() == grown                              # nothing new: nothing done
    with home(tmp_path/'at_once', table): sessions.run(); assert digest() == grown
    monkeypatch.setattr(sessions, 'BATCH', len(table)//3)
    with home(tmp_path/'a_few_slabs_a_time', table): sessions.run(); assert digest() == grown
    s = read('sessions', tmp_path/'grows')
    assert (s['end'].dt.floor('D') > s['start'].dt.floor('D')).sum() > 10 and (s['end'] - s['start']).max() > pd.Timedelta(days=2.9) and s['session_id'].is_unique

def test_a_day_costs_what_it_brings(tmp_path, monkeypatch):
    "One more day of a log of three days and of one of twenty: the same slabs are worked on, the new one and the one before."
    days = [[event('impression', DAY*d + 60*k, f'u{k}', event_id=f'{d}.{k}') for k in range(3)] + [decision(f'd{d}', DAY*d, ['a'], event_id=f'{d}')] for d in range(21)]
    for n in (3, 20):
        with home(tmp_path/f'{n}', sum(days[:n], [])):
            sessions.run(); lay(days[n], Path('artifacts/ingest/events')); built, cached = [], sessions.cached
            with monkeypatch.context() as m:
                m.setattr(sessions, 'cached', lambda kind, key, build: cached(kind, key, lambda f: (built.append(kind), build(f))))
                sessions.run()
            assert sorted(built) == ['sessions/final', 'sessions/slab', 'sessions/window'] and said()['decisions'] == n + 1

def test_an_old_window_that_changes_costs_only_its_days(tmp_path, long_log, monkeypatch):
    "Someone is forgotten, in two old windows: the run equals one from nothing, and far slabs are left alone."
    table = arrow(long_log); received = table['received_time'].to_numpy().astype('M8[D]')
    dates = np.unique(received)
    with home(tmp_path/'grows', table):
        sessions.run(); built, cached = [], sessions.cached
        monkeypatch.setattr(sessions, 'cached', lambda kind, key, build: cached(kind, key, lambda f: (built.append(kind), build(f))))
        keep = table.filter(pa.array(~((table['user_id'].to_numpy(zero_copy_only=False) == 'u3') & np.isin(received, dates[2:4]))))
        shutil.rmtree('artifacts/ingest'); lay(keep, Path('artifacts/ingest/events')); sessions.run(); grown = digest()
        assert 0 < built.count('sessions/slab') < len(dates) - 2
    with home(tmp_path/'at_once', keep): sessions.run(); assert digest() == grown

@pytest.mark.parametrize('unit', ['D', 'M', 'Y'])
def test_slabs_say_what_the_whole_log_says(tmp_path, long_log, con, unit):
    rows = once(long_log)
    events = log(rows); answered = answers(events, CFG)
    whole = con.execute(decisions_with_outcomes(visits(events, GAP), outcomes(events, answered, CFG, STAY), dict(satisfied=1., hidden=-.5)).order_by(['event_time', 'decision_id']))
    with home(tmp_path/'a', long_log, unit):
        sessions.run(); d, a, s = read('decisions'), read('acts'), read('sessions')
    plain = lambda t: t.map(lambda x: list(x) if isinstance(x, np.ndarray) else x).astype(object).where(t.notna(), None).values.tolist()
    order = ['event_time', 'decision_id']
    assert plain(d.sort_values(order)) == plain(whole.sort_values(order)[d.columns]) and len(d) > 300
    key = ['user_id', 'item_id', 'kind', 'event_time', 'known_time']
    assert a[key].sort_values(key).values.tolist() == con.execute(acts(events, CFG))[key].sort_values(key).values.tolist() and len(a) > 300
    v = con.execute(visits(events, GAP)).groupby(['user_id', 'session_id']).agg(start=('event_time', 'min'), end=('event_time', 'max'), decisions=('type', lambda x: (x == 'decision').sum()), clicks=('type', lambda x: (x == 'click').sum()), events=('type', 'size')).reset_index()
    assert s.sort_values('session_id').values.tolist() == v.sort_values('session_id')[s.columns].values.tolist()

# --- the other engine

def test_spark_writes_the_same_bytes(tmp_path):
    found, log = {}, messy(np.random.default_rng(SEED), 6, 3)
    for engine in ('duckdb', 'pyspark'):
        with home(tmp_path/engine, log):
            params = yaml.safe_load(Path('params.yaml').read_text()); params['run']['engine'] = engine; Path('params.yaml').write_text(yaml.safe_dump(params))
            try: sessions.run()
            except TelemetryError as e: pytest.skip(str(e)) if engine == 'pyspark' else pytest.fail(str(e))
            found[engine] = digest()
    assert found['duckdb'] == found['pyspark'] and found['duckdb'][1]['decisions'] > 20
