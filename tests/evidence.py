"Events written by hand, and a folder where ingest left them: shared by the tests of behaviour and sessions."
import contextlib, json
from datetime import datetime, timedelta
from pathlib import Path
import ibis, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, yaml
from conftest import small_params
from telemetry_loop.config import folder_digest, from_dict
from telemetry_loop.dwell import DwellConfig
from telemetry_loop.schema import columns
from telemetry_loop.sessions import SessionsConfig

SEED = 21                                                              # of shuffles and random logs
HOURS, LONG, GAP, SLACK = 2., 30., 30., 5.
CFG = from_dict(SessionsConfig, small_params()['sessions'] | dict(attribution_hours=HOURS, satisfied_seconds=LONG, gap_minutes=GAP, clock_seconds=SLACK), 'sessions')
STAY = from_dict(DwellConfig, small_params()['dwell'] | dict(cap_minutes=30.), 'dwell')
NOON = datetime(2025, 1, 6, 12)
at = lambda seconds: NOON + timedelta(milliseconds=round(1000*float(seconds)))
DAY = 86400
ARROW = {'integer': pa.int64(), 'number': pa.float64(), 'boolean': pa.bool_(), 'string': pa.string()}
SCHEMA = pa.schema([(n, pa.timestamp('ms') if 'pattern' in r and 'T' in r['pattern'] else pa.list_(ARROW[r['items']['type']]) if r['type'] == 'array' else ARROW[r['type']]) for n, r in columns().items()]
    + [('device_time', pa.timestamp('ms')), ('skew_s', pa.float64())])

def arrow(rows): return pa.Table.from_pylist([dict(received_time=r['event_time'], device_time=r['event_time'], skew_s=0., event_id=f'e{i}') | r for i, r in enumerate(rows)], schema=SCHEMA)
def log(rows): return ibis.memtable(arrow(rows))
def event(type, seconds, user='u', **more): return dict(type=type, user_id=user, event_time=at(seconds)) | more
def decision(name, seconds, slate, user='u', **more): return event('decision', seconds, user, decision_id=name, slate=slate, candidates=slate) | more
def act(kind, seconds, name, item, user='u', **more): return event(kind, seconds, user, decision_id=name, item_id=item) | more

def lay(rows, folder, unit='D'):
    "What ingest leaves: one file a window of received time, sorted by event time."
    folder.mkdir(parents=True, exist_ok=True)
    table = (rows if isinstance(rows, pa.Table) else arrow(rows)).sort_by([('event_time', 'ascending'), ('event_id', 'ascending')])
    window = table['received_time'].to_numpy().astype(f'M8[{unit}]').astype(str)
    for w in np.unique(window): pq.write_table(table.filter(pa.array(window == w)), folder/f'{w}.parquet')

@contextlib.contextmanager
def home(folder, rows, unit='D', **section):
    "A folder where ingest left these events."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'params.yaml').write_text(yaml.safe_dump(small_params(sessions=section)))
    lay(rows, folder/'artifacts/ingest/events', unit)
    with contextlib.chdir(folder): yield folder

def read(kind, folder=Path('.')): return pd.concat([pd.read_parquet(p) for p in sorted((folder/'artifacts/sessions'/kind).glob('*.parquet'))], ignore_index=True)
def said(folder=Path('.')): return json.loads((folder/'metrics/sessions.json').read_text())
def digest(folder=Path('.')): return folder_digest(folder/'artifacts/sessions'), said(folder)
