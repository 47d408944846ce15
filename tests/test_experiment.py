"The whole experiment: verdicts by the plan, the course over time, the doors for tables and summaries."
import json
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from telemetry_loop import cli
from telemetry_loop.config import TelemetryError
from telemetry_loop.contrast import moments
from telemetry_loop.estimate import Verdict
from telemetry_loop.experiment import analyse, as_mean, evaluate_summary, evaluate_table, over_time
from telemetry_loop.plan import Plan

SEED = 56
PLAN = Plan('headline', 'Honest headlines bring readers back.', 'user_id', 'plain', {'plain': .5, 'honest': .5}, ['joy'], {'back': .03}, {'joy': 'up', 'back': 'up'}, ['clicks'], [], 7, {}, .05, .8, .03, 14, [7, 14], 'group-sequential')
def people(joy=0., back=0., n=20_000, seed=SEED):
    rng = np.random.default_rng(seed); arm = rng.random(n) < .5; before = rng.normal(5, 1, n)
    return pd.DataFrame(dict(user_id=np.arange(n), variant=np.where(arm, 'honest', 'plain'), before=before, joy=before + rng.normal(0, 1, n) + joy*5*arm, back=(rng.random(n) < .6*(1 + back*arm))*1., clicks=rng.poisson(3, n)*1.))
def judged(table, plan=PLAN, **more): return analyse(moments(table, 'variant', ['joy', 'back', 'clicks', 'before']), 'plain', covariates={'joy': ['before']}, plan=plan, **more)
kind = lambda *a, **k: judged(*a, **k).verdicts['honest']['kind']

def test_every_verdict():
    assert kind(people(.03)) == 'win' and kind(people()) == 'no difference shown' and kind(people(-.03)) == 'harm' and kind(people(.03, -.1)) == 'harm'
    assert kind(people(.03, -.03, seed=SEED + 1)) == 'inconclusive'                       # at its margin a guardrail is not clear
    assert kind(people(.03), day=3) == 'inconclusive' and 'the plan looks on days 7, 14' in judged(people(.03), day=3).verdicts['honest']['reason']
    assert kind(people(n=400)) == 'inconclusive' and 'too few units' in judged(people(n=400)).verdicts['honest']['reason']
    assert kind(people(.03), exposed=Verdict('fail', 'the verdict is void')) == 'invalid'
    lost = people(.03); assert kind(lost[(lost.variant == 'plain') | (lost.user_id % 10 > 0)]) == 'invalid'

def test_an_early_look_needs_more_than_the_last():
    "The same z is not enough on day 7, and is on day 14."
    from telemetry_loop.sequential import boundaries
    table = people(.005, n=20_000); first, last = (judged(table, day=d) for d in (7, 14))
    z = first.metrics['honest']['joy']['z']
    limits = boundaries(np.array([.5, 1])); assert limits[1] < z < limits[0] and not first.metrics['honest']['joy']['significant'] and last.metrics['honest']['joy']['significant']

def test_one_metric_of_a_hundred_asked_afterwards_is_corrected():
    rng = np.random.default_rng(SEED); names = [f'm{i}' for i in range(100)]
    table = pd.DataFrame(rng.normal(10, 1, (4000, 100)), columns=names).assign(variant=np.where(rng.random(4000) < .5, 'honest', 'plain'))
    found = analyse(moments(table, 'variant', names), 'plain', names)
    ms = found.metrics['honest'].values()
    assert any(m['p_value'] < .05 for m in ms) and not any(m['significant'] for m in ms) and found.verdicts['honest']['kind'] == 'no difference shown'

def test_what_was_promised_is_reported():
    with pytest.raises(TelemetryError, match='the plan promises clicks and it is not analysed'): analyse(moments(people(), 'variant', ['joy', 'back']), 'plain', ['joy', 'back'], plan=PLAN)
    with pytest.raises(TelemetryError, match="no variant 'old'; the variants are honest, plain"): analyse(moments(people(), 'variant', ['joy']), 'old', ['joy'])

def test_a_ratio_as_one_value_a_unit():
    t = people(); t = t.assign(visits=1. + np.random.default_rng(SEED).poisson(2, len(t))); control = (t.variant == 'plain').to_numpy()
    line = as_mean(t, 'clicks/visits', control); of = lambda rows: t.clicks[rows].sum()/t.visits[rows].sum()
    assert line[control].mean() == pytest.approx(of(control), rel=1e-12) and line[~control].mean() == pytest.approx(of(~control), abs=2e-3)
    assert (as_mean(t, 'clicks', control) == t.clicks).all()

def test_the_band_over_time_is_wider_than_one_look_and_shrinks():
    t = people(.02); looks = {d: moments(t[t.user_id % 14 < d], 'variant', ['joy', 'before']) for d in (2, 7, 14)}
    path = over_time(looks, 'plain', 'honest', 'joy', 'before')
    assert (path.anytime_upper - path.anytime_lower > path.upper - path.lower).all() and (np.diff(path.anytime_upper - path.anytime_lower) < 0).all() and path.n.tolist() == sorted(path.n)

# --- doors

def door(capsys, *words): # as a user would
    try: cli.app(list(map(str, words)), standalone_mode=False)
    except TelemetryError as e: return None, str(e)
    return capsys.readouterr().out, None

def test_table_door(tmp_path, capsys):
    people(.03).to_csv(tmp_path/'ab.csv', index=False)
    said, _ = door(capsys, 'experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--metric', 'back', '--covariate', 'before', '--json', tmp_path/'o.json')
    told = json.loads((tmp_path/'o.json').read_text())
    assert 'honest: difference; joy differs by' in said and set(told) >= {'srm', 'metrics'} and set(told['srm']) >= {'p_value', 'verdict'}
    joy = told['metrics']['joy']; assert set(joy) >= {'control', 'treatment', 'difference', 'anytime', 'p_value'} and set(joy['difference']) == {'value', 'ci_lower', 'ci_upper', 'n'}
    assert joy['difference']['ci_lower'] < .15 < joy['difference']['ci_upper'] and joy['anytime']['ci_lower'] < joy['difference']['ci_lower']
    assert told == json.loads(json.dumps(evaluate_table(tmp_path/'ab.csv', 'user_id', 'variant', 'plain', ['joy', 'back'], ['before']), default=float))

def test_three_variants_are_keyed_by_treatment(tmp_path):
    t = people(.03); t.loc[t.user_id % 3 == 0, 'variant'] = 'third'
    told = evaluate_table(t, 'user_id', 'variant', 'plain', ['joy'], shares={'plain': 1/3, 'honest': 1/3, 'third': 1/3})
    assert set(told['metrics']['joy']) == {'honest', 'third'} == set(told['verdict'])

@pytest.mark.parametrize('words, said', [
    (('--table', 'T'), '--unit is missing'), (('--unit', 'user_id'), '--unit goes with --table'), (('--table', 'T', '--summary', 'T'), 'one at a time'), (('--summary', 'T'), "no column 'count_c'"),
    (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'old', '--metric', 'joy'), "no variant 'old'"), (('--table', 'none.csv', '--unit', 'u', '--variant', 'v', '--control', 'c', '--metric', 'm'), 'no file none.csv'),
    (('--table', 'T', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--metric', 'joy', '--share', 'plain'), 'is not VARIANT=NUMBER')])
def test_bad_words_are_refused(tmp_path, capsys, words, said):
    people(n=200).to_csv(tmp_path/'t.csv', index=False)
    out, error = door(capsys, 'experiment', *[tmp_path/'t.csv' if w == 'T' else w for w in words])
    assert out is None and said in error and '\n' not in error

def test_plan_door(tmp_path, capsys):
    from dataclasses import asdict; import yaml
    from telemetry_loop.plan import plan_digest
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(asdict(PLAN)))
    said, _ = door(capsys, 'plan', tmp_path/'p.yaml')
    assert plan_digest(PLAN) in said and 'Honest headlines' in said
    people(.03).to_csv(tmp_path/'ab.csv', index=False)
    said, _ = door(capsys, 'experiment', '--table', tmp_path/'ab.csv', '--unit', 'user_id', '--variant', 'variant', '--control', 'plain', '--plan', tmp_path/'p.yaml', '--covariate', 'before')
    assert 'honest: win' in said

def test_summaries(tmp_path, capsys):
    at = np.arange(1, 15); k = at*700
    t = pd.DataFrame(dict(experiment_id='e', variant_id=1, metric_id=1, time_since_start=at, count_c=k, count_t=k, mean_c=2., mean_t=2.1, variance_c=4., variance_t=4.)); t.to_csv(tmp_path/'s.csv', index=False)
    one = evaluate_summary(t)['series'][0]; se = np.sqrt(8/9800)
    assert one['difference']['value'] == pytest.approx(.1) and one['difference']['ci_upper'] - .1 == pytest.approx(1.96*se, rel=1e-3) and one['srm']['p_value'] is None and one['looks'] == 14
    assert evaluate_summary(t, shares={'control': .6, 'treatment': .4})['series'][0]['srm']['verdict'] == 'fail'
    said, _ = door(capsys, 'experiment', '--summary', tmp_path/'s.csv', '--json', tmp_path/'o.json')
    assert 'naive' in said and json.loads((tmp_path/'o.json').read_text())['series'][0]['time'] == 14
    assert evaluate_summary(t.assign(variance_c=0., variance_t=0.))['not_judged'][0]['reason'].startswith('14 checkpoints')
