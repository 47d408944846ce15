"""Does the promise hold through the whole pipeline? Worlds with the default mess in their telemetry, judged by `World.value_at`.

`python tests/validity/through.py --part coverage|ranking|exploration --seeds N --workers W --json OUT` appends one line a world to OUT, goes on where it was stopped, and prints the acceptance figures.
What is estimated is the expected reward of a decision at the decisions that the pipeline evaluates: those of the test window, with the users, candidates, popularity and histories it reconstructs. Bots that the pipeline
takes for people stay in the estimate and have no truth. The truth is that of these very users and an interval speaks of users like these, so it should be longer than its error alone asks for, by what other users would add:
`length` is 1 where it is, and coverage lies above 95 %. Seeds, sizes and policies are declared here. Sizes, and for exploration the logging policy and the target, were chosen on seeds 901 to 904 alone: with the network as
the target there is little to gain anywhere, as most of the doubt is about users and not about weights, so the target is a list of items that the log shows rarely."""
import argparse, contextlib, copy, functools, importlib, json, shutil, sys, tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
SEEDS = dict(coverage=range(1001, 1201), ranking=range(1301, 1351), exploration=range(1401, 1451))
STAGES = ('ingest', 'sessions', 'features', 'train', 'policy', 'replay', 'ope')
LEARN = dict(train=dict(dim=32, length=50, batch=32, lr=.003, epochs=4, patience=4, valid_rows=250), quality=dict(list_rows=300, robust_rows=100))
WORLD = dict(users=450, days=11)                                                                   # the rest as in conftest.TINY
STRETCH = dict(simulate=dict(users=500, days=5), features=dict(test_share=.6))                        # exploration: the first stretch; its later part says where to explore
LOGGING, TARGET, MORE_DAYS = (1., .1), (1.5, .05), 7                                               # popularity power and exploration of the logging policy; liking and exploration of the target; days of the second stretch
RANKED, SAMPLES = 1500, 16                                                                         # decisions and slates each, for ranking; slates each for every truth
ESTIMATOR = 'dr'                                                                                   # as ope.estimator in params.yaml

@contextlib.contextmanager
def product(seed:int, **sections):
    "A folder of its own with the values of a small product; the working directory while it lasts."
    import torch, yaml
    from conftest import small_params
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        params = small_params(**{name: LEARN.get(name, {}) | sections.get(name, {}) for name in LEARN | sections})
        params['run'] |= dict(seed=seed, threads=1)
        Path('params.yaml').write_text(yaml.safe_dump(params))
        yield Path(tmp)

def stages(*names):
    for name in names or STAGES: importlib.import_module(f'telemetry_loop.{name}').run()

def section(name:str):
    from telemetry_loop import ope, policy, sessions, simulate, support
    from telemetry_loop.config import RunConfig, load_params
    return load_params(dict(run=RunConfig, simulate=simulate.SimulateConfig, policy=policy.PolicyConfig, sessions=sessions.SessionsConfig, ope=ope.OpeConfig, support=support.SupportConfig)[name], name)

def replayed(policy, decisions, contexts):
    from telemetry_loop.policy import replay
    return replay(policy, decisions, contexts)

class Fixed:
    "A policy at given contexts, its distribution computed once."
    def __init__(self, policy, contexts): self.policy, self.choice = policy, policy.choice(contexts)
    def decide(self, contexts, rng):
        from telemetry_loop.choice import draw_slates
        from telemetry_loop.schema import Slates
        chosen, p = draw_slates(self.choice, self.policy.cfg.slate, rng)
        items = np.where(chosen < 0, '', np.take_along_axis(contexts.candidates, np.maximum(chosen, 0), 1))
        return Slates(items=items, propensity=p, position_propensity=p, personalised=self.policy.personal(contexts), policy_id=self.policy.policy_id, model_version='')

def evaluated(since=None)->tuple: # since: event time; None: the test window -> decisions, contexts
    "The decisions that the pipeline evaluates, as it sees them."
    import pandas as pd
    from telemetry_loop.features import contexts_of, read_features
    features = read_features()
    d = pd.read_parquet('artifacts/sessions/decisions').merge(features.decisions[['decision_id', 'split']], on='decision_id')
    d = d[(d['split'] == 'test' if since is None else (d['event_time'] >= since) & (d['split'] != 'embargo')) & d['position_propensities'].notna() & d['candidates'].notna()].reset_index(drop=True)
    return d, contexts_of(d, features)

def people(world, contexts)->tuple: # (n,) bool, the contexts of those under their own names
    "Who of these the simulator knows as people."
    from telemetry_loop.privacy import key, pseudonyms
    names = dict(zip(pseudonyms(world.user_ids, key()), world.user_ids))
    there = np.array([u in names for u in contexts.user_id], bool)
    some = contexts.take(there)
    return there, replace(some, user_id=np.array([names[u] for u in some.user_id]))

def truth(world, contexts, policy)->np.ndarray: # (n,)
    "What a decision earns in expectation."
    return world.value_at(contexts, Fixed(policy, contexts), section('sessions').reward, SAMPLES)

@contextlib.contextmanager
def lived(seed:int):
    "A product whose first policy has run, whose network has learned from that, and whose evaluation has spoken."
    from telemetry_loop.loop import first_world
    with product(seed, simulate=WORLD):
        world = first_world(Path('data'), progress=False)
        stages()
        yield world

def promised(world)->dict:
    "What the evaluation in this folder promises of the network, and the truth."
    import pandas as pd
    from telemetry_loop.config import read_json
    from telemetry_loop.estimate import mean, standard_error
    from telemetry_loop.policy import bootstrap_policy, model_policy
    from telemetry_loop.estimators import Tables, cross_fit
    from telemetry_loop.train import Recommender
    told, cfg = read_json('metrics/ope.json'), section('policy')
    decisions, contexts = evaluated()
    there, contexts = people(world, contexts)
    se = lambda x: standard_error(x, decisions['user_id'].to_numpy()[there])
    ours, theirs = [truth(world, contexts, p) for p in (model_policy(Recommender.load('artifacts/train'), cfg), bootstrap_policy(cfg))]
    rows, candidates = [pd.read_parquet(f'artifacts/policy/{name}.parquet') for name in ('rows', 'candidates')]
    _, v = cross_fit(rows, candidates, Tables(section('ope').bins, section('ope').penalty), section('ope').folds, world.seed)
    opinion = mean(v, rows['user_id'].to_numpy()).scale(told['slots_per_decision']).as_dict()          # the spread of predictions, wrongly taken for an interval
    same = read_json('metrics/replay.json')['versions']
    return dict(verdict=told['support']['verdict'], reasons=told['support']['reasons'], ess=told['support']['ess'], khat=told['support']['khat'], mean_weight=told['support']['mean_weight'], decisions=told['n_decisions'], users=told['n_users'],
        strangers=int((~there).sum()), value_se=se(ours), gain_se=se(ours - theirs), same_propensities=same, value=float(ours.mean()), gain=float((ours - theirs).mean()), logging_value=float(theirs.mean()), estimates=told['estimates'], gains=told['gain'], logging=told['logging'], opinion=opinion)

def coverage(seed:int)->dict:
    with lived(seed) as world: return promised(world)

class Remembered:
    "A scorer that is asked often about the same contexts."
    def __init__(self, scorer): self.scorer, self.version, self.told = scorer, scorer.version, {}
    def scores(self, contexts):
        if (key := (contexts.candidates.tobytes(), contexts.time.tobytes())) not in self.told: self.told[key] = self.scorer.scores(contexts)
        return self.told[key]

class Listed:
    "Editors like some items more than others, whoever asks and however popular these are."
    version = 'none'
    def __init__(self, seed:int, strength:float): self.liking = strength*np.random.default_rng(seed).normal(size=100_000)
    def scores(self, contexts): return self.liking[np.where(contexts.candidates == '', '0', np.char.lstrip(contexts.candidates, 'i')).astype(int)]

def grid(recommender, cfg)->dict: # name -> Policy, twenty of them
    "Random; what is unpopular and, more and more sharply, popular; seven lists of editors, who differ by luck alone; and the model, from sharp to loose, with little and with much exploration."
    from telemetry_loop.policy import ModelScorer, Policy, PopularityScorer, random_policy
    model, popular = Remembered(ModelScorer(recommender, cfg.objective)), PopularityScorer(cfg.bootstrap_power)
    return {'random': random_policy(cfg)} | {f'popularity {power}': Policy(PopularityScorer(power), cfg, 'popularity', 1., .1) for power in (-1., .5, 1., 2.)} \
        | {f'list {seed}': Policy(Listed(seed, TARGET[0]), cfg, 'list', 1., .1) for seed in range(7)} \
        | {f'model {t} {share}': Policy(model, cfg, 'sequence', t, share, fallback=popular) for t in (.25, .5, 1., 2.) for share in (.1, .5)}

def judged(policy, decisions, contexts, seed:int)->tuple: # OpeResult and standard error of the value, both per decision; replayed rows and candidates
    "As `ope.evidence` judges the reward; the other outcomes are left out."
    from telemetry_loop.estimate import standard_error
    from telemetry_loop.ope import assess, checked_log
    from telemetry_loop.estimators import dr
    from telemetry_loop.estimators import Tables, cross_fit
    cfg, (rows, candidates) = section('ope'), replayed(policy, decisions, contexts)
    slots, place = len(rows)/rows['decision_id'].nunique(), candidates.groupby(['decision_id', 'position'])
    q, v = cross_fit(rows, candidates, Tables(cfg.bins, cfg.penalty), cfg.folds, seed)
    log = checked_log(rows['reward'], rows['propensity'], rows['target_prob'], q, v, rows['user_id'])
    found = assess(log, section('support'), np.maximum(0, 1 - place['target_prob'].sum()).mean(), {'position': rows['position'].to_numpy()}, rows['item_id'].to_numpy(), candidates.groupby('item_id')['target_prob'].sum()/len(rows), int(place.size().max()))
    return found.scale(slots), slots*standard_error(dr(log.reward, log.target_prob/log.propensity, q, v)[1], log.cluster), rows, candidates

def ranked(world, n:int=RANKED)->dict: # n: decisions looked at
    "Twenty policies on one log: as the evaluation ranks them, and as they are."
    from scipy.stats import spearmanr
    from telemetry_loop.estimators import snips
    from telemetry_loop.train import Recommender
    seed = world.seed
    decisions, contexts = evaluated()
    there, named = people(world, contexts)
    some = np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(there))[:n])
    named = named.take(np.searchsorted(np.flatnonzero(there), some)); decisions, contexts = decisions.iloc[some].reset_index(drop=True), contexts.take(some)
    told = {}
    for name, policy in grid(Recommender.load('artifacts/train'), section('policy')).items():
        found, _, rows, _ = judged(policy, decisions, contexts, seed)
        naive = np.average(rows['reward'], weights=rows['target_prob'])*len(rows)/len(decisions)       # logged rewards where the target agrees, as if the log had not chosen
        luck = snips(np.random.default_rng(seed).permutation(rows['reward'].to_numpy()), (rows['target_prob']/rows['propensity']).to_numpy())[0] # the same log, its rewards dealt out anew
        told[name] = dict(estimate=found.estimates[ESTIMATOR].value, interval=found.estimates[ESTIMATOR].ci_lower is not None, opinion=found.estimates['dm'].value, naive=float(naive), luck=luck, truth=float(truth(world, named, policy).mean()))
    of = lambda key: [t[key] for t in told.values()]
    return dict(decisions=len(decisions), refused=20 - sum(of('interval')), policies=told, **{key: float(spearmanr(of(key), of('truth')).statistic) for key in ('estimate', 'opinion', 'naive', 'luck')})

def ranking(seed:int)->dict:
    with lived(seed) as world: return ranked(world)

def spending(policy, advice=None, share:float=.05):
    "The policy with a share of its slots spent anew: evenly, or as the advice says; what is drawn from, and so every propensity, is the mixture. The share is kept over all decisions together."
    mixed, spent = copy.copy(policy), np.zeros(2)                                                          # spent, decisions
    group = lambda c: np.where(c.personalise, np.array(['strangers', 'newcomers', 'regulars'])[((known := (c.history != '').sum(1)) > 0).astype(int) + (known >= 20)], 'without consent') # as `replay` tells them apart
    def choice(contexts, explore:bool=True):
        plain = policy.choice(contexts, explore); n, m = plain.weights.shape
        if advice is None: extra = share*plain.offered/np.maximum(1, plain.offered.sum(1, keepdims=True))
        else: extra = advice.reindex(list(zip(np.repeat(group(contexts), m), contexts.candidates.ravel()))).fillna(0.).to_numpy().reshape(n, m)*plain.offered
        extra *= np.clip((share*(spent[1] + n) - spent[0])/max(extra.sum(), 1e-12), 0, 2)
        extra *= np.minimum(1, .9/np.maximum(extra.sum(1, keepdims=True), 1e-12))                         # nobody sees exploration alone
        spent[:] += extra.sum(), n
        return replace(plain, weights=(1 - extra.sum(1, keepdims=True))*plain.weights + extra)
    mixed.choice, mixed.policy_id = choice, policy.policy_id + (' even' if advice is None else ' advised')
    return mixed, spent

def exploration(seed:int)->dict:
    "A world lives on three times from the same state: as before, with exploration spent evenly, and where the evaluation asks for it. Each log then evaluates the same target over the second stretch."
    from telemetry_loop.ope import advice
    from telemetry_loop.policy import Policy, PopularityScorer
    from telemetry_loop.simulate import World
    with product(seed, **STRETCH) as here:
        world, cfg = World(section('simulate'), seed), section('policy')
        logging, target = Policy(PopularityScorer(LOGGING[0]), cfg, 'popularity', 1., LOGGING[1]), Policy(Listed(seed, TARGET[0]), cfg, 'list', 1., TARGET[1])
        world.live(logging, world.cfg.days, to=Path('data'))
        stages(*STAGES[:3])
        _, _, rows, candidates = judged(target, *evaluated(), seed)
        told = advice(rows, candidates, section('ope'))
        offered = candidates.merge(rows[['decision_id', 'who']].drop_duplicates(), on='decision_id').groupby(['who', 'item_id']).size()/len(rows)
        more = told.set_index(['who', 'item_id'])['give']; more = (more/offered.reindex(more.index)).fillna(0.) # so much more often, where it is offered
        arms, since, found = dict(before=(logging, np.array([0., 1.])), even=spending(logging), advised=spending(logging, more)), np.datetime64(world.today), {}
        for name, (policy, spent) in arms.items():
            (here/name).mkdir(); shutil.copy('params.yaml', here/name); shutil.copytree('data', here/name/'data')
            with contextlib.chdir(here/name):
                other = copy.deepcopy(world)
                other.live(policy, MORE_DAYS, to=Path('data'))
                stages(*STAGES[:3])
                decisions, contexts = evaluated(since)
                result, se, *_ = judged(target, decisions, contexts, seed)
                s, e = result.support, result.estimates[ESTIMATOR]
                found[name] = dict(decisions=len(decisions), spent=float(spent[0]/spent[1]), verdict=s.verdict, reasons=list(s.reasons), ess=s.ess, khat=s.khat, estimate=e.as_dict(), se=se, truth=float(truth(other, people(other, contexts)[1], target).mean()))
    return dict(arms=found, promised_cut=float(told['cut'].iloc[0]))

PARTS = dict(coverage=coverage, ranking=ranking, exploration=exploration)

def summary(part:str, told:list)->dict: # told: lines of one part
    "The acceptance figures."
    from scipy.stats import binom
    kept = [t for t in told if 'error' not in t]
    out = dict(part=part, worlds=len(told), stopped=len(told) - len(kept), cpu_seconds_per_world=float(np.median([t['cpu_seconds'] for t in told])) if told else None)
    quartiles = lambda x: dict(zip(('lower_quartile', 'median', 'upper_quartile'), np.quantile(x, (.25, .5, .75)).round(4).tolist())) if len(x) else None
    def length(told, what, many): # an interval speaks of users like these, the truth of these very users: what it missed, and what other users would add, over what it allows; 1 where it is neither too short nor too long
        return float(np.mean([(t[many][ESTIMATOR]['value'] - t[what])**2 + t[f'{what}_se']**2 for t in told])/np.mean([((t[many][ESTIMATOR]['ci_upper'] - t[many][ESTIMATOR]['ci_lower'])/3.92)**2 for t in told])) if told else None
    if part == 'coverage':
        taken = [t for t in kept if t['verdict'] != 'refuse']
        inside = lambda e, true: e['ci_lower'] is not None and e['ci_lower'] <= true <= e['ci_upper']
        names = [k for k in taken[0]['gains']] if taken else []
        out |= dict(accepted=len(taken), needed=int(binom.ppf(.01, len(taken), .95)) if taken else None, verdicts={v: sum(t['verdict'] == v for t in kept) for v in ('trust', 'widen', 'refuse')},
            value={k: sum(inside(t['estimates'][k], t['value']) for t in taken) for k in names}, gain={k: sum(inside(t['gains'][k], t['gain']) for t in taken) for k in names},
            control={'opinion taken for an interval': sum(inside(t['opinion'], t['value']) for t in taken), 'mean of the log': sum(inside(t['logging'], t['value']) for t in taken)}, logging_value=sum(inside(t['logging'], t['logging_value']) for t in taken),
            error_in_widths={what: quartiles([(t[many][ESTIMATOR]['value'] - t[what])/(t[many][ESTIMATOR]['ci_upper'] - t[many][ESTIMATOR]['ci_lower'])*3.92 for t in taken]) for what, many in (('value', 'estimates'), ('gain', 'gains'))}, length={what: length([t for t in taken if 'value_se' in t and t['verdict'] == 'trust'], what, many) for what, many in (('value', 'estimates'), ('gain', 'gains'))})
    if part == 'ranking': out |= {k: quartiles([t[k] for t in kept]) for k in ('estimate', 'opinion', 'naive', 'luck', 'refused')}
    if part == 'exploration':
        cut = lambda name: np.array([1 - t['arms'][name]['se']/t['arms']['before']['se'] for t in kept])  # of the plain interval, which every verdict but a refusal scales
        even, advised = cut('even'), cut('advised')
        ratio = np.divide(advised, even, out=np.where(advised > 0, np.inf, 0.), where=even > 0)
        out |= dict(cut_even=quartiles(even), cut_advised=quartiles(advised), ratio=dict(zip(('lower_quartile', 'median', 'upper_quartile'), np.quantile(ratio, (.25, .5, .75), method='lower').round(3).tolist())) if kept else None,
            ratio_of_medians=float(np.median(advised)/np.median(even)) if kept else None, half_more=int((ratio >= 1.5).sum()),
            by_weights={k: quartiles([1 - np.sqrt(t['arms']['before']['ess']/t['arms'][k]['ess']) for t in kept]) for k in ('even', 'advised')}, promised_cut=quartiles([t['promised_cut'] for t in kept]), spent={k: quartiles([t['arms'][k]['spent'] for t in kept]) for k in ('even', 'advised')},
            verdicts={k: {v: sum(t['arms'][k]['verdict'] == v for t in kept) for v in ('trust', 'widen', 'refuse')} for k in ('before', 'even', 'advised')})
    return out

def one(part:str, seed:int)->dict:
    "A world's line; a pipeline that stops is told, not hidden."
    import time
    from telemetry_loop.config import TelemetryError, code_digest
    started = time.process_time()
    try: found = PARTS[part](seed)
    except TelemetryError as e: found = dict(error=str(e))
    return dict(part=part, seed=seed) | found | dict(cpu_seconds=round(time.process_time() - started, 2), code=code_digest())

def worlds(part:str, seeds, workers:int=1, to=None)->list: # to: file of lines, kept and added to; None: none
    "Many worlds; those that the file already holds are not lived again."
    from tqdm import tqdm
    old = [json.loads(line) for line in Path(to).read_text().splitlines()] if to and Path(to).is_file() else []
    told = {t['seed']: t for t in old if t['part'] == part and t['seed'] in seeds}
    def keep(line):
        told[line['seed']] = line
        if to:
            with open(to, 'a') as f: f.write(json.dumps(line) + '\n')
    left = [s for s in seeds if s not in told]
    bar = functools.partial(tqdm, total=len(left), desc=part, unit='world', mininterval=5)
    if workers == 1:
        for s in bar(left): keep(one(part, s))
    else:
        with ProcessPoolExecutor(workers) as pool:
            for done in bar(as_completed([pool.submit(one, part, s) for s in left])): keep(done.result())
    return [told[s] for s in seeds]

if __name__ == '__main__':
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--part', choices=PARTS, required=True); cli.add_argument('--seeds', type=int, help='how many of the declared ones'); cli.add_argument('--first', type=int, help='another first seed, for trying things out')
    cli.add_argument('--workers', type=int, default=1, help='processes'); cli.add_argument('--json', help='file of lines, one a world')
    asked = cli.parse_args()
    seeds = list(SEEDS[asked.part])[:asked.seeds]
    if asked.first is not None: seeds = list(range(asked.first, asked.first + len(seeds)))
    print(json.dumps(summary(asked.part, worlds(asked.part, seeds, asked.workers, asked.json)), indent=1))
