"""Vectors of obp 0.5.7: what it was given and what it answered, recorded so that the tests need no obp.

`python benchmarks/obp_vectors.py [--to tests/obp.json]`

obp has a virtual environment of its own (runs/peers/obp, made once). Its own synthetic data sets are drawn there: three bandits (few actions and binary reward with logging near the target; ten actions and continuous
reward under uniform logging; twenty-four actions and sparse binary reward with logging against the target), one with item categories by chance and one with fixed clusters, one logged by two policies, and slates of three drawn here, for obp has no target policy that
is a plain Plackett-Luce. Every input is rounded to a whole multiple of 1/1024 (slate propensities: 2^-20) and stored as that whole number, so the tests read bit by bit what obp was given."""
import argparse, json, subprocess, sys
from itertools import permutations
from pathlib import Path
import numpy as np

ROOT = Path(__file__).parents[1]
TORCH, PEER = 'torch==2.13.0', ['numpy==1.26.4', 'scipy==1.11.4', 'scikit-learn==1.3.2', 'pandas==2.1.4', 'matplotlib==3.8.4', 'seaborn==0.13.2', 'pyyaml==6.0.2', 'tqdm==4.67.1', 'obp==0.5.7']
SEED, UNIT, FINE = 20262, 1024, 2**20
SETS = {'near': (3, 'binary', 1.5, 8.), 'uniform': (10, 'continuous', 0., 2.), 'against': (24, 'binary', -2., 3.)} # actions, reward, inverse temperature of logging and of target
LAMBDAS = dict(clipped=[1., 5., 20.], switch_dr=[.5, 2., 10., 1000.], dr_os=[.1, 1., 10., 1000.], sub_gaussian=[.01, .2, .8, 1.])

def environment()->Path|None: # its Python
    "A virtual environment with obp in it; torch first, by itself, so that no other build of it comes along."
    home = ROOT/'runs/peers/obp'; python, ready = home/'bin/python', home/'ready'
    if ready.is_file() and ready.read_text() == ' '.join(PEER): return python
    print(f'obp: installing {" ".join(PEER)} into runs/peers/obp', flush=True)
    pip = [python, '-m', 'pip', 'install', '-q']  # obp says it needs Python below 3.11, and runs on 3.11
    if any(subprocess.run(s).returncode for s in ([sys.executable, '-m', 'venv', home], [*pip, TORCH], [*pip, TORCH, *PEER[:-1]], [*pip, '--no-deps', '--ignore-requires-python', PEER[-1]])):
        print('left out: obp cannot be installed here'); return None
    ready.write_text(' '.join(PEER))
    return python

def parts(p:np.ndarray, unit:int=UNIT)->np.ndarray: # (.., A) whole numbers that sum to `unit`
    "Probabilities as whole parts, none of them 0: largest remainders."
    room = unit - p.shape[-1]; whole = np.floor(p*room).astype(int)
    rank = np.argsort(np.argsort(whole - p*room, -1), -1)
    return 1 + whole + (rank < room - whole.sum(-1, keepdims=True))

def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True)); return e/e.sum(-1, keepdims=True)

def given(d:dict)->dict: # the same, as obp is given them
    "Whole numbers back to what they stand for."
    return {k: x if k in ('action', 'embedding', 'logger') else x/(FINE if k.startswith('slate_') else UNIT) for k,x in ((k, np.asarray(x)) for k,x in d.items())}

def bandit(actions, kind, logging, target, n=200):
    "One of obp's synthetic bandits: logged rows, both policies and a reward model that is half right."
    from obp.dataset import SyntheticBanditDataset, linear_reward_function, logistic_reward_function
    d = SyntheticBanditDataset(n_actions=actions, dim_context=5, reward_type=kind, reward_function=logistic_reward_function if kind == 'binary' else linear_reward_function, beta=logging, random_state=SEED).obtain_batch_bandit_feedback(n)
    q = d['expected_reward']; noise = np.random.default_rng(SEED).normal(size=q.shape)*.2
    return dict(action=d['action'], reward=np.round(UNIT*d['reward']).astype(int), logging=parts(d['pi_b'][:, :, 0]), target=parts(softmax(target*q)), q=np.round(UNIT*(.5*q + noise)).astype(int))

def bandit_values(x:dict)->dict: # 'name' or 'name lambda' -> value
    "What obp makes of them."
    from obp import ope
    i = np.arange(len(x['action']))
    data = dict(reward=x['reward'], action=x['action'], pscore=x['logging'][i, x['action']], action_dist=x['target'][:, :, None], estimated_rewards_by_reg_model=x['q'][:, :, None], position=np.zeros(len(i), int))
    each = {'ips': ope.InverseProbabilityWeighting(), 'snips': ope.SelfNormalizedInverseProbabilityWeighting(), 'dm': ope.DirectMethod(), 'dr': ope.DoublyRobust(), 'sndr': ope.SelfNormalizedDoublyRobust()}
    kinds = dict(clipped=ope.InverseProbabilityWeighting, switch_dr=ope.SwitchDoublyRobust, dr_os=ope.DoublyRobustWithShrinkage, sub_gaussian=ope.SubGaussianInverseProbabilityWeighting,
        clipped_dr=ope.DoublyRobust, sub_gaussian_dr=ope.SubGaussianDoublyRobust)
    each |= {f'{name} {at}': kind(lambda_=at) for name, kind in kinds.items() for at in LAMBDAS[name if name in LAMBDAS else name.removesuffix('_dr')]}
    return {name: float(e.estimate_policy_value(**data)) for name, e in each.items()}

def embedded(clusters:bool=False, actions=12, n=100):
    "Actions with two categories each, drawn by chance, or with a cluster each that is always theirs; the reward goes by the categories."
    from obp.dataset import SyntheticBanditDatasetWithActionEmbeds
    d = SyntheticBanditDatasetWithActionEmbeds(n_actions=actions, dim_context=3, n_cat_dim=2, n_cat_per_dim=3, reward_function=None, beta=-1., random_state=SEED).obtain_batch_bandit_feedback(n)
    own, a = np.arange(actions) % 4, d['action']
    kinds = (own[a][:, None], UNIT*(own[:, None] == np.arange(4)).astype(int)[:, :, None]) if clusters else (d['action_embed'], parts(d['p_e_a'].transpose(0, 2, 1)).transpose(0, 2, 1))
    return dict(action=a, reward=np.round(UNIT*d['reward']).astype(int), embedding=kinds[0], logging=parts(d['pi_b'][:, :, 0]), target=parts(softmax(2*d['expected_reward'])), p_embedding=kinds[1])

def embedded_values(x):
    from obp import ope
    data = dict(reward=x['reward'], action=x['action'], action_embed=x['embedding'], pi_b=x['logging'][:, :, None], action_dist=x['target'][:, :, None], p_e_a=x['p_embedding'], position=np.zeros(len(x['action']), int), context=np.zeros((len(x['action']), 1)))
    return {name: float(kind(n_actions=12).estimate_policy_value(**data)) for name, kind in (('mips', ope.MarginalizedInverseProbabilityWeighting), ('snmips', ope.SelfNormalizedMarginalizedInverseProbabilityWeighting))}

def two_loggers():
    "Two policies have logged, one long and near the target, one short and against it."
    d, shares = bandit(5, 'binary', 0., 2.), np.array([.7, .3]); n = len(d['action'])
    rng, score = np.random.default_rng(SEED), np.log(d['target'])
    logging = np.stack([parts(softmax(a*score)) for a in (.5, -1.)]); logger = np.repeat([0, 1], np.round(shares*n).astype(int))
    p = logging[logger, np.arange(n)]/UNIT
    return d | dict(action=(p.cumsum(1) > rng.random((n, 1))).argmax(1), logging=logging, logger=logger)

def two_loggers_values(x):
    from obp import ope
    i, a = np.arange(len(x['action'])), x['action']; each = x['logging'][:, i, a]; share = np.bincount(x['logger'])/len(a)
    data = dict(reward=x['reward'], action=a, action_dist=x['target'][:, :, None], position=np.zeros(len(a), int), stratum_idx=x['logger'], pscore=each[x['logger'], i], pscore_avg=share @ each, estimated_rewards_by_reg_model=x['q'][:, :, None])
    kinds = dict(naive_ips=ope.MultiLoggersNaiveInverseProbabilityWeighting, balanced_ips=ope.MultiLoggersBalancedInverseProbabilityWeighting, weighted_ips=ope.MultiLoggersWeightedInverseProbabilityWeighting,
        naive_dr=ope.MultiLoggersNaiveDoublyRobust, balanced_dr=ope.MultiLoggersBalancedDoublyRobust, weighted_dr=ope.MultiLoggersWeightedDoublyRobust)
    return {name: float(kind().estimate_policy_value(**data)) for name, kind in kinds.items()}

def slates(n=80, k=3, m=5):
    "Plackett-Luce against Plackett-Luce, k of m items; probabilities of the place, of the prefix and of the item at its place."
    rng = np.random.default_rng(SEED); score, orders = rng.normal(size=(n, m)), np.array(list(permutations(range(m), k)))
    def steps(s): # (n, m) scores -> (n, orders, k) probability of each item given those before it
        e = np.exp(s)[:, orders]; return e/(np.exp(s).sum(1)[:, None, None] - np.cumsum(e, 2) + e)
    own, new = steps(.5*score), steps(1.5*score); joint = own.prod(2)
    pick = (joint.cumsum(1) > rng.random((n, 1))).argmax(1); i = np.arange(n); action = orders[pick]
    def marginal(p): return np.stack([(p.prod(2)*(orders[None, :, j] == action[:, j, None])).sum(1) for j in range(k)], 1)
    fine = lambda p: np.maximum(np.round(FINE*p), 1).astype(int)
    gone = np.stack([(action[:, :j, None] == np.arange(m)).any(1) for j in range(k)], 1)
    after = softmax(np.where(gone, -30., 1.5*score[:, None, :]))
    prefix = lambda p: fine(p[i, pick].cumprod(1))
    reward = rng.random((n, k)) < .2 + .6*(score[i[:, None], action] > 0)
    return dict(action=action, reward=UNIT*reward.astype(int), slate_prefix_logging=prefix(own), slate_prefix_target=prefix(new), slate_place_logging=fine(marginal(own)), slate_place_target=fine(marginal(new)),
        after=parts(after), q=rng.integers(0, UNIT, (n, k, m)))

def slates_values(x):
    from obp import ope
    n, k = x['action'].shape; m = x['q'].shape[2]; flat = {name: v.ravel() for name, v in x.items()}
    whole = lambda p: np.repeat(p[:, -1], k)
    data = dict(slate_id=np.repeat(np.arange(n), k), position=np.tile(np.arange(k), n), reward=flat['reward'], action=flat['action'], pscore=whole(x['slate_prefix_logging']), evaluation_policy_pscore=whole(x['slate_prefix_target']),
        pscore_item_position=flat['slate_place_logging'], evaluation_policy_pscore_item_position=flat['slate_place_target'], pscore_cascade=flat['slate_prefix_logging'], evaluation_policy_pscore_cascade=flat['slate_prefix_target'],
        q_hat=flat['q'], evaluation_policy_action_dist=flat['after'])
    kinds = dict(sips=ope.SlateStandardIPS, iips=ope.SlateIndependentIPS, rips=ope.SlateRewardInteractionIPS, snsips=ope.SelfNormalizedSlateStandardIPS, sniips=ope.SelfNormalizedSlateIndependentIPS, snrips=ope.SelfNormalizedSlateRewardInteractionIPS)
    each = {name: kind(len_list=k) for name, kind in kinds.items()} | {'cascade_dr': ope.SlateCascadeDoublyRobust(len_list=k, n_unique_action=m)}
    return {name: float(e.estimate_policy_value(**data)) for name, e in each.items()}

def record(to:Path):
    "Draw, ask obp, write; runs in obp's environment."
    import obp
    drawn = {name: (bandit(*s), bandit_values) for name, s in SETS.items()} | {'embedded': (embedded(), embedded_values), 'clustered': (embedded(True), embedded_values), 'two_loggers': (two_loggers(), two_loggers_values), 'slates': (slates(), slates_values)}
    plain = lambda d: {k: np.asarray(v).tolist() for k,v in d.items()}
    found = {'obp': obp.__version__, 'unit': UNIT, 'fine': FINE} | {name: {'given': plain(d), 'found': values(given(d))} for name, (d, values) in drawn.items()}
    to.write_text(json.dumps(found, separators=(',', ':')).replace('"found"', '\n"found"') + '\n')

def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0]); cli.add_argument('--to', type=Path, default=ROOT/'tests/obp.json')
    to = cli.parse_args().to
    if (python := environment()): subprocess.run([python, '-W', 'ignore', __file__, '--child', to], check=True); print(f'{to}: {to.stat().st_size/1e3:.0f} kB')

if __name__ == '__main__': record(Path(sys.argv[2])) if sys.argv[1:2] == ['--child'] else main()
