"Time is cut the same way for everyone: nothing crosses a cut, young labels are not zeros, samples keep their balance."
import numpy as np, pandas as pd, pytest
from hypothesis import example, given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.splits import Fold, balance, label, rolling_origin, sample, split_of, time_cuts

T0 = np.datetime64('2025-01-06T00:00:00.000', 'ms')                    # a Monday
moment = lambda ms: T0 + np.asarray(ms, dtype='int64').astype('timedelta64[ms]')
span = lambda ms: np.timedelta64(int(ms), 'ms')
days = lambda d: np.timedelta64(int(24*d), 'h')
quick = settings(max_examples=120, deadline=None, derandomize=True, database=None)

# --- train, validation, test

@quick
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), min_size=1), st.integers(5, 15), st.integers(0, 20), st.integers(0, 8))
def test_splits_are_windows_of_time_with_a_gap_between(rows, valid, more, embargo):
    event, known = np.array([e for e, _ in rows]), np.array([e + k for e, k in rows])
    cuts, gap = (valid, valid + more), embargo
    split = split_of(moment(event), moment(known), (moment(cuts[0]), moment(cuts[1])), np.timedelta64(gap, 'ms'))
    train, val, test, between = (split == s for s in ('train', 'valid', 'test', 'embargo'))
    assert (train | val | test | between).all()
    assert (known[train] < cuts[0]).all() and (known[val] < cuts[1]).all()
    assert (event[val] >= cuts[0] + gap).all() and (event[test] >= cuts[1] + gap).all()
    instant = split_of(moment(event), moment(event), (moment(cuts[0]), moment(cuts[1])), np.timedelta64(gap, 'ms'))  # nothing is lost beyond the gaps and what came late
    assert set(event[instant == 'embargo']) <= set(range(cuts[0], cuts[0] + gap)) | set(range(cuts[1], cuts[1] + gap))
    assert np.isin(split[instant != split], 'embargo').all() and (known >= cuts[0])[instant != split].all()

@quick
@given(st.integers(10, 300), st.floats(.02, .45), st.floats(.02, .45))
def test_cuts_leave_the_asked_shares(n, valid_share, test_share):
    times = moment(np.random.default_rng(n).permutation(10*n)[:n])
    valid, test = time_cuts(times, valid_share, test_share)
    assert abs((times >= test).sum() - test_share*n) <= 1 and abs(((times >= valid) & (times < test)).sum() - valid_share*n) <= 1.000001

@pytest.mark.parametrize('shares', [(0, .2), (.2, 0), (.5, .5), (-.1, .2), (.2, 1.)])
def test_shares_that_leave_nothing_are_refused(shares):
    with pytest.raises(TelemetryError, match='valid_share .* must be above 0 and leave something to train on'): time_cuts(moment(np.arange(9)), *shares)

# --- rolling origins

@quick
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 60)), min_size=3, max_size=60), st.integers(1, 4), st.integers(5, 120), st.integers(0, 40), st.booleans())
def test_no_row_crosses_a_cutoff(rows, folds, test, embargo, moving):
    "Whatever the rows: what is learned from happened and was final before the cutoff, what is tested happened after the embargo, and no moment is tested twice."
    event, ready = np.array([e for e, _ in rows]), np.array([e + r for e, r in rows])
    try: found = rolling_origin(moment(event), folds, span(test), span(embargo), train=span(50) if moving else None)
    except TelemetryError: assert event.max() + 1 - folds*test - embargo - (50 if moving else 1) < event.min(); return
    tested = np.zeros(len(rows), int)
    assert len(found) == folds and [f.cutoff for f in found] == sorted(f.cutoff for f in found) and found[-1].test_to > moment(event).max()
    for f in found:
        side = f.split(moment(event), moment(ready))
        assert (moment(ready)[side == 'train'] < f.cutoff).all() and (moment(event)[side == 'train'] < f.cutoff).all()
        assert (moment(event)[side == 'test'] >= f.cutoff + span(embargo)).all() and (moment(event)[side == 'test'] < f.test_to).all() and f.test_to - f.test_from == span(test)
        kept = (moment(event) >= f.train_from) & (moment(event) < f.cutoff) & (moment(ready) < f.cutoff)  # and nothing is lost for nothing
        assert (side == 'train').tolist() == kept.tolist()
        tested += side == 'test'
    assert tested.max(initial=0) <= 1 and (tested[moment(event) >= found[0].test_from] == 1).all()

def test_a_label_whose_window_crosses_the_cutoff_teaches_nothing():
    event = moment(np.arange(0, 100, 10))
    fold = Fold(moment(0), moment(50), moment(60), moment(100))
    assert fold.split(event, event + span(15)).tolist() == ['train']*4 + ['neither']*2 + ['test']*4
    assert fold.split(event, event).tolist() == ['train']*5 + ['neither'] + ['test']*4
    assert fold.split(event, event + span(10)).tolist()[4] == 'neither'      # ready at the cutoff is not before it

@pytest.mark.parametrize('start', range(7))
def test_whole_weeks_weigh_every_weekday_alike_wherever_the_log_ends(start):
    hours = T0 + days(start) + np.arange(45*24)*np.timedelta64(1, 'h')
    weekday = (hours.astype('datetime64[D]').astype(int) + 3) % 7
    for f in rolling_origin(hours, 3, days(7), days(1), weeks=True):
        side = f.split(hours, hours)
        for s in ('train', 'test'): assert len(set(np.bincount(weekday[side == s], minlength=7))) == 1, s
        assert f.train_from - hours.min() < days(7)                          # no week that was there is left out
    assert any(len(set(np.bincount(weekday[f.split(hours, hours) == 'train'], minlength=7))) > 1 for f in rolling_origin(hours, 3, days(5), days(1)))

@pytest.mark.parametrize('how,says', [(dict(folds=0), '0 folds'), (dict(test=days(0)), 'must be above 0'), (dict(embargo=days(-1)), 'embargo at least 0'), (dict(folds=9), 'no training stretch before'), (dict(weeks=True), 'not whole weeks'),
    (dict(test=days(7), weeks=True, train=days(3)), 'not whole weeks'), (dict(train=days(30)), 'no training stretch'), (dict(times=moment([])), 'there must be rows')])
def test_folds_that_cannot_be_are_refused(how, says):
    with pytest.raises(TelemetryError, match=says): rolling_origin(**dict(times=moment(np.arange(20)*86_400_000), folds=2, test=days(3), embargo=days(1)) | how)

# --- labels

outcome = st.tuples(st.integers(0, 5), st.integers(-3, 30), st.integers(0, 20), st.sampled_from([1., 2., -1.]))

@quick
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.lists(outcome, max_size=15), st.integers(1, 12), st.integers(0, 5), st.integers(0, 60))
@example([0], [(0, 5, 0, 1.)], 5, 0, 99)                                     # at the end of the window: outside
def test_labels_read_the_same_slowly(times, came, window, wait, as_of):
    came = [(i % len(times), e, k, v) for i, e, k, v in came]
    made = pd.DataFrame(dict(decision_id=[f'd{i}' for i in range(len(times))], event_time=moment(times)))
    said = pd.DataFrame([(f'd{i}', times[i] + e, times[i] + e + k, v) for i, e, k, v in came], columns=['decision_id', 'event_time', 'known_time', 'value'])
    said = said.assign(event_time=moment(said['event_time']), known_time=moment(said['known_time'])).astype({'decision_id': str, 'value': float})
    got = label(made, said, span(window), moment(as_of), span(wait))
    for i, t in enumerate(times):
        want = sum(v for j, e, k, v in came if j == i and 0 <= e < window and t + e + k < as_of) if t + window + wait <= as_of else None
        assert (np.isnan(got['value'][i]) if want is None else got['value'][i] == want) and got['ready'][i] == moment(t + window + wait)

def test_what_is_known_later_changes_no_label_of_then():
    made = pd.DataFrame(dict(decision_id=['a', 'b'], event_time=moment([0, 0])))
    early = pd.DataFrame(dict(decision_id=['a'], event_time=moment([3]), known_time=moment([4]), value=[1.]))
    late = pd.DataFrame(dict(decision_id=['b', 'a'], event_time=moment([3, 5]), known_time=moment([20, 25]), value=[7., 7.]))
    assert label(made, early, span(10), moment(20)).equals(label(made, pd.concat([early, late]), span(10), moment(20)))
    assert label(made, pd.concat([early, late]), span(10), moment(30))['value'].tolist() == [8., 7.]
    with pytest.raises(TelemetryError, match='must be longer than 0'): label(made, early, span(0), moment(1))

def test_labels_and_folds_together_leak_nothing():
    "Training rows of a fold have final labels, and these are the labels one would have given at the cutoff."
    rng, n = np.random.default_rng(3), 400
    made = pd.DataFrame(dict(decision_id=[f'd{i}' for i in range(n)], event_time=moment(np.sort(rng.integers(0, 10_000, n)))))
    after = rng.integers(0, 900, n)
    said = pd.DataFrame(dict(decision_id=made['decision_id'], event_time=made['event_time'] + pd.to_timedelta(after, 'ms'), value=1.))
    said['known_time'] = said['event_time'] + pd.to_timedelta(rng.integers(0, 100, n), 'ms')
    for f in rolling_origin(made['event_time'].to_numpy(), 3, span(1500), span(200)):
        now, end = (label(made, said, span(500), t, span(100)) for t in (f.cutoff, moment(10**6)))
        train = f.split(now['event_time'].to_numpy(), now['ready'].to_numpy()) == 'train'
        assert train.sum() > 100 and now['value'][train].notna().all() and (now['value'][train] == end['value'][train]).all() and now['value'][train].mean() < 1
        naive = (made['event_time'].to_numpy() < f.cutoff) & ~train
        assert naive.any() and now['value'][naive].isna().sum() > 5          # cut without windows, these would have been taken for nothing earned

# --- samples

def shown(n): return pd.DataFrame(dict(id=[f'r{i}' for i in range(n)], position=np.arange(n) % 10 // 7 + (np.arange(n) % 50 == 0)*2, clicked=np.arange(n) % 3 == 0))

@quick
@given(st.integers(1, 300), st.integers(1, 200), st.integers(0, 9), st.sampled_from([None, 'position']))
def test_samples_do_not_depend_on_order_and_grow_by_adding(size, n, seed, by):
    t = shown(size)
    small, large, mixed = sample(t, 'id', n, seed, by), sample(t, 'id', 2*n, seed, by), sample(t.sample(frac=1, random_state=seed), 'id', n, seed, by)
    assert set(small['id']) <= set(large['id']) and set(small['id']) == set(mixed['id']) and small.index.is_monotonic_increasing
    assert np.isclose(small['weight'].sum(), size) and (small['weight'] >= 1).all()
    if by is None: assert len(small) == min(n, size)

def test_balanced_samples_give_classes_equal_rows_and_say_so():
    t = shown(5000)
    some = sample(t, 'id', 300, 1, 'position')
    told = balance(t, some, 'position')
    assert told['after'].tolist() == [100, 100, 100]
    assert told['before'].tolist() == t['position'].value_counts().sort_index().tolist() and np.isclose(told[['share_before', 'share_after']].sum(), 1).all()
    assert abs(np.average(some['clicked'], weights=some['weight']) - t['clicked'].mean()) < .08 and set(sample(t, 'id', 300, 2, 'position')['id']) != set(some['id'])
    with pytest.raises(TelemetryError, match='n is 0'): sample(t, 'id', 0, 1)

def test_a_plain_sample_keeps_the_classes_in_proportion():
    t = shown(5000)
    told = balance(t, sample(t, 'id', 1500, 4), 'position')
    assert (told['share_before'] - told['share_after']).abs().max() < .03
