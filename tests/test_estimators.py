"The reward model: it never sees its own answer, it learns what is there, and rows keep their places."
import numpy as np, pandas as pd, pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimators import Tables, cross_fit
from slate_log import TABLES, slates

def test_the_model_never_sees_its_own_answer():
    rows, candidates, _ = slates(signal=0.)
    rows['score'] = np.random.default_rng(0).normal(size=len(rows)); rows['reward'] = np.random.default_rng(1).normal(size=len(rows))
    big = Tables(bins=400, penalty=.01)                                # nearly a cell a row
    q, _ = cross_fit(rows, candidates, big, 3, 7)
    assert abs(np.corrcoef(q, rows.reward)[0, 1]) < .05  # pure noise: there is nothing to learn
    rows['user_id'] = np.where(np.arange(len(rows)) % 2, 'a', 'b'); seen, _ = cross_fit(pd.concat([rows, rows.assign(user_id='c', decision_id='x' + rows.decision_id)]),
        pd.concat([candidates, candidates.assign(decision_id='x' + candidates.decision_id)]), big, 3, 7)
    assert np.corrcoef(seen[:len(rows)], rows.reward)[0, 1] > .3  # the same rows under another user's name: it learns the noise

def test_the_model_learns_score_popularity_and_position():
    rng = np.random.default_rng(20261); rows, candidates, _ = slates(4000, signal=0.)
    truth = lambda f: (f.score > 0)*1. - .5*f.position + .3*(f.log_popularity > 1)
    rows['reward'] = truth(rows) + rng.normal(size=len(rows))
    q, v = cross_fit(rows, candidates, TABLES, 5, 7)
    assert np.corrcoef(q, truth(rows))[0, 1] > .97
    want = (truth(candidates)*candidates.target_prob).groupby([candidates.decision_id, candidates.position], sort=False).sum()
    assert np.corrcoef(v, want.to_numpy())[0, 1] > .97 and abs(v.mean() - want.mean()) < .03

def test_cross_fit_is_repeatable_and_aligned():
    rows, candidates, _ = slates(600)
    q, v = cross_fit(rows, candidates, TABLES, 5, 7)
    shuffled = candidates.sample(frac=1, random_state=1)
    q2, v2 = cross_fit(rows, shuffled, TABLES, 5, 7)
    assert np.allclose(q, q2, atol=1e-12) and np.allclose(v, v2, atol=1e-12)
    order = np.random.default_rng(2).permutation(len(rows))
    v3 = cross_fit(rows.iloc[order].reset_index(drop=True), candidates, TABLES, 5, 7)[1]
    assert np.corrcoef(v3, v[order])[0, 1] > .99
    with pytest.raises(TelemetryError, match='candidates disagree with 3 of 1800 rows'): cross_fit(rows, candidates[candidates.decision_id != 'd3'], TABLES, 5, 7)
    with pytest.raises(TelemetryError, match='rows have 1 user'): cross_fit(rows[:15], candidates[candidates.decision_id.isin(rows[:15].decision_id)], TABLES, 5, 7)

def test_any_regressor_of_scikit_learn_may_stand_in():
    rows, candidates, _ = slates(4000)
    q, v = cross_fit(rows, candidates, HistGradientBoostingRegressor(max_iter=40, random_state=0), 4, 7)
    plain, _ = cross_fit(rows, candidates, TABLES, 4, 7)
    assert np.corrcoef(q, plain)[0, 1] > .8 and len(v) == len(rows)
