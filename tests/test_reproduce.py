"A version is learned again to the byte, or what stands in the way is named."
import os, shutil, subprocess
from dataclasses import asdict
from pathlib import Path
import pandas as pd, pytest, yaml
from telemetry_loop import train
from telemetry_loop.config import TelemetryError, folder_digest, read_json, write_json
from telemetry_loop.fit import TrainConfig
from telemetry_loop.reproduce import bundle_of, elsewhere, reproduce

CFG = TrainConfig(dim=8, blocks=1, heads=2, length=6, dropout=.1, batch=16, epochs=2, patience=2, lr=.01, weight_decay=.01, average=.9, full_softmax=1000, negatives=32, half='no', device='cpu', valid_rows=50, adhoc_epochs=3, inputs=['category'], others=[], rewards={}, parts=['network', 'counts', 'linear'])

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); start = pd.Timestamp('2026-01-01')
    Path('params.yaml').write_text(yaml.safe_dump({'run': {'seed': 5, 'threads': 1, 'engine': 'duckdb', 'memory_gb': 1.}, 'train': asdict(CFG), 'quality': {'min_users': 5, 'categories': 5, 'list_rows': 100, 'robust_rows': 50, 'levels': {'cold': [1]}}}))
    Path('artifacts/features').mkdir(parents=True); Path('requirements.lock').write_text('x==1\n')
    pd.DataFrame({'item_id': [f'i{i:02}' for i in range(12)], 'category': ['', 'a']*6, 'available_time': start}).to_parquet('artifacts/features/items.parquet')
    rows = [(f'u{u:02}', (u + d) % 12, start + pd.Timedelta(days=d), start + pd.Timedelta(days=d, hours=1), split) for u in range(30) for d, split in enumerate(['train']*6 + ['valid', 'test'])]
    pd.DataFrame(rows, columns=['user_id', 'item', 'event_time', 'known_time', 'split']).to_parquet('artifacts/features/interactions.parquet')
    train.run()
    return tmp_path

def version(): return read_json('artifacts/train/bundle.json')['version']

def refusal(name=None):
    with pytest.raises(TelemetryError) as e: reproduce(name or version())
    assert '\n' not in str(e.value)
    return str(e.value)

def test_the_same_again_and_nothing_touched(home):
    before = {p: folder_digest(p) for p in ('artifacts', 'metrics', 'runs')}
    Path('params.yaml').write_text(Path('params.yaml').read_text().replace('epochs: 2', 'epochs: 1').replace('seed: 5', 'seed: 6')) # today's values are not the bundle's
    assert reproduce(version()) == f'{version()} reproduced: all 6 files identical'
    assert before == {p: folder_digest(p) for p in before}

def test_what_is_not_as_it_was_is_named(home):
    lock = Path('requirements.lock'); lock.write_text('x==2\n'); said = refusal()
    assert 'lock ' in said and 'data ' not in said and 'code ' not in said and 'dvc checkout' in said
    lock.write_text('x==1\n')
    log = pd.read_parquet('artifacts/features/interactions.parquet'); log.loc[0, 'item'] = 3; log.to_parquet('artifacts/features/interactions.parquet')
    said = refusal(); assert 'data ' in said and 'lock ' not in said and 'code ' not in said

def test_other_code_and_another_torch_are_named(home):
    facts = read_json('artifacts/train/bundle.json')
    assert elsewhere(facts) == [] and [w.split()[0] for w in elsewhere(facts | {'code_digest': 'abc', 'torch': '0.1'})] == ['code', 'torch']

def test_an_altered_bundle_is_refused(home):
    facts = read_json('artifacts/train/bundle.json'); facts['params']['dim'] = 16; write_json('artifacts/train/bundle.json', facts)
    assert 'altered' in refusal()

def test_files_that_differ_are_listed(home):
    facts = read_json('artifacts/train/bundle.json'); facts['seed'] = 99; write_json('artifacts/train/bundle.json', facts) # says it had another seed than it had
    said = refusal(); assert 'not reproduced' in said and 'weights.npz' in said and 'bundle.json' in said and 'vocabulary.json' not in said

@pytest.mark.parametrize('name', ['000000000000', '--all', '', 'x y'])
def test_an_unknown_version_is_refused(home, name):
    with pytest.raises(TelemetryError, match='no bundle is called') as e: reproduce(name)
    assert version() in str(e.value)

def test_a_release_names_its_model(home):
    write_json('releases/0001-abcabcabcabc.json', {'version': 'abcabcabcabc', 'model_version': version()})
    assert bundle_of('abcabcabcabc', home/'none') == Path('artifacts/train')

def test_a_version_of_the_past_comes_from_git_and_dvc(home):
    "Two models in two commits: the older one is found, refused while its data are not here, and reproduced once they are."
    sh = lambda *words: subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ | {'DVC_NO_ANALYTICS': '1'})
    commit = lambda text: (sh('git', 'add', '-A'), sh('git', '-c', 'user.name=t', '-c', 'user.email=t@example.org', 'commit', '-qm', text))
    sh('git', 'init', '-q'); sh('dvc', 'init', '-q')
    Path('.gitignore').write_text('/runs\n')
    sh('dvc', 'add', '-q', 'artifacts/features'); sh('dvc', 'add', '-q', 'artifacts/train'); commit('one'); old = version()
    log = pd.read_parquet('artifacts/features/interactions.parquet'); log.loc[0, 'item'] = 3
    Path('artifacts/features/interactions.parquet').unlink(); log.to_parquet('artifacts/features/interactions.parquet')
    train.run(); sh('dvc', 'add', '-q', 'artifacts/features'); sh('dvc', 'add', '-q', 'artifacts/train'); commit('two')
    assert version() != old
    first = sh('git', 'rev-list', '--max-parents=0', '--abbrev-commit', 'HEAD').stdout.strip()
    said = refusal(old); assert 'data ' in said and f'git checkout {first}' in said
    sh('git', 'checkout', '-q', first, '--', 'artifacts/features.dvc'); sh('dvc', 'checkout', '-q', 'artifacts/features.dvc')
    assert reproduce(old) == f'{old} reproduced: all 6 files identical'
    shutil.rmtree('.dvc/cache'); assert 'no longer holds' in refusal(old)
