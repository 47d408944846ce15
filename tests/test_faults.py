"Every fault does what it says to the log, says so in the truth, and touches nothing else."
import collections, dataclasses, functools, json, tempfile
from pathlib import Path
import jsonschema, numpy as np, pandas as pd, pytest
from hypothesis import example, given, settings, strategies as st
from telemetry_loop.config import TelemetryError, from_dict
from telemetry_loop.faults import BOTS, EVERY, NONE, Faults, bots, chance, clocks, corrupt, damage, device_id, incidents, only, redeliver, stream, write_truth
from telemetry_loop.policy import PolicyConfig, bootstrap_policy
from telemetry_loop.schema import EVENTS, VERSION, event_schema
from telemetry_loop.simulate import SimulateConfig, World
from conftest import small_params

P = small_params(simulate=dict(users=120, days=8))
CFG, POLICY = from_dict(SimulateConfig, P['simulate'], 'simulate'), bootstrap_policy(from_dict(PolicyConfig, P['policy'], 'policy'))
TIMES = ('event_time', 'sent_time', 'received_time')

class Log:
    "A small world with these faults and no others, and what it left behind."
    def __init__(self, on, days=8, seed=5, **cfg):
        self.world = World(dataclasses.replace(CFG, faults=only(**dict(on)), **cfg), seed)
        with tempfile.TemporaryDirectory() as folder:
            self.lived = self.world.live(POLICY, days, to=Path(folder))
            self.files = {f.name: f.read_text().splitlines() for f in sorted(Path(folder).iterdir())}
        self.truth = self.world.truth_frames()
    @functools.cached_property
    def rows(self): # every line that is an object, with its place
        found = []
        for name, lines in self.files.items():
            for i, line in enumerate(lines, 1):
                try: event = json.loads(line)
                except json.JSONDecodeError: continue
                if isinstance(event, dict): found.append((name, i, event))
        return found
    @functools.cached_property
    def sound(self): # lines the truth does not call broken
        broken = set(zip(self.truth['broken'].file, self.truth['broken'].line))
        return [e for name, i, e in self.rows if (name, i) not in broken]
    @functools.cached_property
    def events(self): return {e['event_id']: e for e in reversed(self.sound)} # first delivery
    def frame(self, *kinds): return pd.DataFrame([e for e in self.events.values() if e['type'] in kinds]).pipe(lambda t: t.assign(**{c: t[c].str[:-1].astype('datetime64[ms]') for c in TIMES}))

@functools.lru_cache(None)
def log(**on): return Log(on)

def same_life(a, b): return all(np.array_equal(getattr(a.lived, f.name), getattr(b.lived, f.name)) for f in dataclasses.fields(a.lived)) and np.array_equal(a.world.clicks, b.world.clicks)

VALID = {k: jsonschema.Draft202012Validator(event_schema(k)) for k in EVENTS}
def keeps(line): # the tracking plan
    try: e = json.loads(line)
    except json.JSONDecodeError: return False
    return isinstance(e, dict) and e.get('type') in VALID and VALID[e['type']].is_valid(e)

# ---------------------------------------------------------------- one at a time
FAULTS = [dict(late=.05), dict(backfilled=.02), dict(stalled=.2), dict(shuffled=.1), dict(duplicated=.05), dict(malformed=.03), dict(violating=.03), dict(second_device=.3), dict(clock_skew=.3),
          dict(clock_1970=.1), dict(close_lost=.2), dict(background=.5), dict(bots=.05), dict(incidents_per_30_days=20., incident_size=.5), dict(unit_change=True), dict(new_schema=.5), dict(withdrawn=.2), dict(erased=.2)]

def test_the_list_is_complete(): assert {k for f in FAULTS for k in f} == set(EVERY) == {f.name for f in dataclasses.fields(Faults)} and all(EVERY.values())

@pytest.mark.parametrize('on', FAULTS, ids=lambda f: next(iter(f)))
def test_people_live_the_same_and_only_the_log_changes(on):
    clean, one = log(), log(**on)
    assert same_life(clean, one)
    assert (clean.files == one.files) == ('erased' in on)   # a request to be forgotten leaves no line

def test_all_together_and_twice_the_same():
    one, two = log(**EVERY), Log(EVERY)
    assert same_life(log(), one) and one.files == two.files
    for name, table in one.truth.items(): pd.testing.assert_frame_equal(table, two.truth[name])

def test_no_fault_disturbs_another():
    "What is late, twice or broken among people stays so when bots, clocks, closings and consents go wrong too."
    mess = dict(late=.05, duplicated=.05, malformed=.02, violating=.02)
    a, b = log(**mess), log(**mess, bots=.1, clock_skew=.2, close_lost=.2, withdrawn=.1)
    human = set(a.world.user_ids)
    key = lambda e: (e['type'], e.get('user_id'), e.get('item_id'), e.get('position'), e.get('purpose') or e.get('elapsed'), e['received_time'])
    def fate(l, quiet): # quiet: the same log without broken lines, which knows what they were
        known = {i: key(e) for i, e in quiet.events.items()}
        mine = lambda name: collections.Counter(k for k in (known[i] for i in l.truth[name].event_id) if k[1] in human and k[0] not in ('close', 'consent'))
        return mine('broken'), mine('duplicated')
    fine = dict(late=.05, duplicated=.05)
    assert fate(a, log(**fine)) == fate(b, log(**fine, bots=.1, clock_skew=.2, close_lost=.2, withdrawn=.1))

# ---------------------------------------------------------------- broken lines
def test_exactly_the_told_lines_break_the_plan():
    l = log(malformed=.03, violating=.03)
    truth, n = l.truth['broken'], sum(map(len, l.files.values()))
    assert abs(len(truth) - .06*n) < 5*np.sqrt(.06*n) and .35 < truth.violating.mean() < .65
    for t in truth.itertuples(): assert l.files[t.file][t.line - 1] == t.text and not keeps(t.text)
    assert all(VALID[e['type']].is_valid(e) for e in l.sound[::5])
    assert (pd.Series(t for t in truth[truth.violating].text).map(json.loads).map(type) == dict).all()

@given(st.floats(0, 2, exclude_max=True), st.integers(0, 10**9))
@example(np.nextafter(.6, 0), 0) # the longest cut
@example(0., 0)
@settings(max_examples=300, deadline=None)
def test_damage_always_breaks_the_plan(how, which):
    events = list(log().events.values())
    line = json.dumps(events[which % len(events)])
    bad, kind = damage(line, how)
    assert keeps(line) and not keeps(bad) and kind and bad.strip() and '\n' not in bad and 'null' not in bad # to many readers null is absent, not wrong

@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_corrupt_tells_which(n, share, seed):
    lines = [json.dumps(e) for e in list(log().events.values())[:n]]
    out, truth = corrupt(lines, share, np.random.default_rng(seed))
    assert len(truth) == round(share*n) and [t['line'] for t in truth] == [i for i, (a, b) in enumerate(zip(lines, out), 1) if a != b]
    assert not any(keeps(out[t['line'] - 1]) for t in truth)

def test_redeliver_keeps_the_set():
    lines = [str(i) for i in range(1000)]
    out = redeliver(lines, .1, np.random.default_rng(0))
    assert len(out) == 1100 and set(out) == set(lines) and out[:1000] != lines

# ---------------------------------------------------------------- clocks and ways
def test_a_wrong_clock_is_wrong_by_what_the_truth_says():
    right, wrong = log(), log(clock_skew=.3, clock_1970=.05)
    assert right.events.keys() == wrong.events.keys()
    kinds = wrong.truth['clocks'].kind.value_counts()
    assert {'constant', 'jump', '1970'} == set(kinds.index) and abs(kinds[['constant', 'jump']].sum()/120 - .3*.95) < .12
    a, b = (l.frame('click', 'heartbeat', 'impression', 'account', 'close').set_index('event_id').sort_index() for l in (right, wrong))
    told = b[['device_id']].merge(wrong.truth['clocks'], on='device_id', how='left').set_index(b.index)
    assert (a.received_time == b.received_time).all()   # our clock is right
    for c in ('event_time', 'sent_time'):
        off = np.where(told.jump.notna() & (a[c] >= told.jump), told.offset_after_s, told.offset_s)
        assert np.allclose((b[c] - a[c]).dt.total_seconds(), np.nan_to_num(off), atol=1e-6)
    assert (b.event_time.dt.year == 1970).any() and wrong.truth['clocks'].query('kind != "1970"')[['offset_s', 'offset_after_s']].abs().stack().between(20, 300).all()
    server = [k for k in right.events if right.events[k]['type'] in ('decision', 'request', 'item', 'exposure')]
    assert all(right.events[k] == wrong.events[k] for k in server) and not any('device_id' in right.events[k] for k in server)

def test_devices_are_opaque_and_a_share_has_two():
    l = log(second_device=.3)
    two = l.frame('impression').groupby('user_id').device_id.nunique()
    assert set(two) == {1, 2} and .1 < (two == 2).mean() < .45
    assert l.frame('impression').groupby('device_id').user_id.nunique().eq(1).all() and len({device_id(i) for i in range(10**5)}) == 10**5
    assert not any(e['device_id'].endswith(e['user_id'][1:]) for e in l.events.values() if 'device_id' in e)

def test_stalls_hold_back_half_a_minute_of_a_device():
    a, b = (l.frame('click', 'heartbeat', 'impression').set_index('event_id').sort_index() for l in (log(), log(stalled=.2)))
    held = (b.sent_time > a.sent_time); late = (b.received_time - b.sent_time).dt.total_seconds() >= 30
    assert (a.event_time == b.event_time).all() and .04 < held.mean() < .2 and .04 < late.mean() < .2
    assert ((b.sent_time - b.event_time)[held].dt.total_seconds() <= 30).all() and (b[held].sent_time.dt.second.isin([0, 30])).all()
    assert b[held].groupby(['device_id', 'sent_time']).size().max() > 1   # batches

def test_days_late_are_told_and_land_in_later_files():
    l = log(backfilled=.02)
    t = l.frame(*EVENTS); t['days'] = (t.received_time - t.event_time)/pd.Timedelta(1, 'D')
    here = l.truth['backfilled'][l.truth['backfilled'].event_id.isin(t.event_id)]   # some are still on their way
    assert set(here.event_id) == set(t[t.days >= 1].event_id) and 0 < len(here) <= len(l.truth['backfilled']) and t.days.max() < 5.01 and not t.days.between(.01, .99).any()
    name = {e['event_id']: f for f, _, e in l.rows}
    assert all(name[e] == f'{r:%Y-%m-%d}.jsonl' for e, r in t[['event_id', 'received_time']].itertuples(index=False))

def test_shuffled_lines_are_filed_later_than_received():
    order = lambda l: [e['received_time'] for _, _, e in l.rows]
    assert order(log()) == sorted(order(log())) and order(log(shuffled=.1)) != sorted(order(log(shuffled=.1)))
    assert any(e['received_time'][:10] < name[:10] for name, _, e in log(shuffled=.1).rows)
    assert {k for k in log(shuffled=.1).events} <= {k for k in log().events}

def test_duplicates_are_the_told_events():
    l = log(duplicated=.05)
    n = collections.Counter(e['event_id'] for e in l.sound)
    twice = {k for k, c in n.items() if c == 2}
    assert max(n.values()) == 2 and twice <= set(l.truth['duplicated'].event_id) and len(twice) > .9*len(l.truth['duplicated']) and abs(len(twice)/len(n) - .05) < .01

# ---------------------------------------------------------------- what people do not do
def test_lost_closings_are_the_told_ones():
    l = log(close_lost=.2)
    clicks, closed = l.frame('click'), l.frame('close')
    pair = lambda t: set(zip(t.decision_id, t.item_id))
    lost = pair(l.truth['closes_lost'])
    assert abs(len(lost)/len(clicks) - .2) < .05 and not lost & pair(closed)
    open_ = pair(clicks) - pair(closed) - lost
    assert len(open_) < .01*len(clicks)                 # still on their way when the log ends
    assert pair(log().frame('click')) - pair(log().frame('close')) <= open_ | pair(clicks) - pair(clicks)

def test_dwell_is_in_the_log_whatever_the_background_takes():
    "Beats pause with the app: their number is the time in front; `elapsed` counts both."
    plain, l = log(), log(background=.5)
    truth = l.truth['dwell'].set_index(['decision_id', 'item_id'])
    beats = l.frame('heartbeat').groupby(['decision_id', 'item_id'])
    assert (beats.size() == (truth.seconds//10).reindex(beats.size().index)).mean() > .99 and (truth.seconds == plain.truth['dwell'].seconds.to_numpy()).all()
    close = l.frame('close').set_index(['decision_id', 'item_id']).elapsed
    assert np.allclose(close, (truth.seconds + truth.away).reindex(close.index)) and (truth.away > 0).mean() > .1
    long = lambda log: (log.frame('heartbeat').groupby(['decision_id', 'item_id']).size() >= 3).sum()
    assert long(l) == long(plain)                       # the satisfied rate is what it was
    v = l.frame('visibility').sort_values(['event_time']).groupby(['decision_id', 'item_id'])
    assert (v.state.agg(list).map(tuple) == ('hidden', 'visible')).mean() > .98
    away = (v.event_time.max() - v.event_time.min()).dt.total_seconds()
    assert np.allclose(away, truth.away.reindex(away.index), atol=.01)
    span, inside = v.event_time.agg(['min', 'max']), l.frame('heartbeat').set_index(['decision_id', 'item_id']).event_time
    joined = span.join(inside, how='inner')
    assert not ((joined.event_time > joined['min'] + pd.Timedelta(10, 'ms')) & (joined.event_time < joined['max'] - pd.Timedelta(10, 'ms'))).any()
    nxt = l.frame('decision').sort_values('event_time'); nxt['next'] = nxt.groupby('user_id').event_time.shift(-1)
    late = l.frame('close').merge(nxt[['decision_id', 'next']], on='decision_id')
    assert not (late.event_time > late.next).any()      # nobody decides while away

def test_withdrawals_and_erasures_are_told():
    l = log(withdrawn=.3, erased=.2)
    said = l.frame('consent'); midnight = said.event_time.dt.normalize() == said.event_time
    no = said[~said.granted.astype(bool) & ~midnight]
    assert set(zip(no.user_id, no.purpose)) == set(zip(l.truth['withdrawals'].user_id, l.truth['withdrawals'].purpose)) and 15 < no.user_id.nunique() < 75 and no.purpose.nunique() == 4
    off = l.truth['withdrawals'].query('purpose == "personalisation"').user_id
    assert len(off) and not l.world.people['personalise'][np.isin(l.world.user_ids, off)].any()
    assert 10 < len(l.truth['erasures']) < 50 and l.truth['erasures'].time.is_unique
    first = l.frame('account').set_index('user_id').event_time
    assert (l.truth['erasures'].set_index('user_id').time >= first.reindex(l.truth['erasures'].user_id).fillna(pd.Timestamp('2025-01-06'))).all()

# ---------------------------------------------------------------- bots
def test_bots_leave_lines_and_count_for_nothing():
    l, plain = log(bots=.05), log()
    told = l.truth['bots']
    assert len(told) == 6 and set(told.kind) == set(BOTS) and not set(told.user_id) & set(l.world.user_ids)
    d = l.frame('decision'); d['bot'] = d.user_id.isin(told.user_id)
    assert d[d.bot].user_id.nunique() >= 4 and d[~d.bot].groupby('user_id').size().equals(plain.frame('decision').groupby('user_id').size())
    for kind in ('account', 'consent', 'impression', 'click', 'exposure', 'close', 'heartbeat'): assert l.frame(kind).user_id.isin(told.user_id).any(), kind
    assert (d.propensities.map(min) > 0).all() and sorted(d.seq) == list(range(len(d))) and d.sort_values('seq').event_time.is_monotonic_increasing
    counts = l.frame('click')[lambda t: ~t.user_id.isin(told.user_id)].item_id.value_counts()
    assert np.allclose(l.world.clicks[-1][np.searchsorted(l.world.item_ids, counts.index)], counts, atol=2) # the popularity policies see is that of people

def test_each_kind_of_bot_is_what_it_is_called():
    l = log(bots=.2); kind = l.truth['bots'].set_index('user_id').kind
    d, c = l.frame('decision'), l.frame('click')
    of = lambda t, k: t[t.user_id.map(kind) == k]
    after = of(c, 'fast').merge(d[['decision_id', 'event_time']], on='decision_id', suffixes=('', '_d'))
    assert ((after.event_time - after.event_time_d).dt.total_seconds() < 1.2).all()
    assert len(of(c, 'crawler')) > .98*of(d, 'crawler').slate.str.len().sum()
    gap = of(d, 'regular').sort_values('event_time').groupby('user_id').event_time.diff().dt.total_seconds()
    assert gap[gap < 60].groupby(of(d, 'regular').user_id).std().max() < .01
    hours = of(d, 'tireless').groupby(['user_id', d.event_time.dt.date]).event_time.agg(lambda t: t.dt.hour.nunique())
    assert hours.median() > 12 and d[~d.user_id.isin(kind.index)].groupby(['user_id', d.event_time.dt.date]).event_time.agg(lambda t: t.dt.hour.nunique()).max() < 6

def test_no_bots_without_users_and_at_least_one_with_a_share():
    assert len(bots(only(bots=0.), 1, 2000, 21)['kind']) == 0 and len(bots(only(bots=.001), 1, 120, 21)['kind']) == 1

# ---------------------------------------------------------------- incidents, units, versions
def test_incidents_are_as_many_as_asked_and_no_smaller():
    for seed in range(20):
        found = pd.DataFrame(incidents(only(incidents_per_30_days=10., incident_size=.4), seed, np.datetime64('2025-01-06'), 90))
        hours = (found.end - found.start)/pd.Timedelta(1, 'h')
        assert len(found) == 30 and hours.between(12, 48).all() and found.start.is_monotonic_increasing and found.start.min() >= pd.Timestamp('2025-01-13')
        assert found.query('kind != "errors"')['size'].abs().ge(.4).all() and found.query('kind == "drop"')['size'].between(-1, -.4).all()
    assert found.kind.nunique() >= 4 and not incidents(only(), 1, np.datetime64('2025-01-06'), 90)

@functools.lru_cache(None)
def struck(): return [Log(on, days=24, users=60) for on in (dict(), dict(incidents_per_30_days=20., incident_size=.5))]

def test_incidents_change_what_the_truth_says_by_as_much():
    plain, l = struck()
    told = l.truth['incidents']
    assert same_life(plain, l) and (told.lines > 0).sum() >= 8 and told.kind.nunique() >= 3
    a, b = (x.frame(*EVENTS) for x in (plain, l))
    ran = told[told.lines > 0]
    alone = [r for r in ran.itertuples() if not ((ran.start < r.end) & (ran.end > r.start) & (ran.incident != r.incident)).any()]
    assert len(alone) >= 3
    for r in alone:
        x, y = (t[(t.event_time >= r.start) & (t.event_time < r.end) & ((t.type == r.target) if r.by == 'type' else (t.app_version == r.target) if r.by == 'app_version' else t.elapsed.notna())] for t in (a, b))
        noise = 4*np.sqrt(len(x)*(1 + abs(r.size))) + 1
        if r.kind in ('drop', 'spike'): assert abs(len(y) - len(x)*(1 + r.size)) < noise, r
        if r.kind == 'errors': assert abs(y.error.astype(bool).sum() - x.error.astype(bool).sum() - len(x)*r.size) < noise
        if r.kind == 'latency': assert np.isclose(y.latency_ms.median()/x.latency_ms.median(), 1 + r.size, rtol=.02)
        if r.kind == 'dwell': assert np.isclose(y.elapsed.median()/x.elapsed.median(), 1 + r.size, rtol=.02)
    clear = lambda t: t[~np.any([(t.event_time >= r.start) & (t.event_time < r.end) for r in told.itertuples()], axis=0)]
    assert len(clear(a)) == len(clear(b)) > 0                  # outside incidents nothing moves

def test_the_unit_changes_silently_in_one_version_from_one_day():
    l = log(unit_change=True); told = l.truth['unit_change'].iloc[0]
    t = l.frame('heartbeat', 'close').merge(log().frame('heartbeat', 'close')[['event_id', 'elapsed']], on='event_id', suffixes=('', '_s'))
    wrong = (t.app_version == told.app_version) & (t.event_time >= told.start)
    assert 0 < wrong.sum() < len(t) and np.allclose(t.elapsed, t.elapsed_s*np.where(wrong, told.factor, 1))

def test_several_versions_are_in_use_at_once():
    t = log().frame('impression')
    assert t[t.event_time >= '2025-01-13'].app_version.nunique() == 2 and t[t.event_time < '2025-01-13'].app_version.nunique() == 1

def test_a_newer_schema_is_refused_until_the_plan_is_widened():
    l = Log(dict(new_schema=.9), days=8, users=300); told = l.truth['new_schema'].iloc[0]
    newer = [e for e in l.events.values() if e['schema_version'] == told.schema_version]
    assert newer and min(e['event_time'] for e in newer) >= f'{told.start:%Y-%m-%d}' and all(e['locale'] for e in newer) and not any('locale' in e for e in l.events.values() if e['schema_version'] == VERSION)
    refused = {e['event_id'] for e in l.events.values() if not VALID[e['type']].is_valid(e)}
    assert refused and refused == set(l.truth['refused_until_widened'].event_id) & set(l.events)
    wide = event_schema('survey'); wide['properties']['score'] |= {'maximum': int(told.maximum)}
    assert all(jsonschema.Draft202012Validator(wide).is_valid(l.events[e]) for e in refused)

# ---------------------------------------------------------------- the truth stays apart
def test_truth_is_written_beside_never_inside_the_log(tmp_path):
    l = log(**EVERY)
    write_truth(l.world, tmp_path/'truth')
    assert {p.stem for p in (tmp_path/'truth').iterdir()} == set(l.truth)
    assert set(pd.read_parquet(tmp_path/'truth/bots.parquet').user_id) == set(l.truth['bots'].user_id)
    (tmp_path/'data').mkdir(); (tmp_path/'data/2025-01-06.jsonl').write_text('{}\n')
    with pytest.raises(TelemetryError, match='truth must stay apart'): write_truth(l.world, tmp_path/'data')
    text = '\n'.join(line for lines in l.files.values() for line in lines)
    assert not any(word in text for word in ('harm', 'crawler', 'tireless', 'incident', '"device":', '"newer"', '"filed"'))

def test_truth_reaches_as_far_as_the_log():
    l = log(**EVERY)
    assert (l.truth['incidents'].start < '2025-01-14').all() and (l.truth['bots'].arrives < '2025-01-14').all()

def test_hashed_chance_is_even_and_belongs_to_its_keys():
    x = chance(3, 'name', np.arange(200_000), 4)
    assert abs(x.mean() - .5) < .003 and abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < .01 and (np.histogram(x, 20, (0, 1))[0] > 9500).all()
    assert x[77] == chance(3, 'name', 77, 4)[0] != chance(3, 'other', 77, 4)[0] and abs(np.corrcoef(x, chance(4, 'name', np.arange(200_000), 4))[0, 1]) < .01

def test_unknown_faults_are_refused_by_name():
    with pytest.raises(TelemetryError, match="unknown key 'gremlins'"): from_dict(Faults, NONE | dict(gremlins=1.), 'simulate.faults')
    with pytest.raises(TypeError): only(gremlins=1.)
