"Release: only a passing candidate goes live, once, and history only grows."
import json
import pytest, yaml
from telemetry_loop import release
from telemetry_loop.config import TelemetryError, folder_digest, read_json, write_json, write_text
from telemetry_loop.estimate import Estimate
from telemetry_loop.release import candidate, history, promote, release_of, status

BUNDLE = {'version': 'm1', 'data_digest': 'd1', 'code_digest': 'c1', 'params': {'dim': 8}}
OPE = {'gain': {'dr': {'value': .05, 'ci_lower': .02, 'ci_upper': .08, 'n': 900}}, 'as_of': '2025-01-26'}
def scores(*answers): return {'verdict': 'fail' if 'fail' in answers else 'inconclusive' if 'inconclusive' in answers else 'pass', 'criteria': [{'name': f'c{i}', 'answer': a, 'reason': f'why{i}'} for i, a in enumerate(answers)]}
def made(digest='b1.dir', answers=('pass',), policy={'slate': 3}, bundle=BUNDLE): return candidate(bundle, digest, policy, scores(*answers), OPE)

@pytest.fixture
def places(tmp_path):
    def offer(*args, **kw): write_json(tmp_path/'candidate.json', made(*args, **kw).as_dict()); return tmp_path/'releases', tmp_path/'candidate.json'
    return offer

def test_the_name_is_the_content():
    assert made().version == made().version != made('b2.dir').version
    assert made().version != made(policy={'slate': 4}).version  # the same model, shown differently, is another release
    assert made().version == made(answers=('fail',)).version    # a verdict is about a release, not part of it
    assert made().params_digest != made(bundle=BUNDLE | {'params': {'dim': 9}}).params_digest
    assert release_of(made().as_dict()) == made() and made().predicted == Estimate(.05, .02, .08, 900)

@pytest.mark.parametrize('answers, named', [(('pass', 'fail'), 'c1 fail: why1'), (('inconclusive', 'pass'), 'c0 inconclusive: why0'), (('fail', 'inconclusive'), 'c0 fail: why0; c1 inconclusive: why1')])
def test_a_candidate_that_does_not_pass_stays_out(places, answers, named):
    with pytest.raises(TelemetryError) as err: promote(*places(answers=answers))
    assert named in str(err.value) and '\n' not in str(err.value)
    assert status(places()[0]) is None and history(places()[0]) == [] and not places()[0].exists()

def test_history_only_grows(places):
    folder, _ = places(); promote(*places('b1.dir'))
    first = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != 'live.json'}
    with pytest.raises(TelemetryError, match='already live'): promote(*places('b1.dir'))
    promote(*places('b2.dir')); promote(*places('b1.dir'))  # going back to an earlier one is a new entry
    assert [n for n, _ in history(folder)] == [1, 2, 3]
    assert status(folder) == made('b1.dir') and read_json(folder/'live.json')['number'] == 3
    assert all((folder/name).read_bytes() == was for name, was in first.items())
    assert sorted(p.name for p in folder.iterdir())[0] == f'0001-{made("b1.dir").version}.json'

def test_a_broken_history_is_refused(places):
    folder, _ = places(); promote(*places())
    next(folder.glob('0001-*')).unlink()
    with pytest.raises(TelemetryError, match='names release 1'): status(folder)

def test_incomplete_records_are_refused(tmp_path):
    write_json(tmp_path/'c.json', {'version': 'x'})
    with pytest.raises(TelemetryError, match="has no 'model_version'"): promote(tmp_path/'r', tmp_path/'c.json')
    with pytest.raises(TelemetryError, match='is not there'): promote(tmp_path/'r', tmp_path/'absent.json')
    with pytest.raises(TelemetryError, match='no version'): candidate({}, 'b', {}, scores('pass'), OPE)

def test_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'params.yaml').write_text(yaml.safe_dump({'policy': {'slate': 3}}))
    write_json('artifacts/train/bundle.json', BUNDLE); write_text('artifacts/train/weights', 'w')
    write_json('metrics/scorecard.json', scores('pass')); write_json('metrics/ope.json', OPE)
    release.run()
    r, out = release_of(read_json('artifacts/release/candidate.json')), read_json('metrics/release.json')
    assert r.bundle_digest == folder_digest('artifacts/train') and r.policy == {'slate': 3} and r.as_of == '2025-01-26'
    assert out['predicted'] == OPE['gain']['dr'] and out['verdict'] == 'pass' and out['version'] == r.version
    assert r.version in (tmp_path/'artifacts/release/notes.md').read_text()
    again = (tmp_path/'metrics/release.json').read_bytes(); release.run()
    assert (tmp_path/'metrics/release.json').read_bytes() == again
    write_json('metrics/ope.json', {'gain': {'dr': {'value': None, 'ci_lower': None, 'ci_upper': None, 'n': 0}}}); write_json('metrics/scorecard.json', scores('inconclusive'))
    release.run()
    assert release_of(read_json('artifacts/release/candidate.json')).predicted.value is None
    with pytest.raises(TelemetryError, match='inconclusive'): promote()
    assert not (tmp_path/'releases').exists()
