"A log as written is believed; each way of spoiling it is named."
import contextlib, json, shutil
from dataclasses import asdict, replace
import duckdb, numpy as np, pandas as pd, pytest, yaml
from test_policy import CFG, RULES, SEED, Knows, contexts
from telemetry_loop import ope, policy, replay
from telemetry_loop.replay import as_logged, complaints, lost_decisions, mistaken, replay_equality, weight_equality
from telemetry_loop.config import from_dict, read_json, write_json
from telemetry_loop.features import contexts_of, read_features
from telemetry_loop.policy import Policy, PolicyConfig, model_policy, random_policy
from telemetry_loop.train import Recommender

def log_of(policy, who, seed=SEED):
    s = policy.decide(who, np.random.default_rng(seed))
    nine = lambda x: [[float('%.9g' % v) for v, i in zip(row, items) if i] for row, items in zip(x, s.items)]
    return pd.DataFrame(dict(decision_id=[f'd{i}' for i in range(len(who))], policy_id=s.policy_id, model_version=s.model_version, personalised=s.personalised, even=s.even, repeat=s.repeat, weights=[[float('%.12g' % w) for w, c in zip(row, offer) if c] for row, offer in zip(s.weights, who.candidates)], candidates=[[x for x in row if x] for row in who.candidates.tolist()],
        slate=[[x for x in row if x] for row in s.items.tolist()], propensities=nine(s.propensity), position_propensities=nine(s.position_propensity)))

OTHERS = {'a': 'b', 'b': 'c', 'c': 'd', 'd': 'e', 'e': 'a'}
def spoil(name, change): return lambda d: d.assign(**{name: [change(x) if i == 1 else x for i, x in enumerate(d[name])]})
TAMPERED = {
    'propensity differs': spoil('propensities', lambda x: [p/2 for p in x]), 'position propensity differs': spoil('position_propensities', lambda x: [x[0]*(1 + 1e-6), *x[1:]]),
    'another policy': spoil('policy_id', lambda x: 'older'), 'another model version': spoil('model_version', lambda x: 'older'), 'personalised or not': spoil('personalised', lambda x: not x),
    'item shown was no candidate': spoil('slate', lambda x: ['q', *x[1:]]), 'item shown twice': spoil('slate', lambda x: [x[0], x[0], x[2]]), 'fewer items than the policy shows': lambda d: d.assign(**{k: [x[:2] if i == 1 else x for i, x in enumerate(d[k])] for k in ('slate', 'propensities', 'position_propensities')}),
    'one propensity a place missing': spoil('propensities', lambda x: x[:2]), 'slate longer than the policy shows': lambda d: d.assign(**{k: [[*x, y] if i == 1 else x for i, x in enumerate(d[k])] for k, y in (('slate', 'q'), ('propensities', .5), ('position_propensities', .5))}),
    'candidates missing': spoil('candidates', lambda x: None), 'propensities missing': spoil('propensities', lambda x: None), 'position_propensities missing': lambda d: d.drop(columns='position_propensities')}

@pytest.mark.parametrize('explorer', ['plackett-luce', 'epsilon'])
def test_a_log_as_written_agrees_and_every_change_to_it_is_named(explorer):
    who = contexts('abcde', 'edcba', 'acebd', 'ab', history='h')
    one = Policy(Knows(a=2., b=1., c=.5), replace(CFG, explorer=explorer), 'toy', 1., .2)
    log = log_of(one, who)
    same = replay_equality(one, log, who)
    assert same['reason'].tolist() == ['']*4 and (same['off'] < 1e-8).all()
    for reason, tamper in TAMPERED.items():
        found = replay_equality(one, tamper(log), who)['reason'].tolist()
        assert found[1] == reason and (found[0] == found[2] == found[3] == (reason if reason == 'position_propensities missing' else '')), reason
    forced = spoil('propensities', lambda x: [1.]*3)(log)                                 # the best logged as certain
    floored = spoil('propensities', lambda x: [1e-6, *x[1:]])(log)
    assert all(replay_equality(one, d, who)['reason'][1] == 'propensity differs' for d in (forced, floored))
    other = replay_equality(Policy(one.scorer, one.cfg, 'toy', 1., .21), log, who)        # the policy was not the one at hand
    assert (other['reason'] == 'propensity differs').sum() >= 3
    muted = replay_equality(Policy(one.scorer, replace(one.cfg, rules=replace(RULES, blocked=[log['slate'][0][0]])), 'toy', 1., .2), log, who)
    assert muted['reason'][0] == 'item the policy cannot show'
    assert replay_equality(one, log.iloc[:0], who.take(slice(0, 0))).shape == (0, 3)

def test_the_logging_policy_replayed_is_the_log():
    who = contexts('abcd', 'ab')
    one, other = Policy(Knows(a=2.), CFG, 'toy', 1., .2), random_policy(CFG)
    log = pd.concat([log_of(one, who), log_of(other, who)], ignore_index=True)
    told = as_logged(log)
    assert list(told) == ['random/none', 'toy/toy']
    for policy in (one, other):
        s, d = told[f'{policy.policy_id}/{policy.scorer.version}'], log[log['policy_id'] == policy.policy_id]
        assert [[x for x in row if x] for row in s.items.tolist()] == d['slate'].tolist() and s.items.shape == (2, 3) and (s.propensity[s.items == ''] == 1).all()
        for own, name in ((s.position_propensity, 'position_propensities'), (s.propensity, 'propensities')): assert [row[:len(x)].tolist() for row, x in zip(own, d['slate'])] == d[name].tolist()

@pytest.mark.parametrize('change', [dict(), dict(explorer='epsilon'), dict(rules=replace(RULES, repeat=.3)), dict(explorer='epsilon', rules=replace(RULES, repeat=.3, blocked=['c']))])
def test_propensities_follow_from_logged_weights_whatever_explores(change):
    who = replace(contexts('abcde', 'edcba', 'acebd', 'ab'), category=np.array([['x', 'x', 'y', 'y', '']]*4))
    one = Policy(Knows(a=2., b=1., c=.5), replace(CFG, **change), 'toy', 1., .2)
    log = log_of(one, who)
    told = weight_equality(log, who)
    assert told['reason'].tolist() == ['']*4 and (told['off'] < 1e-8).all()
    for reason in ('propensity differs', 'position propensity differs', 'item shown was no candidate', 'item shown twice', 'one propensity a place missing', 'propensities missing'):
        assert weight_equality(TAMPERED[reason](log), who)['reason'].tolist()[1] == reason
    assert weight_equality(spoil('weights', lambda w: w[::-1])(log), who)['reason'][1] in ('propensity differs', 'item the policy cannot show')
    assert weight_equality(spoil('weights', lambda w: None)(log), who)['reason'].tolist() == ['', 'weights missing', '', '']

def test_a_name_stands_unless_another_policy_explains_the_decision_better():
    far = pd.DataFrame({'a': [.3, .3, .015, .9, np.nan], 'b': [.1, .2, .001, .3, np.nan]})
    assert mistaken(np.array(['a']*5), far).tolist() == ['b', '', '', 'b', ''] and mistaken(np.array(['c']*5), far).tolist() == ['', '', 'b', '', '']
    assert mistaken(np.array(['a']*5), far[['a']]).tolist() == ['']*5

# --- the stage, on the messy telemetry of a small product

@pytest.fixture
def house(tiny_run, tmp_path):
    "The folder of the small product, its parts linked; a test replaces what it spoils."
    (tmp_path/'artifacts').mkdir(); (tmp_path/'metrics').mkdir()
    for name in ('features', 'train', 'policy', 'sessions', 'ingest'): (tmp_path/'artifacts'/name).symlink_to(tiny_run/'artifacts'/name)
    for name in ('params.yaml', 'metrics/policy.json'): shutil.copy(tiny_run/name, tmp_path/name)
    with contextlib.chdir(tmp_path): yield tmp_path

def read(house): return pd.read_parquet(house/'artifacts/sessions/decisions')
def put(house, name, table):
    "Another table in the place of a linked one."
    if (top := house/'artifacts'/name.split('/')[0]).is_symlink(): real = top.resolve(); top.unlink(); shutil.copytree(real, top)
    shutil.rmtree(house/'artifacts'/name); (house/'artifacts'/name).mkdir(); table.to_parquet(house/'artifacts'/name/'all.parquet', index=False)
def heard(): replay.run(); return [c.split(':')[0] for c in read_json('metrics/replay.json')['complaints']]

def test_a_messy_log_is_believed_and_every_propensity_follows_to_1e8(house):
    assert heard() == []
    said = read_json('metrics/replay.json')
    assert said['reasons'] == {'equal': said['decisions']} and said['decisions'] == said['with_weights'] > 5000 and said['largest_difference'] < 1e-8
    assert said['versions']['popularity/none']['mistaken'] == 0 and said['versions']['popularity/none']['apart'] < .01 and 0 < said['lost']['share'] < .02 and said['lost']['p_value'] > .01

HALVED = lambda p, m: ([x/2 for x in p], [x/2 for x in m])
CERTAIN = lambda p, m: ([1.]*len(p), [1.]*len(m))
FLOORED = lambda p, m: ([max(x, .2) for x in p], [max(x, .2) for x in m])
@pytest.mark.parametrize('change', [HALVED, CERTAIN, FLOORED], ids=['halved', 'certain', 'floored'])
def test_one_in_a_hundred_changed_propensities_is_named_and_refused(house, change):
    log = read(house); some = np.random.default_rng(SEED).random(len(log)) < .01
    new = [change(list(p), list(m)) if s else (p, m) for p, m, s in zip(log['propensities'], log['position_propensities'], some)]
    put(house, 'sessions/decisions', log.assign(propensities=[a for a, _ in new], position_propensities=[b for _, b in new]))
    assert heard() == ['weights']
    ope.run(); told = read_json('metrics/ope.json')
    assert told['support']['verdict'] == 'refuse' and told['support']['reasons'][0].startswith('weights: the propensities of') and all(g['value'] is None for g in told['gain'].values())

def test_swapped_policy_versions_are_named(house):
    "Every other decision is decided again by the bundle, then one in twenty of all change names."
    cfg, log = from_dict(PolicyConfig, yaml.safe_load((house/'params.yaml').read_text())['policy'], 'policy'), read(house).iloc[::3].reset_index(drop=True)
    bundle = model_policy(Recommender.load('artifacts/train'), cfg)
    kept = house/'data/bundles'/bundle.scorer.version
    shutil.copytree(house/'artifacts/train', kept); write_json(kept/'policy.json', asdict(cfg))
    half = np.arange(len(log)) % 2 == 1
    s = bundle.decide(contexts_of(log, read_features()).take(half), np.random.default_rng(SEED))
    there = [[i for i, item in enumerate(row) if item] for row in s.items.tolist()]
    cut = lambda x: [row[i].tolist() for row, i in zip(x, there)]
    for name, x in dict(slate=cut(s.items), propensities=cut(s.propensity), position_propensities=cut(s.position_propensity), weights=[w[:len(c)].tolist() for w, c in zip(s.weights, log['candidates'][half])],
                        policy_id=[s.policy_id]*half.sum(), model_version=[s.model_version]*half.sum(), personalised=s.personalised.tolist()).items():
        column = log[name].tolist(); [column.__setitem__(i, v) for i, v in zip(np.flatnonzero(half), x)]; log[name] = column
    put(house, 'sessions/decisions', log)
    assert heard() == [] and set(read_json('metrics/replay.json')['versions']) == {'popularity/none', f'sequence/{s.model_version}'}
    swap = np.random.default_rng(SEED).random(len(log)) < .05
    swapped = log.assign(policy_id=np.where(swap, np.where(half, 'popularity', 'sequence'), log['policy_id']), model_version=np.where(swap, np.where(half, 'none', s.model_version), log['model_version']))
    put(house, 'sessions/decisions', swapped)
    assert heard() == ['version']*2, read_json('metrics/replay.json')['versions']
    shutil.rmtree(kept)                                                # the bundle is gone; the first policy alone still knows its own
    assert 'version' in heard()

def test_lost_rows_are_counted_and_lost_at_random_or_not(house):
    events, cheap = pd.read_parquet(house/'artifacts/ingest/events'), read(house)
    idle = events['decision_id'].isin(cheap.loc[[sum(r) == 0 for r in cheap['reward']], 'decision_id']) & (events['type'] == 'decision')
    drop = np.random.default_rng(SEED).random(len(events)) < .05
    put(house, 'ingest/events', events[~(idle & drop)])
    assert 'lost_by_outcome' in heard()                                # one in twenty of those that earned nothing
    gone = events['decision_id'].isin(events.loc[idle & drop, 'decision_id'])
    put(house, 'ingest/events', events[~gone])
    assert heard() == ['lost']                                         # and all that was heard of them
    put(house, 'ingest/events', events[~((events['type'] == 'decision') & (np.random.default_rng(SEED + 1).random(len(events)) < .008))])
    assert heard() == []                                               # a few at random

def test_what_is_withheld_on_purpose_is_not_lost():
    con, every = duckdb.connect(), pd.DataFrame(dict(type='decision', seq=[0, 1, 4, 5], decision_id=list('abcd'), event_time=pd.Timestamp('2025-01-06')))
    con.register('every', every)
    found = [lost_decisions(con, 'every', f'(SELECT unnest({kept}::BIGINT[]) AS seq)', 1.) for kept in ([], [2], [2, 3, 9])]
    assert [(f['lost'], f['withheld']) for f in found] == [(2, 0), (1, 1), (0, 2)] and found[0]['share'] == pytest.approx(1/3) and found[0]['p_value'] is None
    con.register('none', every.iloc[:0])
    assert lost_decisions(con, 'none', "(SELECT 1 AS seq)", 1.)['share'] is None and complaints(0, 0, {}, lost_decisions(con, 'none', "(SELECT 1 AS seq)", 1.), replay.ReplayConfig(.001, .01, .02, 10)) == []
