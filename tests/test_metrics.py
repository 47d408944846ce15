"How good a ranking is, for whom and at what cost: hand-made ranks and lists, ties, padding, equal and unequal groups, disturbed histories."
import subprocess, sys
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import mean
from telemetry_loop.metrics import (attacked, beyond_precision, by_group, catalogue_use, cold, concentration, coverage, degradation, diversity, exposure, miscalibration,
    mrr, ndcg, noisy, novelty, paired, parity, popularity_lift, rank_of_target, recall, summarise, thinned, top_k)

NONE = np.full((1, 1), -1)

def test_ranks_by_hand():
    s = np.array([[3., 1, 2, 0], [0, 1, 2, 3]])
    assert rank_of_target(s, [1, 1], np.array([[-1], [-1]])).tolist() == [3, 3]
    assert rank_of_target(s, [1, 1], np.array([[0], [3]])).tolist() == [2, 2]
    assert rank_of_target(s, [1, 1], np.array([[0, 2], [3, -1]])).tolist() == [1, 2]

def test_ties_count_against_the_target():
    assert rank_of_target(np.zeros((1, 50)), [0], NONE)[0] == 50
    assert rank_of_target(np.array([[1., 1, 0]]), [0], NONE)[0] == 2

def test_available_by_row_and_for_all():
    s = np.array([[3., 1, 2], [3, 1, 2]])
    only = np.array([[False, True, True], [True, True, True]])
    assert rank_of_target(s, [1, 1], np.full((2, 1), -1), only).tolist() == [2, 3]
    assert rank_of_target(s, [1, 1], np.full((2, 1), -1), np.array([False, True, False])).tolist() == [1, 1]

def test_nothing_removes_the_target():
    assert rank_of_target(np.array([[3., 1, 2]]), [1], np.array([[1]]), np.array([True, False, True]))[0] == 3

def test_minus_infinity_is_a_score_not_a_removal():
    assert rank_of_target(np.array([[-np.inf, -np.inf, 0.]]), [0], np.array([[2]]))[0] == 2

def test_refusals():
    with pytest.raises(TelemetryError, match='1 NaN'): rank_of_target(np.array([[0., np.nan]]), [0], NONE)
    with pytest.raises(TelemetryError, match='outside'): rank_of_target(np.zeros((1, 3)), [3], NONE)
    with pytest.raises(TelemetryError, match='outside'): rank_of_target(np.zeros((1, 3)), [-1], NONE)
    with pytest.raises(TelemetryError, match='same targets'): paired(np.ones(2), np.ones(3), np.arange(2))

@settings(max_examples=50, deadline=None)
@given(arrays(float, (4, 9), elements=st.integers(-3, 3)), arrays(int, 4, elements=st.integers(0, 8)), arrays(int, (4, 3), elements=st.integers(-1, 8)))
def test_rank_agrees_with_counting(scores, target, seen):
    for row, (s, t, gone) in enumerate(zip(scores, target, seen)):
        rivals = [i for i in range(9) if i != t and i not in gone and s[i] >= s[t]]
        assert rank_of_target(scores, target, seen)[row] == len(rivals) + 1

def test_metrics_by_hand():
    assert ndcg(np.array([1, 3, 11]), 10).tolist() == [1, .5, 0]
    assert recall(np.array([1, 10, 11]), 10).tolist() == [1, 1, 0]
    assert mrr(np.array([4])).tolist() == [.25]

def test_intervals_widen_when_rows_belong_to_few_users():
    rank = np.repeat(np.random.default_rng(0).integers(1, 30, 50), 8)
    alone, together = summarise(rank, np.arange(400))['ndcg@10'], summarise(rank, np.repeat(np.arange(50), 8))['ndcg@10']
    assert together.value == alone.value and together.ci_upper - together.ci_lower > 2*(alone.ci_upper - alone.ci_lower)

def test_small_groups_stay_without_a_value():
    group, user = np.array(['a']*6 + ['b']*6), np.array([0, 1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9])
    found = by_group(np.ones(12), group, 5, user)
    assert found['a'].value == 1 and found['b'].value is None and list(found) == ['a', 'b']

def test_lists_by_hand():
    s = np.array([[3., 1, 2, 0], [1, 1, 1, 1]])
    assert top_k(s, 3, np.full((2, 1), -1)).tolist() == [[0, 2, 1], [0, 1, 2]]
    assert top_k(s, 3, np.array([[0, -1], [1, 2]])).tolist() == [[2, 1, 3], [0, 3, -1]]
    assert top_k(s, 9, np.full((2, 1), -1), np.array([True, False, False, True])).tolist() == [[0, 3] + [-1]*7]*2
    assert top_k(np.array([[-np.inf, 0.]]), 2, NONE).tolist() == [[1, 0]]              # minus infinity is a score, not a removal
    assert top_k(np.array([[0, 2]], np.uint8), 1, NONE).tolist() == [[1]]
    with pytest.raises(TelemetryError, match='1 NaN'): top_k(np.array([[0., np.nan]]), 1, NONE)
    with pytest.raises(TelemetryError, match='k is 0'): top_k(s, 0, NONE)

@settings(max_examples=50, deadline=None)
@given(arrays(float, (4, 9), elements=st.integers(-3, 3)), arrays(int, (4, 3), elements=st.integers(-1, 8)), st.integers(1, 11))
def test_lists_agree_with_sorting_and_with_ranks(scores, seen, k):
    top = top_k(scores, k, seen)
    for row in range(4):
        left = sorted((i for i in range(9) if i not in seen[row]), key=lambda i: (-scores[row, i], i))
        assert top[row].tolist() == (left + [-1]*k)[:k]
    target = np.arange(4)
    sure = (rank_of_target(scores, target, seen) <= k) & ~(seen == target[:, None]).any(1)
    assert (top[sure] == target[sure, None]).any(1).all()

def test_beyond_precision_by_hand():
    lists, genre, seen = np.array([[0, 1], [0, 2], [0, -1], [-1, -1]]), np.array(['a', 'a', 'b', 'b']), np.array([8, 4, 2, 2])
    assert coverage(lists, 4) == .75 and coverage(lists[3:], 4) == 0
    assert concentration(np.array([[2], [2]]), 4) == 1 and concentration(np.arange(4)[:, None], 4) == 0
    assert np.isclose(concentration(np.array([[0], [0], [0], [1]]), 2), .5) and np.isnan(concentration(lists[3:], 4))
    assert novelty(lists, seen)[:3].tolist() == [1.5, 2, 1] and np.isnan(novelty(lists, seen)[3])
    assert novelty([[1]], np.array([4, 0])).tolist() == [2]                             # an item never seen counts as seen once
    assert diversity(lists, genre)[:2].tolist() == [0, 1] and np.isnan(diversity(lists, genre)[2:]).all()
    assert np.allclose(diversity([[0, 1], [0, 2]], np.array([[1., 0], [-2, 0], [0, 0]])), [2, 1])
    history = np.array([[-1, 0, 2], [-1, -1, 3], [-1, -1, -1], [0, 1, 2]])
    assert popularity_lift(lists, history, seen)[:2].tolist() == [6/5, 5/2] and np.isnan(popularity_lift(lists, history, seen)[2:]).all()
    found = miscalibration(np.array([[0, 3], [2, 3], [2, 3]]), np.array([[1, 2], [0, 1], [0, 2]]), genre)
    assert np.allclose(found, [0, np.log(100), .5*np.log(.5/.005) + .5*np.log(.5/.995)])
    many = np.array([[1., 0], [5, 5], [0, 0]])                                          # an item's weights share its one vote; without any it has none
    assert np.allclose(miscalibration([[1, 2]], [[0, 1]], many), .75*np.log(.75/(.99*.5 + .01*.75)) + .25*np.log(.25/(.99*.5 + .01*.25)))

def test_refusals_beyond_precision():
    for measure in (coverage, concentration):
        with pytest.raises(TelemetryError, match='item 4; the catalogue has 4'): measure(np.array([[4]]), 4)
    with pytest.raises(TelemetryError, match='catalogue has 2'): novelty([[2]], np.ones(2))
    with pytest.raises(TelemetryError, match='below 0'): miscalibration([[0]], [[0]], np.array([[-1., 1]]))
    with pytest.raises(TelemetryError, match='alpha is 1'): miscalibration([[0]], [[0]], np.array(['a']), 1)
    with pytest.raises(TelemetryError, match='2 lists, 1 histories'): beyond_precision(np.zeros((2, 1), int), np.zeros((1, 1), int), np.arange(2), np.ones(2), ['a', 'b'])

@settings(max_examples=50, deadline=None)
@given(arrays(int, (5, 4), elements=st.integers(-1, 6)), arrays(int, (5, 6), elements=st.integers(-1, 6)), arrays(int, 7, elements=st.integers(0, 50)), st.permutations(range(4)), st.permutations(range(7)))
def test_ranges_and_order_and_names_do_not_matter(lists, histories, seen, order, name):
    of = np.array([[1., 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    name = np.array(name); back = np.argsort(name)
    def all_of(lists, histories, seen, of): return [novelty(lists, seen), diversity(lists, of), popularity_lift(lists, histories, seen), miscalibration(lists, histories, of), coverage(lists, 7), concentration(lists, 7)]
    found = all_of(lists, histories, seen, of)
    for x, low, high in zip(found, (0, 0, 0, -1e-9, 0, -1e-9), (np.log2(351), 2, np.inf, np.log(100) + 1e-9, 1, 1 + 1e-9)):
        x = np.atleast_1d(x)[~np.isnan(np.atleast_1d(x))]
        assert ((x >= low) & (x <= high)).all()
    renamed = [np.where(x >= 0, back[x], -1) for x in (lists[:, list(order)], histories)]   # item i is called back[i] now
    for x, y in zip(found, all_of(*renamed, seen[name], of[name])): np.testing.assert_allclose(x, y, atol=1e-9)

def test_coverage_and_concentration_without_each_person():
    rng, n = np.random.default_rng(8), 60
    user, lists = np.repeat(np.arange(40), 2), np.argsort(np.log(np.arange(1, n + 1)) - rng.gumbel(size=(80, n)), 1)[:, :5]
    lists[3, 2:] = -1
    found = catalogue_use(lists, n, user)
    for name, measure in (('coverage', coverage), ('concentration', concentration)):
        less = np.array([measure(lists[user != u], n) for u in range(40)])
        jackknife = np.sqrt(39/40*((less - less.mean())**2).sum())
        assert found[name].value == measure(lists, n) and np.isclose((found[name].value - found[name].ci_lower)/1.959964, jackknife, rtol=.02 if name == 'concentration' else 1e-6), name
    assert all(e.ci_lower is None for e in catalogue_use(lists[:2], n, user[:2]).values())  # one person

def test_report_of_lists_leaves_out_what_says_nothing():
    lists, history = np.array([[0, 1], [0, 1], [2, -1], [-1, -1]]), np.array([[0], [1], [-1], [2]])
    found = beyond_precision(lists, history, np.array([7, 7, 8, 9]), np.array([2, 1, 1]), np.array(['a', 'b', 'b']))
    assert list(found) == [f'{m}@2' for m in ('coverage', 'concentration', 'novelty', 'diversity', 'popularity_lift', 'miscalibration')]
    assert {m: e.n for m, e in found.items()} == {'coverage@2': 4, 'concentration@2': 4, 'novelty@2': 3, 'diversity@2': 2, 'popularity_lift@2': 2, 'miscalibration@2': 2}
    assert found['novelty@2'] == mean([1.5, 1.5, 2], [7, 7, 8]) != mean([1.5, 1.5, 2]) and found['popularity_lift@2'].value == np.mean([.75, 1.5])
    assert found['coverage@2'].value == 1 and found['coverage@2'].ci_lower < 1 == found['coverage@2'].ci_upper
    empty = beyond_precision(lists[:0], history[:0], [], np.ones(3), ['a', 'b', 'b'])
    assert all(e.value is None for e in empty.values())

def test_groups_of_several_attributes_and_unknown_groups():
    group, user = {'sex': list('fffmmm'), 'old': [True, True, False, True, True, False]}, np.arange(6)
    found = by_group(np.arange(6.), group, 2, user)
    assert {g: e.value for g, e in found.items()} == {('f', False): None, ('f', True): .5, ('m', False): None, ('m', True): 3.5}
    assert by_group(np.array([]), np.array([]), 1, np.array([])) == {}
    with pytest.raises(TelemetryError, match='group cannot be used.*missing'): by_group(np.ones(2), np.array(['a', None]), 1, np.arange(2))
    with pytest.raises(TelemetryError, match='group cannot be used'): by_group(np.ones(3), np.array(['a', 'b']), 1, np.arange(3))

def sparse_ndcg(rng, users, targets, hit): # most targets miss the list, and some people are easier than others
    found = rng.random((users, targets)) < rng.beta(1, 1/np.broadcast_to(hit, users)[:, None] - 1)
    return np.where(found, ndcg(rng.integers(1, 11, (users, targets))), 0.).ravel()

@pytest.mark.parametrize('sizes, targets', [([20, 20, 50, 200, 600], 1), ([40]*5, 4)])
def test_equal_groups_are_called_equal_and_a_plain_interval_would_not(sizes, targets):
    group, user = np.repeat(np.repeat(np.arange(len(sizes)), sizes), targets), np.repeat(np.arange(sum(sizes)), targets)
    found = [parity(sparse_ndcg(np.random.default_rng(s), sum(sizes), targets, .1), group, 20, user) for s in range(200)]
    covers = np.mean([p.difference.ci_lower <= 0 <= p.difference.ci_upper for p in found])
    ratios = np.mean([p.ratio.value is None or p.ratio.ci_lower <= 1 <= p.ratio.ci_upper for p in found])
    both = [(p.groups[p.highest], p.groups[p.lowest], p.difference.value) for p in found]
    plain = np.mean([d > 1.96*np.hypot((a.ci_upper - a.value)/1.96, (b.ci_upper - b.value)/1.96) for a, b, d in both])
    assert covers >= .95 and ratios >= .95 and plain > .1
    assert np.mean([len(p.unequal) > 0 for p in found]) <= .05

def test_seeded_disparity_is_found_and_small_groups_are_only_named():
    sizes, hit = [150, 150, 150, 5], [.5, .5, .2, .9]
    group, user = np.repeat(np.repeat(list('abcd'), sizes), 4), np.repeat(np.arange(455), 4)
    found = [parity(sparse_ndcg(np.random.default_rng(s), 455, 4, np.repeat(hit, sizes)), group, 20, user) for s in range(40)]
    p = found[0]
    assert np.mean([p.lowest == 'c' and p.difference.ci_lower > 0 and p.ratio.ci_upper < 1 and {low for _, low in p.unequal} == {'c'} for p in found]) >= .95
    assert p.groups['d'] == type(p.difference)(None, None, None, 5) and p.highest in 'ab' and p.as_dict()['lowest'] == 'c'
    assert .25 < np.mean([p.ratio.value for p in found]) < .5                            # .2 of .5, a little less for having picked the best
    alone = parity(np.ones(8), np.repeat(['a', 'b'], 4), 3, np.r_[np.arange(4), 9, 9, 9, 9])
    assert alone.highest is None and alone.difference.value is None and alone.unequal == () and list(alone.groups) == ['a', 'b']

def test_pairs_are_cluster_robust_also_when_people_are_in_both_groups():
    user, base = np.repeat(np.arange(200), 2), np.repeat(np.random.default_rng(0).normal(1, 1, 200), 2)
    group = np.tile(['a', 'b'], 200)
    tight = parity(base + np.tile([.1, 0], 200), group, 20, user).difference
    assert np.isclose(tight.value, .1) and tight.ci_lower > .09                                 # what both share is no doubt
    many = parity(np.repeat(base, 9), np.repeat(np.repeat(['a', 'b'], 200), 9), 20, np.repeat(user, 9)).difference
    once = parity(base, np.repeat(['a', 'b'], 200), 20, user).difference
    assert np.isclose(many.ci_upper, once.ci_upper)                                      # saying it nine times makes nobody surer

def test_exposure_by_hand():
    group, second = np.array(['new', 'new', 'old', 'old']), 1/np.log2(3)
    lists = np.tile([[2, 0], [3, 1]], (20, 1))
    found = exposure(lists, group, 20, np.arange(40))
    assert np.isclose(found.groups['old'].value, 2/(1 + second)) and np.isclose(found.groups['new'].value, 2*second/(1 + second))
    assert found.lowest == 'new' and found.unequal == (('old', 'new'),) and np.isclose(found.ratio.value, second)
    due = exposure(lists, group, 10, np.arange(40), np.repeat([2, 0], [30, 10]))         # a quarter chose new: more than its due
    assert np.isclose(due.groups['new'].value, second/(1 + second)/.25) and due.highest == 'new'
    few = exposure(lists, group, 11, np.arange(40), np.repeat([2, 0], [30, 10]))
    assert few.groups['new'].value is None and few.groups['new'].n == 10 and few.difference.value is None
    shown, whose = np.random.default_rng(0).integers(0, 4, (60, 2)), np.arange(60)
    once, many = exposure(shown, group, 20, whose), exposure(np.repeat(shown, 9, 0), group, 20, np.repeat(whose, 9))
    assert np.isclose(once.difference.ci_upper, many.difference.ci_upper)                # nine equal lists of a person are one
    assert exposure(np.full((3, 2), -1), group, 1, np.arange(3)).groups['new'].value is None
    with pytest.raises(TelemetryError, match='item 4'): exposure(np.array([[4]]), group, 1, [0])

@pytest.mark.parametrize('merit', [False, True])
def test_fair_exposure_is_called_fair_and_seeded_neglect_is_found(merit):
    group = np.repeat(['head', 'mid', 'tail'], [10, 20, 30])
    share = np.repeat([.5, .3, .2], [10, 20, 30])/np.repeat([10, 20, 30], [10, 20, 30]) if merit else np.full(60, 1/60)
    def look(s, neglect):
        rng = np.random.default_rng(s)
        shown = share*np.where(group == 'tail', 1 - neglect, 1)
        return exposure(rng.choice(60, (300, 5), p=shown/shown.sum()), group, 20, np.arange(300), rng.choice(60, 300, p=share) if merit else None)
    fair, unfair = [look(s, 0.) for s in range(1000)], [look(s, .7) for s in range(40)]
    for covers in (np.mean([p.difference.ci_lower <= 0 for p in fair]), np.mean([p.ratio.ci_upper >= 1 for p in fair])):
        assert covers >= .95 - 2*np.sqrt(.95*.05/1000)                                   # .95, as far as a thousand draws can tell
    assert np.mean([p.lowest == 'tail' and p.difference.ci_lower > 0 for p in unfair]) >= .95

HISTORIES = arrays(int, (6, 5), elements=st.integers(-1, 8)).map(lambda h: np.take_along_axis(h, np.argsort(h >= 0, 1, kind='stable'), 1))

@settings(max_examples=50, deadline=None)
@given(HISTORIES, st.integers(0, 9), st.integers(0, 4))
def test_disturbances_keep_what_they_should(h, seed, n):
    rng = lambda: np.random.default_rng(seed)
    before, items = h.copy(), lambda row: row[row >= 0].tolist()
    for same in (noisy(h, 0., rng(), 9), thinned(h, 0., rng()), cold(h, 5), attacked(h, 0, rng(), 8)): assert (same == h).all()
    assert ((noisy(h, .5, rng(), 9) >= 0) == (h >= 0)).all() and (thinned(h, 1., rng()) == -1).all()
    less, more = thinned(h, .3, rng()), thinned(h, .6, rng())
    pushed, short = attacked(h, n, rng(), 77), cold(h, n)
    for row, a, b, p, c in zip(h, less, more, pushed, short):
        it = iter(items(row)); assert all(i in it for i in items(a))                     # order stays
        it = iter(items(a)); assert all(i in it for i in items(b))                       # what is lost first stays lost
        assert (np.sort(a >= 0) == (a >= 0)).all()                                           # gaps stand left
        assert items(c) == items(row)[len(items(row)) - min(n, len(items(row))):]
        real = [i for i in items(p) if i != 77]
        assert real == items(row)[len(items(row)) - len(real):] and len(items(p)) == min(5, len(items(row)) + n) and (p == np.r_[[-1]*(5 - len(items(p))), items(p)]).all()
    assert (h == before).all()

def test_shares_are_what_they_say():
    h = np.random.default_rng(0).integers(0, 1000, (500, 20))
    assert abs((noisy(h, .2, np.random.default_rng(1), 1000) != h).mean() - .2) < .02
    assert abs((thinned(h, .2, np.random.default_rng(1)) < 0).mean() - .2) < .02
    at = np.nonzero(attacked(h, 1, np.random.default_rng(1), 1000) == 1000)
    assert len(at[0]) > 450 and set(at[1]) == set(range(20))                             # anywhere; before the oldest of a full history it falls out

def test_degradation_is_monotone_and_repeatable():
    h = (np.arange(400)[:, None] + np.arange(6)) % 40
    ask = lambda x: np.where(x[:, -1] < 0, 40, (h[:, -1] + 1 - x[:, -1] - 1) % 40 + 1)    # knows what follows the newest item
    levels = {'noisy': [.1, .3, .6], 'thinned': [.1, .5, 1.], 'cold': [1, 0], 'attacked': [1]}
    found = degradation(ask, h, np.arange(400), levels, 40, 3, item=5)
    assert [(r['kind'], r['level']) for r in found] == [('undisturbed', 0)] + [(k, l) for k in levels for l in levels[k]]
    lost = {(r['kind'], r['level']): r['difference'] for r in found}
    assert found[0]['ndcg@10'].value == 1 and lost['undisturbed', 0].value == lost['cold', 1].value == 0 and lost['cold', 0].value == -1
    for kind in ('noisy', 'thinned'): assert 0 > lost[kind, levels[kind][0]].value > lost[kind, levels[kind][1]].value > lost[kind, levels[kind][2]].value
    assert lost['noisy', .1].ci_upper < 0 and lost['attacked', 1].ci_upper < 0
    assert all(np.isclose(r['ndcg@10'].value - found[0]['ndcg@10'].value, r['difference'].value) for r in found)
    assert degradation(ask, h, np.arange(400), levels, 40, 3, item=5) == found and degradation(ask, h, np.arange(400), levels, 40, 4, item=5) != found
    with pytest.raises(TelemetryError, match="'upside down'; it must be one of noisy"): degradation(ask, h, np.arange(400), {'upside down': [1]}, 40, 0)

def test_refusals_of_disturbances():
    h, rng = np.zeros((1, 3), int), np.random.default_rng(0)
    for disturb in (lambda: noisy(h, 30, rng, 9), lambda: thinned(h, -.1, rng)):
        with pytest.raises(TelemetryError, match='share is .*; it must be from 0 to 1'): disturb()
    with pytest.raises(TelemetryError, match='keep is -1'): cold(h, -1)
    with pytest.raises(TelemetryError, match='copies is -2'): attacked(h, -2, rng, 0)

def test_import_is_light():
    code = 'import sys, telemetry_loop.metrics; sys.exit(any(m in sys.modules for m in ("fairlearn", "sklearn", "torch", "matplotlib")))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
