"From every report to its run, from the run to the commit and to the data: each link is followed, and each is also broken once to show that it bites."
import hashlib, json, re, shutil
from pathlib import Path
import pytest, yaml
from bs4 import BeautifulSoup
from telemetry_loop.config import file_digest, folder_digest
from pipeline.conftest import sh

def broken_links(root:Path)->list: # complaints, one line each
    "What a reader who follows a report to its origin would stumble over."
    found, read = [], lambda name: json.loads((root/name).read_text())
    release, bundle, lock = read('metrics/release.json'), read('artifacts/train/bundle.json'), yaml.safe_load((root/'dvc.lock').read_text())['stages']
    data = yaml.safe_load((root/'data.dvc').read_text())['outs'][0]
    md5 = lambda stage, kind, path: next((x.get('md5') for x in lock[stage][kind] if x['path'] == path), None)
    def same(what, *values):
        if len(set(values)) > 1 or not values[0]: found.append(f'{what}: {" is not ".join(map(str, values))}')
    # report -> run
    for page in sorted((root/'artifacts/reports').glob('*.html')):
        html = BeautifulSoup(page.read_text(encoding='utf-8'), 'html.parser')
        ids = {tag['id'] for tag in html.find_all(id=True)}
        for tag in html.find_all(href=True) + html.find_all(src=True):
            to = tag.get('href') or tag.get('src')
            if not (to.startswith('data:') or to.startswith('#') and to[1:] in ids or not to.startswith('#') and (page.parent/to).is_file()): found.append(f'{page.name} points to {to[:60]}, which is not there')
        if page.name == 'index.html': continue
        origin = next((h for h in html.find_all('h2') if h.get_text().startswith('Where it comes from')), None)
        told = ' '.join(x.get_text() for x in origin.find_all_next(['p', 'pre'])) if origin else ''
        for word, want in (('Run', release['version']), ('features', release['data_digest']), ('code', release['code_digest']), ('parameters', release['params_digest'])):
            same(f'{page.name}, {word}', (re.search(rf'\b{word} ([\w.]+\w)', told) or [None, None])[1], want)
        if model := re.search(r'\bmodel ([\w.]+\w)', told): same(f'{page.name}, model', model[1], bundle['version'])
    # run -> model and features
    same('model of the run', release['model_version'], bundle['version'])
    same('bundle', release['bundle_digest'], md5('train', 'outs', 'artifacts/train'), folder_digest(root/'artifacts/train'))
    same('features', release['data_digest'], bundle['data_digest'], md5('train', 'deps', 'artifacts/features'), md5('features', 'outs', 'artifacts/features'), folder_digest(root/'artifacts/features'))
    # features -> data
    same('data', data['md5'], md5('ingest', 'deps', 'data'), folder_digest(root/'data'))
    # run -> commit
    at_head = {}
    for stage, body in lock.items():
        for dep in body.get('deps', []):
            path = dep['path']
            if not (path.endswith('.py') or path.startswith('reports/')): continue
            if path not in at_head: at_head[path] = hashlib.md5(sh(root, 'git', 'show', f'HEAD:{path}', check=False).stdout.encode()).hexdigest()
            same(f'{stage}, {path}', dep['md5'], at_head[path])
    # every file of a stage is what the run wrote
    for stage, body in lock.items():
        for out in body.get('outs', []):
            path = root/out['path']
            same(f'{stage}, {out["path"]}', out['md5'], folder_digest(path) if path.is_dir() else file_digest(path) if path.is_file() else 'missing')
    return found

def test_every_report_leads_to_its_run_its_commit_and_its_data(pipeline):
    assert broken_links(pipeline) == []
    assert {p.stem for p in (pipeline/'artifacts/reports').glob('*.html')} - {'index'} == {p.stem for p in (pipeline/'reports').glob('*.ipynb')}

@pytest.fixture(scope='module')
def copy(pipeline, tmp_path_factory):
    to = tmp_path_factory.mktemp('links')/'copy'
    shutil.copytree(pipeline, to, symlinks=True, ignore=shutil.ignore_patterns('runs', 'cache'))
    return to

@pytest.mark.parametrize('name, old, new, words', [
    ('artifacts/reports/00_summary.html', r'Run (<code>)?\w+', 'Run ffffffffffff', ['00_summary.html, Run', 'ffffffffffff']),
    ('artifacts/reports/01_data_health.html', 'Where it comes from', 'The end', ['01_data_health.html, Run', 'None']),
    ('artifacts/reports/index.html', '00_summary.html', '09_gone.html', ['index.html points to 09_gone.html']),
    ('artifacts/train/bundle.json', r'"seed": \d+', '"seed": 99', ['bundle']),
    ('metrics/release.json', r'"data_digest": "\w+', '"data_digest": "0000', ['features', '0000']),
    ('telemetry_loop/model.py', None, '\n# edited\n', ['train, telemetry_loop/model.py']),
    ('data.dvc', r'md5: \w+', 'md5: 1234', ['data', '1234']),
], ids=lambda x: x if isinstance(x, str) and '/' in x else None)
def test_a_broken_link_is_seen(copy, name, old, new, words):
    path = copy/name; good = path.read_bytes()
    path.unlink() # it may be a link into the cache
    text = good.decode()
    path.write_text(text + new if old is None else re.sub(old, new, text, count=1))
    if old is None: sh(copy, 'git', 'add', name); sh(copy, 'git', '-c', 'user.name=test', '-c', 'user.email=test@example.org', 'commit', '-qm', 'edited')
    try: complaints = broken_links(copy)
    finally:
        path.unlink(); path.write_bytes(good)
        if old is None: sh(copy, 'git', 'reset', '-q', '--soft', 'HEAD~1'); sh(copy, 'git', 'reset', '-q', name)
    assert any(all(w in c for w in words) for c in complaints), complaints
