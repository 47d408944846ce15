"The tracking plan is valid JSON Schema, and one name means one thing."
import jsonschema, pytest
from telemetry_loop.schema import ENVELOPE, EVENTS, SENSITIVE, columns, event_schema, tracking_plan

@pytest.mark.parametrize('kind', EVENTS)
def test_every_event_is_a_valid_schema_with_meaning(kind):
    schema = event_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema['required'] and set(schema['required']) <= set(schema['properties']) and all(p.get('description') or 'const' in p for p in schema['properties'].values())

def test_a_name_has_one_rule(): assert all(rule == columns()[name] for _, own, _ in EVENTS.values() for name, (rule, _) in own.items())
def test_sensitive_columns_are_in_the_plan(): assert set(SENSITIVE) <= set(columns()) and not set(SENSITIVE) & set(ENVELOPE)
def test_plan_is_versioned(): assert tracking_plan()['version'] and set(tracking_plan()['events']) == set(EVENTS)
