"Signals: the true ones found among the null ones, flips, proxies, the registry, and one seeded defect for each check."
import contextlib, hashlib
import ibis, numpy as np, pandas as pd, pytest
from telemetry_loop.anomalies import anomalies
from telemetry_loop.config import TelemetryError, load_params, read_json
from telemetry_loop.signals import (SignalsConfig, admitted, associations, audit, causal_effect, completeness, day_counts, distribution, drifts, freshness, out_of_range,
                                    rank_correlation, ranked, references, require_registered, uniqueness, unit_changes, volume)
from conftest import ROOT

CFG = load_params(SignalsConfig, 'signals', ROOT/'params.yaml')
SEEDS = range(401, 451)                                    # fifty, declared once
NAMES = [f's{i}' for i in range(23)]                       # the first three are true

def people(seed, users=600, windows=4, shared=0., flip=None):
    "Twenty-three signals of users in windows; three move the outcome; `shared` is the correlation of the others."
    rng = np.random.default_rng(seed); n = users*windows
    who, window = np.tile(np.arange(users), windows), np.repeat(np.arange(windows), users)
    habit = rng.normal(size=(users, 23))[who]
    x = .7*habit + .7*rng.normal(size=(n, 23))
    x[:, 3:] = np.sqrt(1 - shared)*x[:, 3:] + np.sqrt(shared)*rng.normal(size=(users, 1))[who]
    sign = np.ones(n) if flip is None else np.where(window >= flip, -1., 1.)
    y = .25*(sign*x[:, 0] + x[:, 1] - x[:, 2]) + .7*rng.normal(size=users)[who] + .7*rng.normal(size=n)
    return pd.DataFrame(x, columns=NAMES).assign(user_id=who, window=window, active=True, arm=np.nan, returned=(y > 0)*1.)

@pytest.mark.parametrize('shared', [0., .6])
def test_three_true_among_twenty_null(shared):
    "Fifty seeds: all recovered, realised false discoveries at most 10 % at q = 5 %; p < .05 without correction does not keep that."
    recovered, ours, naive = [], [], []
    for seed in SEEDS:
        found = associations(people(seed, shared=shared), NAMES, ['returned'])
        wrong = lambda picked: len(set(picked) - set(NAMES[:3]))/max(1, len(picked))
        picked = found.signal[found.q_value <= CFG.audit.max_q].tolist()
        recovered.append(set(NAMES[:3]) <= set(picked)); ours.append(wrong(picked)); naive.append(wrong(found.signal[found.p_value < .05].tolist()))
    print(f'shared {shared}: recovered {np.mean(recovered):.2f}, FDR {np.mean(ours):.3f}, naive {np.mean(naive):.3f}')
    assert np.mean(recovered) == 1 and np.mean(ours) <= .10     # 5 % and three standard errors of fifty runs are .05 + 3*.11/sqrt(50) = .097
    assert np.mean(naive) > (.15 if shared == 0 else .10)

def test_null_signals_are_rejected_with_the_number():
    judged = audit(people(1), NAMES, ['returned'], CFG.audit, {})
    assert admitted(judged) == NAMES[:3]
    for r in judged[judged.verdict == 'rejected'].itertuples(): assert r.reason.startswith(('q ', 'effect ')) and any(ch.isdigit() for ch in r.reason)

def test_a_price_too_high_is_refused():
    judged = audit(people(1), NAMES[:3], ['returned'], CFG.audit, {'s0': 1e6})
    assert admitted(judged) == ['s1', 's2'] and judged.reason[0].startswith('value per event')

def test_a_sign_that_turns_on_day_40_is_flagged_by_the_next_audit():
    "Weekly windows: the audit of day 35 sees nothing; that of day 56, the first with a whole window after the turn and its outcomes, does."
    table = people(2, users=1500, windows=8, flip=6)                # the window from day 42 on is the first that starts after day 40
    flagged = lambda windows: associations(table[table.window < windows], NAMES, ['returned']).set_index('signal').flipped.dropna().to_dict()
    assert flagged(5) == {} and flagged(7) == {'s0': 6.} and flagged(8) == {'s0': 6.}
    assert admitted(audit(table, NAMES, ['returned'], CFG.audit, {})) == ['s1', 's2']

def trial(seed, lever, push=.5, users=12000):
    rng = np.random.default_rng(seed); activity, arm = rng.normal(size=users), rng.integers(0, 2, users)
    clicks = activity + rng.normal(size=users) + push*arm
    y = activity + lever*clicks + rng.normal(size=users)
    return pd.DataFrame(dict(user_id=np.arange(users), window=0, active=True, arm=arm.astype(float), clicks=clicks, returned=(y > 0)*1.))

@pytest.mark.parametrize('lever,push,evidence', [(0., .5, 'proxy only'), (1., .5, 'causal'), (1., 0., 'correlational')])
def test_lever_or_proxy(lever, push, evidence):
    told = [audit(trial(s, lever, push), ['clicks'], ['returned'], CFG.audit, {}).iloc[0] for s in range(10)]
    assert all(t.effect > .3 and t.q_value < 1e-6 for t in told)            # the correlation alone says yes each time
    assert sum(t.evidence == evidence for t in told) >= 9
    if evidence == 'proxy only': assert all(t.verdict == 'rejected' for t in told if t.evidence == evidence)

def test_the_wald_interval_holds_no_effect():
    inside = [(lambda e: e['causal_lower'] <= 0 <= e['causal_upper'])(causal_effect(trial(s, 0., users=4000), 'clicks', 'returned', .4)) for s in range(60)]
    assert np.mean(inside) >= .88

def test_many_rows_of_few_users_are_few_users():
    rng = np.random.default_rng(3); user = np.repeat(np.arange(60), 40)
    p = []
    for _ in range(60):
        a, b = (ranked(rng.normal(size=60)[user] + .1*rng.normal(size=2400), np.zeros(2400)) for _ in range(2))
        rho, se = rank_correlation(a, b, user); p.append(abs(rho)/se > 1.96)
    assert np.mean(p) <= .15

def test_training_refuses_an_unregistered_signal():
    require_registered(CFG.registry, CFG.registry)
    with pytest.raises(TelemetryError, match="'horoscope' is not in signals.registry"): require_registered(['satisfied', 'horoscope'], CFG.registry)
    with contextlib.chdir(ROOT), pytest.raises(TelemetryError, match='horoscope'): require_registered(['horoscope'])

def test_the_stage_gives_the_same_bytes_twice(tiny_run, tmp_path):
    "On a tiny world, copied so that the shared run stays as it is."
    import shutil
    from telemetry_loop.signals import run
    for part in ('ingest', 'sessions'): shutil.copytree(tiny_run/'artifacts'/part, tmp_path/'artifacts'/part)
    shutil.copy(tiny_run/'params.yaml', tmp_path)
    with contextlib.chdir(tmp_path):
        told = []
        for _ in range(2):
            run(); told.append([hashlib.md5(p.read_bytes()).hexdigest() for p in (*sorted((tmp_path/'artifacts/signals').iterdir()), tmp_path/'metrics/signals.json')])
        assert told[0] == told[1] and len(told[0]) == 6
        found = read_json('metrics/signals.json')
    assert found['checks']['uniqueness'] == 'pass' and found['effects'] == {} and found['admitted'] == [] # twelve days hold no two whole windows

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

def checks(t):
    full = t.assign(slate=[['i1'] if k == 'decision' else None for k in t.type], app_version='3.0.0', segment=None)
    kinds = dict(event_id='string', type='string', event_time='timestamp(6)', received_time='timestamp(6)', user_id='string', decision_id='string', item_id='string', seq='int64', position='int64', elapsed='float64', slate='array<string>', app_version='string', segment='string')
    extra = {'latency_ms': 'float64', 'error': 'boolean', 'personalised': 'boolean', 'value': 'float64', 'score': 'int64'}
    full = full.astype({c: 'Int64' for c in ('seq', 'position')}).assign(**{c: None for c in extra})
    import telemetry_loop.signals as signals
    from unittest import mock
    events = ibis.memtable(full[[*kinds, *extra]], schema=ibis.schema(kinds | extra))
    c = CFG.checks
    with mock.patch.object(signals, 'NUMBERS', ['elapsed']), mock.patch.object(signals, 'FLAGS', ['error']):
        counts, bins = day_counts(events, CFG.block_hours)
    judged = anomalies(counts, bins, CFG.watch)
    from telemetry_loop.anomalies import alarms
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
    failed, every = checks(log())
    assert failed == set() and [c.name for c in every] == ['completeness', 'range', 'uniqueness', 'references', 'freshness', 'volume', 'distribution']
    assert all(c.answer == 'pass' for c in every)

@pytest.mark.parametrize('name', ['completeness', 'range', 'uniqueness', 'references', 'freshness', 'volume', 'distribution'])
def test_one_seeded_defect_fails_its_check_and_no_other(name):
    failed, every = checks(defect(log(), name))
    assert failed == {name}
    if name == 'distribution': assert 'heartbeat.elapsed from 2025-01-27: milliseconds for seconds' in {c.name: c.detail for c in every}[name]

def test_lost_decisions_are_seen_by_their_serial_number():
    t = log(); gone = t.decision_id.isin([f'd{i}' for i in range(300, 420)])
    assert 'completeness' in checks(t[~gone])[0]

def test_each_kind_of_drift_and_no_other():
    "Input, label and propensity drift, each injected into its column alone."
    rng = np.random.default_rng(7); user = rng.integers(0, 900, 9000)
    columns = lambda: {'clicks': ('input', rng.normal(size=9000), user), 'kind': ('input', rng.choice(['a', 'b', 'c'], 9000), user), 'reward': ('label', (rng.random(9000) < .3)*1., user), 'propensity': ('propensity', rng.random(9000), user)}
    then = columns()
    assert not drifts(then, columns(), CFG.drift).drifted.any()
    for name, moved in dict(clicks=rng.normal(.5, 1, 9000), kind=rng.choice(['a', 'b', 'd'], 9000), reward=(rng.random(9000) < .5)*1., propensity=rng.random(9000)**2).items():
        now = columns(); now[name] = (now[name][0], moved, user)
        found = drifts(then, now, CFG.drift)
        assert found.name[found.drifted].tolist() == [name]
