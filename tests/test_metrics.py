"How good a ranking is: hand-made ranks, ties, padding, groups."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from telemetry_loop.config import TelemetryError
from telemetry_loop.metrics import by_group, mrr, ndcg, paired, rank_of_target, recall, summarise

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
