"Open Bandit Dataset (ZOZO), campaign men: the published digits, from the file alone."
from pathlib import Path
import numpy as np, pandas as pd, pytest
from telemetry_loop.stream import evaluate_log

DATA = Path(__file__).parents[3]/'shared/data/open_bandit'
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason='real data not here: ../shared/data/open_bandit')

@pytest.mark.parametrize('position', [None, 'position'])
def test_thompson_log_to_uniform(position):
    found = evaluate_log(DATA/'bts_men.csv', 'item_id', 'click', 'propensity_score', 'uniform', position=position)
    assert found['estimates']['ips']['value'] == pytest.approx(.0030086263, abs=1e-9)
    assert found['estimates']['snips']['value'] == pytest.approx(.0031894232, abs=1e-9)
    assert found['support']['mean_weight'] == pytest.approx(.9433136257, abs=1e-9)
    assert found['support']['ess'] == pytest.approx(655.7098, abs=1e-4)
    assert found['support']['max_weight'] == pytest.approx(178.2531, abs=1e-4)
    assert found['support']['verdict'] in ('trust', 'widen')

def test_the_uniform_log_to_itself():
    found = evaluate_log(DATA/'random_men.csv', 'item_id', 'click', 'propensity_score', 'uniform')
    assert found['support']['verdict'] == 'trust' and found['support']['ess'] == pytest.approx(10_000)
    assert found['estimates']['ips']['value'] == pytest.approx(.0046, abs=1e-9)

def test_the_uniform_log_to_the_thompson_prior(tmp_path):
    log, prior = pd.read_csv(DATA/'random_men.csv'), pd.read_csv(DATA/'bts_prior_action_distribution_men.csv').set_index('item_id').sort_index()
    log['prior'] = prior[[f'p_pos{j}' for j in range(3)]].to_numpy()[log.item_id, log.position - 1]
    log.to_csv(tmp_path/'log.csv', index=False)
    found = evaluate_log(tmp_path/'log.csv', 'item_id', 'click', 'propensity_score', 'prior', position='position')
    assert found['estimates']['ips']['value'] == pytest.approx(.0045426788, abs=1e-9) and found['estimates']['snips']['value'] == pytest.approx(.0046135081, abs=1e-9)
    assert found['support']['verdict'] == 'trust' and found['gain']['snips']['ci_lower'] < 0 < found['gain']['snips']['ci_upper'] # 46 clicks
