"Parity with obp 0.5.7, from vectors recorded by benchmarks/obp_vectors.py: obp is not needed here."
import json
from pathlib import Path
import numpy as np, pytest
from telemetry_loop.ope import evaluate
from telemetry_loop.estimators import clipped, corrected, dm, dr, dr_os, ips, sndr, snips, sub_gaussian, switch_dr

OBP = json.loads((Path(__file__).parent/'obp.json').read_text())
BANDITS = [name for name in OBP if name in ('near', 'uniform', 'against')]
same = lambda x: pytest.approx(x, rel=1e-10, abs=0)

def given(name):
    "What obp was given, bit by bit."
    return {k: np.array(x)/(1 if k in ('action', 'embedding', 'logger') else OBP['fine'] if k.startswith('slate_') else OBP['unit']) for k,x in OBP[name]['given'].items()}

def vectors(name):
    "-> reward, weight, q_logged, v_target"
    x = given(name); i, a = np.arange(len(x['action'])), x['action'].astype(int)
    return x['reward'], x['target'][i, a]/x['logging'][i, a], x['q'][i, a], (x['target']*x['q']).sum(1)

CASES = [(data, found) for data in BANDITS for found in OBP[data]['found']]

@pytest.mark.parametrize('data, found', CASES)
def test_one_decision_at_a_time(data, found):
    r, w, q, v = vectors(data); name, at = (found.split() + [0])[:2]; at = float(at)
    ours = {'ips': lambda: ips(r, w), 'snips': lambda: snips(r, w), 'dm': lambda: dm(v), 'dr': lambda: dr(r, w, q, v), 'sndr': lambda: sndr(r, w, q, v), 'clipped': lambda: clipped(r, w, at), 'sub_gaussian': lambda: sub_gaussian(r, w, at),
        'switch_dr': lambda: switch_dr(r, w, q, v, at), 'dr_os': lambda: dr_os(r, w, q, v, at), 'clipped_dr': lambda: corrected(r, np.minimum(w, at), q, v), 'sub_gaussian_dr': lambda: corrected(r, w/(1 - at + at*w), q, v)}
    assert ours[name]()[0] == same(OBP[data]['found'][found])

def test_nothing_of_the_record_is_left_out():
    assert len(CASES) == 3*(5 + 3 + 4 + 4 + 4 + 3 + 4) and {x[1].split()[0] for x in CASES} == {'ips', 'snips', 'dm', 'dr', 'sndr', 'clipped', 'sub_gaussian', 'switch_dr', 'dr_os', 'clipped_dr', 'sub_gaussian_dr'}
    for data in BANDITS: # settings that do something: no two answers alike, and most of them far apart
        values = np.sort(list(OBP[data]['found'].values()))
        assert len(np.unique(values.round(6))) > len(values)/2 and np.ptp(values) > .1*abs(values.mean())

def test_evaluate_says_the_same():
    "Through the front door, from probabilities instead of weights."
    for data in BANDITS:
        x = given(data); i, a = np.arange(len(x['action'])), x['action'].astype(int); _, _, q, v = vectors(data)
        found = evaluate(x['reward'], x['logging'][i, a], x['target'][i, a], q_logged=q, v_target=v).estimates
        for name in ('ips', 'snips', 'dm', 'dr', 'sndr'): assert found[name].value == same(OBP[data]['found'][name]), (data, name)

def test_slates():
    "Slates of three: the slate's weight, the item's at its place, the prefix's, and the doubly robust cascade."
    from telemetry_loop.slate import cascade_dr, iips, rips, sips
    x, found = given('slates'), OBP['slates']['found']; a = x['action'].astype(int)
    prefix, place = (x[f'slate_{kind}_target']/x[f'slate_{kind}_logging'] for kind in ('prefix', 'place'))
    for name, estimator, weight in (('sips', sips, prefix), ('iips', iips, place), ('rips', rips, prefix)):
        assert estimator(x['reward'], weight)[0] == same(found[name]) and estimator(x['reward'], weight, normalised=True)[0] == same(found[f'sn{name}']), name
    assert cascade_dr(x['reward'], prefix, np.take_along_axis(x['q'], a[:, :, None], 2)[:, :, 0], (x['after']*x['q']).sum(2))[0] == same(found['cascade_dr'])
    assert len({round(v, 6) for v in found.values()}) == len(found)

def test_many_actions():
    "Categories by chance, whose probabilities are summed here, and clusters, whose probabilities we sum."
    from telemetry_loop.many import cluster_prob, mips
    for data in ('embedded', 'clustered'):
        x = given(data); n, e = len(x['action']), x['embedding'].astype(int)
        each = np.prod([x['p_embedding'][:, e[:, d], d] for d in range(e.shape[1])], axis=0)              # (A, n) P(what is seen | action)
        target, logging = ((x[name]*each.T).sum(1) for name in ('target', 'logging'))
        if data == 'clustered':
            own, row = x['p_embedding'][:, :, 0].argmax(1), np.repeat(np.arange(n), x['target'].shape[1])
            target, logging = (cluster_prob(x[name].ravel(), np.tile(own, n), row, e[:, 0]) for name in ('target', 'logging'))
        assert mips(x['reward'], target, logging)[0] == same(OBP[data]['found']['mips']), data
    assert snips(x['reward'], target/logging)[0] == same(OBP[data]['found']['snmips']) # clusters only: with several categories obp's multiplies their marginals, which its plain one does not

def test_two_logging_policies():
    from telemetry_loop.many import balanced_ips, balanced_weight
    x, found = given('two_loggers'), OBP['two_loggers']['found']; i, a = np.arange(len(x['action'])), x['action'].astype(int)
    logger, each, target, q, v = x['logger'].astype(int), x['logging'][:, i, a].T, x['target'][i, a], x['q'][i, a], (x['target']*x['q']).sum(1)
    assert balanced_ips(x['reward'], target, each, logger)[0] == same(found['balanced_ips'])
    assert dr(x['reward'], balanced_weight(target, each, logger), q, v)[0] == same(found['balanced_dr'])
    own = target/each[i, logger]                                                                        # each row by the policy that wrote it
    assert ips(x['reward'], own)[0] == same(found['naive_ips']) != same(found['balanced_ips']) and dr(x['reward'], own, q, v)[0] == same(found['naive_dr'])
