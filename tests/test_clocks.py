"Clocks: skew is told from delay, the order of a device's events stays, late news is amended or counted."
import numpy as np, pandas as pd, pytest, ibis
from hypothesis import given, settings, strategies as st
from telemetry_loop.clocks import ClocksConfig, amends, corrected, late_reason, lateness, skews, too_late, watermark
from telemetry_loop.config import RunConfig, load_params
from telemetry_loop.engine import connect
from conftest import ROOT

CFG = ClocksConfig(tolerance_s=2., min_sends=5, far_days=30., late_days=7.)
NAMES = ['device_id', 'user_id', 'type', 'event_time', 'sent_time', 'received_time']

@pytest.fixture(scope='module')
def con(): return connect(RunConfig(seed=0, threads=1, engine='duckdb', memory_gb=1.))

def at(seconds): return pd.Timestamp('2025-01-06') + pd.to_timedelta(np.round(np.asarray(seconds)*1000).astype('int64'), 'ms')

def world(seed, spread=300., stalled=.2, devices=80, days=3):
    "Visits of batches; true times; each device's constant skew."
    rng = np.random.default_rng(seed)
    skew, visits = rng.uniform(-spread, spread, devices).round(3), rng.integers(1, 12, devices)
    device = np.repeat(np.arange(devices), 5*visits)
    sent = np.round(np.repeat(rng.uniform(0, 86400*days, visits.sum()), 5) + rng.gamma(4, 2.5, (visits.sum(), 5)).cumsum(1).ravel(), 3)
    received = sent + np.round(.02 + rng.gamma(2, .15, len(sent)) + 30*(rng.random(len(sent)) < stalled), 3)
    b = np.repeat(np.arange(len(sent)), 3)
    true = np.round(sent[b] - rng.uniform(0, 8, len(b)), 3)
    return pd.DataFrame(dict(event_id=np.arange(len(b)), device_id=pd.Series(device[b]).map('d{:03d}'.format), user_id='u', type='click', true=at(true), event_time=at(true + skew[device[b]]),
        sent_time=at(sent[b] + skew[device[b]]), received_time=at(received[b]))), pd.Series(skew, [f'd{i:03d}' for i in range(devices)])

def told(con, rows, carry=None):
    "Every received day in turn: corrected rows, and the skews after the last."
    out = []
    for _, day in rows.groupby(rows.received_time.dt.floor('D')):
        carry = con.execute(skews(ibis.memtable(day), None if carry is None else ibis.memtable(carry), CFG))
        out.append(con.execute(corrected(ibis.memtable(day), ibis.memtable(carry))))
    return pd.concat(out), carry.set_index('device').skew_s

def ordered(out, time):
    "Share of devices whose events keep their true order."
    out = out.assign(time=time).sort_values(['device_id', 'true', 'event_id'])
    return out.groupby('device_id').time.apply(lambda t: t.is_monotonic_increasing).mean()

SEEDS = range(12) # declared once
@pytest.mark.parametrize('seed', SEEDS)
def test_order_is_kept_and_skew_found_among_stalls(con, seed):
    rows, truth = world(seed)
    out, found = told(con, rows)
    assert len(out) == len(rows) and set(out.event_id) == set(rows.event_id)
    assert ordered(out, out.event_time) == 1.
    assert (found - truth).abs().median() < 2 and ((found - truth).abs() < 4).mean() > .99
    assert (out.event_time <= out.received_time).all()
    mean = (rows.sent_time - rows.received_time).dt.total_seconds().groupby(rows.device_id).mean()     # the two ways it is often done
    assert (mean - truth).abs().median() > 2
    assert ordered(out, out.device_time + (out.received_time - out.sent_time)) < .5

def test_right_clocks_change_nothing(con):
    rows, _ = world(0, spread=0.)
    out, found = told(con, rows)
    assert (found == 0).all() and (out.skew_s == 0).all() and (out.event_time == out.device_time).all()

def sends(skew, delays, start='2025-01-06 10:00', device='d', **more):
    sent = pd.date_range(start, periods=len(delays), freq='min')
    shift = pd.to_timedelta(skew if np.ndim(skew) else [skew]*len(delays), 's')
    return pd.DataFrame(dict(device_id=device, user_id='u', type='click', event_time=sent + shift - pd.Timedelta('500ms'), sent_time=sent + shift, received_time=sent + pd.to_timedelta(np.round(delays, 3), 's').round('ms')) | more)

def windows(con, *frames):
    "The skew believed after each window, and the last window corrected."
    carry, beliefs = None, []
    for frame in frames:
        carry = con.execute(skews(ibis.memtable(frame), None if carry is None else ibis.memtable(carry), CFG))
        beliefs.append(carry.set_index('device').skew_s.get('d'))
    return beliefs, con.execute(corrected(ibis.memtable(frames[-1]), ibis.memtable(carry)))

@pytest.mark.parametrize('frames, expected', [
    ([sends(300, [30.]), sends(300, [.2])], [270., 299.8]),                                            # too early proves it at once
    ([sends(300, [.2]*6), sends(300, [30.]*2), sends(300, [.9]*6)], [299.8]*3),                        # stalls and slower days change nothing, to the millisecond
    ([sends(300, [.2]*6), sends(0, [.2]*6)], [299.8, 0.]),                                             # set right
    ([sends(300, [.2]*6), sends(-200, [.2]*6)], [299.8, -200.2]),                                      # set back
    ([sends(0, [.2]*6), sends(120, [.2])], [0., 119.8]),                                               # set ahead
    ([sends(-300, [.2]*2)]*3, [0., 0., -300.2]),                                                       # behind, two sends a day: believed when five agree
    ([sends(0, [30.]*2), sends(0, [.2]), sends(0, [30.]*4)], [0., 0., 0.]),                            # a timely send ends the doubt
    ([sends(-300, [.2]*2), sends(5, [.2], device='other'), sends(-300, [.2]*3)], [0., 0., -300.2]),    # a silent day keeps what was known
    ([sends(-300, [.2]*2), sends(5, [.2], device='other'), sends(-300, [30.]*3)], [0., 0., -300.2]),   # and the best of all its sends
    ([sends(1.9, [.05]*6), sends(1.9, [.0]*6), sends(3., [.1]*6)], [0., 0., 0.]),                      # within the tolerance, and near it once there
    ([sends(-86400*365*55, [.2])], [-86400*365*55 - .2]),                                              # 1970: one send is enough
    ([sends(86400*365*75, [.2]*2)], [86400*365*75 - .2]),                                              # 2100
    ([sends([0]*6 + [86400*365*75], [.2]*7)], [0.]),                                                   # one broken stamp among sound ones
    ([sends(0, [86400*3.]*3)], [0.]),                                                                  # three days underway are no clock
])
def test_what_is_believed(con, frames, expected):
    beliefs, out = windows(con, *frames)
    assert beliefs == pytest.approx(expected, abs=1e-6)
    assert (out.event_time <= out.received_time).all()

def test_constant_clock_is_corrected_by_a_constant_over_windows(con):
    rng = np.random.default_rng(3)
    frames = [sends(137., .05 + rng.gamma(2, .2, 8) + 30*(rng.random(8) < .5), f'2025-01-{6+i:02d} 10:00') for i in range(10)]
    beliefs, _ = windows(con, *frames)
    assert len(set(beliefs[1:])) == 1

def test_server_events_and_unknown_sending_are_trusted(con):
    rows = pd.concat([sends(300, [.2]*6), sends(0, [.2], type='decision'), sends(300, [.2]).assign(sent_time=pd.NaT), sends(0, [.2], device=None, user_id=None, type='request')])
    out = told(con, rows)[0]
    assert out.groupby('type').skew_s.unique().map(list).to_dict() == dict(click=[299.8], decision=[0.], request=[0.])
    behind = told(con, pd.concat([sends(-300, [.2]*6), sends(0, [.2]*6, type='decision')]))[0]
    assert behind.groupby('type').skew_s.unique().map(list).to_dict() == dict(click=[-300.2], decision=[0.])
    only = told(con, sends(300, [.2]*6).assign(sent_time=pd.NaT))[0]
    assert (only.skew_s == 0).all() and (only.event_time == only.received_time).all()                  # nothing is known before it happens

def test_without_a_device_the_user_has_one(con):
    rows = sends(300, [.2]*3, device=None)
    out, found = told(con, rows.assign(device_id=pd.Series([None]*3, dtype='str')))
    assert found.to_dict() == dict(u=299.8) and (out.skew_s == 299.8).all()

def test_the_cut_at_receipt_keeps_the_order(con):
    "A clock 1.5 s ahead counts as right; the batch that was overtaken must not end after what overtook it."
    rows = pd.DataFrame(dict(device_id='d', user_id='u', type='click', event_time=at([10+1.5, 10.1+1.5]), sent_time=at([10.1+1.5, 10.2+1.5]), received_time=at([40., 10.3])))
    out = told(con, rows)[0].sort_values('device_time')
    assert out.skew_s.tolist() == [0, 0] and out.event_time.is_monotonic_increasing and (out.event_time <= out.received_time).all()

def test_a_stamp_later_than_its_sending_moves_no_other(con):
    rows = sends(1.5, [.1]*6)
    odd = rows.assign(event_time=[pd.Timestamp('2100-01-01'), *rows.event_time[1:]])
    plain, out = told(con, rows)[0].sort_values('sent_time'), told(con, odd)[0].sort_values('sent_time')
    assert plain.event_time.tolist()[1:] == out.event_time.tolist()[1:] and out.event_time.iloc[0] == out.received_time.iloc[0]

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 90_000), st.integers(-400_000, 400_000), st.integers(0, 40_000)), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_neither_row_order_nor_copies_matter_and_order_within_a_window_stays(con, sent, random):
    device, when, skew, delay = map(np.array, zip(*sent))
    skew = pd.Series(skew).groupby(device).transform('first').to_numpy() # a constant clock
    rows = pd.DataFrame(dict(device_id=device, user_id='u', type='click', event_time=at((when + skew)/1000), sent_time=at((when + skew)/1000), received_time=at((when + delay)/1000)))
    other = rows.iloc[random.sample(range(len(rows)), len(rows))]
    a, b = (told(con, r)[0].sort_values(['device_id', 'device_time', 'received_time']).reset_index(drop=True) for r in (rows, other))
    pd.testing.assert_frame_equal(a, b)
    assert a.groupby('device_id').event_time.apply(lambda t: t.is_monotonic_increasing).all() and (a.event_time <= a.received_time).all()

def test_late_news_amends_or_is_counted(con):
    when = ['2025-01-06 23:59:59', '2025-01-07 00:00:00', '2025-01-02 10:00:00', '2024-12-31 10:00:00.000', '2024-12-31 09:59:59.999']
    rows = ibis.memtable(pd.DataFrame(dict(event_time=pd.to_datetime(when, format='ISO8601'), received_time=pd.Timestamp('2025-01-07 10:00'))))
    got = con.execute(rows.select(s=lateness(rows), amends=amends(rows, CFG), late=too_late(rows, CFG), mark=watermark(rows.received_time, CFG)))
    assert got.s.tolist() == [36001, 36000, 5*86400, 7*86400, 7*86400 + .001]
    assert got.amends.tolist() == [True, False, True, True, False] and got.late.tolist() == [False]*4 + [True]
    assert (got.mark == pd.Timestamp('2024-12-31 10:00')).all()
    assert late_reason(CFG) == 'late: received more than 7 days after it happened'

def test_params_name_every_value(): assert load_params(ClocksConfig, 'clocks', ROOT/'params.yaml').min_sends >= 2
