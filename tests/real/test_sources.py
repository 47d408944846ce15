import json
from collections import Counter
from pathlib import Path
import jsonschema, pytest
from telemetry_loop.schema import event_schema
from telemetry_loop.sources import import_source

DATA = Path(__file__).parents[3]/'shared/data'
def real(name):
    if not (DATA/name).exists(): pytest.skip(f'real data {name} is not here')
    return DATA/name

def check(folder, every=200): # -> counts by type; each `every`th line keeps the tracking plan
    found = [json.loads(l) for p in sorted(folder.glob('*.jsonl')) for l in p.read_text(encoding='utf-8').splitlines()]
    for e in found[::every]: jsonschema.validate(e, event_schema(e['type']))
    assert len({e['event_id'] for e in found}) == len(found)
    assert [e['received_time'] for e in found] == sorted(e['received_time'] for e in found)
    return Counter(e['type'] for e in found), found

def test_ml_latest_small(tmp_path):
    done = import_source('movielens', real('ml_latest_small/ratings.csv'), tmp_path/'to')
    counts, found = check(tmp_path/'to')
    assert counts == {'interaction': 100_023, 'item': done.items} and done.users == 706 and done.left_out == 0
    assert (done.first, done.last) == ('1996-04-03', '2015-03-30')
    assert sum('category' in e for e in found if e['type'] == 'item') > .99*done.items

def test_beauty(tmp_path):
    path = real('s3rec_beauty/Beauty.txt')
    done = import_source('sequences', path, tmp_path/'to')
    counts, found = check(tmp_path/'to')
    assert (done.users, done.items, counts['interaction']) == (22_363, 12_101, 198_502)
    acts = {}
    for e in found:
        if e['type'] == 'interaction': acts.setdefault(e['user_id'], []).append(e['item_id'])
    assert acts == {line.split()[0]: line.split()[1:] for line in path.read_text().splitlines()}

def test_otto(tmp_path):
    path = real('otto_sample/train.jsonl')
    done = import_source('otto', path, tmp_path/'to')
    counts, found = check(tmp_path/'to', every=1)
    raw = Counter(e['type'] for line in path.read_text().splitlines() for e in json.loads(line)['events'])
    kinds = Counter(e['kind'] for e in found if e['type'] == 'interaction')
    assert (kinds['view'], kinds['cart'], counts['conversion']) == (raw['clicks'], raw['carts'], raw['orders']) and done.users == 20

def test_open_bandit_as_decisions(tmp_path):
    how = tmp_path/'how.yaml'; how.write_text('time: timestamp\ndecisions: {user: user_feature_0, item: item_id, position: position, propensity: propensity_score, click: click, candidates: all}')
    import_source('generic', real('open_bandit/bts_men.csv'), tmp_path/'to', how)
    counts, found = check(tmp_path/'to', every=20)
    assert (counts['decision'], counts['impression'], counts['click'], counts['item']) == (10_000, 10_000, 69, 34)
    assert all(len(e['candidates']) == 34 for e in found if e['type'] == 'decision')
