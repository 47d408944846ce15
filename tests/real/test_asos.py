"ASOS digital experiments: 99 treatments and four metrics each, stopped by every habit of looking, and what the end said."
from pathlib import Path
import numpy as np, pandas as pd, pytest
from telemetry_loop.sequential import METHODS, judge_checkpoints

FILE = Path(__file__).parents[3]/'shared/data/asos/asos_digital_experiments.parquet'
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason='real data not here: ../shared/data/asos')

@pytest.fixture(scope='module')
def found(): return judge_checkpoints(pd.read_parquet(FILE))

def test_every_treatment_is_met(found):
    judged, summary = found
    assert len(judged) == summary['series'] == 396 and len(judged[['experiment_id', 'variant_id']].drop_duplicates()) == 99
    assert summary['checkpoints'] + summary['unusable'] == 24_153 and summary['checkpoints'] == 23_358
    assert summary['not_judged'] == (judged.looks == 0).sum() == 15 and set(judged.metric_id[judged.looks == 0]) == {2, 3, 4}  # without variances

def test_who_stops_early_and_is_taken_back(found):
    _, summary = found
    told = lambda what: [round(summary[m][what], 3) for m in METHODS]
    assert round(summary['final_significant'], 3) == .276
    assert told('early') == [.583, .270, .349] and told('disagree') == [.323, .168, .110]
    assert told('taken_back') == [.323, .087, .102] and told('missed') == [0, .081, .008]

def test_the_end_is_the_usual_interval_and_the_anytime_one_is_wider(found):
    judged, _ = found; told = judged[judged.looks > 0]
    assert ((told.ci_lower > 0) | (told.ci_upper < 0)).eq(told.final != 0).all()
    ratio = (told.anytime_upper - told.anytime_lower)/(told.ci_upper - told.ci_lower)
    assert np.allclose(ratio, ratio.iloc[0]) and 1.4 < ratio.iloc[0] < 1.6                 # at the planned end

def test_steps_dealt_by_chance_leave_only_peeking_wrong():
    "The archive's own standard errors and calendar, but the steps between checkpoints are drawn: no effect anywhere. (Half of its checkpoints bring no information, for values grow with every day; so peeking costs less here than at even looks.)"
    keys = ['experiment_id', 'variant_id', 'metric_id']
    t = pd.read_parquet(FILE).dropna().sort_values([*keys, 'time_since_start']); t = t[(t.count_c > 1) & (t.count_t > 1)]
    t['information'] = (1/(t.variance_c/t.count_c + t.variance_t/t.count_t)).groupby([t[k] for k in keys]).cummax()
    t['step'] = t.groupby(keys).information.diff().fillna(t.information)
    t = t[t.step > 0]
    t['walk'] = np.random.default_rng(20269).normal(size=len(t))*np.sqrt(t.step)          # declared once
    _, summary = judge_checkpoints(t.assign(mean_t=t.mean_c + t.groupby(keys).walk.cumsum()/t.information))
    naive, anytime, planned = (summary[m]['significant'] for m in METHODS)
    by_chance = .05 + 2.33*np.sqrt(.05*.95/381)                                           # the 1 % quantile of 381 series
    assert max(anytime, planned) <= by_chance < naive
