import contextlib, shutil
from dataclasses import replace
from pathlib import Path
import pandas as pd, pytest
from telemetry_loop import catalog
from telemetry_loop.catalog import Column, assessment, assessment_diff, catalog_of, catalog_page, collected, describe, lineage, readers, tables, unused, upstream
from telemetry_loop.config import TelemetryError
from telemetry_loop.governance import CLASS_OF
from telemetry_loop.schema import EVENTS, columns

KEPT = {k: {'basis': 'consent', 'days': 90} for k in EVENTS}
OWNERS = {'ingest': 'data', 'sessions': 'data'}

@pytest.fixture(scope='module')
def house(tiny_run, tmp_path_factory): # a run
    to = tmp_path_factory.mktemp('catalog')/'house'
    shutil.copytree(tiny_run, to, ignore=shutil.ignore_patterns('runs'))
    return to

def test_every_column_of_a_run_is_documented(house):
    with contextlib.chdir(house): catalog.run()
    found = catalog_of(house)
    assert {f'{c.table}.{c.column}' for c in found} == {f'{t}.{c}' for t, cols in tables(house/'artifacts').items() for c in cols}
    assert all(c.meaning and c.unit and c.owner and c.purpose and c.basis and c.retention for c in found)
    page = (house/'artifacts/catalog/catalog.html').read_text()
    assert 'age_band' in page and '<script' not in page and 'http' not in page
    derived = [c for c in found if c.source and c.table != 'ingest/events']
    assert all(upstream(c.column, found) for c in derived if c.column not in ('threshold', 'limit', 'line', 'file', 'reason')), [c.column for c in derived if not upstream(c.column, found)] # lineage ends in what was collected

def test_an_undocumented_column_fails(house, tmp_path):
    shutil.copytree(house, tmp_path/'copy'); copy = tmp_path/'copy'
    path = copy/'artifacts/sessions/bots.parquet'
    pd.read_parquet(path).assign(mood='good').to_parquet(path)
    with contextlib.chdir(copy), pytest.raises(TelemetryError, match='sessions/bots.mood is documented nowhere'): catalog.run()

@pytest.mark.parametrize('lack,says', [('owner', 'no owner'), ('purpose', 'no purpose')])
def test_a_column_without(lack, says, monkeypatch):
    if lack == 'purpose': monkeypatch.setitem(catalog.WHY, 'training', 'item_id')
    with pytest.raises(TelemetryError, match=f'ingest/events.elapsed has {says}'): describe({'ingest/events': {'elapsed': 'double'}}, {} if lack == 'owner' else OWNERS, {}, KEPT)

def test_every_field_of_the_plan_has_a_purpose():
    named = [f for fields in catalog.WHY.values() for f in fields.split()]
    assert sorted(named) == sorted(set(named)) and set(named) == set(columns()) == set(collected())

def test_collected_and_unused_is_found_by_reading_the_code(tmp_path):
    (tmp_path/'features.py').write_text("x = t['elapsed']\ny = t.score\nf(value=1)\n")
    (tmp_path/'simulate.py').write_text("x = t['age_band']\n")
    used = readers(tmp_path)
    found = describe({'ingest/events': {c: 'string' for c in ('elapsed', 'score', 'value', 'age_band')}}, OWNERS, used, KEPT)
    assert unused(found) == ['age_band'] and used['elapsed'] == ['features']

def test_a_new_field_shows_in_the_diff():
    old = describe({'ingest/events': {'elapsed': 'double'}}, OWNERS, {}, KEPT)
    new = describe({'ingest/events': {'elapsed': 'double', 'age_band': 'string'}}, OWNERS, {}, KEPT)
    changes = assessment_diff(assessment(old), assessment([replace(new[0], retention='9 days'), new[1]]))
    assert changes[['field', 'change']].values.tolist() == [['ingest/events.age_band', 'new'], ['ingest/events.elapsed', 'retention']]
    assert assessment_diff(assessment(old), assessment(old)).empty

def test_hostile_names_are_shown_as_text():
    c = Column('x/<b>', '<script>alert(1)</script>', 'string', '<img src=x>', 'u', 'o', 'analytics', 'consent', 'none', '1 days', [], [])
    page = catalog_page([c])
    assert '<script' not in page and '<img' not in page and '&lt;script&gt;' in page

def test_lineage_goes_from_a_prediction_to_its_events(house):
    rows = pd.read_parquet(house/'artifacts/policy/rows.parquet')
    known = pd.read_parquet(house/'artifacts/features/interactions.parquet')['user_id'].value_counts()
    d = rows[rows['user_id'].isin(known.index[:5])].sort_values('event_time').iloc[-1]['decision_id']
    chain = {l['link']: l for l in lineage(d, house)}
    assert list(chain) == ['prediction', 'model', 'snapshot', 'outcomes', 'events', 'telemetry']
    ids = chain['events']['what']
    events = pd.read_parquet(house/'artifacts/ingest/events').set_index('event_id')
    assert ids['of the decision'] and set(events.loc[ids['of the decision'], 'decision_id']) == {d}
    at = events[(events['decision_id'] == d) & (events['type'] == 'decision')]['event_time'].iloc[0]
    assert ids['of its history'] and (events.loc[ids['of its history'], 'received_time'] < at).all() # only what was known
    assert all(chain[l]['digest'] for l in ('model', 'snapshot', 'events', 'telemetry'))

def test_lineage_of_nothing_is_refused(house):
    with pytest.raises(TelemetryError, match='no decision'): lineage('nobody', house)
