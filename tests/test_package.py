"The wheel stands alone: it imports outside the repository, and importing stays light."
import os, subprocess, sys, zipfile
from conftest import ROOT

def test_the_wheel_imports_outside_the_repository(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp_path, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob('*.whl'))
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    code = "import telemetry_loop, telemetry_loop.ope, telemetry_loop.loop, telemetry_loop.cli; print(telemetry_loop.__file__)"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(tmp_path/'site')}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().startswith(str(tmp_path/'site')), done.stderr[-2000:]
    assert 'telemetry-loop=telemetry_loop.cli:main' in (next((tmp_path/'site').glob('*.dist-info'))/'entry_points.txt').read_text().replace(' ', '')

def test_importing_pulls_in_nothing_heavy():
    code = "import sys, telemetry_loop, telemetry_loop.cli; print(sorted({'torch', 'ibis', 'pandas', 'sklearn', 'seaborn', 'duckdb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
