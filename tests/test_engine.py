"The engine: one connection, one file a write, work that is done once."
import hashlib, os, threading
from pathlib import Path
import ibis, pandas as pd, pytest
from telemetry_loop import engine
from telemetry_loop.config import RunConfig, TelemetryError
from telemetry_loop.engine import cached, connect, forget, key_of, make_tables, read_lines, read_parquet, row_by_row, small, spread, write_parquet

RUN = dict(seed=0, threads=2, memory_gb=1.)

@pytest.fixture
def con(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return connect(RunConfig(engine='duckdb', **RUN))

def made(con, sql):
    con.raw_sql(f'CREATE OR REPLACE TEMP VIEW made AS {sql}')
    return con.table('made')

def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(TelemetryError, match="run.engine is 'polars'; the engines it knows are duckdb, pyspark; correct it"): connect(RunConfig(engine='polars', **RUN))

def test_without_pyspark_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(engine, 'find_spec', lambda name: None)
    with pytest.raises(TelemetryError, match='extra `spark`.*pip install') as e: connect(RunConfig(engine='pyspark', **RUN))
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('home', [None, 'nowhere'])
def test_without_java_the_remedy_is_named(monkeypatch, tmp_path, home):
    monkeypatch.setattr(engine, 'find_spec', lambda name: True)
    monkeypatch.setenv('PATH', str(tmp_path)); monkeypatch.delenv('JAVA_HOME', raising=False)
    if home: monkeypatch.setenv('JAVA_HOME', str(tmp_path/home))
    with pytest.raises(TelemetryError, match='there is no Java; the extra `spark` needs Java 17') as e: connect(RunConfig(engine='pyspark', **RUN))
    assert '\n' not in str(e.value)

def test_lines_are_read_as_they_are(con, tmp_path):
    Path('a b+c.jsonl').write_bytes(b'one\n\n"two",\'x\'\nthree\x00\r\n  four\n\xe2\x80\xa8five')
    got = con.execute(read_lines(con, ['a b+c.jsonl'], 100))
    assert got.columns.tolist() == ['file', 'line'] and set(got.file) == {str(tmp_path/'a b+c.jsonl')}
    assert [x for x in got.line if isinstance(x, str) and x] == ['one', '"two",\'x\'', 'three\x00', '  four', '\u2028five']

def test_several_files_are_one_table(con):
    for i in range(3): write_parquet(con, ibis.memtable(pd.DataFrame(dict(n=[i]))), f'p/{i}.parquet')
    assert sorted(con.execute(read_parquet(con, [f'p/{i}.parquet' for i in range(3)])).n) == [0, 1, 2]
    assert sorted(con.execute(read_parquet(con, ['p/*.parquet'])).n) == [0, 1, 2]

def test_the_same_rows_are_the_same_bytes(con):
    table = made(con, 'SELECT i, hash(i) % 1000 AS h, i::VARCHAR AS s FROM range(400000) t(i)')
    digests = set()
    for i in range(3):
        write_parquet(con, table.order_by(['h', 'i']), f'{i}.parquet')
        digests.add(hashlib.md5(Path(f'{i}.parquet').read_bytes()).hexdigest())
    assert len(digests) == 1
    assert sorted(p.name for p in Path('.').iterdir() if p.name != 'runs') == ['0.parquet', '1.parquet', '2.parquet']

def test_a_failed_write_leaves_what_was_there(con):
    write_parquet(con, made(con, 'SELECT 1 AS n'), 'x.parquet')
    with pytest.raises(Exception): write_parquet(con, made(con, "SELECT CASE WHEN i = 99999 THEN error('stop') ELSE i::VARCHAR END AS n FROM range(100000) t(i)"), 'x.parquet')
    assert con.execute(read_parquet(con, ['x.parquet'])).n.tolist() == [1] and [p.name for p in Path('.').iterdir() if p.name != 'runs'] == ['x.parquet']

def test_row_by_row_is_the_answer_itself(con):
    got = row_by_row(con, made(con, "SELECT * FROM (VALUES (1), (2)) t(n)"), lambda t: t.mutate(twice=2*t.n))
    assert con.execute(got.order_by('n')).twice.tolist() == [2, 4]

def test_keys_tell_values_apart_and_nothing_else():
    assert key_of('a', dict(x=1, y=2)) == key_of('a', dict(y=2, x=1)) != key_of('a', dict(x=1, y=3))
    assert key_of('a', 'b') != key_of('ab') and len(key_of()) == 32

def test_work_is_done_once_and_a_stop_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); times = []
    def build(folder): times.append(1); (folder/'x').write_text('42')
    def stop(folder): (folder/'x').write_text('half'); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): cached('k', 'one', stop)
    assert not any(Path('runs/cache/k').iterdir())
    for _ in range(2): assert (cached('k', 'one', build)/'x').read_text() == '42'
    assert times == [1]
    (Path('runs/cache/k')/'.old.part').mkdir()
    forget('k', {'one'}); assert [p.name for p in Path('runs/cache/k').iterdir()] == ['one']
    forget('k', set()); forget('none', set()); assert not any(Path('runs/cache/k').iterdir())

def test_tables_are_made_one_from_another_and_forgotten(con):
    rows = ibis.memtable(pd.DataFrame(dict(n=[1, 2, 3])))
    t = ibis.table(dict(n='int64'), name='rows')
    twice = ibis.table(dict(n='int64', m='int64'), name='twice')
    Path('out').mkdir()
    make_tables(con, {'rows': rows}, {'twice': t.mutate(m=2*t.n), 'sums': twice.agg(s=twice.m.sum())}, {'a': twice.order_by(ibis.desc('n')), 'b': ibis.table(dict(s='int64'), name='sums')}, 'out')
    assert pd.read_parquet('out/a.parquet').m.tolist() == [6, 4, 2] and pd.read_parquet('out/b.parquet').s.tolist() == [12]
    assert not con.con.execute("SELECT table_name FROM information_schema.tables WHERE table_name IN ('rows', 'twice', 'sums')").fetchall()

def test_rows_know_their_file_and_place(con, tmp_path):
    for i in range(2): write_parquet(con, ibis.memtable(pd.DataFrame(dict(n=[10*i, 10*i + 1]))), f'{i}.parquet')
    got = con.execute(read_parquet(con, ['0.parquet', '1.parquet'], file='from', row='nth').order_by('n'))
    assert got.nth.tolist() == [0, 1, 0, 1] and got['from'].tolist() == [str(tmp_path/f'{i//2}.parquet') for i in range(4)]

def test_work_is_spread_and_answers_come_in_order(con):
    assert spread(con, lambda x: 2*x, [3, 1, 2], 2) == [6, 2, 4] and spread(con, len, [], 2) == []
    seen = set()
    barrier = threading.Barrier(2, timeout=20) # two at a time, or it breaks
    spread(con, lambda x: (barrier.wait(), seen.add(threading.get_ident())), [1, 2], 2)
    assert len(seen) == 2 and small(con).execute('SELECT 1').fetchone() == (1,)
