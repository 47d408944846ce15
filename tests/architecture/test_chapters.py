"Every chapter runs from top to bottom, and its demonstrations hold."
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[2]

@pytest.mark.parametrize('chapter', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_chapter(chapter):
    done = subprocess.run([Path(sys.executable).parent/'nbdev_test', '--path', chapter, '--n_workers', '1', '--do_print'], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
