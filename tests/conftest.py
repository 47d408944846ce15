"Shared by the tests: a small world and a folder where the stages have run."
import contextlib, importlib, shutil
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).parent.parent
TINY = {'simulate': dict(users=500, items=150, new_items=2, days=12, categories=6, candidates=16), 'loop': dict(days=7, horizon=14), 'run': dict(threads=1), 'train': dict(dim=32),
        'ablate': dict(seeds=2, rows=200, targets=300, placebo='start', variants={'category': dict(what='the category of an item', change={'inputs': []}), 'start': dict(what='a random category', change={})})}

def small_params(**sections)->dict:
    "The repository's params with the sections changed as named."
    params = yaml.safe_load((ROOT/'params.yaml').read_text())
    for change in (TINY, sections):
        for name, values in change.items(): params[name] = params[name] | values
    return params

@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    "A folder with the telemetry of a tiny world and every artifact up to the release decision; read only."
    from telemetry_loop.loop import first_world, run_stages
    folder = tmp_path_factory.mktemp('tiny')
    (folder/'params.yaml').write_text(yaml.safe_dump(small_params()))
    with contextlib.chdir(folder):
        first_world(Path('data'), progress=False)
        run_stages(progress=False)
    return folder
