"A part of the validity study: the promise of off-policy evaluation against the simulator's truth, on worlds declared once."
import numpy as np, pytest
from telemetry_loop.config import read_json
from conftest import ROOT
from validity.study import SEEDS, study, worlds

@pytest.fixture(scope='module')
def told(): return worlds(SEEDS[:4], 1, 2)

def test_the_truth_lies_in_the_interval(told):
    found = study(told)
    assert found['refused'] == 0 and found['value_in_interval'] >= 3 and found['gain_in_interval'] >= 3

def test_a_naive_reading_of_the_log_fails(told):
    "The mean reward of the log is not what the candidate would earn: it lies below the truth in every world."
    assert all(t['ope']['logging']['ci_upper'] < t['rounds'][0]['true_value']['value'] for t in told)

def test_people_are_more_satisfied_wherever_a_release_went_live(told):
    "Each released policy must have made its own world better; where nothing was released, nothing changed."
    assert any(t['rounds'][0]['promoted'] for t in told)
    for t in told:
        lived = t['rounds'][0]['life_minus_bootstrap']['satisfaction']
        assert lived['ci_lower'] > 0 if t['rounds'][0]['promoted'] else lived['value'] == 0

def test_the_full_study_holds():
    "What `make validity` wrote: the acceptance bars over all twenty worlds."
    found = read_json(ROOT/'metrics/validity.json')
    assert found['worlds'] == len(SEEDS) and found['value_in_interval'] >= 16 and found['promoted_at_least_once'] >= 10
    assert found['last_round_return_rate_minus_bootstrap']['ci_lower'] > 0
