"A number with its doubt, and the rule that judges it."
import numpy as np, pytest
from hypothesis import given, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import Criterion, Estimate, mean, overall, standard_error

def test_clustered_interval_covers_and_the_naive_one_does_not():
    rng, hits, naive = np.random.default_rng(1), 0, 0
    for _ in range(400):
        user = np.repeat(np.arange(100), 5); x = np.repeat(rng.normal(size=100), 5) + .3*rng.normal(size=500)
        a, b = mean(x, user), mean(x)
        hits += a.ci_lower < 0 < a.ci_upper; naive += b.ci_lower < 0 < b.ci_upper
    assert 365 <= hits <= 397      # 95 %, 1 % binomial quantiles
    assert naive < 300             # ignoring users fails in the same harness

@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(-3, 3))
def test_shifting_the_data_shifts_the_mean_and_nothing_else(xs, by):
    a, b = mean(np.array(xs)), mean(np.array(xs) + by)
    assert np.isclose(b.value, a.value + by) and np.isclose(b.ci_upper - b.ci_lower, a.ci_upper - a.ci_lower, atol=1e-9)

def test_no_interval_from_one_cluster(): assert np.isnan(standard_error(np.array([1., 2.]), np.array(['u', 'u'])))
def test_infinite_values_never_reach_json(): assert Estimate(float('nan'), float('inf'), 1., 3).as_dict() == {'value': None, 'ci_lower': None, 'ci_upper': 1., 'n': 3}

@pytest.mark.parametrize('rule, lower, upper, answer', [('above', .1, .2, 'pass'), ('above', -.1, .2, 'inconclusive'), ('above', -.2, 0., 'fail'),
    ('below', -.2, -.1, 'pass'), ('below', -.2, .1, 'inconclusive'), ('below', 0., .1, 'fail')])
def test_the_interval_is_judged_not_the_point(rule, lower, upper, answer):
    assert Criterion('c', 's', rule, 0., 'success', False, '').judge(Estimate((lower+upper)/2, lower, upper, 9)).answer == answer

def test_unknown_rule_is_refused():
    with pytest.raises(TelemetryError, match="rule 'over'"): Criterion('c', 's', 'over', 0., 'success', False, '').judge(1.)

@given(st.lists(st.sampled_from(['pass', 'fail', 'inconclusive'])))
def test_overall(answers): assert overall(answers) == ('fail' if 'fail' in answers else 'pass' if answers and set(answers) == {'pass'} else 'inconclusive')
