"A part of the study of the whole pipeline: worlds with messy telemetry, declared once, judged by the simulator's truth."
import numpy as np, pytest
from validity.through import SEEDS, lived, promised, ranked, spending, summary, worlds

@pytest.fixture(scope='module')
def told():
    "Three worlds, and the policies ranked in the first."
    out = []
    for seed in SEEDS['coverage'][:3]:
        with lived(seed) as world: out.append(promised(world) | dict(cpu_seconds=0) | ({} if out else dict(ranked=ranked(world, 600))))
    return out

def test_intervals_hold_the_truth(told):
    "Honest 95 % intervals miss two or more of three worlds in one study of a hundred and forty."
    found = summary('coverage', told)
    assert found['accepted'] == 3
    assert found['value']['dr'] >= 2 and found['gain']['dr'] >= 2

def test_what_claims_too_much_fails_in_the_same_worlds(told):
    "The model's own word misses in nine worlds of ten, and the log's mean reward is not the candidate's: nothing here is so easy that everything passes."
    control = summary('coverage', told)['control']
    assert control['opinion taken for an interval'] <= 1 and control['mean of the log'] == 0

def test_policies_are_ranked_as_they_are(told):
    "Twenty policies; with the rewards dealt out anew, the same log ranks nothing."
    found = told[0]['ranked']
    assert len(found['policies']) == 20 and found['estimate'] >= .8 and found['luck'] < .8

def test_exploration_is_spent_as_told_and_logged_as_drawn():
    "Both ways spend one slot in twenty; the advised way on the item it was told of, and the propensities are those of the mixture."
    import pandas as pd
    from conftest import ROOT
    from telemetry_loop.config import load_params
    from telemetry_loop.policy import EvenScorer, Policy, PolicyConfig
    from telemetry_loop.schema import Contexts
    n, m = 4000, 8
    contexts = Contexts(user_id=np.full(n, 'u'), time=np.full(n, np.datetime64('2025-01-06', 'ms')), candidates=np.tile([f'i{j}' for j in range(m)], (n, 1)), popularity=np.zeros((n, m)), history=np.full((n, 1), ''), personalise=np.ones(n, bool))
    plain = Policy(EvenScorer(), load_params(PolicyConfig, 'policy', ROOT/'params.yaml'), 'even', 1., 0.)
    advice = pd.Series([.3], index=pd.MultiIndex.from_tuples([('strangers', 'i3')]))
    for policy, spent in (spending(plain), spending(plain, advice)):
        weights = policy.choice(contexts).weights
        assert spent[0]/spent[1] == pytest.approx(.05) and np.allclose(weights.sum(1), 1)
    assert np.allclose(weights[:, 3], .95/m + .05) and np.allclose(np.delete(weights, 3, 1), .95/m)
    slates = policy.decide(contexts, np.random.default_rng(0))
    first = slates.items[:, 0] == 'i3'
    assert first.mean() == pytest.approx(.95/m + .05, abs=4*np.sqrt(.17*.83/n)) and np.allclose(slates.propensity[first, 0], .95/m + .05)

def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    "Each world is told once, and those told already are not lived again."
    from validity import through
    lived = []
    monkeypatch.setitem(through.PARTS, 'ranking', lambda seed: lived.append(seed) or dict(seed_was=seed))
    worlds('ranking', [1, 2], to=tmp_path/'told.jsonl')
    assert [t['seed_was'] for t in worlds('ranking', [1, 2, 3], to=tmp_path/'told.jsonl')] == [1, 2, 3] and lived == [1, 2, 3]
