"""Golden answers: Snowplow's own test events through import and ingest, against the page views, visits, users and consent log its web model is known to give.

Compared, all rows:
- page views: page_view_id, event_id, app_id, user_id, domain_userid, original_domain_userid, stitched_user_id, domain_sessionid, original_domain_sessionid, domain_sessionidx, page_view_in_session_index,
  page_views_in_session, dvce_created_tstamp, collector_tstamp, derived_tstamp, start_tstamp, end_tstamp, engaged_time_in_s, absolute_time_in_s, page_title, page_url (and its host, path, query), page_referrer
- sessions: app_id, domain_sessionid, original_domain_sessionid, domain_sessionidx, start_tstamp, end_tstamp, user_id, domain_userid, original_domain_userid, stitched_user_id, page_views, engaged_time_in_s, event_counts,
  total_events, absolute_time_in_s, first and last page title and url, referrer, event_id, and of the conversion `view_page` its volume, events, first time and whether
- users: user_id, domain_userid, original_domain_userid, start_tstamp, end_tstamp, page_views, sessions, engaged_time_in_s, first and last page title and url, referrer, first_event_id, last_event_id
- consent log: event_id, domain_userid, user_id, page_view_id, domain_sessionid, derived_tstamp, event_name, event_type, basis_for_processing, consent_url, consent_version, consent_scopes, domains_applied, gdpr_applies, cmp_load_time
- quarantined sessions

Not compared: what the tracking plan does not collect (network_userid, IP address, place, language, screen, scrolling, document and viewport sizes); what is looked up from the user agent or the address of the page in tables
of Snowplow's (device, agent, operating system, channel, campaign, content group, source of the referrer); facts about their pipeline (v_collector, platform, load_tstamp, the event_id2 that repeat an id);
page_urlscheme (two answers call http `http-dummy-row`); is_engaged (two sessions alike in all else have different answers); the worth of conversions (a price list of the test); web vitals; and the consent tables that are counts of the consent log.
"""
import contextlib, hashlib, json, shutil
from pathlib import Path
from urllib.parse import urlsplit
import ibis, pandas as pd, pytest
from telemetry_loop import ingest
from telemetry_loop.config import load_params
from telemetry_loop.dwell import DwellConfig, on_page_clock, overlong_visits, page_acts, page_users, page_views, page_visits
from telemetry_loop.privacy import key, pseudonyms
from telemetry_loop.sources import import_source

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent/'shared/data/snowplow_web'
CFG = DwellConfig(cap_minutes=30., heartbeat_seconds=10., minimum_seconds=5., late_days=3., visit_days=3.) # the settings of the published answers

@pytest.fixture(scope='module')
def events(tmp_path_factory):
    if not DATA.exists(): pytest.skip('real data snowplow_web is not here')
    place = tmp_path_factory.mktemp('snowplow')
    import_source('snowplow', DATA/'source', place/'data')
    shutil.copy(ROOT/'params.yaml', place)
    with contextlib.chdir(place): ingest.run()
    files = sorted(place.glob('artifacts/ingest/events/*.parquet')) or [place/'artifacts/ingest/events.parquet']
    return ibis.duckdb.connect().read_parquet([str(f) for f in files])

def expected(name): return pd.read_csv(DATA/f'expected/snowplow_web_{name}_expected.csv', dtype=str)

def known(events, column, ids): # names as the events hold them: long ones shortened by import, people's replaced by pseudonyms at ingest
    ids = [hashlib.md5(i.encode()).hexdigest() if isinstance(i, str) and len(i) > 64 else i for i in ids]
    held = events[[column]].distinct().execute()[column].dropna()
    if not held.str.fullmatch('p[0-9a-f]{16}').all(): return ids
    given = [i for i in ids if isinstance(i, str)]
    names = dict(zip(given, pseudonyms(given, key())))
    return [names.get(i, i) for i in ids]

def people(events, told, **columns): # expected table with its people named as the events name them
    return told.assign(**{theirs: known(events, ours, told[theirs]) for theirs, ours in columns.items() if theirs in told})

NAMES = dict(user_id='login_id', stitched_user_id='login_id', domain_userid='user_id', original_domain_userid='device_id')

def same(found, told, key, pairs):
    "Every row and every named column, as text; empty equals missing."
    assert len(found) == len(told) and set(found[key]) == set(told[pairs[key]])
    found, told = found.sort_values(key).reset_index(drop=True), told.sort_values(pairs[key]).reset_index(drop=True)
    for ours, theirs in pairs.items():
        a, b = found[ours], told[theirs]
        if pd.api.types.is_datetime64_any_dtype(a): b = pd.to_datetime(b)
        elif pd.api.types.is_numeric_dtype(a): b = pd.to_numeric(b)
        elif a.map(lambda x: isinstance(x, bool)).all(): b = b.str.upper().map({'TRUE': True, 'FALSE': False})
        odd = ~((a == b) | (a.isna() & b.isna()))
        assert not odd.any(), f'{theirs}: {odd.sum()} rows differ, e.g. {a[odd].iloc[0]!r} is not {b[odd].iloc[0]!r} ({key} {found[key][odd].iloc[0]})'

def signed(found): # without a cookie, the user is named otherwise here and not at all there
    return found.assign(**{c: found[ours].where(found.device_id.notna()) for c, ours in (('cookie', 'user_id'), ('last_login', 'last_login'))})

def test_page_views(events):
    found = signed(page_views(events, CFG).execute())
    found = found.assign(host=found.page.map(lambda u: urlsplit(u).netloc.split(':')[0]), path=found.page.map(lambda u: urlsplit(u).path), query=found.page.map(lambda u: urlsplit(u).query or None))
    same(found, people(events, expected('page_views'), **NAMES), 'page_view_id', dict(page_view_id='page_view_id', event_id='event_id', app='app_id', login_id='user_id', cookie='domain_userid', device_id='original_domain_userid',
        last_login='stitched_user_id', visit_id='domain_sessionid', visit_index='domain_sessionidx', page_view_in_visit='page_view_in_session_index', page_views_in_visit='page_views_in_session', device_time='dvce_created_tstamp',
        received_time='collector_tstamp', start='start_tstamp', end='end_tstamp', engaged_s='engaged_time_in_s', absolute_s='absolute_time_in_s', page='page_url', title='page_title', referrer='page_referrer',
        host='page_urlhost', path='page_urlpath', query='page_urlquery'))

def test_sessions(events):
    acts = page_acts(events, CFG).execute().sort_values(['at', 'happened', 'event_id'])
    views = acts[acts.type == 'page_view'].groupby('visit_id')
    found = signed(page_visits(events, CFG).execute()).set_index('visit_id').assign(first_view=views['at'].min().astype('datetime64[ms]'), viewed=views.event_id.agg(lambda ids: sorted(ids)),
        counts=acts.groupby('visit_id').apply(lambda t: t['name'].fillna(t.type).value_counts().sort_index().to_dict()))
    found = found.assign(viewed=[v if isinstance(v, list) else [] for v in found.viewed]).reset_index()
    told = people(events, expected('sessions'), **NAMES).assign(counts=lambda t: t.event_counts.map(json.loads), viewed=lambda t: t.cv_view_page_events.map(lambda ids: sorted(json.loads(ids))))
    same(found, told, 'visit_id', dict(visit_id='domain_sessionid', visit_index='domain_sessionidx', app='app_id', start='start_tstamp', end='end_tstamp', login_id='user_id', cookie='domain_userid', device_id='original_domain_userid',
        last_login='stitched_user_id', pages='page_views', engaged_s='engaged_time_in_s', counts='counts', events='total_events', absolute_s='absolute_time_in_s', first_title='first_page_title', first_page='first_page_url',
        last_title='last_page_title', last_page='last_page_url', referrer='referrer', event_id='event_id', views='cv_view_page_volume', viewed='viewed', first_view='cv_view_page_first_conversion'))

def test_users(events):
    found = page_users(page_visits(events, CFG)).execute()
    found = found[found.device_id.notna()]
    same(found, people(events, expected('users'), **NAMES), 'user_id', dict(user_id='domain_userid', device_id='original_domain_userid', login_id='user_id', start='start_tstamp', end='end_tstamp', pages='page_views', visits='sessions',
        engaged_s='engaged_time_in_s', first_title='first_page_title', first_page='first_page_url', last_title='last_page_title', last_page='last_page_url', referrer='referrer', event_id='first_event_id', last_event_id='last_event_id'))

def test_quarantined_sessions(events):
    assert overlong_visits(events, CFG).execute().visit_id.tolist() == expected('base_quarantined_sessions').session_identifier.tolist()

def test_consent_log(events):
    words = dict(consent_shown='cmp_visible', consent_choice='consent_preferences')
    found = on_page_clock(events.filter(events.type.isin(list(words)))).execute()
    lists = lambda column: found[column].map(lambda x: ', '.join(x) if x is not None and len(x) else None)
    found = found.assign(at=found['at'].astype('datetime64[ms]'), type=found.type.map(words), scopes=lists('scopes'), domains=lists('domains'), gdpr=found.gdpr.fillna(False))
    same(found, people(events, expected('consent_log'), **NAMES), 'event_id', dict(event_id='event_id', user_id='domain_userid', login_id='user_id', page_view_id='page_view_id', visit_id='domain_sessionid', at='derived_tstamp', type='event_name',
        choice='event_type', basis='basis_for_processing', consent_url='consent_url', consent_version='consent_version', scopes='consent_scopes', domains='domains_applied', gdpr='gdpr_applies', load_s='cmp_load_time'))

def test_who_was_erased_under_a_login_does_not_come_back(tmp_path, capsys, monkeypatch):
    from telemetry_loop import cli
    from telemetry_loop.privacy import add_tombstones
    if not DATA.exists(): pytest.skip('real data snowplow_web is not here')
    monkeypatch.chdir(tmp_path)
    login = expected('users')['user_id'].dropna().value_counts().index[0]
    add_tombstones([login])
    monkeypatch.setattr('sys.argv', ['telemetry-loop', 'import', 'snowplow', str(DATA/'source'), '--to', 'data'])
    try: cli.main()
    except SystemExit as e: assert not e.code
    text = ''.join(p.read_text() for p in (tmp_path/'data').iterdir())
    assert f'"login_id":"{login}"' not in text and text.count('"login_id"') and 'lines of people who were erased are left out' in capsys.readouterr().out
