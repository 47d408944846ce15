import gzip, json
from datetime import datetime, timedelta
import jsonschema, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError, folder_digest
from telemetry_loop.schema import event_schema
from telemetry_loop.sources import import_source

def lines(folder): return [json.loads(l) for p in sorted(folder.glob('*.jsonl')) for l in p.read_text(encoding='utf-8').splitlines()]

def check(folder): # -> events, each of which keeps the tracking plan, in order of arrival, uniquely named
    found = lines(folder)
    for e in found: jsonschema.validate(e, event_schema(e['type']))
    assert [e['received_time'] for e in found] == sorted(e['received_time'] for e in found)
    assert len({e['event_id'] for e in found}) == len(found)
    return found

def put(folder, name, text):
    (folder/name).write_text(text, encoding='utf-8'); return folder/name

ROWS = [('1', '6', '2.0', '980730861'), ('1', '22', '3.5', '980731380'), ('2', '6', '5.0', '1105663200')]
FORMS = {
    'plain.csv': '\n'.join(','.join(r) for r in ROWS),
    'head.csv':  'userId,movieId,rating,timestamp\n' + '\n'.join(','.join(r) for r in ROWS),
    'r.dat':     '\n'.join('::'.join(r) for r in ROWS) + '\n',
    'u.data':    '\n'.join('\t'.join(r) for r in ROWS) + '\n',
    'r.inter':   'user_id:token\titem_id:token\trating:float\ttimestamp:float\n' + '\n'.join('\t'.join(r) for r in ROWS) + '\n',
}

@pytest.mark.parametrize('name', FORMS)
def test_every_form_of_movielens_says_the_same(tmp_path, name):
    done = import_source('movielens', put(tmp_path, name, FORMS[name]), tmp_path/'to')
    found = check(tmp_path/'to')
    acts = [(e['user_id'], e['item_id'], e['value'], e['event_time']) for e in found if e['type'] == 'interaction']
    assert acts == [('1', '6', 2., '2001-01-29T01:14:21.000Z'), ('1', '22', 3.5, '2001-01-29T01:23:00.000Z'), ('2', '6', 5., '2005-01-14T00:40:00.000Z')]
    assert (done.users, done.items, done.events, done.left_out) == (2, 2, 5, 0)

def test_genres_beside_the_ratings_become_categories(tmp_path):
    put(tmp_path, 'ratings.csv', FORMS['plain.csv']); put(tmp_path, 'movies.csv', '6,"Heat, the film (1995)",Action|Crime\n22,Copycat,(no genres listed)\n')
    import_source('movielens', tmp_path, tmp_path/'to')
    assert {e['item_id']: e.get('category') for e in check(tmp_path/'to') if e['type'] == 'item'} == {'6': 'Action', '22': None}

def test_an_item_is_known_before_it_is_met(tmp_path):
    import_source('movielens', put(tmp_path, 'r.csv', FORMS['plain.csv']), tmp_path/'to')
    seen = set()
    for e in lines(tmp_path/'to'):
        if e['type'] == 'item': assert e['item_id'] not in seen; seen.add(e['item_id'])
        else: assert e['item_id'] in seen

def test_same_bytes_and_same_names_for_overlapping_exports(tmp_path):
    path = put(tmp_path, 'r.csv', FORMS['plain.csv'])
    for to in ('a', 'b'): import_source('movielens', path, tmp_path/to)
    assert folder_digest(tmp_path/'a') == folder_digest(tmp_path/'b')
    import_source('movielens', put(tmp_path, 'part.csv', '\n'.join(','.join(r) for r in ROWS[1:])), tmp_path/'c')
    names = lambda to: {e['event_id'] for e in lines(tmp_path/to) if e['type'] == 'interaction'}
    assert names('c') < names('a')

def test_rows_that_say_the_same_are_both_kept(tmp_path):
    import_source('movielens', put(tmp_path, 'r.csv', '1,6,2.0,980730861\n1,6,2.0,980730861\n'), tmp_path/'to')
    assert len([e for e in check(tmp_path/'to') if e['type'] == 'interaction']) == 2

@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.integers(1, 9).map(str), st.lists(st.sampled_from('abcdef'), min_size=1, max_size=12), min_size=1, max_size=5))
def test_sequences_keep_each_users_order(tmp_path_factory, people):
    folder = tmp_path_factory.mktemp('s')
    done = import_source('sequences', put(folder, 's.txt', ''.join(f'{u} {" ".join(items)}\n' for u, items in people.items())), folder/'to')
    found = [e for e in check(folder/'to') if e['type'] == 'interaction']
    assert {u: [e['item_id'] for e in found if e['user_id'] == u] for u in people} == people
    assert 'no times' in done.note

def test_pairs_and_gzip_are_sequences_too(tmp_path):
    with gzip.open(tmp_path/'s.txt.gz', 'wt') as f: f.write('u a\nv b\nu c\nu a\n')
    import_source('sequences', tmp_path/'s.txt.gz', tmp_path/'to')
    assert [e['item_id'] for e in check(tmp_path/'to') if e.get('user_id') == 'u'] == ['a', 'c', 'a']

def test_otto_acts(tmp_path):
    session = {'session': 5, 'events': [{'aid': 1, 'ts': 1659304800025, 'type': 'clicks'}, {'aid': 1, 'ts': 1659304801000, 'type': 'carts'}, {'aid': 1, 'ts': 1659304802000, 'type': 'orders'}]}
    import_source('otto', put(tmp_path, 'o.jsonl', json.dumps(session) + '\n'), tmp_path/'to')
    found = check(tmp_path/'to')
    assert [(e['type'], e.get('kind')) for e in found] == [('item', None), ('interaction', 'view'), ('interaction', 'cart'), ('conversion', None)]
    assert found[-1]['event_time'] == '2022-07-31T22:00:02.000Z' and 'decision_id' not in found[-1]

TABLE = pd.DataFrame(dict(who=['ann', 'ann', 'bob'], what=[7, 8, 7], act=['seen', 'bought', 'scroll'], at=['2024-05-01T10:00:00+02:00', '2024-05-01 09:00:00', '2024-05-01T12:00:00Z'], price=[None, 3.5, None]))
HOW = 'time: at\ninteractions: {user: who, item: what, kind: {column: act, map: {seen: view, bought: conversion}}, value: price}\n'

@pytest.mark.parametrize('name', ['t.csv', 't.parquet', 't.jsonl'])
def test_generic_interactions(tmp_path, name):
    path = tmp_path/name
    {'csv': lambda: TABLE.to_csv(path, index=False), 'parquet': lambda: TABLE.to_parquet(path), 'jsonl': lambda: TABLE.to_json(path, orient='records', lines=True)}[name[2:]]()
    done = import_source('generic', path, tmp_path/'to', put(tmp_path, 'how.yaml', HOW))
    acts = [e for e in check(tmp_path/'to') if e['type'] != 'item']
    assert [(e['type'], e['user_id'], e['item_id'], e['event_time'], e.get('value')) for e in acts] == [
        ('interaction', 'ann', '7', '2024-05-01T08:00:00.000Z', None), ('conversion', 'ann', '8', '2024-05-01T09:00:00.000Z', 3.5)]
    assert '1 rows of other kinds left out' in done.note

@pytest.mark.parametrize('unit,factor', [('s', 1), ('ms', 1000), ('us', 10**6)])
def test_generic_number_times(tmp_path, unit, factor):
    put(tmp_path, 't.csv', f'u,i,t\na,b,{1714557600*factor}\n')
    import_source('generic', tmp_path/'t.csv', tmp_path/'to', put(tmp_path, 'how.yaml', f'time: t\ntime_unit: {unit}\ninteractions: {{user: u, item: i, kind: view}}'))
    assert lines(tmp_path/'to')[0]['event_time'] == '2024-05-01T10:00:00.000Z'

LOG = 'when,request,visitor,thing,slot,p,clicked,seconds,paid\n2024-05-01 10:00:00,r1,ann,b,2,0.25,1,40,1\n2024-05-01 10:00:00,r1,ann,a,1,0.5,0,,0\n2024-05-01 11:00:00,r2,bob,a,1,0.5,0,,0\n'
DECIDE = 'time: when\ndecisions: {decision: request, user: visitor, item: thing, position: slot, propensity: p, click: clicked, dwell: seconds, conversion: paid, candidates: all}'

def test_generic_decisions(tmp_path):
    import_source('generic', put(tmp_path, 'log.csv', LOG), tmp_path/'to', put(tmp_path, 'how.yaml', DECIDE))
    found = check(tmp_path/'to')
    decisions = [e for e in found if e['type'] == 'decision']
    assert [(d['decision_id'], d['slate'], d['position_propensities'], d.get('propensities'), d['candidates']) for d in decisions] == [
        ('r1', ['a', 'b'], [.5, .25], None, ['a', 'b']), ('r2', ['a'], [.5], [.5], ['a', 'b'])]
    acts = [(e['type'], e['item_id'], e['position']) for e in found if e['type'] in ('click', 'heartbeat', 'conversion', 'impression')]
    assert acts == [('impression', 'a', 0), ('impression', 'b', 1), ('click', 'b', 1), ('conversion', 'b', 1), ('heartbeat', 'b', 1), ('impression', 'a', 0)]
    assert next(e for e in found if e['type'] == 'heartbeat')['elapsed'] == 40

def test_candidates_from_a_list_column(tmp_path):
    put(tmp_path, 'log.jsonl', '{"t": "2024-05-01T10:00:00", "u": "ann", "i": "a", "c": ["a", "z"]}\n')
    import_source('generic', tmp_path/'log.jsonl', tmp_path/'to', put(tmp_path, 'how.yaml', 'time: t\ndecisions: {user: u, item: i, candidates: c}'))
    assert next(e for e in check(tmp_path/'to') if e['type'] == 'decision')['candidates'] == ['a', 'z']

REFUSED = [ # source, name, content, mapping, words of the one line
    ('netflix',   'r.csv', FORMS['plain.csv'], None, ['netflix', 'movielens, sequences, otto, snowplow, generic']),
    ('movielens', 'r.csv', '', None, ['empty']),
    ('movielens', 'r.csv', 'userId,movieId,rating,timestamp\n', None, ['no rows']),
    ('movielens', 'r.csv', 'a poem\nabout nothing\n', None, ['not a movielens file']),
    ('movielens', 'r.csv', 'a,b,c,d\n1,2,x,never\n', None, ['not a movielens file', '1 of 1 rows']),
    ('movielens', 'r.csv', b'\x89PNG\r\n\x1a\n\x00\x00\xff', None, ['not text']),
    ('sequences', 's.txt', 'u a b\nlonely\n', None, ['line 2', 'no item']),
    ('sequences', 's.txt', b'\x80\x81', None, ['not text']),
    ('otto',      'o.jsonl', FORMS['plain.csv'], None, ['not an otto file']),
    ('otto',      'o.jsonl', '{"session": 1, "events": [{"aid": 1, "ts": 1659304800025, "type": "stares"}]}\n', None, ['stares', 'clicks, carts, orders']),
    ('otto',      'o.jsonl', '{"wrong": 1}\n', None, ['otto']),
    ('generic',   't.csv', 'u,i,t\na,b,2024-05-01\n', None, ['--mapping']),
    ('generic',   't.csv', 'u,i,t\na,b,2024-05-01\n', 'time: t\ninteractions: {user: u, item: sku, kind: view}', ["'sku'", 'u, i, t']),
    ('generic',   't.csv', 'u,i,t\na,b,2024-05-01\n', 'time: t\ninteractions: {user: u, item: i, kind: stare}', ["'stare'", 'view, cart']),
    ('generic',   't.csv', 'u,i,t\na,b,2024-05-01\n', 'time: t\ninteractions: {user: u, item: i, kind: view, colour: i}', ["'colour'", 'user, item, kind']),
    ('generic',   't.csv', 'u,i,t\na,b,1714557600\n', 'time: t\ninteractions: {user: u, item: i, kind: view}', ['time_unit']),
    ('generic',   't.csv', 'u,i,t\na,b,soon\n', 'time: t\ninteractions: {user: u, item: i, kind: view}', ['1 of 1 rows']),
    ('generic',   't.xlsx', 'x', 'time: t\ninteractions: {user: u, item: i, kind: view}', ["'.xlsx'"]),
    ('generic',   't.csv', LOG.replace('0.25', '0'), DECIDE, ['1 values', '(0, 1]']),
    ('generic',   't.csv', LOG.replace('0.25', ''), DECIDE, ['1 values']),
    ('generic',   't.csv', LOG.replace('0.25', '1.25'), DECIDE, ['1 values']),
    ('generic',   't.csv', LOG.replace('r2,bob', 'r1,bob'), DECIDE, ["'r1'", 'several users']),
    ('generic',   't.parquet', 'not parquet at all', HOW, ['not a generic file']),
    ('snowplow',  'e.csv', 'event_id,collector_tstamp\n1,2024-01-01\n', None, ["no column 'event_name'", 'atomic events']),
    ('snowplow',  'e.csv', b'\x00\x01', None, ['not text']),
    ('movielens', 'r.csv', 'u' * 70 + ',6,2.0,980730861\n', None, ['70 characters', '64']),
]

@pytest.mark.parametrize('source,name,content,how,words', REFUSED, ids=[f'{i}-{r[0]}' for i, r in enumerate(REFUSED)])
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(tmp_path, source, name, content, how, words):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    mapping = how and put(tmp_path, 'how.yaml', how)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TelemetryError) as e: import_source(source, tmp_path/name, tmp_path/'to', mapping)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert sorted(tmp_path.iterdir()) == before

def test_what_is_there_is_never_overwritten(tmp_path):
    path = put(tmp_path, 'r.csv', FORMS['plain.csv'])
    (tmp_path/'to').mkdir(); put(tmp_path/'to', 'mine.txt', 'precious')
    with pytest.raises(TelemetryError, match='never overwritten'): import_source('movielens', path, tmp_path/'to')
    assert [p.name for p in (tmp_path/'to').iterdir()] == ['mine.txt']
    (tmp_path/'empty').mkdir(); import_source('movielens', path, tmp_path/'empty')
    with pytest.raises(TelemetryError, match='no .*nowhere'): import_source('movielens', tmp_path/'nowhere', tmp_path/'new')

def test_few_bad_rows_are_left_out_and_counted(tmp_path):
    good = ''.join(f'{u},{u%7},3.0,{980730861+u}\n' for u in range(1, 300))
    done = import_source('movielens', put(tmp_path, 'r.csv', good + ',5,3.0,980730861\n'), tmp_path/'to')
    assert done.left_out == 1 and '1 rows left out' in str(done) and done.users == 299

def test_files_follow_the_span(tmp_path):
    day = datetime(2024, 1, 1)
    text = lambda step: ''.join(f'u i{k} 3 {int((day + k*step).timestamp())}\n'.replace(' ', ',') for k in range(40))
    for name, step in (('days', timedelta(days=1)), ('months', timedelta(days=30)), ('years', timedelta(days=365))):
        done = import_source('movielens', put(tmp_path, f'{name}.csv', text(step)), tmp_path/name)
        assert len(list((tmp_path/name).glob('*.jsonl'))) == done.files
        for p in (tmp_path/name).glob('*.jsonl'): assert all(json.loads(l)['event_time'].startswith(p.stem) for l in p.read_text().splitlines())

HEAD = ['event_id', 'event_name', 'domain_userid', 'network_userid', 'user_id', 'domain_sessionid', 'domain_sessionidx', 'app_id', 'v_tracker', 'page_url', 'page_title', 'page_referrer', 'useragent',
    'dvce_created_tstamp', 'dvce_sent_tstamp', 'collector_tstamp', 'derived_tstamp', 'contexts_web_page_1', 'unstruct_event_consent_preferences_1', 'unstruct_event_cmp_visible_1', 'contexts_spiders_and_robots_1']
def web(**fields): # one row of atomic events
    return dict(event_id='e', event_name='page_view', domain_userid='cookie', network_userid='net', user_id='login', domain_sessionid='s', domain_sessionidx='3', app_id='blog', v_tracker='js-3', page_url='https://x/?q=1', page_title='Home',
        dvce_created_tstamp='2024-05-01 10:00:00.5', dvce_sent_tstamp='2024-05-01 10:00:30', collector_tstamp='2024-05-01 10:00:31', derived_tstamp='2024-05-01 10:00:01.5', contexts_web_page_1='[{"id":"p"}]') | fields
def snowplow(tmp_path, *rows, name='events.csv', to='to'):
    pd.DataFrame(list(rows), columns=HEAD).to_csv(tmp_path/name, index=False)
    return import_source('snowplow', tmp_path/name, tmp_path/to), [json.loads(l) for p in sorted((tmp_path/to).glob('*.jsonl')) for l in p.read_text(encoding='utf-8').splitlines()]

def test_a_snowplow_page_view_keeps_its_clocks_and_names(tmp_path):
    done, found = snowplow(tmp_path, web())
    for e in found: jsonschema.validate(e, event_schema(e['type']))
    assert found == [dict(event_id='e', type='page_view', schema_version=found[0]['schema_version'], event_time='2024-05-01T10:00:00.500Z', sent_time='2024-05-01T10:00:30.000Z', received_time='2024-05-01T10:00:31.000Z', derived_time='2024-05-01T10:00:01.500Z',
        user_id='cookie', device_id='cookie', login_id='login', app_version='js-3', app='blog', visit_id='s', visit_index=3, page_view_id='p', page='https://x/?q=1', title='Home')]
    assert (done.events, done.users, done.items) == (1, 1, 0)

def test_snowplow_consent_is_told_as_it_was_and_for_each_purpose(tmp_path):
    choice = json.dumps([dict(event_type='allow_selected', consent_scopes=['necessary', 'statistics'], consent_version='2.0', gdpr_applies=True, domains_applied=['https://x/'], consent_url='https://x/', basis_for_processing='consent')])
    _, found = snowplow(tmp_path, web(event_id='a', event_name='cmp_visible', unstruct_event_cmp_visible_1='[{"elapsed_time": 1.5}]'), web(event_id='b', event_name='consent_preferences', unstruct_event_consent_preferences_1=choice))
    for e in found: jsonschema.validate(e, event_schema(e['type']))
    assert [(e['type'], e.get('load_s'), e.get('choice'), e.get('scopes'), e.get('gdpr'), e.get('purpose'), e.get('granted')) for e in found] == [('consent_shown', 1.5, None, None, None, None, None),
        ('consent_choice', None, 'allow_selected', ['necessary', 'statistics'], True, None, None), ('consent', None, None, None, None, 'analytics', True), ('consent', None, None, None, None, 'personalisation', False)]
    assert len({e['event_id'] for e in found}) == 4

def test_snowplow_robots_other_acts_and_people_without_a_cookie(tmp_path):
    _, found = snowplow(tmp_path, web(event_id='a', useragent='Googlebot/2.1'), web(event_id='b', contexts_spiders_and_robots_1='[{"spiderOrRobot":true}]'), web(event_id='c', event_name='link_click', useragent='Mozilla'),
        web(event_id='d', contexts_web_page_1=None), web(event_id='e', domain_userid=None), web(event_id='f', domain_userid='x'*65), web(event_id='g', unstruct_event_consent_preferences_1='not json', contexts_web_page_1='[[{"id":"p"}]]'))
    e = {x['event_id']: x for x in found}
    assert [k for k in e if e[k].get('robot')] == ['a', 'b'] and (e['c']['type'], e['c']['name']) == ('page_event', 'link_click')
    assert (e['d']['type'], e['d']['name']) == (e['g']['type'], e['g']['name']) == ('page_event', 'page_view')
    assert (e['e']['user_id'], e['e'].get('device_id')) == ('net', None) and len(e['f']['user_id']) == 32
    for x in found: jsonschema.validate(x, event_schema(x['type']))

def test_snowplow_deliveries_of_one_event(tmp_path):
    _, found = snowplow(tmp_path, web(derived_tstamp='2024-05-01 10:00:02'), web(derived_tstamp='2024-05-01 10:00:01'), web(collector_tstamp='2024-05-01 10:05:00'))
    assert [(e['received_time'][14:19], e['derived_time'][17:19]) for e in found] == [('00:31', '01'), ('05:00', '01')] # ingest keeps the first received

def test_snowplow_text_stays_text(tmp_path):
    evil = '"}\n{"type":"consent"}; DROP TABLE lines; --<script>=1+1'
    _, found = snowplow(tmp_path, web(page_title=evil, page_url='x'*3000))
    assert len(found) == 1 and found[0]['title'] == evil and len(found[0]['page']) == 2048

def test_snowplow_folder_with_none_or_two_tables_is_refused(tmp_path):
    (tmp_path/'in').mkdir()
    with pytest.raises(TelemetryError, match='0 files'): import_source('snowplow', tmp_path/'in', tmp_path/'to')
    for name in ('in/a_events.csv', 'in/b_events.csv'): snowplow(tmp_path, web(), name=name, to=name[3])
    with pytest.raises(TelemetryError, match='2 files'): import_source('snowplow', tmp_path/'in', tmp_path/'to')
    (tmp_path/'in/b_events.csv').rename(tmp_path/'in/web_vital_events.csv'); assert import_source('snowplow', tmp_path/'in', tmp_path/'to').events == 1

def test_the_erased_do_not_come_back(tmp_path, monkeypatch):
    from telemetry_loop.privacy import add_tombstones
    monkeypatch.chdir(tmp_path)
    (tmp_path/'seq.txt').write_text('u7 a b\nu77 a c\n')
    add_tombstones(['u7'])
    found = import_source('sequences', 'seq.txt', 'data')
    text = ''.join(p.read_text() for p in (tmp_path/'data').iterdir())
    assert found.users == 1 and '"u77"' in text and '"u7"' not in text
