"Drift: false alarms at the nominal rate at every n, a true shift found, and the naive rules failing in the same harness."
import time
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import ks_2samp
from telemetry_loop.drift import categorical_drift, divergence, effective_rows, numeric_drift

SEED = 20261                                              # declared once
REPEATS = {1_000: 400, 10_000: 200, 100_000: 40, 1_000_000: 6}
SLACK = lambda n: .05 + 3*np.sqrt(.05*.95/n)              # nominal rate plus three binomial standard errors

def grouped(rng, n, each=10): # rows in clusters of `each`: half of the variance is the person's
    who = np.repeat(np.arange(n//each), each)
    return rng.normal(size=n//each)[who] + rng.normal(size=n), who

@pytest.mark.parametrize('n', REPEATS)
def test_no_change_is_no_drift(n):
    "A/A: the lower bound leaves zero in at most 5 % of cases, and never passes a tenth."
    rng, k = np.random.default_rng([SEED, n]), REPEATS[n]
    number = [numeric_drift(*rng.normal(size=(2, n))) for _ in range(k)]
    label = [categorical_drift(*rng.integers(0, 12, (2, n))) for _ in range(k)]
    for found in (number, label):
        assert np.mean([e.ci_lower > 0 for e in found]) <= SLACK(k)
        assert not any(e.ci_lower > .1 for e in found)

def test_a_naive_p_value_fails_where_rows_come_in_users():
    rng = np.random.default_rng([SEED, 1])
    naive, ours = [], []
    for _ in range(150):
        (a, u), (b, v) = grouped(rng, 2000), grouped(rng, 2000)
        naive.append(ks_2samp(a, b).pvalue < .05); ours.append(numeric_drift(a, b, (u, v)).ci_lower > 0)
    assert np.mean(ours) <= SLACK(150) < .3 < np.mean(naive)

def test_naive_rules_fail_at_either_end():
    "PSI over .1 by chance at a thousand rows; p < .05 for a hundredth of a standard deviation at a million."
    rng = np.random.default_rng([SEED, 2])
    def psi(a, b, k):
        p, q = ((np.bincount(x, minlength=k) + .5)/(len(x) + .5*k) for x in (a, b))
        return ((p - q)*np.log(p/q)).sum()
    few = [rng.integers(0, 60, (2, 1000)) for _ in range(100)]
    assert np.mean([psi(a, b, 60) > .1 for a, b in few]) > .5
    assert np.mean([categorical_drift(a, b).ci_lower > 0 for a, b in few]) <= SLACK(100)
    many = [(rng.normal(size=1_000_000), .01 + rng.normal(size=1_000_000)) for _ in range(3)]
    assert all(ks_2samp(a, b).pvalue < .05 for a, b in many) and not any(numeric_drift(a, b).ci_lower > .1 for a, b in many)

@pytest.mark.parametrize('n', [10_000, 100_000])
def test_a_true_shift_is_found(n):
    "Four tenths of a standard deviation (distance .16), and a label whose share grows from a twelfth to a quarter (distance .19)."
    rng = np.random.default_rng([SEED, 3, n])
    for _ in range(30):
        assert numeric_drift(rng.normal(size=n), .4 + rng.normal(size=n)).ci_lower > .1
        moved = np.where(rng.random(n) < .19, 0, rng.integers(0, 12, n))
        assert categorical_drift(rng.integers(0, 12, n), moved).ci_lower > .1

def test_the_interval_holds_the_truth_and_does_not_move_with_n():
    rng = np.random.default_rng([SEED, 4])
    for n in (2_000, 200_000):
        found = [numeric_drift(rng.normal(size=n), .5 + rng.normal(size=n)) for _ in range(40)]
        assert np.mean([e.ci_lower <= .19741 <= e.ci_upper for e in found]) >= .95
        assert abs(np.mean([e.value for e in found]) - .197) < .006

def test_a_million_values_take_less_than_a_second():
    x, y = np.random.default_rng(SEED).normal(size=(2, 1_000_000))
    started = time.process_time(); numeric_drift(x, y)
    assert time.process_time() - started < 1

def test_missing_values_and_spread_are_changes_too():
    rng = np.random.default_rng([SEED, 5]); x = rng.normal(size=20_000)
    assert numeric_drift(x, np.where(rng.random(20_000) < .3, np.nan, x)).ci_lower > .2
    assert numeric_drift(x, 3*rng.normal(size=20_000)).ci_lower > .1
    assert categorical_drift(['a', None]*500, ['a', 'b']*500).ci_lower > .3

def test_nothing_to_compare_says_nothing():
    assert numeric_drift([], [1.]).value is None and categorical_drift([], ['a']).value is None
    same = categorical_drift(['a']*50, ['a']*50)
    assert (same.value, same.ci_lower) == (0, 0)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.integers(1, 9))
def test_copies_are_worth_one(labels, copies):
    g = np.array(labels)
    once, many = effective_rows(g, np.arange(len(g))), effective_rows(np.repeat(g, copies), np.repeat(np.arange(len(g)), copies))
    assert many <= len(g) + 1e-6 and abs(many - once) < 1e-6*len(g) + (copies == 1)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=9), st.lists(st.integers(0, 50), min_size=3, max_size=9))
def test_divergence_is_symmetric_and_bounded(p, q):
    k = min(len(p), len(q)); p, q = np.array(p[:k], float), np.array(q[:k], float)
    if p.sum() and q.sum(): assert abs(divergence(p, q) - divergence(q, p)) < 1e-12 and 0 <= divergence(p, q) <= 1 + 1e-12
