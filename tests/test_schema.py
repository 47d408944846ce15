"The tracking plan is valid JSON Schema, one name means one thing, every goal has evidence, and a new version breaks nobody unseen."
import copy, json
from pathlib import Path
import jsonschema, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.schema import (ENVELOPE, EVENTS, GOALS, METRICS, SENSITIVE, check_files, check_plan, columns, compatible, event_schema, tracking_plan, version_complaint)

ROOT = Path(__file__).parents[1]

@pytest.mark.parametrize('kind', EVENTS)
def test_every_event_is_a_valid_schema_with_meaning(kind):
    schema = event_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema['required'] and set(schema['required']) <= set(schema['properties']) and all(p.get('description') or 'const' in p for p in schema['properties'].values())

def test_a_name_has_one_rule(): assert all(rule == columns()[name] for _, own, _ in EVENTS.values() for name, (rule, _) in own.items())
def test_sensitive_columns_are_in_the_plan(): assert set(SENSITIVE) <= set(columns()) and not set(SENSITIVE) & set(ENVELOPE)
def test_plan_is_versioned(): assert tracking_plan()['version'] and set(tracking_plan()['events']) == set(EVENTS)
def test_plan_is_plain_json(): assert json.loads(json.dumps(tracking_plan())) == tracking_plan()

# ---------------------------------------------------------------- goals -> signals -> events -> metrics
def test_our_plan_has_no_loose_ends(): assert check_plan(tracking_plan()) == []

@pytest.mark.parametrize('goal', GOALS)
def test_a_goal_has_signal_event_and_metric(goal):
    signals = tracking_plan()['goals'][goal]['signals'].values()
    assert signals and all(s['events'] and s['metrics'] and s['meaning'] for s in signals)

@pytest.mark.parametrize('metric', METRICS)
def test_a_missing_metric_names_its_goal(metric):
    plan = tracking_plan(); del plan['metrics'][metric]
    owners = [g for g, (_, signals) in GOALS.items() for _, _, metrics in signals.values() if metric in metrics]
    assert owners and all(any(repr(g) in c and metric in c for c in check_plan(plan)) for g in owners)

@pytest.mark.parametrize('kind', EVENTS)
def test_a_missing_event_names_its_goal(kind):
    plan = tracking_plan(); del plan['events'][kind]
    assert any('goal ' in c and repr(kind) in c for c in check_plan(plan))

@pytest.mark.parametrize('edit,word', [
    (lambda p: p['events'].update(mouse=event_schema('click')), "event 'mouse' serves no goal"),
    (lambda p: p['metrics'].update({'x.y': 'nobody asked'}), "metric 'x.y' serves no goal"),
    (lambda p: p['goals'].update(fame={'meaning': 'be known', 'signals': {}}), "goal 'fame' names no signal"),
    (lambda p: p['goals']['coming back']['signals']['visits'].update(metrics=[]), "goal 'coming back', signal 'visits' names no metric"),
    (lambda p: p['goals']['coming back']['signals']['visits'].update(events=[]), "goal 'coming back', signal 'visits' names no event"),
    (lambda p: p.pop('goals'), 'the plan has no goals'),
], ids=['unmapped event', 'unmapped metric', 'goal without signal', 'signal without metric', 'signal without event', 'no goals'])
def test_loose_ends_are_named(edit, word):
    plan = tracking_plan(); edit(plan)
    assert any(word in c for c in check_plan(plan))

@pytest.mark.parametrize('metric', METRICS)
def test_a_metric_is_where_the_plan_says(metric):
    stage, name = metric.split('.', 1)
    assert name in json.loads((ROOT/f'metrics/{stage}.json').read_text())

# ---------------------------------------------------------------- what may follow what
def field(kind, name): return lambda p: p['events'][kind]['properties'][name]
def change(kind, name, **rule): return lambda p: field(kind, name)(p).update(rule)
def drop(kind, name, key): return lambda p: field(kind, name)(p).pop(key)
MATRIX = { # edit -> (function on the new plan, what is said, breaking)
    'optional field':  (lambda p: p['events']['click']['properties'].update(screen=dict(type='string')), 'optional field added', False),
    'new event':       (lambda p: p['events'].update(scroll=event_schema('click')), 'event added', False),
    'enum value':      (lambda p: field('visibility', 'state')(p)['enum'].append('gone'), 'values widened', False),
    'wider maximum':   (change('survey', 'score', maximum=7), 'range widened', False),
    'longer string':   (change('click', 'item_id', maxLength=128), 'maxLength widened', False),
    'integer->number': (change('click', 'position', type='number'), 'type widened', False),
    'pattern dropped': (drop('click', 'event_time', 'pattern'), 'pattern widened', False),
    'made optional':   (lambda p: p['events']['click']['required'].remove('position'), 'made optional', False),
    'reworded':        (change('click', 'position', description='rank'), 'meaning reworded', False),
    'inclusive bound': (lambda p: (drop('decision', 'propensities', 'items')(p), change('decision', 'propensities', items=dict(type='number', minimum=0, maximum=1))(p)), 'range widened', False),
    'event removed':   (lambda p: p['events'].pop('survey'), 'event removed', True),
    'field removed':   (lambda p: p['events']['click']['properties'].pop('position'), 'field removed', True),
    'required field':  (lambda p: (p['events']['click']['properties'].update(screen=dict(type='string')), p['events']['click']['required'].append('screen')), 'required field added', True),
    'made required':   (lambda p: p['events']['click']['required'].append('device_id'), 'made required', True),
    'number->integer': (change('heartbeat', 'elapsed', type='integer'), 'type narrowed', True),
    'other type':      (change('click', 'item_id', type='integer'), 'type narrowed', True),
    'enum value gone': (lambda p: field('consent', 'purpose')(p)['enum'].remove('training'), 'values narrowed', True),
    'enum imposed':    (change('account', 'segment', enum=['a', 'b']), 'values narrowed', True),
    'lower maximum':   (change('survey', 'score', maximum=4), 'range narrowed', True),
    'higher minimum':  (change('click', 'position', minimum=1), 'range narrowed', True),
    'bound excluded':  (lambda p: (drop('heartbeat', 'elapsed', 'minimum')(p), change('heartbeat', 'elapsed', exclusiveMinimum=0)(p)), 'range narrowed', True),
    'shorter string':  (change('click', 'item_id', maxLength=32), 'maxLength narrowed', True),
    'other pattern':   (change('click', 'event_time', pattern='^.*$'), 'pattern narrowed', True),
    'narrower items':  (lambda p: field('decision', 'slate')(p)['items'].update(minLength=2), 'minLength narrowed', True),
    'unknown keyword': (change('click', 'item_id', format='uuid'), 'format changed', True),
    'metric removed':  (lambda p: p['metrics'].pop('sessions.sessions'), 'metric removed', True),
    'closed':          (lambda p: p['events']['click'].update(additionalProperties=False), 'additionalProperties changed', True),
}
@pytest.mark.parametrize('edit', MATRIX)
def test_matrix_of_edits(edit):
    act, said, breaking = MATRIX[edit]
    old, new = tracking_plan(), copy.deepcopy(tracking_plan()); act(new)
    found = compatible(old, new)
    assert any(c.startswith(said) for c, _, _ in found) and any(b for _, _, b in found) == breaking
    assert (version_complaint(old, new) is not None) == breaking
    new['version'] = '2.0'
    assert version_complaint(old, new) is None
def test_a_plan_may_follow_itself(): assert compatible(tracking_plan(), tracking_plan()) == []

VALUES = [0, 1, -1, 2, 5, 7, .5, 1.5, 'a', 'b', 'ab', 'abc', '', True, False, None, [], ['a'], ['ab', 'b'], [1], [1, 2, .5], {}]
def some(*values): return st.sampled_from(values)
def rules(kind, **keys): return st.fixed_dictionaries({}, optional=dict(type=some(*kind)) | keys)
number = rules(['integer', 'number', ['number', 'null']], minimum=some(-1, 0, 1), exclusiveMinimum=some(-1, 0, 1), maximum=some(1, 2, 5), exclusiveMaximum=some(1, 2, 5))
text = rules(['string', ['string', 'null']], minLength=some(0, 1, 2), maxLength=some(1, 2, 3), pattern=some('^a', 'b$'))
listed = rules(['string', 'integer', ['string', 'integer']], enum=st.lists(some('a', 'ab', 1, 2, True, None), min_size=1, max_size=4, unique_by=repr), const=some('a', 1))
many = rules(['array'], items=number | text, minItems=some(0, 1), maxItems=some(1, 2))

@st.composite
def edited(draw): # -> an event schema and one that is a few edits away
    old, new = ({'type': 'object', 'properties': {}, 'required': []} for _ in range(2))
    for name in 'xy':
        family = draw(some(number, text, listed, many)); was, other = draw(family), draw(family)
        keys = draw(st.sets(some(*(set(was) | set(other)), 'nothing'), max_size=2)) # the keywords that change
        old['properties'][name], new['properties'][name] = was, {k: v for k, v in was.items() if k not in keys} | {k: v for k, v in other.items() if k in keys}
    if draw(some(*range(8))) == 0: draw(some(old, new))['properties'].pop('y')
    for s in (old, new): s['required'] = draw(some([], [], [], ['x']))
    return old, new

@settings(max_examples=600, deadline=None)
@given(edited())
def test_what_is_called_fine_accepts_every_old_line(pair):
    "jsonschema is the judge: a line that carries fields of the old plan only and keeps it, keeps the new one."
    old, new = pair
    if any(b for _, _, b in compatible(*({'version': '1.0', 'events': {'e': s}} for s in pair))): return
    was, now = jsonschema.Draft202012Validator(old), jsonschema.Draft202012Validator(new)
    x = next((v for v in VALUES if was.is_valid({'x': v})), None) # a value that lets y be looked at
    for line in [{}] + [{'x': v} for v in VALUES] + [{'x': x, 'y': v} for v in VALUES if 'y' in old['properties']]:
        if was.is_valid(line): assert now.is_valid(line), line

# ---------------------------------------------------------------- two files
def test_check_files(tmp_path):
    old, new = tracking_plan(), tracking_plan(); field('survey', 'score')(new)['maximum'] = 4
    for name, plan in (('old', old), ('new', new)): (tmp_path/name).write_text(json.dumps(plan))
    assert check_files(tmp_path/'old', tmp_path/'old')[1] is None
    rows, complaint = check_files(tmp_path/'old', tmp_path/'new')
    assert rows[1][1:] == ['survey.score', 'breaking'] and 'survey.score' in complaint and '2.0' in complaint and len(complaint.splitlines()) == 1
    del new['metrics']['sessions.visit_minutes']; (tmp_path/'new').write_text(json.dumps(new))
    assert "'coming back'" in check_files(tmp_path/'old', tmp_path/'new')[1]

@pytest.mark.parametrize('text', ['[]', '{}', '{"version": 1, "events": {}}', '{"version": "x", "events": {}}', '{"version": "1.0", "events": []}', '{"version": "1.0", "events": {"a": 3}}', '{"version": "1.0", "events": {}, "goals": {"g": {"signals": 3}}}', 'no json'])
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path/'bad').write_text(text); (tmp_path/'good').write_text(json.dumps(tracking_plan() | {'events': {'a': {'properties': {'x': {}}}}}))
    with pytest.raises(TelemetryError): check_files(tmp_path/'good', tmp_path/'bad')
