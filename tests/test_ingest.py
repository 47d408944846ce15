"Every line accounted for; the same bytes whatever the order, the files and the history; nothing overwritten by a refusal."
import contextlib, gzip, json, os, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import numpy as np, pandas as pd, pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import small_params
from telemetry_loop import ingest
from telemetry_loop.config import RunConfig, TelemetryError, file_digest, folder_digest
from telemetry_loop.engine import connect
from telemetry_loop.privacy import DEVELOPMENT_KEY, fingerprint, pseudonyms
from telemetry_loop.schema import VERSION, columns, tracking_plan

SEED = 20                                                              # of every shuffle
CLICK = dict(event_id='e1', type='click', schema_version=VERSION, event_time='2025-01-06T10:00:00.000Z', received_time='2025-01-06T10:00:01.000Z',
             user_id='u1', decision_id='d1', item_id='i1', position=0)
START = np.datetime64('2025-01-06T00:00:00.000')

def at(seconds): # -> text, seconds after the first midnight
    return str(START + np.timedelta64(round(1000*seconds), 'ms')) + 'Z'

@contextlib.contextmanager
def home(folder, **files): # name -> lines or bytes; `.` is written `_`
    "A folder with params and these files in data/."
    (folder/'data').mkdir(parents=True)
    (folder/'params.yaml').write_text(yaml.safe_dump(small_params()))
    fill(folder, **files)
    with contextlib.chdir(folder): yield folder

def fill(folder, **files):
    for name, body in files.items():
        if not isinstance(body, bytes): body = ''.join(l + '\n' for l in body).encode(); body = gzip.compress(body) if name.endswith('_gz') else body
        (folder/'data'/name.replace('_', '.')).write_bytes(body)

def said(): return json.loads(Path('metrics/ingest.json').read_text())
def kept(): return pd.concat([pd.read_parquet(p) for p in sorted(Path('artifacts/ingest/events').glob('*.parquet'))], ignore_index=True)
def dead(): return pd.read_parquet('artifacts/ingest/quarantine.parquet')
def result(): # all that must not depend on order, files and history
    return {p.name: file_digest(p) for p in Path('artifacts/ingest/events').iterdir()}, sorted(map(tuple, dead()[['reason', 'line']].values.tolist())), file_digest('artifacts/ingest/volumes.parquet')

def deliveries(rng, n=120, days=1): # -> lines: `n` events, many delivered again with other clocks and contents, some at the very same moment
    found = []
    for i in range(n):
        when = int(rng.integers(0, 600)) + 86400*int(rng.integers(0, days))
        slow = [0, 0, 0, 7200, 2*86400, 9*86400][int(rng.integers(0, 6))] if days > 1 else 0
        event = CLICK | dict(event_id=f'e{i:03d}', user_id=f'u{i % 7}', event_time=at(when + (90 if i % 7 == 3 else 0)), sent_time=at(when + slow + (90 if i % 7 == 3 else 0)), received_time=at(when + slow + 1), position=float(i % 3) if i % 2 else i % 3)
        if i % 11 == 0: event = {k: v for k, v in event.items() if k not in ('decision_id', 'item_id', 'position')} | dict(type='consent', purpose='analytics', granted=i % 2 == 0)
        found.append(event)
        if i % 3 == 0: found.append(event | dict(received_time=at(when + slow + int(rng.integers(2, 90)) + 86400*(i % 2)*(days > 1))))
        if i % 5 == 0: found.append(event | dict(user_id='u2'))         # same name, same moment, other content
    return [json.dumps(e) for e in found]

BAD = ['{"event_id": "e1", "ty', *(json.dumps(CLICK | {'position': -i}) for i in range(1, 6))]

def test_order_files_and_repeats_change_no_byte(tmp_path):
    rng = np.random.default_rng(SEED)
    good = deliveries(rng)
    everything = good + BAD
    mixed = lambda ls: [ls[i] for i in rng.permutation(len(ls))]
    def cut(ls): ls = mixed(ls); return dict(b_jsonl=ls[:50], a_jsonl_gz=ls[50:120], c_jsonl=ls[120:])
    runs = dict(once=dict(a_jsonl=everything), reversed=dict(a_jsonl=everything[::-1]), files=cut(everything), twice=cut(everything + good), windows=dict(a_jsonl='\r\n'.join(everything).encode()))
    seen, counts = {}, {}
    for name, files in runs.items():
        with home(tmp_path/name, **files): ingest.run(); seen[name], counts[name] = result(), said()
    assert all(r == seen['once'] for r in seen.values())
    assert counts['twice']['duplicates'] == counts['once']['duplicates'] + len(good) > 0
    for c in counts.values(): assert c['lines'] == c['events'] + c['duplicates'] + c['quarantined'] + c['withheld_by_purpose']['analytics']
    with contextlib.chdir(tmp_path/'once'): events = kept()
    first = {}
    for e in map(json.loads, good): first[e['event_id']] = min(first.get(e['event_id'], '9'), e['received_time'])
    got = dict(zip(events['event_id'], events['received_time'].dt.strftime('%Y-%m-%dT%H:%M:%S.000Z')))
    assert got == {k: first[k] for k in got} and len(got) == counts['once']['events']

@settings(max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**20), files=st.integers(1, 4), again=st.integers(0, 40), later=st.integers(0, 3))
def test_shuffled_repeated_split_and_backfilled_logs_give_the_same_bytes(tmp_path_factory, seed, files, again, later):
    "Any order, any files, any repeats; some files come only after a first run has been through."
    rng, tmp = np.random.default_rng(seed), tmp_path_factory.mktemp('any')
    lines = deliveries(rng, n=60, days=4) + BAD[:3]
    with home(tmp/'scratch', a_jsonl=lines): ingest.run(); want = result()
    mixed = [lines[i] for i in rng.permutation(len(lines))] + [lines[i] for i in rng.integers(0, 90, again)]
    mixed = [l for l in mixed if l not in BAD] + BAD[:3]
    parts = {f'{"zyxw"[i]}{i}_jsonl' + ['', '_gz'][i % 2]: mixed[i::files] for i in range(files)}
    with home(tmp/'other') as folder:
        held = list(parts)[:min(later, files - 1)]                        # backfilled
        fill(folder, **{k: v for k, v in parts.items() if k not in held})
        if held:
            with contextlib.suppress(TelemetryError): ingest.run()        # what is there may be too broken to go on
        fill(folder, **{k: parts[k] for k in held})
        ingest.run()
        assert result() == want

def test_a_new_day_makes_only_its_own_pieces_and_equals_scratch(tmp_path):
    rng = np.random.default_rng(SEED)
    lines = deliveries(rng, n=200, days=5)
    day = lambda l: json.loads(l)['received_time'][:10]
    days = sorted({day(l) for l in lines})
    with home(tmp_path/'grown') as folder:
        for d in days[:-1]: fill(folder, **{f'd{d}_jsonl': [l for l in lines if day(l) == d]})
        ingest.run()
        pieces = lambda kind: {p.name for p in Path('runs/cache/ingest', kind).iterdir()}
        before, windows, chunks = result()[0], pieces('window'), pieces('chunk')
        fill(folder, **{f'd{days[-1]}_jsonl': [l for l in lines if day(l) == days[-1]]})
        ingest.run()
        assert len(pieces('window') - windows) == 1 and not windows - pieces('window') and len(pieces('chunk') - chunks) == 1
        grown = result()
        assert before.items() < grown[0].items() and len(grown[0]) == len(days) == said()['windows']
    with home(tmp_path/'scratch', a_jsonl=lines): ingest.run(); assert result() == grown

def test_columns_order_and_pseudonyms(tmp_path):
    with home(tmp_path/'here', a_jsonl=deliveries(np.random.default_rng(SEED), days=3)):
        ingest.run()
        for p in Path('artifacts/ingest/events').iterdir():
            e = pd.read_parquet(p)
            assert list(e) == [*columns(), 'device_time', 'skew_s'] and set(e.received_time.dt.strftime("%Y-%m-%d")) <= {p.stem}
            assert list(map(tuple, e[['event_time', 'event_id']].values)) == sorted(map(tuple, e[['event_time', 'event_id']].values)) and (e.event_time <= e.received_time).all()
        assert set(kept().user_id) <= set(pseudonyms([f'u{i}' for i in range(7)], DEVELOPMENT_KEY)) and kept().event_id.is_unique
        v = pd.read_parquet('artifacts/ingest/volumes.parquet')
        assert list(v) == ['date', 'type', 'app_version', 'events', 'late_p50_s', 'late_p95_s'] and v.events.sum() == said()['events']
        assert not any(b'"u3"' in p.read_bytes() for p in Path('artifacts/ingest/events').iterdir())

def test_another_key_is_refused_in_one_line(tmp_path, monkeypatch):
    with home(tmp_path/'here', a_jsonl=[json.dumps(CLICK)]):
        monkeypatch.setenv('TELEMETRY_LOOP_KEY', 'some other key, long enough')
        with pytest.raises(TelemetryError, match='key_fingerprint expects') as e: ingest.run()
        assert '\n' not in str(e.value) and not Path('artifacts').exists()
        params = small_params(ingest=dict(key_fingerprint=fingerprint(b'some other key, long enough')))
        Path('params.yaml').write_text(yaml.safe_dump(params)); ingest.run()
        assert kept().user_id.tolist() == pseudonyms(['u1'], b'some other key, long enough')

def test_a_wrong_clock_is_corrected_and_a_late_event_counted(tmp_path):
    "A device five minutes ahead keeps its order; three days late amends, eight days late is dropped with its line."
    event = lambda i, when, sent, got, user='u1': json.dumps(CLICK | dict(event_id=f'e{i}', user_id=user, event_time=at(when), sent_time=at(sent), received_time=at(got)))
    ahead = [event(i, 1000 + 60*i + 300, 1000 + 60*i + 300, 1000 + 60*i + .5) for i in range(20)]
    late = [event(100, 0, 3*86400, 3*86400 + 1, 'u2'), event(101, 5, 8*86400, 8*86400 + 1, 'u3')]
    with home(tmp_path/'here', a_jsonl=ahead + late):
        ingest.run(); e, s = kept().set_index('event_id'), said()
        mine = e[e.device_id.isna() & (e.user_id == pseudonyms(['u1'], DEVELOPMENT_KEY)[0])]
        off = (mine.event_time - pd.to_datetime([at(1000 + 60*int(i[1:]))[:-1] for i in mine.index])).dt.total_seconds()
        assert len(mine) == 20 and off.between(-1, 2).all() and mine.event_time.is_monotonic_increasing and mine.skew_s.between(298, 301).all()
        assert (mine.device_time - mine.event_time).dt.total_seconds().between(298, 301).all()
        assert (s['late_dropped'], s['late_amended'], s['skewed_devices']) == (1, 1, 1) and 'e100' in e.index and 'e101' not in e.index
        assert dead().values.tolist() == [['a.jsonl', 'late: received more than 7 days after it happened', late[1]]]

def test_consent_counts_from_when_we_knew(tmp_path):
    "A withdrawal that arrives late acts from its arrival; silence is consent; words themselves are kept."
    act = lambda i, got: json.dumps(CLICK | dict(event_id=f'e{i}', event_time=at(got), received_time=at(got)))
    word = lambda i, yes, when, got: json.dumps(dict(event_id=f'w{i}', type='consent', schema_version=VERSION, event_time=at(when), received_time=at(got), user_id='u1', purpose='analytics', granted=yes))
    day = 86400
    lines = [act(1, 10), act(2, day + 10), word(1, False, day + 5, day + 20), act(3, day + 30), act(4, 2*day + 5), word(2, True, day + 1, 2*day + 6), act(5, 2*day + 7), word(3, True, 3*day, 3*day + 1), act(6, 3*day + 2), act(7, 4*day)]
    other = json.dumps(CLICK | dict(event_id='x', user_id='u2', event_time=at(2*day + 5), received_time=at(2*day + 5)))
    with home(tmp_path/'here', a_jsonl=[*lines, other]):
        ingest.run()
        assert sorted(kept().event_id) == ['e1', 'e2', 'e6', 'e7', 'w1', 'w2', 'w3', 'x'] and said()['withheld_by_purpose'] == {'analytics': 3}

def test_one_percent_corrupt_is_quarantined_exactly_and_a_fixed_plan_recovers_all(tmp_path):
    "Lines a too narrow plan refuses come back, no other; the bytes are those of a run under the new plan."
    rng = np.random.default_rng(SEED)
    lines = [json.dumps(CLICK | dict(event_id=f'e{i:04d}', user_id=f'u{i % 40}', event_time=at(60*i), received_time=at(60*i + 1))) for i in range(3000)]
    hurt, cut = set(rng.choice(3000, 30, replace=False).tolist()), None
    for i in hurt: lines[i] = json.dumps(json.loads(lines[i]) | dict(position=-1))
    new, strange = json.loads(json.dumps(tracking_plan())), json.dumps(dict(event_id='s', type='swipe', schema_version='9', event_time=at(9), received_time=at(10), user_id='u1', speed=2.5))
    for body in new['events'].values():
        if 'position' in body['properties']: body['properties']['position'] = dict(type='integer', minimum=-1)
    new['events']['swipe'] = dict(new['events']['item'], properties={k: v for k, v in new['events']['item']['properties'].items() if k not in ('item_id', 'category')} | {'user_id': new['events']['account']['properties']['user_id'], 'speed': dict(type='number')}, required=['event_id', 'type', 'schema_version', 'event_time', 'received_time'])
    broken = ['{"event_id": "e1", "ty', json.dumps(CLICK | dict(position='x'))]
    everything = [*lines, strange, *broken]
    with home(tmp_path/'old', a_jsonl=everything[::2], b_jsonl_gz=everything[1::2]):
        ingest.run()
        assert sorted(dead().line) == sorted([*(lines[i] for i in hurt), strange, *broken])
        narrow = json.loads(json.dumps(new)); narrow['events'].pop('click')
        with pytest.raises(TelemetryError, match='does not only widen .click is gone.*without --replay'): ingest.run(replay=True, plan=narrow)
        judged, real = [], ingest.lines_sql
        ingest.lines_sql = lambda path: judged.append(path) or real(path)
        try: ingest.run(replay=True, plan=new)
        finally: ingest.lines_sql = real
        assert not judged and sorted(dead().line) == sorted(broken) and said()['events'] == 3001 and len(kept()) == 3001 # no log was read again
        got, speed = result(), kept().set_index('event_id').speed
        assert speed['s'] == 2.5 and speed.notna().sum() == 1
    with home(tmp_path/'new', a_jsonl=everything): ingest.run(plan=new); assert result() == got

# --- bad input

HOSTILE = ["'; DROP TABLE rows; --", '<script>alert(1)</script>', '../../etc/passwd', '=HYPERLINK("x")', '\u202egnp.exe', "'||(SELECT 1)||'", '%s%n', '\x00']

def test_a_zoo_of_bad_files_stops_nobody(tmp_path):
    good = [json.dumps(CLICK | {'event_id': f'f{i}'}) for i in range(1000)]
    whole = gzip.compress(''.join(json.dumps(CLICK | {'event_id': f'g{i}'}) + '\n' for i in range(500)).encode(), 0)
    latin = ''.join(json.dumps(CLICK | {'event_id': f'l{i}', 'item_id': 'caf\xe9' if i == 3 else 'é'}, ensure_ascii=False) + '\n' for i in range(10))
    latin = b''.join(l.encode('latin-1' if 'caf' in l else 'utf-8') for l in latin.splitlines(True))
    files = dict(a_jsonl=good, b_jsonl_gz=whole[:-100], c_jsonl=latin, d_jsonl=b'x'*100_000_000 + b'\n' + json.dumps(CLICK | {'event_id': 'after'}).encode(), e_jsonl_gz=b'not gzip at all', f_jsonl=b'\x00\x00\n\n\n',
        g_jsonl=[json.dumps(CLICK | {'event_id': 'x'*10_000}), json.dumps(CLICK | {'event_id': 'y', 'event_time': '2025-01-06T24:00:00.000Z'}), json.dumps(CLICK | {'event_id': 'z', 'event_time': '0000-01-06T10:00:00.000Z'}),
                 json.dumps(CLICK | {'event_id': 'v', 'event_time': '2100-01-06T10:00:00.000Z'}), json.dumps(CLICK | {'event_id': 'w', 'event_time': '1970-01-01T00:00:00.000Z'}), json.dumps(CLICK | {'event_id': 'u', 'event_time': '1970-01-01T00:00:00.000Z', 'sent_time': '1970-01-01T00:00:01.000Z'})],
        h_jsonl=[json.dumps(CLICK | {'event_id': f'h{i}', 'item_id': t, 'user_id': t}) for i, t in enumerate(HOSTILE)])
    with home(tmp_path/'here', **files) as folder:
        for name in ('a.jsonl.bak', '.a.jsonl.swp', 'a.jsonl~', 'x.json'): (folder/'data'/name).write_text('{"no": "log"}\n')
        started = time.process_time(); ingest.run()
        why = {(r.file, r.reason) for r in dead().itertuples()}
        assert {('b.jsonl.gz', 'line: cut short, its gzip file ends early'), ('c.jsonl', 'line: not UTF-8 text'), ('d.jsonl', 'line: longer than 2,097,152 bytes'), ('e.jsonl.gz', 'line: cut short, its gzip file is damaged'), ('f.jsonl', 'not a JSON object'),
            ('g.jsonl', 'event_id: must be string, length >= 1, length <= 64'), ('g.jsonl', 'event_time: must be string, like 2025-01-06T10:00:00.000Z'), ('g.jsonl', 'event_time: must be at most 48 hours after it was sent'),
            ('g.jsonl', 'late: received more than 7 days after it happened'), ('g.jsonl', 'sent_time: must be a clock within 48 hours of ours')} == why
        ids = set(kept().event_id)
        assert {f'f{i}' for i in range(1000)} | {'after'} | {f'h{i}' for i in range(len(HOSTILE))} | {f'l{i}' for i in range(10) if i != 3} <= ids and 498 <= sum(i[0] == 'g' for i in ids) < 500
        assert kept().set_index('event_id').item_id[[f'h{i}' for i in range(len(HOSTILE))]].tolist() == HOSTILE # kept as they are, never run
        assert said()['lines'] == said()['events'] + said()['duplicates'] + said()['quarantined'] and dead().line.str.len().max() < 20_000

@pytest.mark.parametrize('odd,events', [(json.dumps(CLICK).encode() + b'\r\n', 41), (b'{"event_id": "\x02"}\n', 40), (b'\x00\n', 40), (b'\xff\n', 40), (b'\xed\xa0\x80\n', 40)], ids=['another line end', 'a control character', 'no character', 'no UTF-8', 'half a character'])
def test_one_odd_byte_stops_nobody(tmp_path, odd, events):
    with home(tmp_path/'here', a_jsonl=''.join(json.dumps(CLICK | {'event_id': f'f{i}'}) + '\n' for i in range(40)).encode() + odd):
        ingest.run(); assert said()['events'] == events and said()['lines'] == 41

def test_mixed_line_ends_and_blank_lines_are_no_lines(tmp_path):
    with home(tmp_path/'here', a_jsonl=''.join(json.dumps(CLICK | {'event_id': f'f{i}'}) + ('\n' if i < 40 else '\r\n' if i < 78 else '\n\n') for i in range(80)).encode()):
        ingest.run(); assert (said()['lines'], said()['events']) == (80, 80)

REFUSED = {
    'no folder':       (None, 'data/ holds no telemetry .*telemetry-loop simulate'),
    'no log files':    (dict(ratings_csv=['1,2,3']), 'data/ holds no telemetry'),
    'only a backup':   (dict(a_jsonl_bak=['{}']), 'data/ holds no telemetry'),
    'empty files':     (dict(a_jsonl=b'', b_jsonl=b''), 'all 2 files in data/ are empty'),
    'blank lines':     (dict(a_jsonl=['', '', '']), 'data/'),
    'not telemetry':   (dict(a_jsonl=['user,item,rating', '1,2,3', '1,3,4']), r'3 of 3 lines in data/ break the tracking plan \(first reason: not a JSON object\); .*telemetry-loop import'),
    'another plan':    (dict(a_jsonl=[json.dumps({'user': i, 'item': i}) for i in range(20)]), r'20 of 20 lines .*type: missing'),
    'too much broken': (dict(a_jsonl=[json.dumps(CLICK | {'event_id': f'e{i}'}) for i in range(94)] + ['{'] * 6), r'6 of 100 lines .*at most 5% may'),
    'no gzip':         (dict(a_jsonl=[json.dumps(CLICK)], b_jsonl_gz=b'{}'), r'1 of 2 lines .*its gzip file is damaged'),
    'not text':        (dict(a_jsonl=[json.dumps(CLICK)], b_jsonl=b'\xff\xfe\x00\x80\n'), r'1 of 2 lines .*not UTF-8'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_refusals_are_one_line_and_overwrite_nothing(tmp_path, name):
    files, says = REFUSED[name]
    with home(tmp_path/'here', **(files or {})) as folder:
        if files is None: (folder/'data').rmdir()
        for old in ('artifacts/ingest/events/2025-01-06.parquet', 'artifacts/ingest/quarantine.parquet', 'metrics/ingest.json'): (folder/old).parent.mkdir(parents=True, exist_ok=True); (folder/old).write_text('as it was')
        before = folder_digest(folder/'artifacts'), folder_digest(folder/'metrics')
        with pytest.raises(TelemetryError, match=says) as refused: ingest.run()
        assert len(str(refused.value).splitlines()) == 1 and (folder_digest(folder/'artifacts'), folder_digest(folder/'metrics')) == before

def test_a_vanishing_file_and_a_full_disk_leave_nothing_half_written(tmp_path, monkeypatch):
    with home(tmp_path/'here', a_jsonl=[json.dumps(CLICK)], b_jsonl=[json.dumps(CLICK | {'event_id': 'e2'})]) as folder:
        real = ingest.lines_sql
        monkeypatch.setattr(ingest, 'lines_sql', lambda path: (folder/'data/b.jsonl').unlink(missing_ok=True) or real(path))
        with pytest.raises(TelemetryError, match='vanished while it was read; nothing was written'): ingest.run()
        monkeypatch.undo(); copy = ingest.copy_parquet
        def full(db, sql, path):
            if path.name == 'volumes.parquet': Path(path).write_bytes(b'half'); raise OSError(28, 'No space left on device')
            copy(db, sql, path)
        monkeypatch.setattr(ingest, 'copy_parquet', full)
        with pytest.raises(TelemetryError, match='No space left on device.*make room') as e: ingest.run()
        assert '\n' not in str(e.value) and not Path('artifacts/ingest').exists() and not Path('metrics').exists() and not [p for p in folder.rglob('*.part')]
        monkeypatch.undo(); ingest.run(); assert said()['events'] == 1

def test_killed_at_twenty_points_the_next_run_is_the_same(tmp_path):
    "kill -9 whenever: at twenty file operations drawn from the seed, each in a process of its own."
    rng = np.random.default_rng(SEED)
    lines = deliveries(rng, n=150, days=6)
    with home(tmp_path/'whole', a_jsonl=lines[::2], b_jsonl=lines[1::2]): ingest.run(); want = result()
    code = '''
import json, os, shutil, signal, sys
left = 0
def die(event, args):
    global left
    if event in ('open', 'os.rename', 'os.link', 'os.mkdir', 'os.remove', 'shutil.rmtree', 'os.chmod') and any('ingest' in str(a) for a in args):
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
from telemetry_loop import ingest
ingest._chunk_sql(json.dumps(ingest.tracking_plan()), ingest.load_params(ingest.IngestConfig, 'ingest'), ingest.load_params(ingest.ClocksConfig, 'clocks')) # once for all
sys.addaudithook(die)
for n in sys.argv[1:]:
    if os.fork() == 0: left = int(n); ingest.run(); os._exit(0)
    print(code := os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    if code == 0: left = 0; shutil.rmtree('runs') # it came through; the next one starts afresh over what is there
'''
    with home(tmp_path/'killed', a_jsonl=lines[::2], b_jsonl=lines[1::2]):
        points = sorted(rng.choice(np.arange(2, 90), 20, replace=False).tolist()) # each goes on from what the one before it left
        done = subprocess.run([sys.executable, '-c', code, *map(str, points)], capture_output=True, text=True, timeout=500)
        codes = [int(c) for c in done.stdout.split()]
        assert len(codes) == 20, done.stderr[-2000:]
        assert codes.count(-signal.SIGKILL) >= 15, codes
        ingest.run()
        assert result() == want and not list(Path('runs').rglob('*.part')) and sorted(p.name for p in Path('artifacts').iterdir()) == ['ingest']

def test_every_line_of_the_tiny_world_is_an_event_a_repeat_or_quarantined(tmp_path):
    from telemetry_loop.loop import first_world
    with home(tmp_path/'here'):
        shutil.rmtree('data'); first_world(Path('data'), progress=False); ingest.run()
        raw = [l for p in sorted(Path('data').glob('*.jsonl')) for l in p.read_text(encoding='utf-8').splitlines()]
        s, bad, events = said(), dead(), kept()
        assert s['lines'] == len(raw) == s['events'] + s['duplicates'] + s['quarantined'] + s['withheld_by_purpose']['analytics'] and s['duplicates'] > 100 and s['quarantined'] > 50
        assert len(events) == events.event_id.nunique() == s['events'] == sum(s['events_by_type'].values()) and len(bad) == s['quarantined'] == sum(s['quarantined_by_reason'].values())
        left = Counter(raw); left.subtract(Counter(bad.line)); assert min(left.values()) >= 0
        slates = events[events.type == 'decision'].explode(['slate', 'propensities'])
        clicks = events[events.type == 'click']
        assert set(clicks.decision_id) - set(slates.decision_id) == set() or len(set(clicks.decision_id) - set(slates.decision_id)) < .01*len(clicks) # a lost decision line may leave its clicks alone
        assert slates.propensities.astype(float).between(0, 1, inclusive='right').all()

def test_the_allowed_share_of_broken_lines_is_allowed(tmp_path):
    with home(tmp_path/'here', a_jsonl=[json.dumps(CLICK | {'event_id': f'e{i}'}) for i in range(95)] + ['{']*5):
        ingest.run()
        assert said()['quarantined_share'] == {'value': .05, 'ci_lower': None, 'ci_upper': None, 'n': 100} and said()['events'] == 95

def test_few_enough_windows():
    days = [str(np.datetime64('2020-01-01') + i) for i in range(4000)]
    assert len(ingest.window_names(days[:100])) == 100 and ingest.window_names(days[:101]) == ['2020-01', '2020-02', '2020-03', '2020-04'] and ingest.window_names(days)[-1] == '2030'
    assert [str(ingest._start(*a)) for a in (('2024-02-28', 1), ('2024-02-29', 1), ('2024-12', 1), ('2024', 1), ('2024-12', 0))] == ['2024-02-29', '2024-03-01', '2025-01-01', '2025-01-01', '2024-12-01']

def test_an_unknown_engine_is_refused():
    with pytest.raises(TelemetryError, match="run.engine is 'spark'"): connect(RunConfig(seed=0, threads=1, engine='spark', memory_gb=1.))
