import contextlib, io, json, subprocess, sys
from types import SimpleNamespace
from pathlib import Path
import pytest
from telemetry_loop import cli
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import Estimate

ROOT = Path(__file__).parent.parent
VERBS = 'simulate import ingest sessions signals features train policy replay ope scorecard release catalog report index reproduce promote status loop schema audit lineage erase expire'.split()

def door(*words, cwd=ROOT): # the door in this process: what it says, and its code
    argv, code, out, err = sys.argv, 0, io.StringIO(), io.StringIO()
    sys.argv = ['telemetry-loop', *map(str, words)]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): cli.main()
    except SystemExit as e: code = e.code
    finally: sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

def refused(out, *words): # one line on stderr, nothing on stdout, a non-zero code
    assert out.returncode != 0 and out.stdout == '' and len(out.stderr.splitlines()) == 1, (out.returncode, out.stdout, out.stderr)
    assert out.stderr.startswith('error: ') and all(w in out.stderr for w in words), out.stderr

def test_help_names_every_verb_with_its_promise():
    out = door('--help')
    said = {l.split()[0]: ' '.join(l.split()[1:]) for l in out.stdout.split('Commands:')[1].splitlines() if l.strip()}
    assert out.returncode == 0 and set(said) >= set(VERBS) and all(said.values())
    for verb, module in {v: v for v in ('ingest', 'train', 'ope', 'scorecard')}.items(): assert said[verb] == cli.duty(module)

@pytest.mark.parametrize('verb', VERBS)
def test_every_verb_has_help(verb):
    out = door(verb, '--help')
    assert out.returncode == 0 and f'telemetry-loop {verb}' in out.stdout

def test_the_installed_door(tmp_path): # a process of its own, away from the repository
    out = subprocess.run([Path(sys.executable).parent/'telemetry-loop', 'import', 'netflix', 'x', '--to', 'y'], cwd=tmp_path, capture_output=True, text=True)
    refused(out, 'netflix'); assert out.returncode == 1

def test_status_where_nothing_is_live(tmp_path):
    out = door('status', cwd=tmp_path)
    assert out.returncode == 0 and 'nothing is live' in out.stdout

def test_help_imports_nothing_heavy():
    code = "import sys\nfrom telemetry_loop import cli\nsys.argv = ['telemetry-loop', '--help']\ntry: cli.main()\nexcept SystemExit: pass\nprint(sorted({'torch', 'ibis', 'duckdb', 'pandas', 'sklearn', 'numpy', 'papermill'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == '[]', out.stdout[-200:] + out.stderr

def test_package_imports_away_from_the_repository(tmp_path):
    out = subprocess.run([sys.executable, '-c', 'import telemetry_loop; print(telemetry_loop.__version__)'], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip()

@pytest.mark.parametrize('words,says', [
    (['dance'], ['dance']), (['train', '--colour', 'red'], ['--colour']), (['loop', '--rounds', 'x'], ['--rounds']), (['loop', '--rounds', '0'], ['--rounds']), (['import', 'movielens'], ['path']),
    (['train', '--protocol', 'leave-one-out'], ['--protocol', '--sequences']), (['train', '--variant', 'colour'], ['colour', 'category', 'random_category']), (['train', '--whole'], ['--whole', '--variant']),
    (['train', '--variant', 'category', '--json', 'x.json'], ['--json', '--sequences']), (['train', '--variant', 'category', '--sequences', 'x.txt'], ['--sequences', '--variant']), (['reproduce', 'nothing'], ['nothing', 'artifacts/train']), (['reproduce'], ['VERSION']), (['train', '--json', 'x.json'], ['--json', '--sequences']), (['train', '--once'], ['--once', '--sequences']), (['train', '--apart', 'x'], ['--apart', '--sequences']),
    (['ope', '--action', 'a'], ['--action', '--log']), (['ope', '--log', 'x.csv', '--action', 'a'], ['--reward', '--propensity', '--target']),
    (['import', 'netflix', 'x', '--to', 'y'], ['netflix', 'movielens, sequences, otto']), (['import', 'otto', 'none.jsonl', '--to', 'y'], ['none.jsonl']),
    (['report', '99_none'], ['99_none']), (['report', '00_summary', '-p', 'k'], ['-p k', 'NAME=VALUE']),
    (['ope', '--log', 'none.csv', '--action', 'a', '--reward', 'r', '--propensity', 'p', '--target', 'uniform'], ['none.csv']),
    (['train', '--sequences', 'none.txt', '--protocol', 'leave-one-out'], ['none.txt']),
], ids=lambda x: '-'.join(x)[:40])
def test_refusals_are_one_line(words, says, tmp_path):
    before = set(ROOT.iterdir())
    refused(door(*words), *says)
    assert set(ROOT.iterdir()) == before

@pytest.mark.parametrize('verb', ['ingest', 'sessions', 'features', 'train', 'policy', 'replay', 'ope', 'scorecard', 'release'])
def test_a_stage_away_from_the_repository_says_so(verb, tmp_path):
    refused(door(verb, cwd=tmp_path), 'not there' if verb == 'release' else 'params.yaml')
    assert list(tmp_path.iterdir()) == []

def test_import_verb(tmp_path):
    (tmp_path/'r.csv').write_text('1,6,2.0,980730861\n')
    out = door('import', 'movielens', 'r.csv', '--to', 'data', cwd=tmp_path)
    assert out.returncode == 0 and '2 events of 1 users and 1 items' in out.stdout and (tmp_path/'data').is_dir()
    refused(door('import', 'movielens', 'r.csv', '--to', 'data', cwd=tmp_path), 'never overwritten')

def test_ope_door_prints_and_writes_only_the_json(tmp_path):
    rows = [f'{i % 4},{int(i % 7 == 0)},0.25' for i in range(2000)]
    (tmp_path/'log.csv').write_text('a,r,p\n' + '\n'.join(rows) + '\n')
    (tmp_path/'params.yaml').write_text((ROOT/'params.yaml').read_text())
    out = door('ope', '--log', 'log.csv', '--action', 'a', '--reward', 'r', '--propensity', 'p', '--target', 'uniform', '--json', 'out.json', cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    found = json.loads((tmp_path/'out.json').read_text())
    assert found['estimates']['ips']['value'] == pytest.approx(286/2000) and set(found['estimates']['ips']) == {'value', 'ci_lower', 'ci_upper', 'n'}
    assert found['support']['verdict'] == 'trust' and 'snips' in out.stdout and 'verdict' in out.stdout
    assert {p.name for p in tmp_path.iterdir()} == {'log.csv', 'params.yaml', 'out.json'}

def test_schema_verb_is_the_tracking_plan(tmp_path):
    from telemetry_loop.schema import tracking_plan
    assert json.loads(door('schema', cwd=tmp_path).stdout) == tracking_plan()

def test_estimates_become_plain_values():
    assert cli.plain({'a': [Estimate(1., .5, 1.5, 9)]}) == {'a': [{'value': 1., 'ci_lower': .5, 'ci_upper': 1.5, 'n': 9}]}
    assert cli.shown({'value': 1., 'ci_lower': .5, 'ci_upper': 1.5, 'n': 9}) == '1  (0.5 to 1.5)' and cli.shown({'value': None}) == 'not known'
    assert cli.shown({'slate': 3, 'power': .5}) == 'slate 3, power 0.5' and cli.shown([]) == '-'

def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*a, **k): raise ZeroDivisionError('ours')
    monkeypatch.setattr(cli, 'app', broken)
    with pytest.raises(ZeroDivisionError): cli.main()

@pytest.mark.parametrize('error,word', [(TelemetryError('one\ntwo'), 'error: one two'), (FileNotFoundError(2, 'no', 'x.csv'), 'x.csv is not there'), (PermissionError(13, 'no', 'x.csv'), 'permissions'), (KeyboardInterrupt(), 'stopped')])
def test_input_errors_are_one_line(monkeypatch, capsys, error, word):
    def refuse(*a, **k): raise error
    monkeypatch.setattr(cli, 'app', refuse)
    with pytest.raises(SystemExit) as e: cli.main()
    said = capsys.readouterr().err
    assert e.value.code != 0 and word in said and len(said.splitlines()) == 1
