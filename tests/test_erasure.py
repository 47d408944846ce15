import contextlib, gzip, json, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import ROOT
from telemetry_loop import erasure
from telemetry_loop.config import TelemetryError, folder_digest
from telemetry_loop.erasure import People, erase, expire, holds, is_of, keep_out, outlived, old_decisions, people_of, scan, stale, stores, traced, without
from telemetry_loop.governance import audit_verify
from telemetry_loop.privacy import erasure_token, key, pseudonyms

def sh(cwd, *words): return subprocess.run([sys.executable, '-m', *words] if words[0] == 'dvc' else words, cwd=cwd, check=True, capture_output=True, text=True).stdout

def line(user, at='2025-01-06T10:00:00.000Z', kind='click', **more): return json.dumps(dict(event_id=f'{user}{at}{kind}', type=kind, event_time=at, received_time=at, user_id=user, **more)) + '\n'

U7 = People(frozenset({'u7'}), nicks=tuple(pseudonyms(['u7'], key())))

RELEASE = dict(version='abc', model_version='m', bundle_digest='b', data_digest='d', code_digest='c', params_digest='p', policy={}, verdict='pass', open=[], predicted=dict(value=1., ci_lower=0., ci_upper=2., n=3), as_of=None)

@pytest.fixture(scope='module')
def built(tmp_path_factory): # a checkout whose pipeline has run, with a remote, an old run and a release
    repo = tmp_path_factory.mktemp('built')/'house'; repo.mkdir()
    sh(repo, 'git', 'init', '-q'); sh(repo, 'dvc', 'init', '-q')
    shutil.copy(ROOT/'params.yaml', repo/'params.yaml')
    (repo/'data').mkdir()
    (repo/'data/a.jsonl').write_text(line('u7') + line('u77') + line('u1', target='u7') + '{"type": "click", "user_id": "u7\n')
    with gzip.open(repo/'data/b.jsonl.gz', 'wt') as f: f.write(line('u7', kind='consent') + line('u8'))
    for name in ('artifacts/ingest/events', 'artifacts/train', 'artifacts/features', 'runs/loop-7/data', 'releases', 'metrics'): (repo/name).mkdir(parents=True)
    nick = pseudonyms(['u7', 'u8'], key())
    pd.DataFrame(dict(user_id=nick, type='click', event_time=pd.Timestamp('2025-01-06'))).to_parquet(repo/'artifacts/ingest/events/2025-01-06.parquet')
    pd.DataFrame(dict(item_id=['i1'])).to_parquet(repo/'artifacts/features/items.parquet')
    (repo/'artifacts/train/bundle.json').write_text('{"version": "m"}')
    (repo/'runs/loop-7/data/a.jsonl').write_text(line('u7'))
    (repo/'releases/0001-abc.json').write_text(json.dumps(RELEASE | {'number': 1}))
    sh(repo, 'dvc', 'add', '-q', 'data', 'artifacts/ingest', 'artifacts/features')
    sh(repo, 'dvc', 'remote', 'add', '-d', '-q', 'far', '../far'); sh(repo, 'dvc', 'push', '-q')
    return repo.parent

@pytest.fixture
def house(built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path/'house'

def test_erased_everywhere(house):
    nick, places = pseudonyms(['u7'], key())[0], stores(house)
    assert set(places) == {'cache', 'far'} and all(len(scan([p], U7)) == 3 for p in places.values()) # it was there
    before = folder_digest(house/'data')
    found = erase('u7', house)
    assert found.lines == 3 and found.stale == 1 and found.objects >= 4
    assert scan([house, *places.values()], U7) == []
    assert (house/'data/a.jsonl').read_text() == line('u77') + line('u1', target='u7')
    assert 'u8' in gzip.open(house/'data/b.jsonl.gz', 'rt').read()
    assert not (house/'runs/loop-7').exists() and not (house/'artifacts/ingest').exists()
    assert (house/'artifacts/train/bundle.json').is_file() and (house/'artifacts/features/items.parquet').is_file() # what does not hold them stays
    assert folder_digest(house/'data') != before and folder_digest(house/'data') in (house/'data.dvc').read_text()
    assert 'retrain' in stale(house/'releases')['abc']
    log = (house/'releases/audit.jsonl').read_text()
    assert audit_verify(house/'releases/audit.jsonl') is None and erasure_token('u7') in log and 'u7' not in log and nick not in log

def test_a_second_time_finds_nothing_and_says_so(house):
    erase('u7', house)
    again = erase('u7', house)
    assert (again.lines, again.outputs, again.objects, again.stale) == (0, 0, 0, 0)

def test_what_waits_for_promotion_is_withdrawn_and_what_never_knew_them_stays(house):
    for path in ('artifacts/release', 'artifacts/policy'): (house/path).mkdir()
    (house/'artifacts/release/candidate.json').write_text(json.dumps(RELEASE)); (house/'data.x.part/data').mkdir(parents=True); (house/'data.x.part/data/a.jsonl').write_text(line('u7')) # and a simulation was killed
    pd.DataFrame(dict(decision_id=['x1'], score=[.5])).to_parquet(house/'artifacts/policy/candidates.parquet')
    (house/'data/a.jsonl').write_text(line('u7', decision_id='x1') + line('u8', kind='close'))
    sh(house, 'dvc', 'add', '-q', 'artifacts/release', 'artifacts/policy')
    objects = lambda: [p for p in stores(house)['cache'].rglob('*') if p.is_file() and (b'"verdict"' in p.read_bytes() or b'score' in p.read_bytes())]
    assert len(objects()) == 2
    assert erase('u7', house).stale == 1 and not (house/'artifacts/release').exists() and not (house/'artifacts/policy').exists() and not objects() and not list(house.glob('*.part'))
    (house/'releases/0002-new.json').write_text(json.dumps(RELEASE | {'number': 2, 'version': 'new'})); (house/'artifacts/release').mkdir(); (house/'artifacts/release/candidate.json').write_text('{}')
    assert erase('u7', house).stale == 0 and 'new' not in stale(house/'releases') and (house/'artifacts/release').exists() # it learned without them

@pytest.mark.parametrize('stop', ['without', '_clear', 'purge', '_commit'])
def test_killed_on_the_way_it_goes_on(house, monkeypatch, stop):
    with monkeypatch.context() as m:
        m.setattr(erasure, stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): erase('u7', house)
    assert erasure_token('u7') in (house/'releases/tombstones.txt').read_text() # remembered first
    erase('u7', house)
    assert scan([house, *stores(house).values()], U7) == []

def test_an_id_that_is_also_an_item_number(house): # MovieLens: user 7, item 7
    (house/'data/a.jsonl').write_text(line('7', item_id='8') + line('8', item_id='7'))
    pd.DataFrame(dict(user_id=pseudonyms(['8'], key()), item_id=['7'])).to_parquet(house/'artifacts/features/acts.parquet')
    assert erase('7', house).lines == 1
    assert (house/'data/a.jsonl').read_text() == line('8', item_id='7') and (house/'artifacts/features/acts.parquet').is_file()

def test_a_remote_out_of_reach_is_refused_before_anything_is_touched(house):
    sh(house, 'dvc', 'remote', 'add', '-q', 'cloud', 's3://bucket/x')
    before = folder_digest(house/'data')
    with pytest.raises(TelemetryError, match='cloud'): erase('u7', house)
    assert folder_digest(house/'data') == before and not (house/'releases/tombstones.txt').exists()

def test_nobody_is_refused(house):
    with pytest.raises(TelemetryError, match='empty'): erase(' ', house)

def test_the_erased_stay_away(house):
    erase('u7', house)
    (house/'new').mkdir(); (house/'new/c.jsonl').write_text(line('u7') + line('u9'))
    assert keep_out(house/'new', house/'releases') == 1 and (house/'new/c.jsonl').read_text() == line('u9')

@pytest.mark.parametrize('text,mine', [
    ('{"user_id": "u7"}', True), ('{"user_id": "u77"}', False), ('{"user_id": "u1", "note": "u7"}', False), ('{"user_id": "\\u0075\\u0037"}', True),
    ('{"user_id": "u7', True), ('{"user_id": "u7.5', False), ('not json u7 at all', True), ('[1, "u7"]', True), ('', False), ('{"user_id": 7}', False)])
def test_whose_line(text, mine): assert is_of(text.encode(), U7) == mine

def test_a_line_that_names_nobody_goes_with_the_mark_only_they_carry(tmp_path):
    theirs = ['{"user_id":"u7","event_id":"e1","device_id":"d7","decision_id":"x1"}', '{"user_id":"u7","event_id":"e2","device_id":"tv"}',
              '{"user_id":17,"event_id":"e3","device_id":"d7"}', '{"event_id":"e1","type":"cli', 'ERROR {"event_id":"e2","type":"cli', '{"type":"click","decision_id":"x1"}', '[{"user_id":"u7"}]', '{"login_id":"u7","user_id":"cookie"}']
    others = ['{"user_id":"u8","event_id":"e4","device_id":"tv"}', '{"event_id":"e5","device_id":"tv"}', '{"event_id":"e9","ty', '{"user_id":"u8","event_id":"e6","decision_id":"x1b"}', '[{"user_id":"u8","device_id":"d7b"}]', '{"type":"item","item_id":"u7"}']
    (tmp_path/'a.jsonl').write_text('\n'.join(theirs[:4] + others + theirs[4:]) + '\n')
    people = people_of(tmp_path, ['u7'])
    assert people.marks == {('event_id', 'e1'), ('event_id', 'e2'), ('device_id', 'd7'), ('decision_id', 'x1')} and people.nicks == tuple(pseudonyms(['u7', 'd7'], key()))
    assert without(tmp_path, lambda l: is_of(l, people)) == len(theirs) and (tmp_path/'a.jsonl').read_text().splitlines() == others

def test_a_number_is_a_name_too():
    assert is_of(b'{"user_id": 7}', People(frozenset({'7'}))) and not is_of(b'{"user_id": 77, "item_id": "7"}', People(frozenset({'7'})))

def test_a_damaged_gzip_file_is_read_as_far_as_it_goes(tmp_path):
    whole = gzip.compress(''.join(line(f'u{i % 9}', target=str(i*7919)) for i in range(500)).encode())
    (tmp_path/'a.jsonl.gz').write_bytes(whole[:len(whole)//2]); shutil.copy(tmp_path/'a.jsonl.gz', tmp_path/'object')
    assert holds(tmp_path/'object', U7)
    assert without(tmp_path, lambda l: is_of(l, U7)) > 10 and not holds(tmp_path/'a.jsonl.gz', U7) and gzip.decompress((tmp_path/'a.jsonl.gz').read_bytes()).count(b'"u8"') > 10

def test_seen_in_whatever_holds_them(tmp_path):
    nick, theirs = U7.nicks[0], People(U7.users, frozenset({('decision_id', 'x1')}), U7.nicks)
    pd.DataFrame(dict(decision_id=['x1'], clicks=[1])).to_parquet(tmp_path/'views'); pd.DataFrame(dict(item_id=['x1', 'u7'])).to_parquet(tmp_path/'items')
    pd.DataFrame(dict(user_id=['u7'])).to_parquet(tmp_path/'truth'); pd.DataFrame(dict(seen=[[nick]])).to_parquet(tmp_path/'lists')
    np.savez(tmp_path/'a.npz', users=np.array(['p0', nick])); (tmp_path/'lineage.json').write_text('{"decision_id": "x1"}'); (tmp_path/'other.json').write_text('{"version": "x1", "what": "u7"}')
    (tmp_path/'late').write_text('no event\n'*50 + line('u7'))
    assert {p.name for p in scan([tmp_path], theirs)} == {'views', 'truth', 'lists', 'a.npz', 'lineage.json', 'late'}

def test_decisions_are_known_from_tables_when_the_lines_are_gone(tmp_path):
    pd.DataFrame(dict(user_id=[U7.nicks[0], 'p1'], decision_id=['x1', 'x2'])).to_parquet(tmp_path/'decisions')
    assert traced([tmp_path], U7).marks == {('decision_id', 'x1')}

def test_other_files_keep_their_bytes(tmp_path):
    (tmp_path/'a.jsonl').write_bytes(b'\xff\xfe broken\n' + line('u8').encode()); (tmp_path/'.b.jsonl.swp').write_text(line('u7'))
    before = (tmp_path/'a.jsonl').stat().st_ino
    without(tmp_path, lambda l: is_of(l, U7))
    assert (tmp_path/'a.jsonl').stat().st_ino == before # not even rewritten

# ---------------------------------------------------------------- age
def test_expired_from_every_tier(house):
    old, new = '2023-01-01T00:00:00.000Z', '2025-01-06T00:00:00.000Z'
    (house/'data/a.jsonl').write_text(line('u1', old) + '{"broken": \n' + line('u1', new) + '{"broken": \n' + line('u1', old, kind='consent'))
    (house/'data/b.jsonl.gz').unlink()
    pd.DataFrame(dict(user_id=['p1'], start=pd.Timestamp(old[:-1]))).to_parquet(house/'artifacts/ingest/events/2023-01-01.parquet')
    sh(house, 'dvc', 'add', '-q', 'data', 'artifacts/ingest'); sh(house, 'dvc', 'push', '-q')
    found = expire('2025-02-01', house)
    assert found.lines == 2 # the old click and the broken line behind it; a consent is kept for years
    assert (house/'data/a.jsonl').read_text() == line('u1', new) + '{"broken": \n' + line('u1', old, kind='consent')
    assert not (house/'artifacts/ingest').exists() and (house/'artifacts/features').is_dir()
    for place in stores(house).values():
        assert not any(b'"click"' in p.read_bytes() and old.encode() in p.read_bytes() and b'u1' + old.encode() + b'click' in p.read_bytes() for p in place.rglob('*') if p.is_file())
    assert '"what": "expire"' in (house/'releases/audit.jsonl').read_text() and audit_verify(house/'releases/audit.jsonl') is None
    assert expire('2025-02-01', house).lines == 0

def test_a_table_that_names_only_decisions_ages_with_them(tmp_path):
    ends = {'decision': '2024-01-01T00:00:00', 'click': '2024-01-01T00:00:00'}
    pd.DataFrame(dict(user_id='p1', decision_id=['x1', 'x2'], event_time=pd.to_datetime(['2023-12-31', '2024-01-02']))).to_parquet(tmp_path/'decisions')
    for name, d in (('old', 'x1'), ('new', 'x2')): pd.DataFrame(dict(decision_id=[d], clicks=[1])).to_parquet(tmp_path/name)
    found = old_decisions([tmp_path], ends)
    assert found == {'x1'} and outlived(tmp_path/'old', ends, found) and not outlived(tmp_path/'new', ends, found) and outlived(tmp_path/'decisions', ends, found)

def test_expire_refuses_a_date_that_is_none(house):
    with pytest.raises(TelemetryError, match='soon'): expire('soon', house)
