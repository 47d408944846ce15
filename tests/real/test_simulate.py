"The simulated product resembles real logs where it matters: the rhythm of acts, the length of visits, the skew of popularity."
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest
from telemetry_loop.config import from_dict
from telemetry_loop.policy import PolicyConfig, bootstrap_policy
from telemetry_loop.simulate import SimulateConfig, World
from conftest import ROOT, small_params

DATA = ROOT.parent/'shared/data'
pytestmark = pytest.mark.skipif(not (DATA/'otto_sample').is_dir(), reason='real data not here: ../shared/data/otto_sample')

def gini(counts):
    c = np.sort(np.asarray(counts, float)); n = len(c)
    return ((2*np.arange(1, n+1) - n - 1)*c).sum()/(n*c.sum())

def rhythm(user, seconds):
    "Median and 90th percentile of gaps within visits (30 minutes), mean acts a visit."
    t = pd.DataFrame(dict(u=user, s=seconds)).sort_values(['u', 's'])
    gap = t.groupby('u').s.diff(); visit = (gap.isna() | (gap >= 1800)).cumsum()
    return gap[gap < 1800].quantile([.5, .9]).tolist() + [visit.value_counts().mean()]

@pytest.fixture(scope='module')
def simulated(tmp_path_factory): # what people did, from sound lines and right clocks
    params, folder = small_params(), tmp_path_factory.mktemp('log')
    params['simulate']['faults'] = params['simulate']['faults'] | dict(malformed=0., violating=0., duplicated=0., clock_skew=0., bots=0.)
    World(from_dict(SimulateConfig, params['simulate'], 'simulate'), 7).live(bootstrap_policy(from_dict(PolicyConfig, params['policy'], 'policy')), 12, to=folder)
    events = pd.DataFrame([{k: e.get(k) for k in ('type', 'user_id', 'item_id', 'event_time')} for f in sorted(folder.iterdir()) for e in map(json.loads, f.read_text().splitlines())])
    return events.assign(event_time=events.event_time.str[:-1].astype('datetime64[ms]'))

def test_acts_keep_the_rhythm_of_a_real_shop(simulated):
    sessions = [json.loads(l) for l in (DATA/'otto_sample/train.jsonl').read_text().splitlines()]
    real = rhythm([s['session'] for s in sessions for _ in s['events']], [e['ts']/1000 for s in sessions for e in s['events']])
    acts = simulated[simulated.type.isin(['decision', 'click', 'conversion'])]
    ours = rhythm(acts.user_id, acts.event_time.astype('int64')/1000)
    assert all(.5 < a/b < 2 for a, b in zip(ours, real)), (ours, real)

def test_popularity_is_skewed_as_in_real_catalogues(simulated):
    real = [gini(pd.read_csv(DATA/'ml_latest_small/ratings.csv', header=None)[1].value_counts()), gini(pd.Series([i for l in (DATA/'s3rec_beauty/Beauty.txt').open() for i in l.split()[1:]]).value_counts())]
    assert min(real) - .1 < gini(simulated[simulated.type == 'click'].item_id.value_counts()) < max(real) + .05

def test_conversion_lies_between_orders_and_carts(simulated):
    kinds = pd.Series([e['type'] for l in (DATA/'otto_sample/train.jsonl').read_text().splitlines() for e in json.loads(l)['events']]).value_counts(normalize=True)
    n = simulated.type.value_counts()
    assert kinds['orders'] < n['conversion']/n['click'] < 2*(kinds['orders'] + kinds['carts'])
