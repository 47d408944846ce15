"""Experiments through the whole pipeline: four run beside each other in one product, each with another true story; the stages must tell which is which.
`honest` takes the pull from clickbait, `nothing` changes nothing, `bait` makes clickbait pull harder, and of `lost` a part of the treated never reaches the log."""
import contextlib, importlib, re, shutil
from pathlib import Path
import pandas as pd, pytest, yaml
from conftest import ROOT, small_params
from telemetry_loop.config import read_json

def plan(name, primary, up, guardrails=None, **more):
    return dict(experiment=name, hypothesis=f'{name} changes {primary}.', unit='user_id', control='old', shares={'old': .5, 'new': .5}, primary=[primary], guardrails=guardrails or {}, directions={primary: 'up' if up else 'down'} | {g: 'down' for g in guardrails or {}},
                secondary=[m for m in ('engagement', 'satisfaction', 'return_rate') if m != primary], segments=['segment', 'newcomer'], covariate_days=4, outliers={}, alpha=.05, power=.8, mde=.35, days=10, looks=[6, 8, 10], stopping='group-sequential') | more
PLANS = [plan('honest', 'complaints', False), plan('nothing', 'engagement', True), plan('bait', 'engagement', True, {'complaints': .05}, mde=.1), plan('lost', 'engagement', True, stopping='anytime', looks=[])]

@pytest.fixture(scope='module')
def tried(tmp_path_factory):
    "A folder in which the product tried four things and the stages looked at them."
    folder = tmp_path_factory.mktemp('tried'); arm = lambda layer, pull: dict(layer=layer, variants={'old': .5, 'new': .5}, share=1., start=0., pull=pull, policy={})
    params = small_params(simulate=dict(users=2500, days=14, items=150, categories=6, candidates=16), experiment=dict(follow_up=5, least=50, units=2500), longterm=dict(later=[5, 8], gap=4),
        assignment=dict(begins=4, holdout=0., experiments={'honest': arm('a', {'new': .0}), 'nothing': arm('b', {}), 'bait': arm('c', {'new': 2.5}), 'lost': arm('d', {})}))
    (folder/'params.yaml').write_text(yaml.safe_dump(params)); (folder/'plans').mkdir()
    for p in PLANS: (folder/f'plans/{p["experiment"]}.yaml').write_text(yaml.safe_dump(p))
    with contextlib.chdir(folder):
        importlib.import_module('telemetry_loop.loop').first_world(Path('data'), progress=False)
        for path in sorted(Path('data').glob('*.jsonl')): # a client that crashes loses exposures of one variant
            kept = [l for l in path.read_text().splitlines() if not ('"experiment":"lost"' in l and '"variant":"new"' in l and re.search('"user_id":"u[0-9]{5}[0-2]"', l))]
            path.write_text('\n'.join(kept) + '\n')
        for name in ('ingest', 'sessions', 'experiment', 'longterm'): importlib.import_module(f'telemetry_loop.{name}').run()
    return folder

@pytest.fixture(scope='module')
def found(tried): return read_json(tried/'metrics/experiment.json')['experiments']

def test_each_story_is_told_as_it_is(found):
    kinds = {k: v['verdict']['kind'] for k, v in found.items()}
    assert kinds == {'honest': 'win', 'nothing': 'no difference shown', 'bait': 'harm', 'lost': 'invalid'}, {k: v['verdict'] for k, v in found.items()}
    assert 'complaints got better' in found['honest']['verdict']['reason'] and 'guardrail complaints' in found['bait']['verdict']['reason'] and 'declared shares' in found['lost']['verdict']['reason']
    assert found['bait']['metrics']['engagement']['lift']['ci_lower'] > 0                        # the clicks alone would have shipped it
    assert found['nothing']['metrics']['engagement']['always_valid_p'] > .05 and max(found['lost']['srm_exposed'][p] for p in ('p_value', 'always_valid_p')) < .001 < min(found['honest']['srm_exposed'][p] for p in ('p_value', 'always_valid_p'))

def test_people_are_counted_once_and_followed_equally_long(tried, found):
    one = found['honest']
    assert sum(one['exposed'].values()) > one['followed'] > 1000 and one['looked'] == 10 and [r['day'] for r in one['over_time']['new']] == [6, 8, 10]
    assert one['left_out']['bots'] == 0 and one['announced']['answer'] == 'pass'
    n = [r['n'] for r in one['over_time']['new']]; assert n == sorted(n) and n[-1] == one['followed']

def test_factors_are_told_apart(tried):
    "Beside each other, honest lowers and bait raises what people open; nothing does nothing."
    pairs = {(c['first'], c['second']): c['metrics']['engagement'] for c in read_json(tried/'metrics/experiment.json')['crossings']}
    assert len(pairs) == 3                                                                       # what is not valid is not crossed
    both = pairs['bait', 'honest']['effects']
    assert both['bait']['ci_lower'] > 0 > both['honest']['ci_upper'] and both['bait x honest']['value'] < 0  # where clickbait has no pull, there is nothing to multiply
    quiet = pairs['honest', 'nothing']['effects']
    assert quiet['nothing']['ci_lower'] < 0 < quiet['nothing']['ci_upper']
    assert min(p['independence'] for p in pairs.values()) > .001

def test_the_long_run_is_asked_of_each(tried):
    told = read_json(tried/'metrics/longterm.json')
    assert set(told['experiments']) == {p['experiment'] for p in PLANS}
    for name in ('honest', 'bait'):
        late = told['experiments'][name]['new']
        assert set(late['promise']['decisions']) == {'clicks', 'index', 'lope', 'came'} and late['promise']['known'] > 500 and set(late['stays']['curves']) == {'old', 'new'}
    assert told['experiments']['bait']['new']['promise']['decisions']['clicks']['ship'] and not told['experiments']['honest']['new']['promise']['decisions']['clicks']['ship']   # what clicks alone would do
    assert 0 < told['glossary']['return_rate']['value'] < 1 and told['glossary']['retained_d28']['value'] is None and told['ahead']['days_seen_in_next_28']['value'] > 1

def test_who_does_not_agree_to_experiments_is_in_neither_stage(tried, found):
    import duckdb
    from telemetry_loop.longterm import read_exposures, read_people
    with contextlib.chdir(tried): met, people = read_exposures(con := duckdb.connect()), read_people(con)
    mine = met[met['experiment'] == 'honest'].sort_values('event_time').drop_duplicates('user_id'); refuse = mine['user_id'].isin(people.loc[~people['agrees'], 'user_id'])
    assert refuse.sum() == found['honest']['left_out']['no_consent'] > 0 and sum(found['honest']['exposed'].values()) == (~refuse).sum()
    early = mine['event_time'].dt.floor('D') <= pd.Timestamp(read_json(tried/'metrics/longterm.json')['as_of']) - pd.Timedelta(days=2)
    assert read_json(tried/'metrics/longterm.json')['experiments']['honest']['new']['promise']['units'] == (early & ~refuse).sum() < early.sum()

def test_a_plan_edited_after_exposure_is_void(tried, tmp_path):
    copy = tmp_path/'copy'; shutil.copytree(tried, copy, ignore=shutil.ignore_patterns('data', 'runs'))
    path = copy/'plans/nothing.yaml'; path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | dict(primary=['satisfaction'], secondary=['engagement', 'return_rate'], directions={'satisfaction': 'up'})))
    (copy/'plans/bait.yaml').unlink()
    with contextlib.chdir(copy): importlib.import_module('telemetry_loop.experiment').run()
    again = read_json(copy/'metrics/experiment.json')['experiments']
    assert again['nothing']['verdict']['kind'] == 'invalid' and 'exposures were not under plan' in again['nothing']['verdict']['reason']
    assert again['bait']['verdict'] == dict(kind='invalid', answer='fail', reason='plans/bait.yaml is not there; an experiment is judged by the plan it was announced with; bring it back')
    assert again['honest']['verdict']['kind'] == 'win'

def test_a_log_without_announced_experiments_says_so(tried, tmp_path):
    copy = tmp_path/'copy'; (copy/'artifacts/sessions').mkdir(parents=True); (copy/'artifacts/ingest/events').mkdir(parents=True); shutil.copy(tried/'params.yaml', copy)
    shutil.copytree(tried/'artifacts/sessions', copy/'artifacts/sessions', dirs_exist_ok=True)
    for path in (tried/'artifacts/ingest/events').glob('*.parquet'): t = pd.read_parquet(path); t[t['type'] != 'exposure'].drop(columns=['plan', 'forced'], errors='ignore').to_parquet(copy/'artifacts/ingest/events'/path.name, index=False)
    with contextlib.chdir(copy):
        for name in ('experiment', 'longterm'): importlib.import_module(f'telemetry_loop.{name}').run()
    from telemetry_loop.readout import answer
    found = read_json(copy/'metrics/experiment.json')
    assert found == dict(experiments={}, crossings=[], as_of=None) and answer(found).startswith('**No experiment is announced')
    assert read_json(copy/'metrics/longterm.json')['glossary']['engagement']['value'] > 0
