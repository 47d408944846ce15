"One definition read three ways: slowly by its words, in SQL, and event by event; by both clocks, in any order of arrival."
import dataclasses, hashlib, warnings
import duckdb, numpy as np, pandas as pd, pytest
from hypothesis import example, given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.schema import EVENTS
from telemetry_loop.views import DAY, HALVINGS, VIEWS, Counts, FeatureState, FeatureView, as_of_sql, check, pinned, to_ms, values_as_of, views_using

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
con = duckdb.connect(config=dict(threads=1))
ms = lambda x: np.asarray(x, dtype='int64').astype('datetime64[ms]')
user, item, both = ('user_id',), ('item_id',), ('user_id', 'item_id')
SECOND = 10/DAY # a window of ten ms, in days

MANY = [FeatureView('count', 1, '', user, ('click', 'conversion'), 'count'), FeatureView('count', 2, '', user, ('click',), 'count', days=SECOND), FeatureView('count_item', 1, '', item, ('click',), 'count', days=3*SECOND),
        FeatureView('decayed', 1, '', both, ('click',), 'decayed', days=SECOND/2), FeatureView('sum', 1, '', user, ('conversion',), 'sum', column='value', days=2*SECOND), FeatureView('sum', 2, '', item, ('conversion',), 'sum', column='value'),
        FeatureView('mean', 1, '', item, ('conversion',), 'mean', column='value', prior=(2., 3.)), FeatureView('mean', 2, '', user, ('conversion',), 'mean', column='value', days=SECOND),
        FeatureView('distinct', 1, '', user, ('click',), 'distinct', column='item_id', days=SECOND), FeatureView('distinct', 2, '', user, ('click', 'conversion'), 'distinct', column='item_id'),
        FeatureView('last', 1, '', user, ('click', 'conversion'), 'last', column='item_id'), FeatureView('last', 2, '', item, ('conversion',), 'last', column='value', days=SECOND),
        FeatureView('since', 1, '', user, ('click',), 'since'), FeatureView('since', 2, '', both, ('click',), 'since', days=SECOND),
        FeatureView('some', 1, '', user, ('click',), 'count', where={'item_id': ['x', "o'y"]}), FeatureView('large', 1, '', user, ('conversion',), 'count', where={'value': {'at_least': 1.}}, days=SECOND)]

def frame(rows): # (type, user, item, event ms, delay, value) -> events
    t = pd.DataFrame(rows, columns=['type', 'user_id', 'item_id', 'event', 'delay', 'value'])
    t = t.assign(event_id=[f'e{i}' for i in range(len(t))], event_time=ms(t['event']), received_time=ms(t['event'] + t['delay'])).drop(columns=['event', 'delay'])
    return t.astype({'type': str, 'user_id': str, 'item_id': str, 'value': float})

happened = st.lists(st.tuples(st.sampled_from(['click', 'click', 'conversion', 'survey']), st.sampled_from('ab'), st.sampled_from(['x', 'z', "o'y"]), st.integers(0, 60), st.sampled_from([0, 0, 1, 7, 25, 90, -3]), st.sampled_from([.1, .2, 1., -3.7, None])), min_size=1, max_size=20)
asked = st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from(['x', 'z', 'q']), st.integers(0, 160)), min_size=1, max_size=8)
ask_frame = lambda rows: pd.DataFrame(dict(user_id=[r[0] for r in rows], item_id=[r[1] for r in rows], as_of=ms([r[2] for r in rows])))

def slow(v, events, entity, at):
    "The definition, word by word."
    span = None if v.days is None else round(v.days*DAY)
    rows = [r for r in events if r['type'] in v.events and all(r[c] == entity[c] for c in v.entity) and to_ms(r['event_time']) < at and to_ms(r['received_time']) < at]
    rows = [r for r in rows if all((r[c] is not None and r[c] == r[c] and (r[c] >= how['at_least'] if isinstance(how, dict) else r[c] in how)) for c, how in v.where.items())]
    if v.column: rows = [r for r in rows if r[v.column] is not None and r[v.column] == r[v.column]]
    age = lambda r: at - to_ms(r['event_time'])
    if v.aggregation == 'decayed':
        halved = [next(k for k in range(10**6) if age(r) <= (k + 1)*span) for r in rows]
        return sum(2.**-k for k in halved if k <= HALVINGS)
    if span is not None: rows = [r for r in rows if age(r) <= span]
    newest = max(rows, key=lambda r: (to_ms(r['event_time']), r['event_id']), default=None)
    if v.aggregation == 'count': return len(rows)
    if v.aggregation == 'sum': return sum(r[v.column] for r in rows)
    if v.aggregation == 'mean': return (sum(r[v.column] for r in rows) + v.prior[0]*v.prior[1])/(len(rows) + v.prior[1]) if len(rows) + v.prior[1] else None
    if v.aggregation == 'distinct': return len({r[v.column] for r in rows})
    if newest is None: return None
    return newest[v.column] if v.aggregation == 'last' else age(newest)/DAY

def same(a, b): return (a is None or a != a) and (b is None or b != b) or (a == b if isinstance(b, str) else isinstance(b, (int, float)) and a is not None and abs(a - b) <= 1e-9)

def streamed(views, deliveries, rows): # answers in the order of `rows`
    state, found = FeatureState(views), {}
    for e in deliveries: state.update(e)
    for i in sorted(range(len(rows)), key=lambda i: rows[i][2]): found[i] = state.value(dict(user_id=rows[i][0], item_id=rows[i][1]), rows[i][2])
    return [found[i] for i in range(len(rows))]

def digest(t): return hashlib.md5(t.to_csv(index=False, float_format='%.17g').encode()).hexdigest()

@quick
@given(happened, asked)
@example([('click', 'a', 'x', 0, 90, None)], [('a', 'x', 50), ('a', 'x', 95)])      # known when its window was over
@example([('click', 'a', 'x', 0, 0, None), ('click', 'a', 'x', 10, 0, None)], [('a', 'x', 10), ('a', 'x', 11), ('a', 'x', 20), ('a', 'x', 21)]) # at the edges
def test_three_readings_agree(rows, ask):
    events = frame(rows)
    batch, stream, log = values_as_of(con, MANY, events, ask_frame(ask)), streamed(MANY, events.to_dict('records'), ask), events.to_dict('records')
    assert len(batch) == len(ask)
    for i, (u, x, at) in enumerate(ask):
        for v in MANY:
            want = slow(v, log, dict(user_id=u, item_id=x), at)
            assert same(batch[v.id][i], want), (v.id, 'batch', batch[v.id][i], want)
            assert same(stream[i][v.id], want), (v.id, 'stream', stream[i][v.id], want)

@quick
@given(happened, asked, st.lists(st.tuples(st.sampled_from(['click', 'conversion']), st.sampled_from('ab'), st.sampled_from('xz'), st.integers(0, 200), st.integers(0, 40), st.sampled_from([.3, 5.])), max_size=8), st.randoms(use_true_random=False))
def test_shuffled_repeated_and_backfilled_logs_give_the_same_bytes(rows, ask, late, rng):
    "Rows received at the last asked moment or after change nothing, nor does any order or repeat of deliveries."
    end = max(at for *_, at in ask)
    events = frame(rows)
    first = digest(values_as_of(con, MANY, events, ask_frame(ask)))
    backfill = frame([(k, u, x, e, max(0, end - e) + wait, value) for k, u, x, e, wait, value in late]).assign(event_id=[f'late{i}' for i in range(len(late))])
    order = list(range(len(events) + len(backfill))); rng.shuffle(order)
    more = pd.concat([events, backfill]).iloc[order].reset_index(drop=True)
    assert digest(values_as_of(con, MANY, more, ask_frame(ask))) == first
    deliveries = more.to_dict('records')
    deliveries += [d | dict(received_time=d['received_time'] + pd.Timedelta(milliseconds=rng.randrange(50))) for d in rng.sample(deliveries, len(deliveries)//2)]
    rng.shuffle(deliveries)
    plain, mixed = streamed(MANY, events.to_dict('records'), ask), streamed(MANY, deliveries, ask)
    assert plain == mixed

def test_known_answers_by_hand():
    events = frame([('click', 'a', 'x', 0, 0, None), ('click', 'a', 'x', 3, 40, None), ('conversion', 'a', 'x', 5, 0, .1), ('conversion', 'a', 'x', 5, 0, .2)])
    got = values_as_of(con, MANY, events, ask_frame([('a', 'x', 0), ('a', 'x', 1), ('a', 'x', 11), ('a', 'x', 44)]))
    assert got['count@1'].tolist() == [0, 1, 3, 4] and got['count@2'].tolist() == [0, 1, 0, 0]    # the late click was known 43 ms in, its ten over
    assert got['decayed@1'].tolist() == [0, 1, .25, 2*2**-8]                                       # third half-life of 5 ms; at 44 both are in their ninth
    assert got['sum@2'].round(12).tolist() == [0, 0, .3, .3] and got['mean@1'].tolist() == [2., 2., 6.3/5, 6.3/5]

def test_known_answers_fade_by_the_step():
    v = FeatureView('fade', 1, '', user, ('click',), 'decayed', days=1.)
    at = [1, DAY, DAY + 1, 2*DAY, 2*DAY + 1, 9*DAY, 9*DAY + 1]
    assert values_as_of(con, [v], frame([('click', 'a', 'x', 0, 0, None)]), ask_frame([('a', 'x', t) for t in at]))['fade@1'].tolist() == [1, 1, .5, .5, .25, 2**-8, 0]

def test_a_simulated_stretch_of_sums_in_any_order_has_the_same_bits():
    rng = np.random.default_rng(5)
    n = 3000
    events = frame([('conversion', 'a', 'x', int(t), int(d), float(v)) for t, d, v in zip(rng.integers(0, 10**4, n), rng.integers(0, 50, n), rng.normal(size=n)*10.**rng.integers(-6, 10, n))])
    ask = ask_frame([('a', 'x', t) for t in range(0, 10**4, 7)])
    views = [v for v in MANY if v.aggregation in ('sum', 'mean')]
    one = values_as_of(con, views, events, ask)
    assert digest(one) == digest(values_as_of(con, views, events.sample(frac=1, random_state=1), ask))
    stream = streamed(views, events.to_dict('records'), [('a', 'x', to_ms(t)) for t in ask['as_of']])
    assert all(np.allclose(one[v.id].astype(float), np.array([s[v.id] for s in stream], float), rtol=1e-12, atol=1e-9, equal_nan=True) for v in views)

# --- the live state

def test_a_live_state_only_moves_forward_and_forgets():
    state = FeatureState([MANY[1]])
    for e in frame([('click', 'a', 'x', t, 0, None) for t in range(0, 1000, 5)]).to_dict('records'): state.update(e)
    assert state.value({'user_id': 'a'}, 500) == {'count@2': 2.}
    with pytest.raises(TelemetryError, match='count@2 was asked as of .* moves forward'): state.value({'user_id': 'a'}, 499)
    assert len(state.cells[0, 'a'].waiting) < 201*2 and state.value({'user_id': 'nobody'}, 0) == {'count@2': 0.} and len(state.cells) == 1
    state.forget(2000)
    assert not state.cells and not state.seen

def test_an_earlier_delivery_takes_the_place_of_a_later_one():
    e = frame([('click', 'a', 'x', 0, 8, None)]).to_dict('records')[0]
    state = FeatureState(MANY)
    assert state.update(e) and not state.update(e) and not state.update(e | dict(received_time=ms(9)))
    assert state.update(e | dict(received_time=ms(2)))
    assert [state.value({'user_id': 'a'}, t)['count@2'] for t in (2, 3, 9, 10, 11)] == [0, 1, 1, 1, 0]

def test_both_sinks_saw_the_same_rows_in_any_order():
    events = frame([('click', 'a', 'x', t*DAY//2, 0, None) for t in range(6)] + [('survey', 'b', 'x', 7, 0, None)])
    one, other, missing = (FeatureState(MANY), Counts()), (FeatureState(MANY), Counts()), Counts()
    for e in events.to_dict('records'):
        for sink in one: sink.update(e)
    for e in pd.concat([events, events.head(3)]).sample(frac=1, random_state=2).to_dict('records'):
        for sink in other: sink.update(e)
    for e in events.to_dict('records')[1:]: missing.update(e)
    assert len({s.digest for s in one + other}) == 1 and missing.digest != one[0].digest
    want = events.assign(date=events['event_time'].dt.floor('D')).groupby(['date', 'type']).size()
    assert other[1].table()['events'].tolist() == want.tolist() and one[1].table().equals(other[1].table())

@pytest.mark.parametrize('t', ['1970-01-02T00:00:00.250Z', pd.Timestamp('1970-01-02T00:00:00.250'), np.datetime64('1970-01-02T00:00:00.250'), DAY + 250])
def test_moments_are_read_in_every_spelling(t): assert to_ms(t) == DAY + 250

# --- versions, and what may not be

def test_a_new_version_beside_the_old_changes_none_of_its_bytes():
    events, ask = frame([('click', 'a', 'x', t, t % 9, None) for t in range(50)]), ask_frame([('a', 'x', t) for t in range(60)])
    old = values_as_of(con, MANY[:3], events, ask)
    new = values_as_of(con, [*MANY[:3], dataclasses.replace(MANY[1], version=9, days=5*SECOND)], events, ask)
    assert digest(new[old.columns]) == digest(old) and not new['count@9'].equals(new['count@2'])

def test_the_end_of_an_event_names_the_features_that_die():
    assert views_using('survey', VIEWS) == ['item_satisfaction@1'] and len(views_using('click', VIEWS)) == 6 and views_using('item', VIEWS) == []
    without = {k: v for k, v in EVENTS.items() if k != 'click'}
    dead = []
    for v in VIEWS:
        try: check(v, without)
        except TelemetryError: dead.append(v.id)
    assert dead == views_using('click', VIEWS)

@pytest.mark.parametrize('change,says', [(dict(column='age_band', events=('account',), aggregation='last'), 'age_band. is the sensitive attribute'), (dict(where={'age_band': ['18-24']}, events=('account',)), 'age_band'), (dict(name='user_gender'), "'gender'"), (dict(events=('clik',)), 'reads clik'),
    (dict(events=()), 'reads nothing'), (dict(aggregation='median'), "aggregation is 'median'"), (dict(entity=('segment',)), 'entity is'), (dict(entity=()), 'entity is'), (dict(aggregation='sum'), 'column is None'), (dict(column='item_id'), "column is 'item_id'"),
    (dict(days=0.), 'days is 0'), (dict(aggregation='decayed', days=None), 'days is None'), (dict(where={'elapsed': {'at_least': 1}}), "no column 'elapsed'")])
def test_what_cannot_be_served_is_refused_in_one_line(change, says):
    with pytest.raises(TelemetryError, match=says) as refused: check(dataclasses.replace(FeatureView('v', 1, '', user, ('click',), 'count', days=1.), **change))
    assert str(refused.value).startswith('view ') and '@1' in str(refused.value) and len(str(refused.value).splitlines()) == 1
    with pytest.raises(TelemetryError): FeatureState([dataclasses.replace(FeatureView('v', 1, '', user, ('click',), 'count', days=1.), **change)])

def test_a_deprecated_view_warns_then_is_refused():
    old = dataclasses.replace(MANY[0], deprecated='2025-02-01')
    with pytest.warns(DeprecationWarning, match='count@1 is deprecated and refused from 2025-02-01'): assert pinned(['count@1'], [old], '2025-01-31') == [old]
    with pytest.raises(TelemetryError, match='count@1 is deprecated since 2025-02-01'): pinned(['count@1'], [old], '2025-02-01')
    with warnings.catch_warnings(): warnings.simplefilter('error'); pinned(['count@2'], MANY, '2025-02-01')
    with pytest.raises(TelemetryError, match="names 'count@7'; the views it knows are count@1"): pinned(['count@7'], MANY, '2025-01-01')

def test_shipped_views_are_sound_and_named_once():
    for v in VIEWS: check(v)
    assert len({v.id for v in VIEWS}) == len(VIEWS) and {v.entity for v in VIEWS} == {user, item, both}

def test_hostile_ids_are_text():
    evil = "'; DROP TABLE source; --"
    events = frame([('click', evil, evil, 0, 0, None)])
    views = [FeatureView('evil', 1, '', user, ('click',), 'count', where={'item_id': [evil]})]
    assert values_as_of(con, views, events, ask_frame([(evil, 'x', 5)]))['evil@1'].tolist() == [1]
