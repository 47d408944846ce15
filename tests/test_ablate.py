"Ablations: a part that matters is found to, one that cannot matter is not, and the interval knows people and seeds."
import json
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, yaml
from telemetry_loop import ablate
from telemetry_loop.ablate import AblateConfig, Variant, changed, dealt, gains, over_seeds, some_of, verdict
from telemetry_loop.config import TelemetryError, load_params
from telemetry_loop.estimate import Estimate, mean
from telemetry_loop.fit import Targets, TrainConfig
from telemetry_loop.train import Task
from conftest import ROOT

CFG = TrainConfig(dim=8, blocks=1, heads=2, length=8, dropout=.1, batch=16, epochs=4, patience=4, lr=.02, weight_decay=.01, average=.9, full_softmax=1000, negatives=32, half='no', device='cpu', valid_rows=100, adhoc_epochs=3, inputs=['category'], others=[], rewards={}, parts=['network', 'counts'])
HOW = AblateConfig(seeds=3, rows=1000, targets=1000, quick={}, whole_seeds=2, band=.05, placebo='dealt', variants={'category': Variant('category', {'inputs': []}), 'counts': Variant('counts', {'parts': ['network']}), 'dealt': Variant('a random category', {})})
SEEDS = (1, 2, 3)

def world(seed, by, people=80, asked=250, items=80, kinds=4, length=6):
    "The next item is one of the next category, half of the items new (`by` category), or simply the next one (`by` order)."
    rng = np.random.default_rng(seed); category = np.arange(items) % kinds
    def walk(n, known):
        if by == 'order': return [(rng.integers(known) + np.arange(length)) % known for _ in range(n)]
        return [rng.integers(0, known//kinds, length)*kinds + (np.arange(length) + rng.integers(kinds)) % kinds for _ in range(n)]
    ask = lambda paths: Targets([p[:-1] for p in paths], np.array([p[-1] for p in paths]), np.arange(len(paths)), None, None)
    known = items//2 if by == 'category' else items
    return Task(pd.DataFrame({'item_id': np.arange(items).astype(str)}), category, walk(people, known), ask(walk(80, items)), ask(walk(asked, items)), 0)

@pytest.mark.parametrize('seed', SEEDS)
def test_a_part_that_is_all_there_is_to_know_earns_its_place(seed):
    one, two = ablate.ablate('category', world(seed, 'category'), CFG, HOW, [seed, seed + 10], 1), ablate.ablate('counts', world(seed, 'order'), CFG, HOW, [seed, seed + 10], 1)
    assert (one['verdict'], two['verdict']) == ('earns its place',)*2, (one['delta'], two['delta'])
    assert one['with']['value'] - one['without']['value'] == pytest.approx(-one['delta']['value'])

def test_the_placebo_is_worth_nothing():
    "Its interval covers zero and lies within the band, whatever the seeds."
    found = [ablate.ablate('dealt', world(seed, 'category'), replace(CFG, parts=['network']), HOW, [seed, seed + 10, seed + 20], 1) for seed in SEEDS]
    assert [f['verdict'] for f in found] == ['worth nothing']*len(SEEDS), [f['delta'] for f in found]
    assert all(f['delta']['ci_lower'] < 0 < f['delta']['ci_upper'] for f in found) and all(len(set(f['by_seed'])) == 3 for f in found)

def test_a_deal_keeps_how_many_there_are_of_each():
    task = world(1, 'category')
    assert sorted(dealt(task, 1).category) == sorted(task.category) and not (dealt(task, 1).category == task.category).all()
    assert (dealt(task, [1, 0]).category == dealt(task, [1, 0]).category).all() and (dealt(task, [1, 0]).category != dealt(task, [1, 1]).category).any()

def test_people_and_seeds_both_enter_the_interval():
    rng, user = np.random.default_rng(0), np.repeat(np.arange(50), 2)
    people = rng.normal(0, 1, 50)[user]
    same, apart = over_seeds(np.array([people]*3), user), over_seeds(people + np.array([[-.5], [0.], [.5]]), user)
    alone = mean(people, user)
    assert same.value == pytest.approx(alone.value) and same.ci_upper - same.value == pytest.approx(alone.ci_upper - alone.value, rel=.03) and same.n == 100
    assert apart.value == pytest.approx(same.value) and apart.ci_upper - apart.value > 1.8*(same.ci_upper - same.value)
    many, se = over_seeds(people + np.tile([[-.5], [.5]], (15, 1)), user), (alone.ci_upper - alone.value)/1.96
    assert many.ci_upper - many.value == pytest.approx(2*np.hypot(se, .5/29**.5), rel=.03)
    assert over_seeds(np.zeros((3, 0)), user[:0]) == Estimate(None, None, None, 0)
    exact = over_seeds(np.zeros((3, 100)), user)
    assert (exact.value, exact.ci_lower, exact.ci_upper) == (0, 0, 0)

@pytest.mark.parametrize('low, high, said', [(-.03, -.001, 'earns its place'), (.001, .03, 'harms'), (-.009, .01, 'worth nothing'), (-.011, .001, 'cannot tell'), (0., 0., 'worth nothing'), (None, None, 'cannot tell')])
def test_verdicts(low, high, said): assert verdict(Estimate(None if low is None else (low + high)/2, low, high, 9), .01) == said

def test_a_subsample_is_the_same_every_time_and_no_larger_than_asked():
    task = world(1, 'order'); few = some_of(task, 20, 30, 5)
    assert (len(few.sequences), len(few.test), len(few.valid)) == (20, 30, 80) and (few.test.item == some_of(task, 20, 30, 5).test.item).all()
    assert len(some_of(task, 9999, 9999, 5).sequences) == 80 and (some_of(task, 9999, 9999, 5).test.item == task.test.item).all()

def test_the_whole_model_is_learned_once(tmp_path, monkeypatch):
    task, calls, learn = world(1, 'order', asked=20), [], ablate.learn
    monkeypatch.setattr(ablate, 'learn', lambda *a, **k: calls.append(a) or learn(*a, **k))
    first = ablate.ablate('category', task, CFG, HOW, [1, 2], 1, tmp_path); assert len(calls) == 4
    ablate.ablate('counts', task, CFG, HOW, [1, 2], 1, tmp_path); assert len(calls) == 6
    assert ablate.ablate('category', task, CFG, HOW, [1, 2], 1, tmp_path) == first and len(calls) == 6 and not list(tmp_path.glob('*.part'))
    gains(replace(task, category=task.category[::-1].copy()), CFG, 1, 1, tmp_path); assert len(calls) == 7 # other categories, other answers

@pytest.mark.parametrize('change, said', [(dict(seeds=1), 'at least 2'), (dict(placebo='sugar'), "'sugar'"), (dict(variants={'dealt': Variant('x', {'blocks': 2})}), 'placebo changes nothing'),
                                          (dict(variants={'dealt': Variant('x', {}), 'category': Variant('x', {})}), 'every other variant something')])
def test_senseless_tables_are_refused(change, said):
    cfg = replace(HOW, **change)
    with pytest.raises(TelemetryError, match=said): ablate.ablate(list(cfg.variants)[-1], world(1, 'order'), CFG, cfg, [1, 2], 1)

@pytest.mark.parametrize('change, said', [({'colour': 1}, "unknown key 'colour'"), ({'blocks': 1}, 'changes nothing'), ({'dim': 'x'}, 'must be int'), ({'dim': 7}, 'divide'), ({'parts': ['magic']}, "'magic'")])
def test_senseless_changes_are_refused(change, said):
    with pytest.raises(TelemetryError, match=said): changed(CFG, change, 'ablate.variants.x.change')

def test_the_table_in_params_holds():
    cfg, train = load_params(AblateConfig, 'ablate', ROOT/'params.yaml'), load_params(TrainConfig, 'train', ROOT/'params.yaml')
    cfg.check(); quick = changed(train, cfg.quick, 'ablate.quick')
    for name, v in cfg.variants.items():
        for whole in (train, quick): changed(whole, v.change, name)

def test_stage_writes_one_file_and_says_how_much_it_saw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); start = pd.Timestamp('2026-01-01'); task = world(1, 'order', people=60)
    Path('params.yaml').write_text(yaml.safe_dump({'run': {'seed': 5, 'threads': 1, 'engine': 'duckdb', 'memory_gb': 1.}, 'train': asdict(CFG), 'ablate': asdict(HOW) | dict(seeds=2, rows=40, targets=50, quick={'epochs': 1})}))
    Path('artifacts/features').mkdir(parents=True)
    pd.DataFrame({'item_id': [f'i{i:02}' for i in range(80)], 'category': [f'c{c}' for c in task.category], 'available_time': start}).to_parquet('artifacts/features/items.parquet')
    rows = [(f'u{u:02}', i, start + pd.Timedelta(days=d), start + pd.Timedelta(days=d, hours=1), split) for u, s in enumerate(task.sequences) for d, (i, split) in enumerate(zip(s, ['train']*4 + ['valid', 'test']))]
    pd.DataFrame(rows, columns=['user_id', 'item', 'event_time', 'known_time', 'split']).to_parquet('artifacts/features/interactions.parquet')
    ablate.run('category'); first = Path('metrics/ablate/category.json').read_bytes(); found = json.loads(first)
    assert {'variant', 'what', 'delta', 'with', 'without', 'seeds', 'rows', 'verdict'} <= set(found) and (found['seeds'], found['rows'], found['targets']) == (2, 40, 50)
    assert set(found['delta']) == {'value', 'ci_lower', 'ci_upper', 'n'} and found['verdict'] in ('earns its place', 'harms', 'worth nothing', 'cannot tell')
    import shutil; shutil.rmtree('runs'); ablate.run('category'); assert Path('metrics/ablate/category.json').read_bytes() == first
    found = ablate.run('category', whole=True)
    assert (found['rows'], found['targets']) == (60, 60) and Path('runs/ablate/category.json').is_file() and Path('metrics/ablate/category.json').read_bytes() == first
    with pytest.raises(TelemetryError, match="no variant 'colour'.*category, counts, dealt"): ablate.run('colour')
    assert [p.name for p in Path('metrics/ablate').iterdir()] == ['category.json']
