"A person asks to be forgotten: nothing of them is left, and what is learned afterwards is what would have been learned without them."
import contextlib, gzip, io, json, re, shutil, subprocess
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, yaml
from telemetry_loop import catalog, erasure, ingest
from telemetry_loop.config import TelemetryError, folder_digest, read_json
from telemetry_loop.governance import audit_verify
from telemetry_loop.loop import STAGES, run_stages, simulate_first_windows
from telemetry_loop.privacy import erasure_token, key, pseudonyms
from telemetry_loop.release import promote
from telemetry_loop.sources import import_source
from conftest import ROOT, small_params
from pipeline.conftest import sh

BASE = small_params()
WORLD = dict(simulate=dict(users=200, items=60, new_items=1, days=4, categories=4, candidates=8, faults=BASE['simulate']['faults'] | dict(second_device=.5, malformed=.005, violating=.01, duplicated=.03)),
             train=dict(epochs=1, dim=16, blocks=1), scorecard=dict(criteria=[c for c in BASE['scorecard']['criteria'] if c['name'] in ('no leakage', 'batch equals stream')]))

# ---------------------------------------------------------------- a reader and a rule of our own, that share nothing with the chapter
def texts(path):
    "Everything a file says, as text: tables, archives and compressed files opened."
    body = path.read_bytes()
    yield body.decode('utf-8', 'replace')
    if body[:4] == b'PAR1':
        table = pq.read_table(pa.BufferReader(body))
        for column in table.columns:
            if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)): yield json.dumps(column.to_pylist(), default=str, ensure_ascii=False)
    if body[:2] == b'\x1f\x8b': yield gzip.decompress(body).decode('utf-8', 'replace')
    if body[:2] == b'PK': # numpy's; any other archive fails here
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays: yield ' '.join([*arrays, *(str(v) for name in arrays if arrays[name].dtype.kind in 'US' for v in arrays[name].ravel())])

def telling(folders, names, ids):
    "Files that hold a name anywhere, or an event's (e0000000001) or decision's (d00000001) id."
    found = {}
    for path in (p for folder in folders for p in sorted(Path(folder).rglob('*')) if p.is_file() and '.git' not in p.relative_to(folder).parts):
        said = {w for text in texts(path) for w in {n for n in names if n in text} | ids.intersection(re.findall(r'[a-z]\d{8,}', text))}
        if said: found[path] = said
    return found

def history_of(repo):
    "Everything git remembers."
    return subprocess.run(['git', 'cat-file', '--batch-all-objects', '--batch'], cwd=repo, check=True, capture_output=True).stdout.decode('utf-8', 'replace')

def events_of(line):
    try: found = json.loads(line)
    except ValueError: return None
    return found if isinstance(found, dict) else None

def by_hand(files, user):
    "Which lines are the user's: those that name them; and those that name nobody but carry a device, event or decision only their lines carry."
    mine, others, loose = set(), set(), {}
    carried = {True: set(), False: set()}
    for at, line in ((f'{name}:{i}', line) for name, lines in files.items() for i, line in enumerate(lines)):
        event = events_of(line)
        who = event['user_id'] if event and isinstance(event.get('user_id'), str) else None if event else next(iter(re.findall('"user_id":"([^"]+)"', line)), None)
        marks = {(k, v) for k, v in re.findall('"(device_id|event_id|decision_id)":"([^"]+)"', line)}
        if who == user or not event and re.search(rf'\b{user}\b', line): mine.add(at); carried[True] |= marks
        elif who is None: loose[at] = marks
        else: carried[False] |= marks
    marks = carried[True] - carried[False]
    return mine | {at for at, its in loose.items() if its & marks}, marks

def read(folder): return {p.name: p.read_text().splitlines() for p in sorted(Path(folder).glob('*.jsonl'))}

def digests(folder):
    "Every artifact's name and content, and what is measured, but for the time it took."
    timeless = lambda x: {k: timeless(v) for k, v in x.items() if 'seconds' not in k or k in ('skew_seconds', 'transit_seconds')} if isinstance(x, dict) else x
    return {p.name: folder_digest(p) for p in sorted((folder/'artifacts').iterdir())} | {p.name: folder_digest(p) if p.is_dir() else timeless(read_json(p)) for p in sorted((folder/'metrics').iterdir())}

def live(folder):
    with contextlib.chdir(folder): run_stages(progress=False); catalog.run()

# ---------------------------------------------------------------- one life, told by the tests below
class Story: pass

@pytest.fixture(scope='module')
def story(tmp_path_factory):
    s = Story(); top = tmp_path_factory.mktemp('forgotten'); s.house = house = top/'house'; house.mkdir()
    (house/'params.yaml').write_text(yaml.safe_dump(small_params(**WORLD)))
    shutil.copy(ROOT/'.gitignore', house/'.gitignore')
    stages = yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages'] # the code is not in this house
    (house/'dvc.yaml').write_text(yaml.safe_dump({'stages': {n: stages[n] | {'deps': [d for d in stages[n]['deps'] if d.startswith(('data', 'artifacts', 'metrics'))]} for n in (*STAGES, 'catalog')}}))
    sh(house, 'git', 'init', '-q'); sh(house, 'dvc', 'init', '-q')
    (house/'.dvc/config').write_text('[core]\n    remote = far\n[\'remote "far"\']\n    url = ../../far\n') # relative to the file
    with contextlib.chdir(house): simulate_first_windows(truth=Path('runs/truth'))
    shutil.copytree(house/'data', top/'log'); s.log = read(top/'log')
    live(house)
    with contextlib.chdir(house): s.release = promote()
    shutil.copytree(house/'data', house/'runs/loop-7/data') # an earlier run
    sh(house, 'dvc', 'commit', '-f'); sh(house, 'dvc', 'push', '-q')
    git = ('git', '-c', 'user.name=test', '-c', 'user.email=test@example.org')
    sh(house, 'git', 'add', '-A'); sh(house, *git, 'commit', '-qm', 'a release')
    s.old = folder_digest(house/'artifacts/train')
    # an active person with two devices, one of whose lines names nobody
    lines, devices = Counter(), defaultdict(set)
    for event in filter(None, (events_of(l) for ls in s.log.values() for l in ls)):
        if isinstance(u := event.get('user_id'), str) and u < f'u{WORLD["simulate"]["users"]:06d}': lines[u] += 1; devices[u].add(event.get('device_id'))
    twice = [u for u, _ in lines.most_common() if len(devices[u] - {None}) > 1]
    unnamed = lambda u: [at for at in by_hand(s.log, u)[0] if f'"{u}"' not in s.log[at.split(':')[0]][int(at.split(':')[1])]]
    s.user = next(u for u in twice if unnamed(u)); s.unnamed = unnamed(s.user)
    s.mine, s.marks = by_hand(s.log, s.user)
    people = [s.user, *sorted(v for k, v in s.marks if k == 'device_id')]
    s.names, s.ids = [*people, *pseudonyms(people, key())], {v for k, v in s.marks if k != 'device_id'}
    s.before = {p.relative_to(top).as_posix() for p in telling([house, top/'far'], s.names, s.ids)}
    s.said = sh(house, 'telemetry-loop', 'erase', s.user).stdout
    s.left = telling([house, top/'far'], s.names, s.ids)
    s.stale, s.top = erasure.stale(house/'releases'), top
    with contextlib.chdir(house), pytest.raises(TelemetryError) as s.refused: promote()
    shutil.copytree(house/'releases', top/'releases')
    live(house)
    # the same log without them, elsewhere
    s.other = top/'other'; (s.other/'data').mkdir(parents=True)
    shutil.copy(house/'params.yaml', s.other/'params.yaml')
    for name, ls in s.log.items(): (s.other/'data'/name).write_text(''.join(l + '\n' for i, l in enumerate(ls) if f'{name}:{i}' not in s.mine))
    live(s.other)
    return s

def test_they_were_everywhere(story):
    "The scan finds them where they were; a scan that finds nothing afterwards means something."
    assert len(story.mine) > 200 and len(story.unnamed) > 0 and sum(k == 'device_id' for k, _ in story.marks) == 2
    place = lambda start, end='': any(p.startswith(start) and p.endswith(end) for p in story.before)
    assert place('house/data/') and place('house/runs/loop-7/') and place('house/runs/truth/') and place('house/runs/cache/') and place('house/.dvc/cache/') and place('far/')
    assert {f'house/artifacts/{p}.parquet' for p in ('ingest/quarantine', 'features/decisions', 'features/views', 'policy/candidates', 'ope/weights')} <= story.before

def test_nothing_of_them_is_left(story):
    "Not their id, pseudonym, devices, events or decisions: in no file, cache, remote or commit, only the token."
    assert story.left == {}
    past = history_of(story.house)
    assert not [n for n in story.names if n in past] and not story.ids.intersection(re.findall(r'[a-z]\d{8,}', past))
    token = erasure_token(story.user)
    assert token in (story.top/'releases/tombstones.txt').read_text() and token in (story.top/'releases/audit.jsonl').read_text()
    assert audit_verify(story.top/'releases/audit.jsonl') is None and story.user not in story.said and f'{len(story.mine):,} raw lines' in story.said

def test_what_learned_from_them_is_no_way_back(story):
    assert 'retrain' in story.stale[story.release.version] and 'candidate' in str(story.refused.value)
    old = story.top/'old'; shutil.copytree(story.house, old, ignore=shutil.ignore_patterns('runs', 'data', 'artifacts'))
    sh(old, 'git', 'checkout', '-q', '--', 'dvc.lock', 'data.dvc') # the release as git and DVC remember it
    assert sh(old, 'dvc', 'pull', check=False).returncode != 0
    assert not {p.name for p in [old/'data', *(old/'artifacts').glob('*')] if p.exists()} & {'data', 'ingest', 'sessions', 'features', 'policy', 'ope', 'release'}

def test_learning_again_equals_learning_without_them(story):
    "Artifact by artifact, and to the last digit measured."
    assert folder_digest(story.house/'data') == folder_digest(story.other/'data') and folder_digest(story.house/'data') in (story.house/'data.dvc').read_text()
    ours, theirs = digests(story.house), digests(story.other)
    assert {'ingest', 'sessions', 'signals', 'features', 'train', 'policy', 'ope', 'scorecard', 'release', 'catalog', 'train.json', 'ope.json'} <= set(ours)
    assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} == set()
    assert ours['train'] != story.old # they did teach the old one something
    assert telling([story.house/d for d in ('data', 'artifacts', 'metrics', 'runs')], story.names, story.ids) == {}

def test_one_line_of_theirs_would_have_shown(story, tmp_path):
    "The comparison above is able to fail."
    shutil.copytree(story.other, tmp_path, dirs_exist_ok=True)
    before = folder_digest(tmp_path/'artifacts/ingest/events')
    name, i = next((n, int(i)) for n, i in (at.split(':') for at in sorted(story.mine)) if (e := events_of(story.log[n][int(i)])) and e['type'] == 'click' and e.get('user_id') == story.user)
    with open(tmp_path/'data'/name, 'a') as f: f.write(story.log[name][i] + '\n')
    with contextlib.chdir(tmp_path): ingest.run()
    assert folder_digest(tmp_path/'artifacts/ingest/events') != before and telling([tmp_path/'artifacts'], story.names, story.ids)

def test_simulate_does_not_bring_them_back(story):
    with contextlib.chdir(story.house): simulate_first_windows('again')
    assert folder_digest(story.house/'again') == folder_digest(story.other/'data')

def test_import_does_not_bring_them_back(story):
    rows = [(events_of(l), l) for ls in story.log.values() for l in ls if '"click"' in l]
    (story.house/'clicks.csv').write_text('who,what,when\n' + ''.join(f'{e["user_id"]},{e["item_id"]},{e["event_time"]}\n' for e, _ in rows if e and isinstance(e.get('user_id'), str) and isinstance(e.get('item_id'), str)))
    (story.house/'map.yaml').write_text(yaml.safe_dump(dict(time='when', interactions=dict(user='who', item='what', kind='view'))))
    assert story.user in (story.house/'clicks.csv').read_text()
    with contextlib.chdir(story.house): found = import_source('generic', 'clicks.csv', 'imported', 'map.yaml')
    assert found.users > 50 and telling([story.house/'imported'], story.names, set()) == {}
