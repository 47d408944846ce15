"Temporary clones of the repository with a tiny world."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml
from conftest import ROOT, small_params

ENV = os.environ | {'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', 'DVC_NO_ANALYTICS': '1'}

def sh(cwd, *words, check=True):
    "Run a command as a user would; its output, and an error that shows it."
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode: raise AssertionError(f'{" ".join(map(str, words))} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}')
    return done

def clone(to:Path, **sections)->Path:
    "The tree as it stands, committed in a repository of its own, with a tiny world and no data."
    to.mkdir(parents=True)
    for name in sh(ROOT, 'git', 'ls-files', '-co', '--exclude-standard', '-z').stdout.split('\0'):
        if name and (ROOT/name).is_file():
            (to/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/name, to/name)
    for name in ('data.dvc', 'dvc.lock'): (to/name).unlink(missing_ok=True)
    shutil.rmtree(to/'metrics', ignore_errors=True)
    (to/'params.yaml').write_text(yaml.safe_dump(small_params(**sections)))
    sh(to, 'git', 'init', '-q'); sh(to, 'git', 'add', '-A')
    sh(to, 'git', '-c', 'user.name=test', '-c', 'user.email=test@example.org', 'commit', '-qm', 'tiny')
    return to

def ran(repo):
    "Simulate and run the pipeline."
    sh(repo, 'telemetry-loop', 'simulate'); sh(repo, 'dvc', 'repro')
    return repo

@pytest.fixture(scope='session')
def pipeline(tmp_path_factory): return ran(clone(tmp_path_factory.mktemp('pipeline')/'one'))
