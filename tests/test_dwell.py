"Seconds from beats: golden cases, an oracle in plain Python, and both engines."
import dataclasses, random
import ibis, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import RunConfig, TelemetryError, load_params
from telemetry_loop.engine import connect, read_parquet
from telemetry_loop.dwell import DwellConfig, item_dwell, overlong_visits, page_acts, page_users, page_views, page_visits, usage

CFG = DwellConfig(cap_minutes=30., heartbeat_seconds=10., minimum_seconds=5., late_days=3., visit_days=3.)
NOON = pd.Timestamp('2025-01-06 12:00')
TEXT, TIME = ['event_id', 'type', 'user_id', 'device_id', 'decision_id', 'item_id', 'state', 'visit_id', 'page_view_id', 'login_id', 'app', 'page', 'title', 'referrer', 'name'], ['event_time', 'sent_time', 'received_time', 'derived_time']
SCHEMA = ibis.schema({c: 'string' for c in TEXT} | {c: 'timestamp(3)' for c in TIME} | dict(elapsed='float64', visit_index='int64', robot='boolean'))
CON = ibis.duckdb.connect(threads=2)

def rows(acts, start=NOON): # (second, type, item, value, ..fields) -> dicts
    found = []
    for i, (second, kind, item, value, *more) in enumerate(acts):
        at = start + pd.Timedelta(milliseconds=round(1000*second))
        found.append(dict(event_id=f'e{i:03}', type=kind, user_id='ann', device_id='phone', event_time=at, sent_time=at, received_time=at + pd.Timedelta(seconds=1)) | (dict(decision_id='d', item_id=item) if item else {})
            | ({'state' if kind == 'visibility' else 'elapsed': value} if value is not None else {}) | (more[0] if more else {}))
    return found

def table(events): return CON.create_table('events', pa.Table.from_pylist(events, schema=SCHEMA.to_pyarrow()), schema=SCHEMA, overwrite=True)
def stays(events, cfg=CFG): return {(r.user_id, r.decision_id, r.item_id): (r.dwell, r.certain) for r in item_dwell(table(events), cfg).execute().itertuples()}
def golden(*acts, start=NOON, cfg=CFG): return {item: stay for (_, _, item), stay in stays(rows(acts, start), cfg).items()}

click, beat, close = (lambda s, item='a', **f: (s, 'click', item, None, f)), (lambda s, elapsed=None, item='a', **f: (s, 'heartbeat', item, s if elapsed is None else elapsed, f)), (lambda s, elapsed=None, item='a', **f: (s, 'close', item, s if elapsed is None else elapsed, f))
hide, show = (lambda s, **f: (s, 'visibility', None, 'hidden', f)), (lambda s, **f: (s, 'visibility', None, 'visible', f))

CASES = {
    'a close says when it ended':               ([click(0), beat(10), beat(20), close(27)], {'a': (27., True)}),
    'without a close, the last beat':           ([click(0), beat(10), beat(20)], {'a': (20., False)}),
    'without any beat, nothing':                ([click(0)], {'a': (0., False)}),
    'beats without a click are not a stay':     ([beat(10), close(12)], {}),
    'beats before the click say nothing':       ([beat(2, 90), click(5), beat(15, 10)], {'a': (10., False)}),
    'a close has the last word':                ([click(0), beat(10), close(15), beat(20), close(25)], {'a': (15., True)}),
    'negative time says nothing':               ([click(0), beat(10, -10), beat(20, 20), close(22, -3)], {'a': (20., False)}),
    'when time runs backwards, the largest':    ([click(0), beat(10), beat(30, 30), beat(40, 4)], {'a': (30., False)}),
    'duplicates change nothing':                ([click(0), click(0), beat(10), beat(10), close(12), close(12)], {'a': (12., True)}),
    'late beats count':                         ([click(0), beat(10), beat(20, received_time=NOON + pd.Timedelta(days=2))], {'a': (20., False)}),
    'time in the background does not count':    ([click(0), hide(10), show(40), beat(50)], {'a': (20., False)}),
    'hidden and never back':                    ([click(0), beat(10), hide(12), beat(30)], {'a': (12., False)}),
    'hidden twice in a row is hidden once':     ([click(0), hide(5), hide(10), show(20), show(25), close(30)], {'a': (15., True)}),
    'hidden before the click: the click shows': ([hide(-60), click(0), close(30)], {'a': (30., True)}),
    'hidden on another device':                 ([click(0), hide(5, device_id='tablet'), close(30)], {'a': (30., True)}),
    'hidden in the app of another user':        ([click(0), hide(5, user_id='bob'), close(30)], {'a': (30., True)}),
    'no device named: the user has one':        ([click(0, device_id=None), hide(5, device_id=None), show(15, device_id=None), close(30, device_id=None)], {'a': (20., True)}),
    'fractions of a second':                    ([click(.4), hide(.9), show(1.6), close(9.7, 9.3)], {'a': (8.6, True)}),
    'the later click takes over':               ([click(0), click(14, 'b'), beat(20), beat(24, 10, 'b')], {'a': (14., True), 'b': (10., False)}),
    'taken over on another device':             ([click(0), click(14, 'b', device_id='tablet'), close(20)], {'a': (14., True), 'b': (0., False)}),
    'silent before the next click':             ([click(0), beat(10), click(60, 'b'), close(70, 10, 'b')], {'a': (10., False), 'b': (10., True)}),
    'opened twice, looked at twice':            ([click(0), close(10), click(100), beat(120, 20)], {'a': (30., False)}),
    'a screen left on':                         ([click(0), close(3600)], {'a': (1800., False)}),
    'the cap is on what was seen':              ([click(0), hide(10), show(3610), close(3620)], {'a': (20., True)}),
    'an absurd claim':                          ([click(0), beat(10, 1e300)], {'a': (1800., False)}),
}
@pytest.fixture(scope='module')
def measured(): # all cases in one log, each with people of its own
    own = lambda i, e: e | {c: f'{i}-{e[c]}' for c in ('event_id', 'user_id', 'decision_id') if e.get(c)}
    return stays([own(i, e) for i, (acts, _) in enumerate(CASES.values()) for e in rows(acts)])

@pytest.mark.parametrize('case', CASES)
def test_golden(case, measured):
    i = list(CASES).index(case)
    assert {item: stay for (user, _, item), stay in measured.items() if user.startswith(f'{i}-')} == CASES[case][1]

@pytest.mark.parametrize('start', ['2025-01-06 23:59:45', '2024-12-31 23:59:45', '2025-03-30 00:59:45', '2025-10-26 00:59:45', '2016-12-31 23:59:45'])
@pytest.mark.parametrize('zone', ['UTC', 'Europe/Paris', 'America/New_York'])
def test_midnight_new_year_and_summer_time_are_moments_like_any_other(start, zone):
    CON.raw_sql(f"SET TimeZone='{zone}'")
    try: assert golden(click(0), hide(10), show(20), beat(40), close(45), start=pd.Timestamp(start)) == {'a': (35., True)}
    finally: CON.raw_sql("SET TimeZone='UTC'")

def test_another_cap(): assert golden(click(0), close(100), cfg=dataclasses.replace(CFG, cap_minutes=1.)) == {'a': (60., False)}
def test_params_of_the_project(): assert load_params(DwellConfig, 'dwell').cap_minutes > 0

USERS = ['ann', 'bob', 'cat', 'dan', 'eve']
acts = st.lists(st.tuples(st.integers(0, 120), st.sampled_from(['click', 'click', 'heartbeat', 'heartbeat', 'close', 'hidden', 'visible']), st.sampled_from(['a', 'b']), st.sampled_from(USERS), st.sampled_from(['phone', 'tablet']), st.integers(-5, 90)), max_size=60)
def events_of(acts):
    return rows([(s, 'visibility', None, kind, dict(user_id=user, device_id=device)) if kind in ('hidden', 'visible') else (s, kind, item, None if kind == 'click' else elapsed, dict(user_id=user, device_id=device))
        for s, kind, item, user, device, elapsed in acts])

def oracle(events): # second by second, each rule in its own words
    sec = lambda e: (e['event_time'] - NOON).total_seconds()
    found = {}
    for user in USERS:
        own = [e for e in events if e['user_id'] == user]
        clicks = sorted((e for e in own if e['type'] == 'click'), key=lambda e: (sec(e), e['item_id'], e['event_id']))
        for i, c in enumerate(clicks):
            again = [sec(x) for x in clicks[i+1:] if x['item_id'] == c['item_id']]
            mine = [e for e in own if e['type'] in ('heartbeat', 'close') and e['item_id'] == c['item_id'] and sec(c) <= sec(e) and (not again or sec(e) < again[0]) and e['elapsed'] >= 0]
            closes, beats = [e['elapsed'] for e in mine if e['type'] == 'close'], [e['elapsed'] for e in mine if e['type'] == 'heartbeat']
            stay = min(closes) if closes else max(beats, default=0)
            taken = i + 1 < len(clicks) and sec(clicks[i+1]) - sec(c) <= stay
            if taken: stay = sec(clicks[i+1]) - sec(c)
            signs = sorted([(sec(e), e['state'] != 'hidden') for e in own if e['type'] == 'visibility' and e['device_id'] == c['device_id']] + [(sec(e), True) for e in clicks if e['device_id'] == c['device_id']])
            visible = lambda t: ([shown for at, shown in signs if at <= t] or [True])[-1]
            seen = sum(visible(t) for t in range(int(sec(c)), int(sec(c) + stay)))
            dwell, certain = found.get((user, 'd', c['item_id']), (0., True))
            found[(user, 'd', c['item_id'])] = (dwell + seen, certain and (bool(closes) or taken))
    return found

@settings(max_examples=20, deadline=None)
@given(acts)
def test_like_a_second_by_second_count(acts): assert stays(events_of(acts)) == oracle(events_of(acts))

@settings(max_examples=8, deadline=None)
@given(acts, st.integers(0, 99))
def test_order_of_arrival_and_redelivery_change_nothing(acts, seed):
    events = events_of(acts)
    luck = random.Random(seed)
    mixed = events + luck.sample(events, luck.randint(0, len(events)))
    luck.shuffle(mixed)
    assert stays(mixed) == stays(events)

@settings(max_examples=8, deadline=None)
@given(acts)
def test_nobody_looks_longer_than_the_clock(acts):
    events = events_of(acts)
    for user in USERS:
        ends = [(e['event_time'] - NOON).total_seconds() for e in events if e['user_id'] == user and e['type'] == 'click']
        if ends: assert sum(dwell for (who, *_), (dwell, _) in stays(events).items() if who == user) <= max(ends) - min(ends) + 90

# pages
def web(*acts): # (second, type, page view, ..fields)
    return rows([(s, kind, None, None, dict(page_view_id=view, visit_id='v', page=f'https://x/{view}') | (more[0] if more else {})) for s, kind, view, *more in acts])
def one(events, what, cfg=CFG): return what(table(events), cfg).execute()

def test_engaged_seconds_are_beats_of_the_clock():
    pings = lambda *seconds: one(web((0, 'page_view', 'p'), *[(s, 'page_ping', 'p') for s in seconds]), page_views).engaged_s.tolist()
    assert pings() == [0.] and pings(7) == [5.] and pings(31, 39) == [5.] and pings(30, 41, 52) == [25.] and pings(39, 40) == [15.]
    assert one(web((0, 'page_view', 'p'), (30, 'page_ping', 'p'), (90, 'page_ping', 'p')), page_views, dataclasses.replace(CFG, heartbeat_seconds=60., minimum_seconds=20.)).engaged_s.tolist() == [80.]

def test_the_first_of_two_views_with_one_id_counts():
    found = one(web((5, 'page_view', 'p'), (0, 'page_view', 'p'), (9, 'page_view', 'q')), page_views).sort_values('start')
    assert found.event_id.tolist() == ['e001', 'e002'] and found.page_view_in_visit.tolist() == [1, 2] and found.page_views_in_visit.tolist() == [2, 2]

def test_time_is_receipt_less_the_wait_on_the_device():
    clocks = dict(sent_time=NOON + pd.Timedelta(minutes=10), received_time=NOON + pd.Timedelta(hours=1))  # the device is 50 minutes slow
    assert one(web((60, 'page_view', 'p', clocks)), page_views).start.tolist() == [NOON + pd.Timedelta(minutes=51)]
    assert one(web((60, 'page_view', 'p', clocks | dict(derived_time=NOON))), page_views).start.tolist() == [NOON]
    assert one(web((60, 'page_view', 'p', dict(sent_time=None))), page_views).start.tolist() == [NOON + pd.Timedelta(minutes=1)]

def test_corrected_clocks_are_not_corrected_twice():
    events = table(web((0, 'page_view', 'p'))).mutate(device_time=ibis.timestamp(NOON) - ibis.interval(minutes=5))
    assert page_views(events, CFG).execute().start.tolist() == [NOON - pd.Timedelta(minutes=5) + pd.Timedelta(seconds=1)]

def test_robots_strays_and_the_far_too_late_are_left_out():
    late = dict(sent_time=NOON + pd.Timedelta(days=3, seconds=2), received_time=NOON + pd.Timedelta(days=3, seconds=2))
    found = one(web((0, 'page_view', 'p'), (1, 'page_view', 'q', dict(robot=True)), (1, 'page_view', 'r', late), (2, 'page_view', None), (3, 'page_view', 's', dict(visit_id=None))), page_views)
    assert found.page_view_id.tolist() == ['p']

def test_a_visit_is_cut_after_days_and_named_when_it_was_still_going_on():
    day = 86400
    events = web((0, 'page_view', 'p'), (2*day, 'page_view', 'q'), (3.5*day, 'page_view', 'r')) + [e | dict(event_id=e['event_id'] + 'w', visit_id='w') for e in web((0, 'page_view', 'p'), (90*day, 'page_view', 'q'))]
    assert one(events, page_visits).set_index('visit_id').pages.to_dict() == {'v': 2, 'w': 1}
    assert one(events, overlong_visits).visit_id.tolist() == ['v']

def test_a_visit_of_one_stray_ping_began_before_it():
    found = one(web((30, 'page_ping', 'p')), page_visits).iloc[0]
    assert (found.start, found.end, found.engaged_s, found.absolute_s, found.pages) == (NOON + pd.Timedelta(seconds=26), NOON + pd.Timedelta(seconds=31), 5., 5, 1)

def test_a_visit_belongs_to_whom_it_began_with_and_needs_a_page():
    events = web((0, 'page_event', None, dict(name='click', user_id='cat')), (1, 'page_view', 'p', dict(user_id='bob', login_id='b1')), (2, 'page_view', 'q', dict(login_id='b2'))) + [e | dict(event_id='x', visit_id='w') for e in web((0, 'page_event', 'p', dict(name='click')))]
    visits = page_visits(table(events), CFG)
    found = visits.execute()
    assert len(found) == 1 and found.iloc[0][['user_id', 'login_id', 'last_login', 'events', 'pages', 'first_page', 'last_page']].tolist() == ['bob', 'b1', 'b2', 3, 2, 'https://x/p', 'https://x/q']
    assert page_users(visits).execute()[['user_id', 'visits', 'pages', 'login_id']].values.tolist() == [['bob', 1, 2, 'b1']]

# use
def test_six_events_counted():
    ago = lambda days, **f: dict(event_id='e', user_id='ann', event_time=NOON - pd.Timedelta(days=days), received_time=NOON - pd.Timedelta(days=days)) | f
    log = [ago(0, type='click'), ago(1, type='click'), ago(6.999, type='click'), ago(27.999, type='click'), ago(28, type='click'), ago(.5, type='survey', received_time=NOON + pd.Timedelta(milliseconds=1))]
    assert usage(table(log), NOON).execute().values.tolist() == [['ann', 'click', 1, 3, 4]]
    assert usage(table(log), NOON + pd.Timedelta(days=1), days=(2,)).order_by('type').execute().values.tolist() == [['ann', 'click', 1], ['ann', 'survey', 1]]

def test_our_own_acts_are_not_use():
    assert usage(table(rows([(0, 'decision', 'a', None), (0, 'request', None, None), (0, 'click', 'a', None, dict(user_id=None))])), NOON + pd.Timedelta(hours=1)).execute().empty

def test_spark_says_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try: con = connect(RunConfig(seed=0, threads=1, engine='pyspark', memory_gb=1.))
    except TelemetryError as e: pytest.skip(str(e))
    luck = random.Random(1)
    events = events_of([(luck.randint(0, 300), luck.choice(['click', 'heartbeat', 'heartbeat', 'close', 'hidden', 'visible']), luck.choice('ab'), luck.choice(['ann', 'bob']), 'phone', luck.randint(0, 90)) for _ in range(60)])
    pages = [e | dict(event_id='w' + e['event_id']) for e in web((0, 'page_view', 'p'), (12.3, 'page_ping', 'p'), (31.7, 'page_ping', 'p'), (40, 'page_event', 'p', dict(name='go')), (50.5, 'page_view', 'q', dict(user_id='bob')))]
    here = table(events + pages)
    pq.write_table(here.to_pyarrow(), 'events.parquet')
    there = read_parquet(con, ['events.parquet'])
    asked = dict(item_dwell=lambda t: item_dwell(t, CFG), page_views=lambda t: page_views(t, CFG), page_users=lambda t: page_users(page_visits(t, CFG)), usage=lambda t: usage(t, NOON + pd.Timedelta(days=1)))
    for name, ask in asked.items():
        a, b = ask(here).execute(), ask(there).execute()
        plain = lambda x: None if pd.isna(x) else pd.Timestamp(x).isoformat() if isinstance(x, pd.Timestamp) else x if isinstance(x, (str, bool)) else float(x)
        tidy = lambda t: sorted(([plain(x) for x in row] for row in t.astype(object).values.tolist()), key=str)
        assert list(a.columns) == list(b.columns) and len(a) and tidy(a) == tidy(b), name
