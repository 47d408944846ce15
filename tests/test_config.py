"Values are joined with names and types; whatever does not fit is refused by name, and files are whole or absent."
import json, subprocess, sys
from dataclasses import dataclass
import pytest
from telemetry_loop.config import RunConfig, TelemetryError, code_digest, folder_digest, from_dict, load_params, read_json, write_json

@dataclass(frozen=True)
class Inner:
    share: float
@dataclass(frozen=True)
class Outer:
    names: list[str]
    worth: dict[str, float]
    parts: list[Inner]

def test_nested_values_keep_their_types():
    cfg = from_dict(Outer, {'names': ['a'], 'worth': {'x': 1}, 'parts': [{'share': .5}]}, 'outer')
    assert cfg.parts[0] == Inner(.5) and cfg.worth == {'x': 1.0} and isinstance(cfg.worth['x'], float)

@pytest.mark.parametrize('values, words', [
    ({'names': 'a', 'worth': {}, 'parts': []}, "outer.names is 'a'"), ({'names': [1], 'worth': {}, 'parts': []}, r'outer.names\[0\] is 1'),
    ({'names': [], 'worth': {'x': 'y'}, 'parts': []}, "outer.worth.x is 'y'"), ({'names': [], 'worth': {}, 'parts': [{'shar': 1.}]}, "unknown key 'shar'")])
def test_misfits_are_named(values, words):
    with pytest.raises(TelemetryError, match=words): from_dict(Outer, values, 'outer')

def test_params_file_errors(tmp_path):
    with pytest.raises(TelemetryError, match='no params.yaml|no .*params.yaml'): load_params(RunConfig, 'run', tmp_path/'params.yaml')
    (tmp_path/'params.yaml').write_text('run: [unclosed')
    with pytest.raises(TelemetryError, match='not valid YAML'): load_params(RunConfig, 'run', tmp_path/'params.yaml')
    (tmp_path/'params.yaml').write_text('other: {a: 1}')
    with pytest.raises(TelemetryError, match="no section 'run'.*other"): load_params(RunConfig, 'run', tmp_path/'params.yaml')

def test_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path/'a.json', {'x': 1})
    with pytest.raises(ValueError): write_json(tmp_path/'a.json', {'x': float('nan')})
    assert read_json(tmp_path/'a.json') == {'x': 1} and len(list(tmp_path.iterdir())) == 1

def test_folder_digest_is_the_one_dvc_computes(tmp_path):
    for args in (['git', 'init', '-q'], [sys.executable, '-m', 'dvc', 'init', '-q']): subprocess.run(args, cwd=tmp_path, check=True)
    for name in ('b.jsonl', 'a/x.jsonl', 'a.b/y', 'é.txt'): p = tmp_path/'data'/name; p.parent.mkdir(parents=True, exist_ok=True); p.write_text(name)
    subprocess.run([sys.executable, '-m', 'dvc', 'add', '-q', 'data'], cwd=tmp_path, check=True)
    assert f'md5: {folder_digest(tmp_path/"data")}' in (tmp_path/'data.dvc').read_text()

def test_code_digest_follows_the_modules():
    assert code_digest('ope') != code_digest('policy') != code_digest()
