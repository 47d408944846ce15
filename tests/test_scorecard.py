"Scorecard: criteria are data, doubt is not failure, and the card is written from the metrics alone."
import json
from pathlib import Path
import pytest, yaml
from hypothesis import given, strategies as st
from telemetry_loop import scorecard
from telemetry_loop.config import TelemetryError, read_json, write_json
from telemetry_loop.scorecard import ScorecardConfig, criterion, find, judge, model_card, plot_criteria

ROOT = Path(__file__).parents[1]
VALUE = dict(name='value', source='ope.gain.dr', rule='above', threshold=0., role='success', exact=False, why='people get more')
LEAK = dict(name='no leakage', source='features.leakage', rule='equals', threshold=0, role='trust', exact=True, why='no peeking')
def e(value, low=None, high=None, n=100): return dict(value=value, ci_lower=low, ci_upper=high, n=n)
def metrics(gain=e(.03, .01, .05), leak=e(0.)): return {'ope': {'gain': {'dr': gain}}, 'features': {'leakage': leak}}
GATE = [criterion(VALUE), criterion(LEAK)]

@pytest.mark.parametrize('gain, leak, verdict', [
    (e(.03, .01, .05), e(0.), 'pass'), (e(.03, -.01, .05), e(0.), 'inconclusive'), (e(-.03, -.05, -.01), e(0.), 'fail'),
    (e(.03, .01, .05), e(2.), 'fail'), (e(None), e(0.), 'inconclusive'), (e(.03), e(0.), 'inconclusive'), (e(None), e(1.), 'fail'), (e(.03, .01, .05), 0, 'pass'), (.03, e(0.), 'inconclusive')])
def test_verdict(gain, leak, verdict): assert judge(GATE, metrics(gain, leak)).verdict == verdict

@given(st.lists(st.sampled_from([(e(.03, .01, .05), 'pass'), (e(.0, -.1, .1), 'inconclusive'), (e(-1., -2., -.5), 'fail')]), max_size=6))
def test_any_failure_fails_any_doubt_is_doubt(parts):
    card = judge([criterion(VALUE | dict(name=str(i), source=f'ope.x{i}')) for i in range(len(parts))], {'ope': {f'x{i}': p[0] for i, p in enumerate(parts)}})
    answers = [p[1] for p in parts]
    assert [r.verdict.answer for r in card.rows] == answers and sum(card.counts.values()) == len(parts)
    assert card.verdict == ('fail' if 'fail' in answers else 'pass' if answers and set(answers) == {'pass'} else 'inconclusive')

def test_what_is_not_there_is_doubt_with_a_reason():
    for there, why in (({}, 'metrics/ope.json is not there'), ({'ope': {}}, 'metrics/ope.json has no gain'), ({'ope': {'gain': {}}}, 'metrics/ope.json has no gain.dr'),
                       ({'ope': {'gain': {'dr': {'a': 1}}}}, 'holds no single value'), ({'ope': {'gain': 3}}, 'has no gain.dr')):
        row = judge(GATE[:1], there).rows[0]
        assert row.verdict.answer == 'inconclusive' and why in row.verdict.reason

@pytest.mark.parametrize('change, says', [
    ({'treshold': 1}, "unknown key 'treshold'"), ({'why': None}, 'why None'), ({'rule': 'over'}, "rule 'over'"), ({'role': 'nice'}, "role 'nice'"), ({'threshold': 'high'}, "threshold 'high'"),
    ({'threshold': True}, 'threshold True'), ({'threshold': float('nan')}, 'threshold nan'), ({'exact': 'no'}, "exact 'no'"), ({'source': 'ope'}, "source 'ope'"), ({'name': ''}, "name ''")])
def test_a_malformed_criterion_is_refused_in_one_line(change, says):
    with pytest.raises(TelemetryError, match=says) as err: criterion(VALUE | change)
    assert '\n' not in str(err.value) and 'params.yaml' in str(err.value)

def test_a_missing_key_is_refused():
    for key in VALUE:
        with pytest.raises(TelemetryError, match=f'missing key {key!r}'): criterion({k: v for k, v in VALUE.items() if k != key})
    with pytest.raises(TelemetryError, match='must be a mapping'): criterion('value above 0')

def test_the_criteria_of_this_repository_are_well_formed():
    sections = yaml.safe_load((ROOT/'params.yaml').read_text())
    gate = [criterion(c) for c in sections['scorecard']['criteria']]
    assert len({c.name for c in gate}) == len(gate) and {'success', 'guardrail', 'trust'} == {c.role for c in gate}
    assert judge(gate, {}).verdict == 'inconclusive'
    stage = lambda gain: {'train': {'differences': {f'sequence_minus_{k}': e(.02, .01, .03) for k in ('most_popular', 'gap_markov')}}, 'features': {'leakage': e(0.), 'parity': e(0.)}, 'signals': {'checks_failed': 0}, 'ingest': {'quarantined_share': e(.004)},
                          'ope': {'gain': {'dr': gain}, 'complaints_gain': e(.001, -.002, .004)}, 'policy': {'exposure': {'more': .2}}}
    assert judge(gate, stage(e(.03, .01, .05))).verdict == 'pass'
    assert judge(gate, stage(e(None))).verdict == 'inconclusive'  # a log that cannot tell: doubt, not failure
    assert judge(gate, stage(e(-.03, -.05, -.01))).verdict == 'fail'

def test_picture():
    import matplotlib; matplotlib.use('Agg')
    card = judge([*GATE, criterion(VALUE | dict(name='far', source='ope.far'))], metrics() | {'ope': {'gain': {'dr': e(.03, .01, .05)}, 'far': e(9., 8.9, 9.1)}})
    ax = plot_criteria(card.as_dict())
    assert [t.get_text() for t in ax.get_yticklabels()] == ['far: pass', 'value: pass']  # the exact one has no interval to draw
    drawn = [line.get_xdata() for line in ax.lines]
    assert all(-6.6 < x < 6.6 for xs in drawn for x in (xs if hasattr(xs, '__len__') else [xs]))
    assert min(drawn[2]) > 0  # the last-listed is lowest; `value` lies wholly right of its threshold

def test_seaborn_is_not_loaded_to_judge():
    import subprocess, sys
    code = "import sys, telemetry_loop.scorecard, telemetry_loop.release; assert not {'seaborn', 'matplotlib', 'torch', 'ibis'} & set(sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'params.yaml').write_text(yaml.safe_dump({'scorecard': {'criteria': [VALUE, LEAK]}}))
    for name, content in metrics().items(): write_json(f'metrics/{name}.json', content)
    write_json('metrics/train.json', {'version': 'abc123', 'n_targets': 4321})
    scorecard.run()
    out, card = read_json('metrics/scorecard.json'), (tmp_path/'artifacts/scorecard/model_card.md').read_text()
    assert out['verdict'] == 'pass' and out['counts'] == {'pass': 2, 'fail': 0, 'inconclusive': 0}
    assert {'name', 'source', 'answer', 'reason', 'value', 'ci_lower', 'ci_upper', 'n'} <= set(out['criteria'][0]) and out['criteria'][0]['value'] == .03
    assert 'version abc123' in card and 'Verdict: pass' in card and '4,321' in card
    for section in ('What it is', 'Data', 'Intended use', 'Evidence', 'Caveats'): assert f'## {section}' in card
    write_json('metrics/ope.json', {'gain': {'dr': e(None)}, 'support': {'verdict': 'refuse', 'reasons': ['no_propensities: the log does not say']}})
    scorecard.run()
    card = (tmp_path/'artifacts/scorecard/model_card.md').read_text()
    assert read_json('metrics/scorecard.json')['verdict'] == 'inconclusive' and 'no_propensities' in card and 'Verdict: inconclusive' in card
    before = (tmp_path/'metrics/scorecard.json').read_bytes()
    (tmp_path/'params.yaml').write_text(yaml.safe_dump({'scorecard': {'criteria': [VALUE, LEAK | {'rule': '?'}]}}))
    with pytest.raises(TelemetryError, match='no leakage'): scorecard.run()
    assert (tmp_path/'metrics/scorecard.json').read_bytes() == before  # nothing overwritten
