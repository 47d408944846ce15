"Sound telemetry passes every check; one seeded defect fails its own and no other."
from unittest import mock
import ibis, numpy as np, pandas as pd, pytest
from conftest import ROOT
from telemetry_loop import checks
from telemetry_loop.anomalies import alarms, anomalies
from telemetry_loop.checks import completeness, day_counts, distribution, freshness, out_of_range, references, uniqueness, unit_changes, volume
from telemetry_loop.config import load_params
from telemetry_loop.signals import SignalsConfig

CFG = load_params(SignalsConfig, 'signals', ROOT/'params.yaml')

def log(days=28, seed=4):
    "Decisions with an impression, clicks and heartbeats that answer them."
    rng, rows, start = np.random.default_rng(seed), [], pd.Timestamp('2025-01-06')
    for d in range(days):
        for i in range(60):
            n, at = d*60 + i, start + pd.Timedelta(d, 'D') + pd.Timedelta(int(86000*(i + rng.random())/60), 's')
            say = lambda kind, after, **more: rows.append(dict(event_id=f'{kind}{n}-{after}', type=kind, event_time=at + pd.Timedelta(after, 's'), received_time=at + pd.Timedelta(after + 1, 's'),
                user_id=f'u{rng.integers(200)}', decision_id=f'd{n}', item_id='i1', **more))
            say('decision', 0, seq=n); say('impression', 1, position=0)
            if rng.random() < .6:
                say('click', 5, position=0)
                for beat in range(1, 4): say('heartbeat', 5 + 10*beat, position=0, elapsed=float(np.round(np.exp(rng.normal(3, .6)), 1)))
    return pd.DataFrame(rows)

def judge(t):
    full = t.assign(slate=[['i1'] if k == 'decision' else None for k in t.type], app_version='3.0.0', segment=None)
    kinds = dict(event_id='string', type='string', event_time='timestamp(6)', received_time='timestamp(6)', user_id='string', decision_id='string', item_id='string', seq='int64', position='int64', elapsed='float64', slate='array<string>', app_version='string', segment='string')
    extra = {'latency_ms': 'float64', 'error': 'boolean', 'personalised': 'boolean', 'value': 'float64', 'score': 'int64'}
    full = full.astype({c: 'Int64' for c in ('seq', 'position')}).assign(**{c: None for c in extra})
    events = ibis.memtable(full[[*kinds, *extra]], schema=ibis.schema(kinds | extra))
    c = CFG.checks
    with mock.patch.object(checks, 'NUMBERS', ['elapsed']), mock.patch.object(checks, 'FLAGS', ['error']):
        counts, bins = day_counts(events, CFG.block_hours)
    judged = anomalies(counts, bins, CFG.watch)
    all_ = [completeness(events, c.max_missing), out_of_range(events, c.max_out_of_range), uniqueness(events), references(events, c.max_orphans), freshness(events, c.max_silent_hours), volume(judged, CFG.watch), distribution(unit_changes(bins, alarms(judged)))]
    return {x.name for x in all_ if x.answer == 'fail'}, all_

def defect(t, name):
    rng, pick = np.random.default_rng(6), lambda mask, share: mask & (np.random.default_rng(6).random(len(t)) < share)
    t = t.copy(); end = t.received_time.max()
    if name == 'completeness': t.loc[pick(t.type == 'click', .1), 'item_id'] = None
    if name == 'range': t.loc[pick(t.type == 'impression', .05), 'position'] = -1
    if name == 'uniqueness': t.loc[t.index[5:25], 'event_id'] = t.event_id[0]
    if name == 'references': t.loc[pick(t.type == 'click', .1), 'decision_id'] = 'd-nowhere'
    if name == 'freshness': t = t[~((t.type == 'click') & (t.received_time > end - pd.Timedelta(30, 'h')))]
    if name == 'volume': t = t[~((t.event_time.dt.floor('D') == pd.Timestamp('2025-01-30')) & t.type.isin(['impression', 'heartbeat']))]
    if name == 'distribution': t.loc[(t.event_time >= '2025-01-27') & (t.type == 'heartbeat'), 'elapsed'] *= 1000
    return t

def test_sound_telemetry_passes_every_check():
    failed, every = judge(log())
    assert failed == set() and [c.name for c in every] == ['completeness', 'range', 'uniqueness', 'references', 'freshness', 'volume', 'distribution']
    assert all(c.answer == 'pass' for c in every)

@pytest.mark.parametrize('name', ['completeness', 'range', 'uniqueness', 'references', 'freshness', 'volume', 'distribution'])
def test_one_seeded_defect_fails_its_check_and_no_other(name):
    failed, every = judge(defect(log(), name))
    assert failed == {name}
    if name == 'distribution': assert 'heartbeat.elapsed from 2025-01-27: milliseconds for seconds' in {c.name: c.detail for c in every}[name]

def test_lost_decisions_are_seen_by_their_serial_number():
    t = log(); gone = t.decision_id.isin([f'd{i}' for i in range(300, 420)])
    assert 'completeness' in judge(t[~gone])[0]

@pytest.mark.parametrize('first,answer', [('1996-03-29 18:36:55', 'pass'), ('1970-01-01', 'fail'), ('1989-12-31 23:59:59.999', 'fail')])
def test_the_ratings_of_1996_are_in_range_and_a_clock_at_1970_is_not(first, answer):
    when = [pd.Timestamp(first)]
    found = out_of_range(ibis.memtable(pd.DataFrame(dict(event_time=when, received_time=when, position=[0]))), 0.)
    assert found.answer == answer
