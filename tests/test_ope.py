"OPE: identities, refusals, and intervals held against a known truth, with methods that must fail beside them."
import json
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop import estimators, ope
from telemetry_loop.config import TelemetryError, read_json, write_json
from telemetry_loop.ope import OpeConfig, evaluate, evidence
from telemetry_loop.estimators import KNOBS, clipped, dm, dr, dr_os, ips, sndr, snips, sub_gaussian, switch_dr, tune
from telemetry_loop.estimators import cross_fit
from telemetry_loop.stream import evaluate_log
from slate_log import TABLES, slates, softmax
from telemetry_loop.support import DEFAULT_LIMITS, SupportConfig, widening
from telemetry_loop.estimate import standard_error

SEED, REPLICATIONS = 20261, 400  # declared once
COVER = (.9175, .98)             # 95 % within 3 binomial standard errors of 400 replications

class World:
    "Contextual bandit: the expected reward of every action is known."
    def __init__(self, actions=10, logged=0., target=2.2, base=1.5):
        self.taste, self.logged, self.target, self.base = np.random.default_rng(5).normal(size=(5, actions))/np.sqrt(5), logged, target, base
        self.truth = self.draw(np.random.default_rng(99), 400_000)['v'].mean()
    def draw(self, rng, n=2000):
        score = rng.normal(size=(n, 5)) @ self.taste
        like, p, q = 1/(1 + np.exp(-score - self.base)), softmax(self.logged*score), softmax(self.target*score)
        i, a = np.arange(n), (p.cumsum(1) > rng.random((n, 1))).argmax(1)
        return dict(reward=(rng.random(n) < like[i, a])*1., propensity=p[i, a], target_prob=q[i, a], q=like[i, a], v=(q*like).sum(1))

def result(d, model=lambda q: q): return evaluate(d['reward'], d['propensity'], d['target_prob'], q_logged=model(d['q']), v_target=model(d['v']))
covers = lambda e, truth: e.ci_lower <= truth <= e.ci_upper
width = lambda e: e.ci_upper - e.ci_lower

@pytest.fixture(scope='module')
def study():
    "Four hundred logs of one world; the reward model is half right."
    world, rng = World(), np.random.default_rng(SEED)
    logs = [world.draw(rng) for _ in range(REPLICATIONS)]
    return world.truth, logs, [result(d, lambda q: .5*q + .3) for d in logs]

def test_gains_cover(study):
    world, (truth, logs, results) = World(), study
    earned = World(target=0.).truth  # uniform logging
    for name in ('ips', 'snips', 'dr'):
        assert COVER[0] <= np.mean([covers(r.gains[name], truth - earned) for r in results if r.support.verdict == 'trust']) <= COVER[1], name

def test_knobs_set_by_the_data_cover_and_own_up_to_their_bias(study):
    truth, logs, results = study
    for name in KNOBS:
        assert np.mean([covers(r.estimates[name], truth) for r in results if r.support.verdict == 'trust']) >= COVER[0], name
        assert all(r.tuned[name].tried.bias[0] == 0 and r.tuned[name].setting in r.tuned[name].tried.setting.to_list() for r in results[:20])
        end = 'dr' if KNOBS[name][2] else 'ips'                        # the end without bias: what was chosen by the data claims no less room than that
        for r in results:
            for kind in (r.estimates, r.gains):
                if (e := kind[end]).ci_lower is not None: assert kind[name].ci_lower <= e.ci_lower + 1e-12 and kind[name].ci_upper >= e.ci_upper - 1e-12, name

def test_a_knob_pays_where_weights_are_heavy_and_leaves_no_trace():
    world, rng = World(actions=20, logged=-1.5, target=2., base=0.), np.random.default_rng(SEED)
    logs = [world.draw(rng, 1000) for _ in range(150)]
    def error(estimate): return np.sqrt(np.mean([(estimate(d) - world.truth)**2 for d in logs]))
    weight = lambda d: d['target_prob']/d['propensity']
    tuned = lambda name, *model: lambda d: tune(lambda at: KNOBS[name][0](d['reward'], weight(d), *[d[m]*.9 for m in model], at), KNOBS[name][1](weight(d).max())).value
    assert error(tuned('sub_gaussian')) < .8*error(lambda d: ips(d['reward'], weight(d))[0])
    assert error(tuned('clipped')) < .8*error(lambda d: ips(d['reward'], weight(d))[0])
    assert error(tuned('dr_os', 'q', 'v')) < error(lambda d: dr(d['reward'], weight(d), .9*d['q'], .9*d['v'])[0])
    first = tuned('clipped')(logs[0]); tuned('clipped')(logs[1]); assert tuned('clipped')(logs[0]) == first

def test_bias_that_shows_stops_the_cutting():
    rng = np.random.default_rng(SEED); d = World().draw(rng, 100_000)                  # so many rows that any cut is seen
    found = tune(lambda at: clipped(d['reward'], d['target_prob']/d['propensity'], at), [1e9, 30., 3., 1.])
    assert found.setting > 3 and found.tried.shown.iloc[-1] > .1 and found.tried.bias.iloc[-1] < -.1 and found.tried.shown[1] < .01

def test_poor_overlap_claims_nothing():
    world, rng = World(actions=20, logged=-2.5, target=3., base=0.), np.random.default_rng(SEED)
    for _ in range(50):
        r = result(world.draw(rng))
        assert r.support.verdict == 'refuse'
        assert all(e.value is not None and e.ci_lower is None for e in r.estimates.values())
        assert all(e.value is None and e.ci_lower is None for e in [*r.gains.values(), *r.relative.values()])

# ---------------------------------------------------------------- identities
@st.composite
def logs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6))); n = draw(st.integers(2, 300))
    return dict(reward=rng.normal(size=n), propensity=rng.uniform(.05, 1, n), target_prob=rng.uniform(.01, 1, n)), rng

@settings(deadline=None, max_examples=40)
@given(logs(), st.floats(-100, 100))
def test_identities(log, c):
    d, rng = log; n = len(d['reward']); w = d['target_prob']/d['propensity']; zero = np.zeros(n)
    assert snips(d['reward'] + c, w)[0] == pytest.approx(snips(d['reward'], w)[0] + c, abs=1e-12*max(1, abs(c)))
    assert dr(d['reward'], w, zero, zero)[0] == pytest.approx(ips(d['reward'], w)[0], abs=1e-12)
    q, v, near = rng.normal(size=n), rng.normal(size=n), lambda x: pytest.approx(x, abs=1e-12)
    for estimator in (switch_dr, dr_os):
        assert estimator(d['reward'], w, q, v, 0.)[0] == near(dm(v)[0]) and estimator(d['reward'], w, q, v, np.inf)[0] == near(dr(d['reward'], w, q, v)[0])
    assert sndr(d['reward'], w, zero, zero)[0] == near(snips(d['reward'], w)[0]) and sndr(d['reward'], w, q, v)[0] == near(v.mean() + snips(d['reward'] - q, w)[0])
    assert clipped(d['reward'], w, np.inf)[0] == sub_gaussian(d['reward'], w, 0.)[0] == near(ips(d['reward'], w)[0]) and sub_gaussian(d['reward'], w, 1.)[0] == near(d['reward'].mean())
    same = evaluate(d['reward'], d['propensity'], d['propensity'])
    assert same.estimates['ips'].value == pytest.approx(d['reward'].mean(), abs=1e-12) and same.support.ess == pytest.approx(n, abs=1e-9)
    assert same.support.verdict == 'refuse' or same.gains['ips'].value == pytest.approx(0, abs=1e-12)
    user, order = rng.integers(5, size=n), rng.permutation(n)
    a = evaluate(**d, q_logged=q, v_target=v, cluster=user)
    b = evaluate(**{k: x[order] for k, x in d.items()}, q_logged=q[order], v_target=v[order], cluster=user[order])
    for name in a.estimates:
        for x, y in ((a.estimates[name], b.estimates[name]), (a.gains[name], b.gains[name])):
            assert (x.value is None) == (y.value is None) and (x.value is None or x.value == pytest.approx(y.value, abs=1e-10))
            assert (x.ci_lower is None) == (y.ci_lower is None) and (x.ci_lower is None or x.ci_lower == pytest.approx(y.ci_lower, abs=1e-9))

def test_relative_gain_is_the_quotient():
    r = result(World().draw(np.random.default_rng(SEED), 4000))
    assert r.relative['dr'].value == pytest.approx(r.gains['dr'].value/r.logging.value)
    assert r.relative['dr'].ci_lower < r.relative['dr'].value < r.relative['dr'].ci_upper
    assert r.scale(3).gains['dr'].ci_upper == pytest.approx(3*r.gains['dr'].ci_upper) and r.scale(3).relative == r.relative

def test_repeated_users_lengthen_the_interval():
    d = World().draw(np.random.default_rng(SEED), 500)
    rows = {k: np.repeat(d[k], 8) for k in ('reward', 'propensity', 'target_prob')}
    alone, together = evaluate(**rows), evaluate(**rows, cluster=np.repeat(np.arange(500).astype(str), 8))
    assert width(together.gains['snips']) > 2.7*width(alone.gains['snips'])

# ---------------------------------------------------------------- refusals
ONE = np.ones(4)
def test_rewards_outside_their_declared_range_are_refused():
    with pytest.raises(TelemetryError, match=r'reward has 2 values outside 0\.\.1'): evaluate([0., 1., 2., -1.], ONE/2, ONE/2, reward_range=(0, 1))
    assert evaluate([0., 1., .5, 1.], ONE/2, ONE/2, reward_range=(0, 1)).support.ess == 4

@pytest.mark.parametrize('change, says', [
    (dict(propensity=[0, .5, -1, 1]), 'propensity has 2 values <= 0; every logged action needs a positive propensity'),
    (dict(propensity=[2, .5, 1, 1]), 'propensity has 1 values > 1'),
    (dict(propensity=[np.nan, .5, None, 1]), 'propensity has 2 values that are missing'),
    (dict(propensity=['high', .5, 1, 1]), 'propensity has 1 values that are missing or no finite numbers'),
    (dict(reward=[np.inf, 1, 1, 1]), 'reward has 1 values'),
    (dict(target_prob=[1.5, -.1, 1, 1]), r'target_prob has 2 values outside 0\.\.1'),
    (dict(target_prob=[0, 0, 0, 0]), 'target_prob is 0 in all 4 rows'),
    (dict(target_prob=[1, 1]), 'target_prob has 2 values and reward has 4'),
    (dict(reward=[], propensity=[], target_prob=[]), 'the log has 0 rows'),
    (dict(q_logged=ONE), 'only one of q_logged and v_target'),
    (dict(q_logged=ONE, v_target=[1., np.nan, 1, 1]), 'v_target has 1 values'),
    (dict(cluster=['a', None, 'b', 'b']), 'cluster has 1 missing values'),
    (dict(cluster=['a']), 'cluster has 1 values and reward has 4')])
def test_bad_input_is_refused_in_one_line(change, says):
    with pytest.raises(TelemetryError, match=says) as e: evaluate(**(dict(reward=ONE, propensity=ONE/2, target_prob=ONE/2) | change))
    assert '\n' not in str(e.value) and str(e.value).count(';') >= 2

def test_a_log_in_which_hardly_anybody_earned_claims_no_interval():
    rng = np.random.default_rng(SEED); p = rng.uniform(.2, .6, 2000)
    for clicks, verdict in ((0, 'refuse'), (9, 'refuse'), (10, 'trust')):
        r = np.r_[np.ones(clicks), np.zeros(2000 - clicks)]
        for reward in (r, 1 - r, 7 + 3*r):
            found = evaluate(reward, p, p); assert found.support.verdict == verdict and [x.split(':')[0] for x in found.support.reasons] == ['few_rewards']*(verdict == 'refuse')
            assert (found.estimates['ips'].ci_lower is None) == (verdict == 'refuse') == (found.gains['ips'].value is None)
    shown = np.r_[np.ones(1000), np.zeros(1000)]                                # rows that the target would not show do not count
    assert evaluate(1 - shown, np.full(2000, .5), shown).support.verdict == 'refuse'

def test_a_segment_whose_propensities_are_off_is_named_and_silence_of_complaints_is_no_fault():
    rows, candidates, truth = slates()
    rows['who'], rows['hidden'] = np.where(rows.user_id.str[-1] < '5', 'newcomers', 'regulars'), 0.
    honest, _ = evidence(rows, candidates, CFG, DEFAULT_LIMITS, 7)
    assert honest['support']['verdict'] == 'trust' and honest['complaints_gain']['value'] == 0
    wrong, _ = evidence(rows.assign(propensity=rows.propensity*np.where(rows.who == 'newcomers', .8, 1.25)), candidates, CFG, DEFAULT_LIMITS, 7)
    assert wrong['support']['verdict'] == 'refuse' and any('the weights of segment newcomers (1.2' in r and ', regulars (0.' in r for r in wrong['support']['reasons'])
    assert not any(r.startswith('mean_weight: the weights average') for r in wrong['support']['reasons']) and wrong['gain']['dr']['value'] is None # on the whole they average 1
    silent, _ = evidence(rows.assign(reward=0.), candidates, CFG, DEFAULT_LIMITS, 7)
    assert silent['support']['verdict'] == 'refuse' and silent['support']['reasons'][0].startswith('few_rewards: no rows earned other than the rest')

# ---------------------------------------------------------------- the door
@pytest.fixture
def table():
    rng = np.random.default_rng(SEED); p = np.array([.4, .3, .2, .1]); a = rng.choice(4, 4000, p=p)
    return pd.DataFrame(dict(item=np.array(list('wxyz'))[a], place=rng.integers(3, size=4000), click=(rng.random(4000) < (a + 1)/5)*1, prob=p[a], new=np.array([.1, .2, .3, .4])[a], user=rng.integers(400, size=4000)))

@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_a_log_on_disk(tmp_path, table, kind):
    path = tmp_path/f'log.{kind}'
    table.to_csv(path, index=False) if kind == 'csv' else table.to_parquet(path)
    found = evaluate_log(path, 'item', 'click', 'prob', 'uniform', position='place', cluster='user')
    assert list(found) == ['estimates', 'logging', 'gain', 'support'] and list(found['estimates']) == list(found['gain']) and list(found['estimates']) == ['ips', 'snips', 'clipped', 'sub_gaussian']
    assert set(found['support']) == {'verdict', 'reasons', 'ess', 'mean_weight', 'max_weight', 'max_weight_share', 'khat'}
    assert set(found['estimates']['ips']) == {'value', 'ci_lower', 'ci_upper', 'n'}
    assert found['estimates']['snips']['ci_lower'] < .5 < found['estimates']['snips']['ci_upper']
    found = evaluate_log(path, 'item', 'click', 'prob', 'new')
    assert found['estimates']['snips']['ci_lower'] < .6 < found['estimates']['snips']['ci_upper']
    json.dumps(found, allow_nan=False)

def test_the_door_refuses_in_one_line(tmp_path, table):
    path = tmp_path/'log.csv'; table.to_csv(path, index=False)
    with pytest.raises(TelemetryError, match="log.csv has no column 'klick'; it has item, place, click, prob, new, user;"): evaluate_log(path, 'item', 'klick', 'prob', 'uniform')
    with pytest.raises(TelemetryError, match='is not a file'): evaluate_log(tmp_path/'no.csv', 'item', 'click', 'prob', 'uniform')
    (tmp_path/'bad.parquet').write_text('no table'); (tmp_path/'empty.csv').write_text('')
    for name in ('bad.parquet', 'empty.csv'):
        with pytest.raises(TelemetryError, match='cannot be read as a table'): evaluate_log(tmp_path/name, 'item', 'click', 'prob', 'uniform')
    table.assign(prob=0.).to_csv(path, index=False)
    with pytest.raises(TelemetryError, match='propensity has 4000 values <= 0'): evaluate_log(path, 'item', 'click', 'prob', 'uniform')
    table[:0].to_csv(path, index=False)
    with pytest.raises(TelemetryError, match='0 rows'): evaluate_log(path, 'item', 'click', 'prob', 'uniform')

@pytest.mark.parametrize('name, target, tamper', [
    ('mean_weight', 'uniform', lambda t: t.prob/2), ('mean_weight', 'new', lambda t: t.prob/2),
    ('certain', 'uniform', lambda t: t.prob.mask(t.item == 'w', 1.)), ('certain', 'new', lambda t: t.prob.mask(t.item == 'w', 1.)),  # the favourite logged as certain
    ('floor', 'uniform', lambda t: t.prob.mask(t.index % 400 == 0, 1e-6)), ('floor', 'new', lambda t: t.prob.mask(t.index % 400 == 0, 1e-6)),
    ('calibration', 'uniform', lambda t: t.prob.mask(t.item == 'x', .2).mask(t.item == 'y', .3))])                               # two actions swapped
def test_a_tampered_log_is_refused_by_name(tmp_path, table, name, target, tamper):
    path = tmp_path/'log.csv'
    table.to_csv(path, index=False); assert evaluate_log(path, 'item', 'click', 'prob', target, cluster='user')['support']['verdict'] == 'trust'
    table.assign(prob=tamper(table)).to_csv(path, index=False)
    found = evaluate_log(path, 'item', 'click', 'prob', target, cluster='user')
    assert found['support']['verdict'] == 'refuse' and name in [r.split(':')[0] for r in found['support']['reasons']]
    assert all(e['ci_lower'] is None for e in found['estimates'].values())

def test_what_is_wrong_with_a_file_is_said_alike_for_both_kinds(tmp_path, table):
    for kind in ('csv', 'parquet'):
        table.to_csv(tmp_path/'log.csv', index=False); table.to_parquet(tmp_path/'log.parquet')
        with pytest.raises(TelemetryError) as e: evaluate_log(tmp_path/f'log.{kind}', 'item', 'klick', 'prob', 'uniform')
        assert str(e.value) == f"log.{kind} has no column 'klick'; it has item, place, click, prob, new, user; name one of them"

def test_a_log_of_one_action_is_refused(tmp_path, table):
    path = tmp_path/'log.csv'; table[table.item == 'w'].to_csv(path, index=False)
    with pytest.raises(TelemetryError, match='item has 1 distinct value'): evaluate_log(path, 'item', 'click', 'prob', 'uniform')

# ---------------------------------------------------------------- the stage
CFG = OpeConfig(folds=5, bins=12, penalty=20., estimator='dr', explore=.05)

def test_gain_per_decision_covers_the_truth():
    found = []
    for seed in range(20):
        rows, candidates, truth = slates(800, seed=SEED + seed)
        q, v = cross_fit(rows, candidates, TABLES, CFG.folds, 7)
        found.append(covers(evaluate(rows.reward, rows.propensity, rows.target_prob, q_logged=q, v_target=v, cluster=rows.user_id).scale(3).gains['dr'], truth))
    assert sum(found) >= 16

def test_stage(tmp_path, monkeypatch):
    import yaml
    monkeypatch.chdir(tmp_path)
    rows, candidates, truth = slates()
    none_of = pd.DataFrame(dict(item_id=[], vector=[])), pd.DataFrame(dict(decision_id=[], position=[], logger=[], propensity=[], wrote=[]))
    def stage(rows, candidates, complaints=()):
        (tmp_path/'artifacts/policy').mkdir(parents=True, exist_ok=True)
        for name, table in zip(('items', 'loggers'), none_of): table.to_parquet(f'artifacts/policy/{name}.parquet')
        rows.to_parquet('artifacts/policy/rows.parquet'); candidates.to_parquet('artifacts/policy/candidates.parquet')
        write_json('metrics/policy.json', {'unsupported_mass': {'value': 0. if len(rows) else None, 'ci_lower': None, 'ci_upper': None, 'n': len(rows)}})
        write_json('metrics/replay.json', {'complaints': list(complaints)})
        ope.run(); return read_json('metrics/ope.json')
    from dataclasses import asdict
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(dict(run=dict(seed=7, threads=2, engine='duckdb', memory_gb=1.), ope=asdict(CFG), support=asdict(DEFAULT_LIMITS))))
    first = stage(rows, candidates)
    text, weights = (tmp_path/'metrics/ope.json').read_text(), (tmp_path/'artifacts/ope/weights.parquet').read_bytes()
    assert first['support']['verdict'] == 'trust' and first['gain']['dr']['ci_lower'] < truth < first['gain']['dr']['ci_upper']
    assert set(first['gain']) == {'ips', 'snips', 'dr', 'sndr', 'clipped', 'sub_gaussian', 'switch_dr', 'dr_os'} and set(first['estimates']) == set(first['gain']) | {'dm'}
    assert first['estimates']['dm']['ci_lower'] is None
    assert first['logging']['value'] == pytest.approx(rows.reward.sum()/rows.decision_id.nunique())
    assert first['clicks_gain']['value'] == pytest.approx(-first['gain']['dr']['value'], rel=.2)  # clicked = 1 - reward here
    assert abs(first['complaints_gain']['value']) < .03 and first['n_decisions'] == 2000 and first['n_users'] == 400
    stage(rows, candidates)
    assert (tmp_path/'metrics/ope.json').read_text() == text and (tmp_path/'artifacts/ope/weights.parquet').read_bytes() == weights
    doubted = stage(rows, candidates, ['version: mixed up'])
    assert doubted['support']['verdict'] == 'refuse' and doubted['support']['reasons'] == ['version: mixed up'] and all(g['value'] is None for g in doubted['gain'].values()) and doubted['estimates']['ips']['ci_lower'] is None
    none = stage(rows[:0], candidates[:0])  # a log without propensities: an answer, no number
    assert none['support']['verdict'] == 'refuse' and none['support']['reasons'][0].startswith('no_propensities')
    assert set(none) == set(first) and all(e['value'] is None for e in [*none['gain'].values(), *none['estimates'].values(), none['logging']])
    with pytest.raises(TelemetryError, match='3 positions of a decision twice'): stage(pd.concat([rows, rows[:3]]), candidates)
    halved = stage(rows.assign(propensity=rows.propensity/2), candidates)
    assert halved['support']['verdict'] == 'refuse' and halved['gain']['dr']['value'] is None and halved['estimates']['ips']['value'] is not None


def test_people_drawn_again_agree_with_the_delta_method():
    "Users with several rows each: drawn one by one their rows would seem to say more than they do."
    rng, n = np.random.default_rng(SEED), 1500
    user = np.repeat(np.arange(n//5), 5); w = np.exp(rng.normal(size=n//5)[user] + .3*rng.normal(size=n) - .5); r = .6 + .2*rng.normal(size=n//5)[user] + .1*rng.normal(size=n)
    value, influence = estimators.snips(r, w)
    again = lambda cluster: estimators.bootstrap(lambda m: (m*w*r).sum()/(m*w).sum(), n, cluster, 600, SEED)
    length = lambda ends: ends[1] - ends[0]
    assert length(again(user)) == pytest.approx(2*1.96*standard_error(influence, user), rel=.12) and length(again(None)) < .6*length(again(user))
    assert estimators.sub_gaussian(np.array([1., 0., 1.]), np.array([0., .5, 2.]), 1.)[0] == pytest.approx(1/3) # a row the target cannot show counts nothing, whatever the mix

# ---------------------------------------------------------------- weighed otherwise
ITEMS, GROUPS = 60, 6
def grouped(seed=SEED, n=4000, direct=0.):
    "60 items in 6 groups that earn alike but for `direct`; 20 candidates a decision, even logging, a target with a favourite group and favourites in it -> rows, candidates, vectors, true gain."
    rng = np.random.default_rng(seed); i = np.arange(n)[:, None]
    offer = np.argsort(rng.random((n, ITEMS)), axis=1)[:, :20]; group, star = offer % GROUPS, offer < 12
    prob = np.exp(.5*(group == 0) + 2.5*star); prob /= prob.sum(1, keepdims=True)
    like = .3 + .4*(group == 0) + direct*star
    shown = rng.integers(20, size=n)[:, None]; earned = (rng.random((n, 1)) < like[i, shown])*1.; name = np.char.add('d', np.arange(n).astype(str))
    plain = dict(position=0, score=0., log_popularity=0.)
    rows = pd.DataFrame(dict(decision_id=name, user_id=np.char.add('u', (np.arange(n)//4).astype(str)), who='anybody', item_id=offer[i, shown].ravel().astype(str), reward=earned.ravel(), clicked=earned.ravel(), satisfied=earned.ravel(), hidden=0.,
        propensity=1/20, target_prob=prob[i, shown].ravel(), event_time=pd.Timestamp('2026-01-01') + pd.to_timedelta(np.arange(n)//1000, 'D'), seq=np.arange(n)) | plain)
    candidates = pd.DataFrame(dict(decision_id=np.repeat(name, 20), item_id=offer.ravel().astype(str), target_prob=prob.ravel(), logging_prob=1/20) | plain)
    vectors = pd.DataFrame(dict(item_id=np.arange(ITEMS).astype(str), vector=list(np.eye(GROUPS)[np.arange(ITEMS) % GROUPS] + .01*rng.normal(size=(ITEMS, GROUPS)))))
    return rows, candidates, vectors, float(((prob - 1/20)*like).sum(1).mean())
def weighed(seed=SEED, log=None, **more):
    rows, candidates, vectors, truth = log or grouped(seed)
    return evidence(rows, candidates, CFG, DEFAULT_LIMITS, 7, **dict(vectors=vectors) | more)[0], truth
span = lambda e: e['ci_upper'] - e['ci_lower']

def test_similar_items_together_tell_more_where_they_earn_alike(monkeypatch):
    monkeypatch.setattr(ope, 'CLUSTERS', (GROUPS,))
    found = [weighed(s) for s in range(20)]
    for name, plain in (('mips', 'ips'), ('offcem', 'dr')):
        assert np.mean([said['otherwise'][name]['clusters'] == GROUPS for said, _ in found]) > .8 and np.mean([said['otherwise'][name]['broken'] for said, _ in found]) <= .2
        near = [(said['gain'], truth) for said, truth in found if not said['otherwise'][name]['broken']]
        assert np.mean([g[name]['ci_lower'] <= truth <= g[name]['ci_upper'] for g, truth in near]) >= .85
        assert np.median([span(g[name])/span(g[plain]) for g, _ in near]) < .9

def test_a_direct_effect_is_seen_and_its_line_says_so(monkeypatch):
    "Clusters that cut the favourites together with the others of their group, and no single items to fall back on."
    monkeypatch.setattr(ope, 'CLUSTERS', (GROUPS,))
    real = ope.cluster_weights; monkeypatch.setattr(ope, 'cluster_weights', lambda *a: {GROUPS: real(*a)[GROUPS]})
    said, _ = weighed(log=grouped(direct=.25)); fine, _ = weighed()
    assert said['otherwise']['mips']['broken'] and said['gain']['mips']['value'] is not None and said['gain']['mips']['ci_lower'] is None and said['estimates']['mips']['ci_lower'] is None
    assert said['otherwise']['mips']['apart']['ci_upper'] < 0 and not fine['otherwise']['mips']['broken'] and fine['gain']['mips']['ci_lower'] is not None
    from telemetry_loop.value import agreement
    assert 'no interval is claimed' in agreement(said) and 'no interval is claimed' not in agreement(fine)

def test_where_favourites_earn_more_than_their_group_items_stay_single():
    said, truth = weighed(log=grouped(direct=.25)); by = said['otherwise']
    assert by['mips']['alone'] and not by['mips']['broken'] and said['gain']['mips']['value'] == pytest.approx(said['gain']['ips']['value']) and said['gain']['mips']['ci_lower'] < truth < said['gain']['mips']['ci_upper']
    assert [x['clusters'] for x in by['mips']['tried']] == [60, 16, 4] and abs(by['mips']['tried'][-1]['value'] - by['mips']['tried'][0]['value']) > .05

def test_every_item_alone_is_ips_and_a_dropped_logging_probability_is_not_believed():
    rows, candidates, vectors, _ = grouped()
    weights = ope.cluster_weights(rows, candidates, vectors, 7)
    assert list(weights) == [60, 16, 4] and weights[60] == pytest.approx(rows.target_prob/rows.propensity) and all(abs(w.mean() - 1) < 4*w.std()/np.sqrt(len(w)) for w in weights.values())
    strangers = ope.cluster_weights(rows, candidates, vectors[:40], 7)                     # items the model does not know stand alone
    assert list(strangers) == [60, 16, 4] and all(abs(w.mean() - 1) < 4*w.std()/np.sqrt(len(w)) for w in strangers.values())
    for lost in (candidates.drop(columns='logging_prob'), candidates.assign(logging_prob=np.where(candidates.index == 5, np.nan, .05))):
        said, _ = weighed(log=(rows, lost, vectors, 0.))
        assert 'mips' not in said['gain'] and 'log the weights of the draw' in said['otherwise']['mips']['left_out'] and 'keep the bundles' in said['otherwise']['balanced']['left_out']

def two_wrote(seed=SEED, n=6000):
    "Nine users of ten meet a policy that hardly shows what the target wants, the tenth one that does -> rows, candidates, loggers, true gain."
    rng = np.random.default_rng(seed); draws = np.array([[.97, .02, .01], [.05, .15, .8]]); wanted, pays = np.array([.1, .2, .7]), np.array([.2, .5, .9])
    user = np.arange(n)//6; by = (user % 10 == 0)*1
    a = (draws[by].cumsum(1) > rng.random((n, 1))).argmax(1); earned = (rng.random(n) < pays[a])*1.; name = np.char.add('d', np.arange(n).astype(str)); plain = dict(position=0, log_popularity=0.)
    rows = pd.DataFrame(dict(decision_id=name, user_id=user, who='anybody', item_id=a.astype(str), reward=earned, clicked=earned, satisfied=earned, hidden=0., propensity=draws[by, a], target_prob=wanted[a], score=a*1., event_time=pd.Timestamp('2026-01-01'), seq=np.arange(n)) | plain)
    candidates = pd.DataFrame(dict(decision_id=np.repeat(name, 3), item_id=np.tile(list('012'), n), target_prob=np.tile(wanted, n), score=np.tile(np.arange(3.), n)) | plain)
    loggers = pd.concat([pd.DataFrame(dict(decision_id=name, position=0, logger=f'policy {l}', propensity=draws[l, a], wrote=by == l)) for l in (0, 1)])
    share = np.bincount(by, minlength=2)/n
    return rows, candidates, loggers.sample(frac=1, random_state=1), float(wanted@pays - share@draws@pays)

def test_where_one_policy_hardly_covers_the_target_the_mixture_does():
    wide = SupportConfig(**(DEFAULT_LIMITS.__dict__ | dict(khat_widen=9., khat_refuse=9., min_ess=1., trust_ess=1., max_weight_share=1., mean_weight_tolerance=1.)))
    found = [(evidence(rows, candidates, CFG, wide, 7, loggers=loggers)[0], truth) for rows, candidates, loggers, truth in map(two_wrote, range(30))]
    assert all(said['otherwise']['balanced'] == {'policies': ['policy 0', 'policy 1'], 'left_out': None} for said, _ in found)
    error = np.array([[said['gain'][name]['value'] - truth for name in ('ips', 'balanced')] for said, truth in found])
    assert error[:, 1].std() < error[:, 0].std()/2 and abs(error[:, 1].mean()) < 4*error[:, 1].std()/np.sqrt(30)
    assert np.mean([said['gain']['balanced']['ci_lower'] <= truth <= said['gain']['balanced']['ci_upper'] for said, truth in found]) >= .85
    assert np.median([span(said['gain']['ips'])/span(said['gain']['balanced']) for said, _ in found]) > 1.3
    rows, candidates, loggers, _ = two_wrote()
    swapped = loggers.assign(wrote=~loggers.wrote)
    right, wrong = (evidence(rows, candidates, CFG, wide, 7, loggers=x)[0]['estimates']['balanced']['value'] for x in (loggers, swapped))
    assert abs(wrong - right) > .1                                                         # who wrote which row matters

def test_one_policy_is_its_own_mixture_and_unknown_ones_are_left_out():
    rows, candidates, _, _ = grouped(); one = rows[['decision_id', 'position', 'propensity']].assign(logger='only', wrote=True)
    said, _ = weighed(loggers=one)
    assert {k: said[k]['balanced'] for k in ('estimates', 'gain')} == {k: said[k]['ips'] for k in ('estimates', 'gain')}
    both = pd.concat([one[:2000], one[2000:].assign(logger='other')])                      # each known only where it wrote
    said, _ = weighed(loggers=both)
    assert 'balanced' not in said['gain'] and 'keep the bundles' in said['otherwise']['balanced']['left_out']

def test_a_refused_log_silences_them_too():
    rows, candidates, vectors, _ = grouped(); one = rows[['decision_id', 'position', 'propensity']].assign(logger='only', wrote=True)
    said, _ = weighed(loggers=one, complaints=('version: mixed up',))
    for name in ('balanced', 'mips', 'offcem'):
        assert said['gain'][name]['value'] is None and said['estimates'][name]['ci_lower'] is None and said['estimates'][name]['value'] is not None
    assert not said['otherwise']['mips']['broken'] and (said['otherwise']['mips']['alone'] or said['otherwise']['mips']['apart']['ci_lower'] is None)
