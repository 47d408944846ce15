"Spark gives the frames DuckDB gives: odd lines, clocks, and whole worlds through ingest and sessions."
import contextlib, json, shutil
from importlib.util import find_spec
from pathlib import Path
import ibis, numpy as np, pandas as pd, pytest, yaml
from conftest import ROOT, small_params
from telemetry_loop.clocks import ClocksConfig, corrected, skews
from telemetry_loop.config import RunConfig
from telemetry_loop.engine import connect, read_lines, read_parquet, row_by_row, write_parquet
from telemetry_loop.lines import judge
from telemetry_loop.schema import VERSION

pytestmark = [pytest.mark.skipif(not find_spec('pyspark'), reason='no pyspark here: the extra `spark` is not installed'),
              pytest.mark.skipif(not shutil.which('java'), reason='no Java here: Spark needs Java 17 or newer')]
RATINGS = ROOT.parent/'shared/data/ml_latest_small/ratings.csv'
BOTH = ('duckdb', 'pyspark')

def plain(frame, order=None):
    "A frame without what engines may differ in: row order, units of time, kinds of null and of list."
    def value(x):
        if isinstance(x, (list, np.ndarray)): return tuple(value(v) for v in x)
        if isinstance(x, dict): return tuple((k, value(v)) for k, v in x.items())
        return None if x is None or x is pd.NaT or (isinstance(x, float) and np.isnan(x)) else x
    frame = frame.copy()
    for c in frame:
        if pd.api.types.is_datetime64_any_dtype(frame[c]): frame[c] = frame[c].astype('datetime64[us]').astype(object)
        frame[c] = pd.Series([value(x) for x in frame[c]], index=frame.index, dtype=object)
    rows = [tuple(r) for r in frame.itertuples(index=False)]
    return list(frame.columns), sorted(rows, key=repr)

@pytest.fixture(scope='module')
def cons(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp('engines')):
        found = {e: connect(RunConfig(seed=0, threads=2, engine=e, memory_gb=1.5)) for e in BOTH}
        yield found
        found['pyspark'].disconnect()

# --- lines

CLICK = dict(event_id='e1', type='click', schema_version=VERSION, event_time='2025-01-06T10:00:00.000Z', received_time='2025-01-06T10:00:01.000Z', user_id='u1', decision_id='d1', item_id='i1', position=0)
DECISION = dict(CLICK, type='decision', slate=['a', 'b'], candidates=['a', 'b', 'c'], propensities=[.5, .25])
def raw(line, **texts): # the line with fields given as JSON text
    return '{' + ', '.join(f'"{k}": {v}' for k, v in ({k: json.dumps(v) for k, v in line.items()} | texts).items()) + '}'
ODD = [raw(CLICK), raw(DECISION), *[raw(CLICK, position=x) for x in ('NaN', '-Infinity', '1e400', '-0', '1.0', '1.5', '1e2', '18446744073709551615', '18446744073709551616', '123456789012345678901234567890', '9007199254740993', '01', '+1', '.5', '0x10', 'null', 'true', '"0"', '[0]', '{}')],
    *[raw(CLICK, item_id=x) for x in (r'"\u00e9"', r'"\ud83d\ude00"', r'"\ud800"', r'"\u0000"', r'"\""', r'"a\/b"', '"é"', '"😀"', '"\t"', '"\x01"', '""', '" "', '"e\u0301"', '"' + 'x'*65 + '"', '"' + '😀'*64 + '"')],
    *[raw(DECISION, propensities=x) for x in ('[]', '[1e-400]', '[0.1, 1e400]', '[[0.5]]', '[null]', '["0.5"]', '[0.5, NaN]', '0.5', '[1, 1.0]', '[0.30000000000000004]')],
    *[raw(DECISION, slate=x) for x in ('["a", ["b"]]', '["a", {"b": 1}]', r'["\ud83d\ude00", "\u0061"]', '[]', '[1]', '"a"')],
    raw(CLICK)[:-1] + ', "user_id": "u2"}', raw(CLICK)[:-1] + ', "type": "view"}', raw(CLICK)[:-1] + ',}', raw(CLICK) + ' ', ' ' + raw(CLICK), raw(CLICK) + 'x', raw(CLICK) + raw(CLICK), raw(CLICK)[:40], '\ufeff' + raw(CLICK),
    raw(CLICK).replace('"user_id"', r'"user\u005fid"'), raw(CLICK)[:-1] + ', "deep": ' + '['*200 + ']'*200 + '}', raw(CLICK)[:-1] + ', "a.b": 1, "$": {"user_id": 2}}', '{}', '[]', 'null', '1', '"x"', 'NaN', '{"type": 1}', "{'type': 'click'}", '// comment', ' ']

def test_odd_lines_mean_the_same(cons):
    Path('odd lines.jsonl').write_bytes('\n'.join(ODD).encode() + b'\n\n{"a": 1}\r\n{"b": 1}\r{"c": 1}')
    got = {}
    for e, con in cons.items():
        lines = read_lines(con, ['odd lines.jsonl'], 2**21)
        judged = row_by_row(con, lines.filter(lines.line.length() > 0), judge)
        write_parquet(con, judged.order_by('line'), f'{e}.parquet')
        got[e] = plain(pd.read_parquet(f'{e}.parquet'))
    assert len(got['duckdb'][1]) == len(ODD) + 3 and got['duckdb'] == got['pyspark']
    assert not [p for p in Path('.').iterdir() if p.name.endswith('.part') or p.suffix == '.crc']

def test_a_file_written_by_one_is_read_by_the_other_in_order(cons):
    frame = pd.DataFrame(dict(n=np.arange(5000)[::-1], at=pd.Timestamp('1969-12-31 23:59:59.999') + pd.to_timedelta(np.arange(5000), 'ms'), word=[None, 'é']*2500, parts=[[1., .5], []]*2500))
    for e, con in cons.items(): write_parquet(con, ibis.memtable(frame).pipe(lambda t: row_by_row(con, con_table(con, t), lambda x: x)).order_by('n'), f'{e}-own.parquet')
    ours, theirs = (pd.read_parquet(f'{e}-own.parquet') for e in BOTH)
    pd.testing.assert_frame_equal(ours, theirs)
    assert ours.n.is_monotonic_increasing and ours['at'].dt.tz is None
    for con in cons.values(): assert plain(con.execute(read_parquet(con, ['duckdb-own.parquet', 'pyspark-own.parquet'])))[1] == plain(pd.concat([ours, theirs]))[1]

def con_table(con, memtable):
    "The in-memory table as one of the engine's own."
    con._run_pre_execute_hooks(memtable)
    return con.table(memtable.get_name())

# --- clocks

def test_clocks_are_the_same(cons):
    rng, cfg = np.random.default_rng(0), ClocksConfig(tolerance_s=2., min_sends=5, far_days=30., late_days=7.)
    n = 4000
    device = rng.integers(0, 60, n)
    skew = np.round(np.r_[rng.uniform(-300, 300, 50), rng.uniform(-3, 3, 8), 1.7e9, -1.7e9], 3)
    sent = np.sort(rng.uniform(0, 2*86400, n))
    at = lambda s: pd.Timestamp('2025-01-06') + pd.to_timedelta(np.round(s*1000).astype('int64'), 'ms')
    rows = pd.DataFrame(dict(event_id=np.arange(n), device_id=[None if d % 7 == 0 else f'd{d}' for d in device], user_id=[f'u{d}' for d in device], type=rng.choice(['click', 'view', 'decision'], n),
        event_time=at(sent + skew[device] - rng.exponential(5, n)), sent_time=at(sent + skew[device]), received_time=at(sent + rng.gamma(2, .1, n) + 30*(rng.random(n) < .3))))
    rows['sent_time'] = rows.sent_time.where(rng.random(n) < .95)
    frames = {}
    for e, con in cons.items():
        carry, out = None, []
        for _, day in rows.groupby(rows.received_time.dt.floor('D')):
            carry = con.execute(skews(ibis.memtable(day), None if carry is None else ibis.memtable(carry), cfg))
            out.append(con.execute(corrected(ibis.memtable(day), ibis.memtable(carry))))
        frames[e] = [plain(f) for f in (carry, *out)]
    assert len(frames['duckdb']) == 3 and frames['duckdb'] == frames['pyspark'] and any(r[1] for r in frames['duckdb'][0][1])

# --- whole worlds

def through(folder, engine):
    "The folder's data through ingest and sessions."
    from telemetry_loop import ingest, sessions
    params = yaml.safe_load((ROOT/'params.yaml').read_text())
    params['run'] |= dict(engine=engine, threads=2)
    (folder/'params.yaml').write_text(yaml.safe_dump(params))
    with contextlib.chdir(folder): ingest.run(); sessions.run()

def same(a, b):
    "Events and sessions, files and frames, and what the metrics say."
    for stage in ('ingest', 'sessions'):
        names = sorted(str(p.relative_to(a)) for p in (a/f'artifacts/{stage}').rglob('*.parquet'))
        assert names and names == sorted(str(p.relative_to(b)) for p in (b/f'artifacts/{stage}').rglob('*.parquet'))
        for name in names: assert (a/name).read_bytes() == (b/name).read_bytes() or plain(pd.read_parquet(a/name)) == plain(pd.read_parquet(b/name)), name
        assert json.loads((a/f'metrics/{stage}.json').read_text()) == json.loads((b/f'metrics/{stage}.json').read_text())

@pytest.mark.parametrize('world', ['the default world', 'movielens'])
def test_a_world_is_the_same(tmp_path, world):
    from telemetry_loop.loop import first_world
    from telemetry_loop.sources import import_source
    if world == 'movielens' and not RATINGS.is_file(): pytest.skip('real data not here: ../shared/data/ml_latest_small')
    a, b = (tmp_path/e for e in BOTH)
    a.mkdir(); shutil.copy(ROOT/'params.yaml', a)
    with contextlib.chdir(a):
        if world == 'movielens': import_source('movielens', RATINGS, 'data')
        else: first_world(Path('data'), progress=False)
    shutil.copytree(a, b)
    for folder, engine in zip((a, b), BOTH): through(folder, engine)
    same(a, b)
