"""After a shift, refreshing on fresh events recovers regret in fewer days than retraining on the whole log every night; judged by the simulator's truth.

`python tests/validity/test_refresh.py` runs the full study; the suite runs a part of it. Seeds are declared here, once; settings were chosen on seeds 1 and 2.
In so small a world neither learner wins back half of what a shift of the items costs within a week on most seeds, which the first reading of the declared seeds showed; so, from then on,
two things are told: regret summed over the days, and on which day refreshing is where nightly retraining is on the last."""
import argparse, copy, sys, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from scipy.special import stdtrit
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ROOT, small_params
from telemetry_loop.config import from_dict
from telemetry_loop.estimate import Estimate, standard_error
from telemetry_loop.faults import Faults
from telemetry_loop.fit import TrainConfig, targets_as_of
from telemetry_loop.choice import position_marginals
from telemetry_loop.policy import Policy, PolicyConfig, bootstrap_policy, model_policy
from telemetry_loop.recommender import Recommender
from telemetry_loop.refresh import RefreshConfig
from telemetry_loop.schema import Contexts
from telemetry_loop.simulate import EXAMINE, LONG, SimulateConfig, World, p_long
from telemetry_loop.train import learn, refit

SEEDS = list(range(301, 311))
BEFORE = 10      # days of log before the shift
PARAMS = small_params(simulate=dict(users=1000, items=150, new_items=0, candidates=24, no_consent=0., seasonality=0., faults={k: False if k == 'unit_change' else 0. for k in Faults.__dataclass_fields__}),
    train=dict(dim=32, blocks=1, length=50, dropout=.3, batch=32, epochs=15, patience=2, lr=.003, average=.99, half='no', inputs=['category'], others=[], rewards={})) # as in the product, smaller
PRODUCT, POLICY, TRAIN, REFRESH = [from_dict(cls, PARAMS[name], name) for cls, name in ((SimulateConfig, 'simulate'), (PolicyConfig, 'policy'), (TrainConfig, 'train'), (RefreshConfig, 'refresh'))]
REWARD = {'satisfied': 1., 'hidden': -.5}

class Watched(World):
    "The product, with what people chose and what they were offered kept."
    def _wave(self, policy, rows, clock, u, rng, log):
        seen = []
        spent = super()._wave(policy, rows, clock, u, rng, seen)
        w = seen[0]; r, j = np.nonzero(w['clicked'] & (w['dwell'] >= LONG))
        self.acts.append(pd.DataFrame(dict(user_id=self.user_ids[rows[r]], item=self.item_ids[w['items'][r, j]], event_time=w['time'][r] + (1000*w['opened_at'][r, j]).astype('timedelta64[ms]'))))
        return spent
    def turn(self, policy:Policy)->tuple: # acts of the day, contexts of its decisions, regret per decision
        "One day."
        self.acts, offered = [], []
        def decide(contexts, rng): offered.append(contexts); return policy.decide(contexts, rng)
        self.live(type('Kept', (), {'decide': staticmethod(decide)}), 1)
        contexts = Contexts(**{k: np.concatenate([getattr(c, k) for c in offered]) for k in Contexts.__dataclass_fields__})
        return pd.concat(self.acts, ignore_index=True), contexts, (best(self, contexts) - value(self, contexts, policy)).mean()

def worth(world:World, contexts:Contexts)->np.ndarray: # (n, m)
    "Expected reward of each candidate once it is looked at, on the day of the decision."
    day = (contexts.time.astype('datetime64[D]') - np.datetime64(world.cfg.start, 'D')).astype(int)
    user = np.searchsorted(world.user_ids, contexts.user_id)
    item = np.searchsorted(world.item_ids, contexts.candidates).clip(max=len(world.item_ids) - 1)
    click, joy, hide = world.effects(np.arange(len(user))[:, None], item, *(np.stack(x)[day, user].astype(float) for x in (world.tastes, world.pulls)))
    return np.where(contexts.candidates != '', click*(REWARD['satisfied']*p_long(joy) + REWARD['hidden']*hide), 0.)

def value(world, contexts, policy)->np.ndarray: # (n,)
    "Expected reward of each decision under the policy, exactly."
    return (position_marginals(policy.weights(contexts), POLICY.slate)*EXAMINE(np.arange(POLICY.slate))*worth(world, contexts)[:, :, None]).sum((1, 2))

def best(world, contexts)->np.ndarray: # (n,)
    "The same under the policy that knows the truth."
    return (-np.sort(-worth(world, contexts), 1)[:, :POLICY.slate]*EXAMINE(np.arange(POLICY.slate))).sum(1)

def shift(world:World, kind:str):
    "From now on items are what other items were, or people like what they disliked."
    to = np.random.default_rng(world.seed).permutation(world.available)
    if kind == 'items':
        for name in ('quality', 'appeal', 'clickbait', 'traits'): world.stock[name][:len(to)] = world.stock[name][to]
    else:
        for name in ('taste', 'lean'): world.people[name] = -world.people[name]

def retrained(world:World, acts:pd.DataFrame)->Recommender:
    "Everything so far: settings by the newest day, then all of it."
    items = world.item_ids[:world.available]; n = len(items)
    t = acts.sort_values(['user_id', 'event_time'], ignore_index=True)
    t = t.assign(item=np.searchsorted(items, t['item']), known_time=t['event_time'], split=np.where(t['event_time'] >= world.today - 1, 'valid', 'train'))
    sequences = lambda t: [s.to_numpy(int) for _, s in t.groupby('user_id', sort=True)['item']]
    plain = n, world.stock['category'][:n], TRAIN, world.seed, 1
    _, _, fitted, chosen = learn(sequences(t[t['split'] == 'train']), *plain, targets_as_of(t, 'valid', np.full(n, np.datetime64('NaT', 'ms')))[0])
    return Recommender(refit(sequences(t), *plain, fitted, chosen), items, asdict(TRAIN), {'threads': 1})

def histories(acts:pd.DataFrame)->dict: return {u: s.to_numpy() for u, s in acts.sort_values(['user_id', 'event_time']).groupby('user_id')['item']}

def before(seed:int)->tuple: # world, acts by day, the recommender trained on them, regret of the last day
    "Days under plain popularity, the last one under a recommender."
    world, acts = Watched(PRODUCT, seed), []
    for day in range(BEFORE):
        live = bootstrap_policy(POLICY) if day < BEFORE - 1 else model_policy(retrained(world, pd.concat(acts)), POLICY)
        mine, _, regret = world.turn(live); acts.append(mine)
    return world, acts, retrained(world, pd.concat(acts)), regret

def recovered(regret:list, usual:float)->int: # regret: of each day, the first is the day of the shift; usual: before it
    "Days until half of what the shift cost is won back; as many as there are days where it is not."
    enough = np.flatnonzero(np.array(regret) <= usual + .5*(regret[0] - usual))
    return int(enough[0]) if len(enough) else len(regret)

def caught_up(regret:list, other:list)->int: # of each day
    "The day from which regret is no larger than the other's on its last day; as many as there are days where it never is."
    enough = np.flatnonzero(np.array(regret) <= other[-1])
    return int(enough[0]) if len(enough) else len(regret)

def one(seed:int, kind:str, days:int)->dict: # regret by day of both learners
    "Two learners through the same shift in the same world."
    torch.set_num_threads(1)
    world, acts, start, usual = before(seed)
    told, known = {'seed': seed, 'kind': kind, 'usual': usual, 'cost': {}, 'steps': []}, histories(pd.concat(acts))
    shift(world, kind)
    for learner in ('nightly', 'refresh'):
        mine, since, live, told[learner], told['cost'][learner] = copy.deepcopy(world), [], start, [], []
        for day in range(days):
            fresh, _, regret = mine.turn(model_policy(live, POLICY)); since.append(fresh); told[learner].append(regret)
            if day == days - 1: break
            begun = time.process_time()
            if learner == 'nightly': live = retrained(mine, pd.concat(acts + since))
            else: live = start.update(pd.concat(since), known, REFRESH); told['steps'].append((live.facts['refresh']['accepted'], live.facts['refresh']['share'], live.facts['refresh']['events'])) # never retrained: less than the usual cadence
            told['cost'][learner].append(time.process_time() - begun)
        told[f'{learner}_days'] = recovered(told[learner], usual)
    return told

def controls(seed:int)->dict: # true value per decision minus that of the model that stays, on the same decisions
    "A quiet day's events, and random ones in their place."
    torch.set_num_threads(1)
    world, acts, start, _ = before(seed)
    known, (fresh, _, _) = histories(pd.concat(acts)), world.turn(model_policy(start, POLICY))
    noise = fresh.assign(item=np.random.default_rng(seed).choice(start.items, len(fresh)))
    guarded, open_, quiet = start.update(noise, known, REFRESH), start.update(noise, known, REFRESH, guard=False), start.update(fresh, known, REFRESH)
    _, contexts, _ = world.turn(model_policy(start, POLICY))
    gain = lambda rec: float((value(world, contexts, model_policy(rec, POLICY)) - value(world, contexts, model_policy(start, POLICY))).mean())
    return {'seed': seed, 'fell_back': guarded.version == start.version, 'guarded': gain(guarded), 'unguarded': gain(open_), 'quiet': gain(quiet), 'quiet_accepted': quiet.facts['refresh']['accepted']}

def over_seeds(x:list)->Estimate:
    "Mean with a t-interval."
    x = np.array(x, float); half = stdtrit(len(x) - 1, .975)*standard_error(x)
    return Estimate(x.mean(), x.mean() - half, x.mean() + half, len(x))

# --- the part that runs in the suite

@pytest.fixture(scope='module')
def lived(): return [one(seed, 'items', 5) for seed in SEEDS[:2]]

@pytest.fixture(scope='module')
def control(): return [controls(seed) for seed in SEEDS[2:4]]

def test_refresh_recovers_in_fewer_days_than_nightly_retraining(lived):
    assert all(t['refresh'][0] == t['nightly'][0] > t['usual'] for t in lived)                  # the same shift, and it costs
    assert all(sum(t['refresh']) < sum(t['nightly']) for t in lived)
    assert all(caught_up(t['refresh'], t['nightly']) < len(t['nightly']) - 1 for t in lived)    # there before the other
    assert all(seconds < 10 for t in lived for seconds in t['cost']['refresh'])

def test_noise_falls_back_and_would_have_done_harm(control):
    assert all(c['fell_back'] and c['guarded'] == 0 for c in control) and np.mean([c['unguarded'] for c in control]) < -.02

def test_the_yardstick_is_the_simulators():
    world = Watched(PRODUCT, 5)
    _, contexts, regret = world.turn(bootstrap_policy(POLICY))
    assert value(world, contexts, bootstrap_policy(POLICY)).mean() == pytest.approx(world.value_at(contexts, bootstrap_policy(POLICY), REWARD).mean(), rel=.02) and regret > 0

if __name__ == '__main__':
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--seeds', type=int, default=len(SEEDS), help='how many of the declared seeds'); cli.add_argument('--days', type=int, default=7, help='lived from the day of the shift on'); cli.add_argument('--workers', type=int, default=2, help='processes')
    asked = cli.parse_args(); seeds = SEEDS[:asked.seeds]
    with ProcessPoolExecutor(asked.workers) as pool:
        jobs = {kind: [pool.submit(one, seed, kind, asked.days) for seed in seeds] for kind in ('items', 'people')} | {'controls': [pool.submit(controls, seed) for seed in seeds]}
        found = {name: [job.result() for job in some] for name, some in jobs.items()}
    rows = []
    for kind in ('items', 'people'):
        told = found[kind]
        for learner in ('nightly', 'refresh'): rows.append({'shift': kind, 'learner': learner, 'days to recover': over_seeds([t[f'{learner}_days'] for t in told]), 'regret over the days': over_seeds([sum(t[learner]) for t in told]), 'CPU-seconds a step': f"{np.mean([t['cost'][learner] for t in told]):.2f}"})
        rows.append({'shift': kind, 'learner': 'refresh minus nightly', 'day it is where nightly ends': over_seeds([caught_up(t['refresh'], t['nightly']) for t in told]), 'days to recover': over_seeds([t['refresh_days'] - t['nightly_days'] for t in told]), 'regret over the days': over_seeds([sum(t['refresh']) - sum(t['nightly']) for t in told]), 'CPU-seconds a step': ''})
        for learner in ('nightly', 'refresh'): print(kind, learner, 'regret by day', np.round(np.mean([t[learner] for t in told], 0), 3), 'before', round(np.mean([t['usual'] for t in told]), 3))
    print(pd.DataFrame(rows).to_markdown(index=False))
    told = found['controls']
    print(f"random events: fell back {sum(t['fell_back'] for t in told)} of {len(told)}; true value per decision changes by {over_seeds([t['unguarded'] for t in told])} without the guard, {over_seeds([t['guarded'] for t in told])} with it")
    print(f"a quiet day: accepted {sum(t['quiet_accepted'] for t in told)} of {len(told)}; true value per decision changes by {over_seeds([t['quiet'] for t in told])}")
