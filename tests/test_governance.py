"Consent counts from when it was known, nothing outlives its class, no role reads more than granted, and no line of the audit log changes unseen."
import dataclasses, json, multiprocessing, os, signal, time
from pathlib import Path
import ibis, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop import governance as g
from telemetry_loop.config import TelemetryError, load_params
from telemetry_loop.schema import EVENTS, SENSITIVE

ROOT = Path(__file__).parents[1]
CFG = load_params(g.GovernanceConfig, 'governance', ROOT/'params.yaml')
T0 = pd.Timestamp('2025-01-06')
def at(minute): return T0 + pd.Timedelta(minutes=minute)
def words(rows): # of (user, purpose, granted, said, known), minutes
    return pd.DataFrame([(u, p, y, at(e), at(k)) for u, p, y, e, k in rows], columns=g.LEDGER[:-1]).astype({'granted': bool, 'event_time': 'datetime64[us]', 'known_time': 'datetime64[us]', 'user_id': 'str', 'purpose': 'str'})

# ---------------------------------------------------------------- terms
@pytest.mark.parametrize('kind', EVENTS)
def test_every_event_type_has_terms(kind):
    found = g.terms(kind, CFG)
    assert found['days'] > 0 and found['basis'] and set(found['purposes']) <= set(g.PURPOSES) and found['class'] in CFG.retention
def test_no_class_and_no_type_too_many():
    assert set(g.CLASS_OF) == set(EVENTS) and set(CFG.retention) == set(g.CLASSES) == set(g.CLASS_OF.values())
    assert set(g.PURPOSES) == set(EVENTS['consent'][1]['purpose'][0]['enum'])
def test_the_record_of_a_consent_does_not_rest_on_it(): assert not {'consent', 'control', 'account'} & set(g.NEEDS_CONSENT) and {'click', 'decision', 'heartbeat'} <= set(g.NEEDS_CONSENT)
def test_a_new_type_needs_a_class():
    with pytest.raises(TelemetryError, match="'mouse' has no retention class"): g.terms('mouse', CFG)
    for days in ({}, {'behaviour': 0}, {'behaviour': 40_000}):
        with pytest.raises(TelemetryError, match="'behaviour' has"): g.terms('click', dataclasses.replace(CFG, retention=days))

# ---------------------------------------------------------------- consent
word = st.tuples(st.sampled_from(['ann', 'bob']), st.sampled_from(['training', 'analytics']), st.booleans(), st.integers(0, 6), st.integers(0, 6))
def plainly(rows, purpose, user, when, default): # the rule, one word at a time
    known = [(e, not y) for u, p, y, e, k in rows if (u, p) == (user, purpose) and k <= when]
    return not max(known)[1] if known else default

@settings(max_examples=30, deadline=None)
@given(st.lists(word, max_size=8), st.booleans(), st.randoms())
def test_allowed_is_the_last_word_known_in_pandas_and_in_the_engine(rows, default, chance):
    asked = [(u, t) for u in ('ann', 'bob', 'cid') for t in range(-1, 8)]; chance.shuffle(asked)
    want = [plainly(rows, 'training', u, t, default) for u, t in asked]
    ledger = g.consent_ledger(words(rows))
    users, times = [u for u, _ in asked], [at(t) for _, t in asked]
    assert g.allowed(ledger, 'training', users, times, default).tolist() == want
    mixed = list(rows); chance.shuffle(mixed)
    assert g.consent_ledger(words(mixed)).equals(ledger)
    con = ibis.duckdb.connect()
    told = con.create_table('told', words(rows), schema=ibis.schema(dict(user_id='string', purpose='string', granted='boolean', event_time='timestamp(6)', known_time='timestamp(6)')))
    uses = con.create_table('uses', pd.DataFrame({'row': range(len(asked)), 'user_id': users, 'as_of': times}))
    kept = set(g.allowed_rows(uses, told, 'training', 'as_of', default).execute()['row'])
    assert [i in kept for i in range(len(asked))] == want
    assert set(g.withdrawn(told, 'training').execute()['user_id']) == {u for u in ('ann', 'bob') if not plainly(rows, 'training', u, 99, True)}

@settings(max_examples=40, deadline=None)
@given(st.lists(word, max_size=8), word.map(lambda w: (*w[:4], w[4] + 7)))
def test_what_is_learned_later_changes_no_earlier_answer(rows, late):
    before, after = g.consent_ledger(words(rows)), g.consent_ledger(words(rows + [late]))
    times = [at(t) for t in range(7)]
    assert g.allowed(before, 'training', ['ann']*7, times).tolist() == g.allowed(after, 'training', ['ann']*7, times).tolist()
    assert after.iloc[:len(before)].equals(before) # append-only

def test_consent_events_of_the_log_make_the_ledger():
    events = words([('ann', 'training', False, 1, 2)]).rename(columns={'known_time': 'received_time'})
    assert g.consent_ledger(events).columns.tolist() == g.LEDGER
def test_nobody_asked_and_nobody_said():
    empty = g.consent_ledger(words([]))
    assert g.allowed(empty, 'training', [], T0).tolist() == [] and g.allowed(empty, 'training', ['ann'], T0).tolist() == [True]
def test_an_unknown_purpose_is_refused():
    with pytest.raises(TelemetryError, match="'sales'"): g.allowed(g.consent_ledger(words([])), 'sales', ['ann'], T0)
def test_coverage_counts_people():
    ledger = g.consent_ledger(words([('ann', 'training', False, 1, 1), ('ann', 'training', True, 2, 2), ('bob', 'training', False, 1, 1), ('bob', 'training', True, 3, 9)]))
    found = g.consent_coverage(ledger, ['ann', 'bob', 'cid', 'cid', 'dan'], at(5)).set_index('purpose').loc['training']
    assert found.tolist() == [4, 1, 1, 2, .75]
    assert g.consent_coverage(ledger, ['ann', 'bob', 'cid', 'dan'], at(5), default=False).set_index('purpose').loc['training', 'allowed_share'] == .25
def test_scopes_not_named_are_refused():
    answers = pd.DataFrame({'user_id': ['ann', 'bob'], 'scopes': [['necessary', 'statistics'], []], 'event_time': [at(1)]*2, 'known_time': [at(1)]*2})
    ledger = g.consent_ledger(g.words_of_scopes(answers, {'analytics': 'statistics', 'training': 'marketing'}))
    assert g.allowed(ledger, 'analytics', ['ann', 'bob'], at(2)).tolist() == [True, False] and not g.allowed(ledger, 'training', ['ann', 'bob'], at(2)).any()

# ---------------------------------------------------------------- retention
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(EVENTS)), st.integers(0, 40_000), st.integers(0, 36_000))
def test_an_event_expires_when_its_days_are_over(kind, age, clock):
    now = T0 + pd.Timedelta(days=clock)
    found = g.expired([kind], [now - pd.Timedelta(days=age)], now, CFG)
    assert found.tolist() == [age > CFG.retention[g.CLASS_OF[kind]]]
    assert g.cutoffs(now, CFG)[kind] == now - pd.Timedelta(days=CFG.retention[g.CLASS_OF[kind]])
def test_expiry_refuses_a_type_it_does_not_know():
    with pytest.raises(TelemetryError, match='mouse'): g.expired(['click', 'mouse'], [T0, T0], T0, CFG)
    assert g.expired([], np.array([], 'datetime64[us]'), T0, CFG).tolist() == []

# ---------------------------------------------------------------- the audit log
def log_of(tmp_path, n=5):
    log = tmp_path/'audit.jsonl'
    for i in range(n): g.audit_append(log, 'release', version=f'v{i}', note='naïve ✓')
    assert g.audit_verify(log) is None
    return log, log.read_bytes().splitlines(keepends=True)

@pytest.mark.parametrize('line', range(5))
def test_any_one_line_changed_dropped_repeated_or_moved_is_seen(tmp_path, line):
    log, lines = log_of(tmp_path)
    def edited(i, to): return [to if j == i else l for j, l in enumerate(lines)]
    entry = json.loads(lines[line])
    resealed = g._line(entry | {'version': 'x', 'hash': g._sealed(entry | {'version': 'x'})}) # by somebody who knows how
    edits = dict(changed=edited(line, lines[line].replace(b'release', b'erasure')), resealed=edited(line, resealed), spaced=edited(line, lines[line].replace(b': ', b':  ', 1)), dropped=lines[:line] + lines[line+1:],
                 repeated=lines[:line+1] + lines[line:], moved=edited(line, lines[line-1])[:], blank=lines[:line] + [b'\n'] + lines[line:], bits=edited(line, b'\xff' + lines[line][1:]), torn=edited(line, lines[line][:-1]))
    other = (line + 1) % 5; swapped = list(lines); swapped[line], swapped[other] = lines[other], lines[line]; edits['swapped'] = swapped
    for name, now in edits.items():
        log.write_bytes(b''.join(now))
        assert g.audit_verify(log), name
@pytest.mark.parametrize('kept', range(5))
def test_a_cut_off_end_is_seen_and_nothing_is_added_after_it(tmp_path, kept):
    log, lines = log_of(tmp_path)
    log.write_bytes(b''.join(lines[:kept]))
    assert 'cut off' in g.audit_verify(log)
    with pytest.raises(TelemetryError, match='nothing was added'): g.audit_append(log, 'release')
    assert log.read_bytes() == b''.join(lines[:kept])
def test_the_head_is_part_of_it(tmp_path):
    log, lines = log_of(tmp_path); head = log.with_name('audit.jsonl.head')
    for text in ('', '{}', '[]', '{"n": "x"}', head.read_text().replace('"n": 5', '"n": 4'), head.read_text().replace('"hash": "', '"hash": "0')):
        head.write_text(text); assert g.audit_verify(log), text
    head.unlink(); assert 'missing' in g.audit_verify(log)
def test_a_deleted_log_is_seen(tmp_path):
    log, _ = log_of(tmp_path); log.unlink()
    assert 'deleted' in g.audit_verify(log)
    assert g.audit_verify(tmp_path/'never.jsonl') is None

def test_appends_at_once_all_arrive_in_one_chain(tmp_path):
    log, fork = tmp_path/'audit.jsonl', multiprocessing.get_context('fork')
    start = fork.Barrier(3)
    def work(name):
        start.wait()
        for i in range(60): g.audit_append(log, 'read', by=name, i=i)
    running = [fork.Process(target=work, args=(f'w{i}',)) for i in range(3)]
    for p in running: p.start()
    for p in running: p.join()
    assert [p.exitcode for p in running] == [0]*3 and g.audit_verify(log) is None
    found = pd.DataFrame([json.loads(l) for l in log.open()])
    assert len(found) == 180 and all(rows['i'].tolist() == list(range(60)) for _, rows in found.groupby('by'))

@pytest.mark.parametrize('left', ['a torn line', 'a line the head does not know', 'an empty log'])
def test_death_at_each_step_of_an_append_is_mended_by_the_next(tmp_path, left):
    log, lines = log_of(tmp_path, 3); head = log.with_name('audit.jsonl.head')
    if left == 'a torn line': log.write_bytes(b''.join(lines) + b'{"at": "2025-')
    elif left == 'an empty log': log.write_bytes(b''); head.unlink(); lines = []
    else: g.audit_append(log, 'release', version='v3'); known = head.read_text(); g.audit_append(log, 'release', version='v4'); head.write_text(known); lines = log.read_bytes().splitlines(keepends=True)
    assert g.audit_verify(log) is None
    g.audit_append(log, 'release', version='next')
    assert g.audit_verify(log) is None and log.read_bytes().splitlines(keepends=True)[:-1] == lines

@pytest.mark.parametrize('before', [0, 3])
def test_death_between_the_line_and_the_head(tmp_path, monkeypatch, before):
    log, write = tmp_path/'audit.jsonl', g.write_json
    for i in range(before): g.audit_append(log, 'release')
    def dies(path, value):
        if value['n'] > before: raise KeyboardInterrupt
        write(path, value)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(g, 'write_json', dies); g.audit_append(log, 'release')
    assert g.audit_verify(log) is None
    g.audit_append(log, 'release')
    assert g.audit_verify(log) is None and len(log.read_bytes().splitlines()) == before + 2

def test_killed_while_appending(tmp_path):
    log, rng, count = tmp_path/'audit.jsonl', np.random.default_rng(0), 0
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            try:
                while True: g.audit_append(log, 'read')
            finally: os._exit(1)
        time.sleep(rng.uniform(.001, .02)); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        assert g.audit_verify(log) is None
        g.audit_append(log, 'alive'); lines = log.read_bytes().splitlines()
        assert g.audit_verify(log) is None and len(lines) > count; count = len(lines)

def test_people_and_own_words_are_refused(tmp_path):
    for fact, said in ({'user_id': 'u1'}, 'erasure_token'), ({'user': 'u1'}, 'erasure_token'), ({'hash': 'x'}, 'itself'), ({'n': 3}, 'itself'), ({'x': float('nan')}, 'JSON'), ({'x': {1, 2}}, 'JSON'):
        with pytest.raises(TelemetryError, match=said): g.audit_append(tmp_path/'a.jsonl', 'erase', **fact)
    assert g.audit_verify(tmp_path/'a.jsonl') is None

# ---------------------------------------------------------------- access
@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'params.yaml').write_text((ROOT/'params.yaml').read_text())
    pd.DataFrame({'user_id': ['p1', 'p2'], 'age_band': ['a', 'b'], 'line': ['{', '}'], 'clicks': [3, 4]}).to_parquet('t.parquet')
    return 't.parquet'
def logged(): return [json.loads(l) for l in open(g.ACCESS)]

@pytest.mark.parametrize('column', [*SENSITIVE, 'line'])
def test_the_default_reader_cannot_read_sensitive_columns(table, column):
    for columns in ([column], ['clicks', column]):
        with pytest.raises(TelemetryError, match=rf"'{column}' is sensitive and role 'reader' .*governance\.roles\.reader\.columns"): g.read_table(table, columns=columns)
    assert g.read_table(table, columns=['clicks'])['clicks'].tolist() == [3, 4]
    assert [(l['what'], l['columns']) for l in logged()] == [('refused', [column]), ('refused', ['clicks', column]), ('read', ['clicks'])] and g.audit_verify(g.ACCESS) is None
def test_all_columns_means_all(table):
    with pytest.raises(TelemetryError, match="'user_id' is pseudonym"): g.read_table(table)
    assert g.read_table(table, 'steward').columns.tolist() == ['user_id', 'age_band', 'line', 'clicks']
def test_a_grant_allows(table):
    assert g.read_table(table, 'auditor', ['age_band', 'user_id'])['age_band'].tolist() == ['a', 'b']
    with pytest.raises(TelemetryError, match="'age_band'"): g.read_table(table, 'scientist', ['age_band'])
    text = Path('params.yaml').read_text(); Path('params.yaml').write_text(text.replace('scientist: {sensitivity: [none, pseudonym], columns: []', 'scientist: {sensitivity: [none, pseudonym], columns: [age_band]'))
    assert g.read_table(table, 'scientist', ['age_band']).shape == (2, 1)
    assert [l['what'] for l in logged()] == ['read', 'refused', 'read'] and all({'role', 'table', 'columns', 'purpose', 'by', 'at'} <= set(l) for l in logged())
def test_purpose_and_role_must_be_known(table):
    with pytest.raises(TelemetryError, match="'reader' may not read for the purpose 'training'"): g.read_table(table, columns=['clicks'], purpose='training')
    with pytest.raises(TelemetryError, match="no role 'boss'"): g.read_table(table, 'boss', ['clicks'])
    with pytest.raises(TelemetryError, match="no column 'nope'"): g.read_table(table, columns=['nope'])
    with pytest.raises(TelemetryError, match='not there'): g.read_table('none.parquet')
def test_a_folder_reads_like_a_file(table, tmp_path):
    (tmp_path/'many').mkdir()
    for i in range(2): pd.read_parquet(table).to_parquet(f'many/{i}.parquet')
    assert g.read_table('many', columns=['clicks'])['clicks'].tolist() == [3, 4, 3, 4]
