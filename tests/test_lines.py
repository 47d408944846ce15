"The compiled rules against the reference validator, line by line; every line of a file goes one way."
import gzip, json, re
from datetime import datetime
import ibis, jsonschema, numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from telemetry_loop.config import RunConfig, TelemetryError
from telemetry_loop.engine import connect
from telemetry_loop.lines import BLOCK, LONGEST, clean, judge, narrowed, survey
from telemetry_loop.schema import ENVELOPE, EVENTS, VERSION, columns, event_schema, tracking_plan

RULES, REFERENCE = columns(), {kind: jsonschema.Draft202012Validator(event_schema(kind)) for kind in EVENTS}
TIMES = [n for n, rule in RULES.items() if 'pattern' in rule]
CLICK = dict(event_id='e1', type='click', schema_version=VERSION, event_time='2025-01-06T10:00:00.000Z', received_time='2025-01-06T10:00:01.000Z',
             user_id='u1', decision_id='d1', item_id='i1', position=0)

@pytest.fixture(scope='module')
def con(): return connect(RunConfig(seed=0, threads=2, engine='duckdb', memory_gb=1.))

def judged(con, texts): # -> one dict a line, in order
    "All lines in one query."
    table = judge(ibis.memtable(pd.DataFrame(dict(file=[f'{i:06d}' for i in range(len(texts))], line=texts))))
    return sorted(con.to_pyarrow(table).to_pylist(), key=lambda row: row['file'])

# --- the reference

def real_day(text): # the documented exception: the pattern lets the 31st of February pass
    try: return bool(re.fullmatch(r'[0-9TZ:.-]{24}', text)) and datetime.fromisoformat(text) is not None
    except ValueError: return False

def faults(line): # -> fields at fault; None: not an event at all
    "What the reference validator finds wrong."
    if not isinstance(line, dict) or not isinstance(line.get('type'), str) or line['type'] not in EVENTS: return None
    found = set()
    for e in REFERENCE[line['type']].iter_errors(line): found |= set(e.validator_value) - set(line) if e.validator == 'required' else {e.absolute_path[0]}
    return found | {n for n in TIMES if n in event_schema(line['type'])['properties'] and isinstance(line.get(n), str) and not real_day(line[n])}

# --- lines that keep the plan, and what may befall them

word = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=32)
clock = st.sampled_from(['2025-01-06T10:00:00.000Z', '2024-02-29T23:59:59.999Z', '0001-01-01T00:00:00.000Z', '9999-12-31T23:59:59.999Z'])
whole = lambda lo, hi: st.integers(lo, hi) | st.integers(lo, min(hi, 10**9)).map(float)      # 1 and 1.0 are the same integer

def fits(rule): # -> strategy of values that keep the rule
    if rule['type'] == 'array': return st.lists(fits(rule['items']), max_size=4)
    if rule['type'] == 'boolean': return st.booleans()
    if 'enum' in rule: return st.sampled_from(rule['enum'])
    if 'pattern' in rule: return clock
    if rule['type'] == 'string': return word
    if rule['type'] == 'integer': return whole(rule.get('minimum', -2**53), rule.get('maximum', 2**53))
    if 'exclusiveMinimum' in rule: return st.floats(1e-12, 1) | st.just(1)
    return st.floats(rule.get('minimum', -1e300), 1e300) | st.integers(rule.get('minimum', -2**53), 2**53)

@st.composite
def sound_lines(draw):
    kind = draw(st.sampled_from(list(EVENTS)))
    own, must = ENVELOPE | EVENTS[kind][1], event_schema(kind)['required']
    return {n: kind if n == 'type' else draw(fits(rule)) for n, (rule, _) in own.items() if n in must or draw(st.booleans())}

ODD = [None, True, False, 0, 1, -1, 2, 5, 6, 0., 1., 1.5, 6., -0., 1.0000001, -1e-9, 2**53, '', ' ', '0', '1.0', 'true', 'null', 'view', 'off', 'a\x00b', 'x'*32, 'x'*33, 'x'*64, 'x'*65,
    'é'*64, 'e\u0301'*33, '\U0001f926\U0001f3fc\u200d♂️'*13, 'د'*65, '"', '\\', '\n', '\u2028', [], {}, [[]], ['a'], [''], [None], ['a', None], ['x'*65], [1], [1, 'a'], [['a']], [{'a': 1}], [True], [.5], [.5, 0], [1, 1.],
    [1.01], [-.1], ['.5'], [[.5]], {'a': 1}, {'0': 'a'}, {'a': {'b': [1]}}, '2025-01-06', '2025-01-06T10:00:00Z', '2025-01-06T10:00:00.000', '2025-01-06T10:00:00.000+01:00', '2025-01-06 10:00:00.000Z', '2025-02-29T10:00:00.000Z',
    '2025-02-31T10:00:00.000Z', '2025-13-01T10:00:00.000Z', '2025-00-10T10:00:00.000Z', '2025-04-31T00:00:00.000Z', '2025-01-06T25:00:00.000Z', '2025-01-06T10:60:00.000Z', '2025-01-06T10:00:60.000Z', ' 2025-01-06T10:00:00.000Z',
    '٢٠٢٥-01-06T10:00:00.000Z', '2025-01-06T10:00:00.000Z\n', 'yesterday']
odd = st.sampled_from(ODD)

@st.composite
def lines(draw): # sound, or hurt in up to three places
    line = dict(draw(sound_lines()))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        name = draw(st.sampled_from(sorted(line) + sorted(RULES)))
        how = draw(st.sampled_from(['drop', 'odd', 'odd', 'odd', 'member', 'foreign', 'kind', 'extra']))
        if how == 'drop': line.pop(name, None)
        elif how == 'odd': line[name] = draw(odd)
        elif how == 'member' and line.get(name) and isinstance(line[name], list): line[name] = draw(st.permutations([*line[name], draw(odd)]))
        elif how == 'foreign': line[name] = draw(fits(RULES[draw(st.sampled_from(sorted(RULES)))]))
        elif how == 'kind': line['type'] = draw(st.sampled_from(list(EVENTS) + ['Click', 'click ', '']))
        elif how == 'extra': line[draw(word)] = draw(odd)
        if line.get('type', '') is None: line['type'] = 'klick'         # a null type has its own test
    return line

def agree(con, sent):
    """Judged in one query: what passes is what the reference passes and carries the values that were sent, in the plan's columns only; what fails names a field the reference finds at fault.
    Exception: days and hours that do not exist are refused though their pattern passes."""
    for line, row in zip(sent, judged(con, [json.dumps(l, ensure_ascii=i % 2 == 0) for i, l in enumerate(sent)])):
        wrong, reason = faults(line), row['reason']
        assert (reason is None) == (wrong == set()), (line, reason, wrong)
        if wrong: assert reason.split(':')[0] in wrong, (line, reason, wrong)
        elif wrong is None: assert reason in ('type: missing', 'type: not in the tracking plan')
        else:
            own = ENVELOPE | EVENTS[line['type']][1]
            stamp = lambda n, v: datetime.fromisoformat(v).replace(tzinfo=None) if n in TIMES else v
            assert {n: row[n] for n in RULES} == {n: stamp(n, line[n]) if n in own and n in line else None for n in RULES}, line

FITS = dict(string='a', integer=2, number=.5, boolean=True)

def test_every_rule_agrees_with_the_reference_on_every_oddity(con):
    "Each field of each event: left out, and set to every odd value, which in lists also stands among good ones."
    sent = []
    for kind, (_, own, _) in EVENTS.items():
        fit = {n: [FITS[r['items']['type']]] if r['type'] == 'array' else r['enum'][0] if 'enum' in r else FITS[r['type']] for n, (r, _) in own.items()}
        whole = CLICK | dict(sent_time=CLICK['event_time'], app_version='3.1') | fit | dict(type=kind)
        for n in own if kind != 'click' else [n for n in whole if n != 'type']:
            sent += [{k: v for k, v in whole.items() if k != n}, *(whole | {n: v} for v in ODD)]
            if RULES[n]['type'] == 'array': sent += [whole | {n: [*fit[n], v, *fit[n]]} for v in ODD]
    assert len(sent) > 4000 and {tuple(sorted(faults(l))) for l in sent} >= {(), ('propensities',), ('event_time',), ('purpose',), ('score',)}
    agree(con, sent)

def test_random_lines_agree_with_the_reference(con):
    "Lines of every type, sound or hurt in up to three places."
    sent = []
    @settings(max_examples=1200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(lines())
    def collect(line): sent.append(line)
    collect()
    assert {l['type'] for l in sent if faults(l) == set()} == set(EVENTS) and .2 < np.mean([faults(l) == set() for l in sent]) < .8
    agree(con, sent)

def test_what_is_not_an_object_is_named_so(con):
    texts = ['', ' ', 'null', 'true', '17', '"click"', '[]', f'[{json.dumps(CLICK)}]', json.dumps(CLICK)[:-1], json.dumps(CLICK) + '}', "{'type': 'click'}", '{"user_id": "\\ud800"}', '['*2000, 'user,item,rating', '\ufeff']
    assert {r['reason'] for r in judged(con, texts)} == {'not a JSON object'}
    assert [r['reason'] for r in judged(con, ['{}', '{"Type": "click"}', ' ' + json.dumps(CLICK) + ' '])] == ['type: missing', 'type: missing', None]

STRANGE = {'a null type': CLICK | {'type': None}, 'no integer at all': CLICK | {'position': float('nan')}, 'an endless stay': CLICK | {'type': 'heartbeat', 'elapsed': float('inf')}, 'a number beyond 64 bits': CLICK | {'position': 10**19},
           'more digits than a double holds': CLICK | {'position': 2**53 + 2}, 'far below zero': CLICK | {'type': 'survey', 'score': -10**30}}

@pytest.mark.parametrize('name', STRANGE)
def test_one_odd_line_is_quarantined_and_stops_nobody(con, name):
    "Also where the reference lets it pass: NaN and Infinity are no JSON, and an integer must arrive exactly."
    odd, plain = judged(con, [json.dumps(STRANGE[name]), json.dumps(CLICK)])
    assert odd['reason'] and plain['reason'] is None

# --- files

def cleaned(tmp_path, body, name='a.jsonl'):
    path, sound, odd = (tmp_path/n for n in (name, 'sound', 'odd'))
    path.write_bytes(body); clean(path, sound, odd)
    return survey(path).plain, sound.read_bytes(), [json.loads(l) for l in odd.open()]

def test_a_clean_file_is_taken_as_it_is(tmp_path):
    body = ('{"a": "é\U0001f926"}\n'*100_000).encode()                    # letters of many bytes, across the blocks
    assert cleaned(tmp_path, body) == (True, body, [])
    assert cleaned(tmp_path, gzip.compress(body), 'a.jsonl.gz') == (False, body, [])
    assert cleaned(tmp_path, gzip.compress(body[:21]) + gzip.compress(body[21:]) + b'\0'*9, 'a.jsonl.gz')[1:] == (body, [])

@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from([b'{"a": 1}', b'\xff', b'x'*(LONGEST + 1), b'y'*(LONGEST + 2*BLOCK), b'z'*LONGEST, 'é'.encode(), b'']), max_size=6), end=st.booleans(), zipped=st.booleans())
def test_every_line_goes_one_way(tmp_path_factory, parts, end, zipped):
    tmp = tmp_path_factory.mktemp('parts')
    body = b'\n'.join(parts) + b'\n'*end
    plain, sound, odd = cleaned(tmp, gzip.compress(body, 0) if zipped else body, 'a.jsonl' + '.gz'*zipped)
    fits = [p for p in parts if p != b'\xff' and len(p) <= LONGEST]
    assert [l for l in sound.split(b'\n') if l] == [p for p in fits if p]
    assert [o['reason'] for o in odd] == ['line: not UTF-8 text' if p == b'\xff' else f'line: longer than {LONGEST:,} bytes' for p in parts if p not in fits]
    assert [o['line'].split('(')[-1] for o in odd if 'longer' in o['reason']] == [f'{len(p):,} bytes)' for p in parts if len(p) > LONGEST]
    if b'\xff' in parts or any(len(p) >= LONGEST + 2*BLOCK for p in parts) or zipped: assert not plain

@pytest.mark.parametrize('cut', [1, 5, 9, 30, 400])
def test_a_cut_gzip_gives_its_whole_lines_and_one_fault(tmp_path, cut):
    body = b'{"a": 1}\n'*100
    plain, sound, odd = cleaned(tmp_path, gzip.compress(body, 0)[:-cut], 'a.jsonl.gz')
    assert body.startswith(sound) and sound.endswith(b'}\n') and [o['reason'] for o in odd] == ['line: cut short, its gzip file ends early'] and sound + odd[0]['line'].encode() == body[:len(body) - max(0, cut - 8)].rstrip(b'\n') + b'\n'*(cut <= 8) or odd[0]['line'] == ''

# --- a wider plan

def changed(**rule): # of click's position
    plan = json.loads(json.dumps(tracking_plan()))
    for body in plan['events'].values():
        if 'position' in body['properties']: body['properties']['position'] = rule
    return plan

def test_only_a_wider_plan_may_take_lines_back():
    old = tracking_plan()
    for rule, wider in ((dict(type='integer', minimum=0), True), (dict(type='integer'), True), (dict(type='integer', minimum=-1), True), (dict(type='integer', minimum=1), False), (dict(type='integer', minimum=0, maximum=9), False),
                        (dict(type='number', minimum=0), False), (dict(type='integer', enum=[0]), False), (dict(type='integer', exclusiveMinimum=0), False)):
        why = narrowed(old, changed(**rule))
        assert (why is None) == wider and (wider or 'position' in why), (rule, why)
    for hurt, says in ((lambda p: p['events'].pop('click'), 'click is gone'), (lambda p: p['events']['click']['required'].append('app_version'), 'click requires app_version'),
                       (lambda p: p['events']['click']['properties'].pop('position'), 'click.position was not a field of both'), (lambda p: p['events']['click']['properties'].update(colour=dict(type='string')), 'click.colour was not')):
        new = json.loads(json.dumps(old)); hurt(new)
        assert says in narrowed(old, new)
    new = json.loads(json.dumps(old)); new['events']['swipe'] = new['events']['item']; new['events']['click']['required'].remove('position')
    assert narrowed(old, new) is None
