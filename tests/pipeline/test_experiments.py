"A value tried, a model had again, a bundle fetched by its name, parts taken out: with DVC's own commands."
import json, shutil
import pytest, yaml
from telemetry_loop.recommender import Recommender
from pipeline.conftest import clone, sh

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A tiny world up to the bundle, committed."
    repo = clone(tmp_path_factory.mktemp('experiments')/'one', train=dict(epochs=3, dim=16, blocks=1))
    sh(repo, 'telemetry-loop', 'simulate'); sh(repo, 'dvc', 'repro', 'train', 'ablate')
    commit(repo, 'trained')
    return repo

def commit(repo, text): sh(repo, 'git', 'add', '-A'); sh(repo, 'git', '-c', 'user.name=test', '-c', 'user.email=test@example.org', 'commit', '-qm', text)

def copy(repo, to): shutil.copytree(repo, to, symlinks=True); return to

def test_exp_run_tries_a_value(trained, tmp_path):
    repo = copy(trained, tmp_path/'copy'); before = json.loads((repo/'metrics/train.json').read_text())
    sh(repo, 'dvc', 'exp', 'run', '-S', 'train.epochs=1', '-S', 'train.dim=8', '-n', 'narrow', 'train')
    after, params = json.loads((repo/'metrics/train.json').read_text()), yaml.safe_load((repo/'params.yaml').read_text())['train']
    assert (params['epochs'], params['dim'], after['epochs']) == (1, 8, 1) and after['version'] != before['version']
    assert 'narrow' in sh(repo, 'dvc', 'exp', 'list').stdout and Recommender.load(repo/'artifacts/train').params['dim'] == 8
    changes = json.loads(sh(repo, 'dvc', 'metrics', 'diff', '--json', 'HEAD').stdout)
    assert changes and after['version'] != json.loads(sh(repo, 'git', 'show', 'HEAD:metrics/train.json').stdout)['version']

def test_the_bundle_is_had_by_name(trained, tmp_path):
    repo = copy(trained, tmp_path/'copy')
    sh(repo, 'gto', 'register', 'recommender')
    sh(repo, 'dvc', 'artifacts', 'get', '.', 'recommender', '-o', tmp_path/'got')
    assert Recommender.load(tmp_path/'got').version == json.loads((repo/'metrics/train.json').read_text())['version']

def test_reproduce_says_identical_or_what_differs(trained, tmp_path):
    repo = copy(trained, tmp_path/'copy'); version = json.loads((repo/'metrics/train.json').read_text())['version']
    assert f'{version} reproduced: all' in sh(repo, 'telemetry-loop', 'reproduce', version).stdout and sh(repo, 'git', 'status', '--porcelain').stdout == ''
    (repo/'requirements.lock').write_text((repo/'requirements.lock').read_text() + '\n')
    done = sh(repo, 'telemetry-loop', 'reproduce', version, check=False)
    assert done.returncode and len(done.stderr.strip().splitlines()) == 1 and 'lock' in done.stderr and 'git checkout' in done.stderr

def test_every_part_has_its_file_and_a_new_one_runs_alone(trained, tmp_path):
    repo = copy(trained, tmp_path/'copy')
    assert sorted(p.stem for p in (repo/'metrics/ablate').iterdir()) == ['category', 'start']
    params = yaml.safe_load((repo/'params.yaml').read_text()); params['ablate']['variants']['linear'] = {'what': 'the linear model', 'change': {'parts': ['network', 'counts']}}
    (repo/'params.yaml').write_text(yaml.safe_dump(params))
    out = sh(repo, 'dvc', 'repro', 'ablate').stdout
    assert "Running stage 'ablate@linear'" in out and out.count('Running stage') == 1
    assert json.loads((repo/'metrics/ablate/linear.json').read_text())['rows'] == json.loads((repo/'metrics/ablate/category.json').read_text())['rows'] <= 200

def test_curves_are_plots(trained, tmp_path):
    repo = copy(trained, tmp_path/'copy')
    for name in ('loss', 'valid_ndcg'): assert len((repo/f'metrics/curves/plots/metrics/{name}.tsv').read_text().splitlines()) > json.loads((repo/'metrics/train.json').read_text())['epochs']
    sh(repo, 'dvc', 'plots', 'show', '-o', tmp_path/'plots'); page = (tmp_path/'plots/index.html').read_text()
    assert 'Mean loss of each pass' in page and 'Validation after each pass' in page
