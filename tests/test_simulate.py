"The simulated product: a known truth, common luck, and telemetry that keeps the plan where it should."
import dataclasses, json
from pathlib import Path
import numpy as np, pytest
from scipy.special import expit
from telemetry_loop.config import TelemetryError, from_dict
from telemetry_loop.policy import PolicyConfig, bootstrap_policy, model_policy, Policy
from telemetry_loop.schema import Contexts
from telemetry_loop.simulate import EXAMINE, LONG, SimulateConfig, World, outcome_means, p_long
from conftest import small_params

CFG, POLICY = from_dict(SimulateConfig, small_params()['simulate'], 'simulate'), from_dict(PolicyConfig, small_params()['policy'], 'policy')

def read(folder): return [(f.name, i, l) for f in sorted(Path(folder).iterdir()) for i, l in enumerate(f.read_text().splitlines(), 1)]
def sound(world, lines): # event_id -> event, of people, whatever the telemetry lost or broke
    truth = world.truth_frames(); broken, bots = set(zip(truth['broken'].file, truth['broken'].line)), set(truth['bots'].user_id)
    events = [json.loads(l) for f, i, l in lines if (f, i) not in broken]
    return {e['event_id']: e for e in events if e.get('user_id') not in bots}

@pytest.fixture(scope='module')
def lived(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world'); world = World(CFG, 3)
    return world, world.live(bootstrap_policy(POLICY), 6, to=folder), read(folder)

def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, lived):
    for seed in (3, 4): World(CFG, seed).live(bootstrap_policy(POLICY), 6, to=tmp_path/str(seed))
    assert read(tmp_path/'3') == lived[2] != read(tmp_path/'4')

def test_logging_changes_nothing_about_life(lived):
    silent = World(CFG, 3).live(bootstrap_policy(POLICY), 6)
    assert all((getattr(silent, f.name) == getattr(lived[1], f.name)).all() for f in dataclasses.fields(silent))

def test_windows_add_up(tmp_path):
    "Six days at once are three days twice: the log of a longer life begins with the log of a shorter one."
    world = World(CFG, 3)
    for _ in range(2): world.live(bootstrap_policy(POLICY), 3, to=tmp_path/'two')
    World(CFG, 3).live(bootstrap_policy(POLICY), 6, to=tmp_path/'one')
    assert read(tmp_path/'one') == read(tmp_path/'two')

def test_long_dwell_has_the_closed_form():
    rng = np.random.default_rng(0)
    for joy in (-1., 0., 1.):
        dwell = 24*np.exp(.8*(joy + .5*rng.normal(size=400_000)) + .6*rng.normal(size=400_000))
        assert abs((dwell >= LONG).mean() - p_long(np.array(joy))) < .004

def test_value_at_is_what_the_log_earns_on_policy(lived):
    "The truth at logged contexts must agree with what users did there under the policy that logged, within noise."
    world, life, lines = lived
    events = sound(world, lines)
    decisions = sorted((e for e in events.values() if e['type'] == 'decision'), key=lambda e: e['decision_id'])
    clicks = sum(e['type'] == 'click' for e in events.values()); hidden = sum(e['type'] == 'complaint' for e in events.values())
    m = CFG.candidates
    pad = lambda xs: list(xs) + ['']*(m - len(xs))
    day = {str(d): i for i, d in enumerate(np.datetime64(CFG.start) + np.arange(7))}
    index = lambda ids: np.searchsorted(world.item_ids, ids)
    offered = np.array([pad(d['candidates']) for d in decisions])
    popular = np.array([np.where(row == '', 0, world.clicks[day[d['event_time'][:10]]][np.minimum(index(row), len(world.item_ids)-1)]) for d, row in zip(decisions, offered)])
    contexts = Contexts(user_id=np.array([d['user_id'] for d in decisions]), time=np.array([d['event_time'][:-1] for d in decisions], 'datetime64[ms]'), candidates=offered,
                        popularity=popular, history=np.full((len(decisions), 1), ''), personalise=np.ones(len(decisions), bool))
    for reward, count in ((dict(clicked=1.), clicks), (dict(hidden=1.), hidden)):
        truth = world.value_at(contexts, bootstrap_policy(POLICY), reward, samples=30)
        assert abs(truth.sum() - count) < 4*np.sqrt(count) + .01*count

def test_propensities_are_those_of_the_draw(lived):
    "Over many decisions, mean of 1/propensity of the first item shown is the number of candidates on offer (Horvitz & Thompson)."
    decisions = [e for e in sound(lived[0], lived[2]).values() if e['type'] == 'decision']
    ratio = np.array([1/d['propensities'][0]/len(d['candidates']) for d in decisions])
    assert abs(ratio.mean() - 1) < 4*ratio.std()/np.sqrt(len(ratio))
    assert all(set(d['slate']) <= set(d['candidates']) and len(d['slate']) == len(set(d['slate'])) == len(d['propensities']) for d in decisions)
    assert sorted(d['seq'] for d in decisions) == sorted(set(d['seq'] for d in decisions))

def test_satisfaction_not_clicks_brings_people_back():
    "Turning the pull of goodwill off makes the return rate deaf to satisfaction; with it, clickbait costs returns."
    click, joy, hide = outcome_means(0., 0., 0., np.array([0., 1.]), CFG.clickbait)
    assert click[1] > click[0] and joy[1] < joy[0] and hide[1] > hide[0]
    def gap(goodwill):
        world = World(dataclasses.replace(CFG, goodwill=goodwill), 5); world.live(bootstrap_policy(POLICY), 3)
        class Cheat:
            version = 'truth'
            def __init__(self, sign): self.sign = sign
            def scores(self, c):
                u = np.searchsorted(world.user_ids, c.user_id)[:, None]; i = np.minimum(np.searchsorted(world.item_ids, c.candidates), len(world.item_ids)-1)
                click, joy, _ = world.effects(u, i); return self.sign*4*joy
        lives = [world.value(Policy(Cheat(s), POLICY, 'cheat', 1., .05), 10).visited.mean() for s in (1, -1)]
        return lives[0] - lives[1]
    assert gap(2.) > .03 and abs(gap(0.)) < 1e-12

def test_a_world_without_days_left_says_so():
    with pytest.raises(TelemetryError, match='holds items for 400 days'): World(CFG, 1).live(bootstrap_policy(POLICY), 401)

def test_every_event_of_the_plan_happens(lived):
    "All that this product does; pages and histories come from imports. A control changes what the next decision may do."
    events = sound(lived[0], lived[2]).values()
    assert {e['type'] for e in events} == {'account', 'item', 'decision', 'impression', 'click', 'heartbeat', 'close', 'conversion', 'complaint', 'survey', 'exposure', 'consent', 'control', 'request'}
    off = {e['user_id'] for e in events if e['type'] == 'control' and e['action'] == 'off'}
    assert off and not any(lived[0].people['personalise'][np.isin(lived[0].user_ids, list(off - {e['user_id'] for e in events if e['type'] == 'control' and e['action'] == 'on'}))])
    assert {e['app_version'] for e in events if 'app_version' in e} == {'3.0.0'}

def test_seasonality_is_a_strength():
    "The week is in the visits when it is on and gone when it is 0."
    def weekend(strength):
        world = World(dataclasses.replace(CFG, seasonality=strength, goodwill=0., users=2000), 2)
        came = world.live(bootstrap_policy(POLICY), 14).visited.mean(0)
        return came[[5, 6, 12, 13]].mean()/came[[0, 1, 2, 3, 7, 8, 9, 10]].mean()
    assert weekend(2.) < weekend(1.) < .95 < weekend(0.) < 1.05

def test_withdrawn_personalisation_is_obeyed_at_once(tmp_path):
    world = World(dataclasses.replace(CFG, faults=dataclasses.replace(CFG.faults, withdrawn=.5)), 3)
    asked = []
    class Watch:
        def decide(self, contexts, rng): asked.append((contexts.user_id, contexts.time, contexts.personalise)); return bootstrap_policy(POLICY).decide(contexts, rng)
    world.live(Watch(), 8, to=tmp_path)
    told = world.truth_frames()['withdrawals'].query('purpose == "personalisation"').set_index('user_id').time
    user, time, told_policy = (np.concatenate(x) for x in zip(*asked))
    after = np.array([u in told.index and t > told[u] for u, t in zip(user, time)])
    assert after.sum() > 50 and not told_policy[after].any() and told_policy[~after].mean() > .85

def test_the_future_lived_in_thought_leaves_no_trace(tmp_path):
    "Asking for the value neither moves the world nor adds to the truth."
    world = World(CFG, 3); world.live(bootstrap_policy(POLICY), 3, to=tmp_path)
    before = {k: len(v) for k, v in world.truth_frames().items()}
    world.value(bootstrap_policy(POLICY), 5)
    assert world.day == 3 and before == {k: len(v) for k, v in world.truth_frames().items()}
