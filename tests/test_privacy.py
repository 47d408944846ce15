"Nobody goes back from a pseudonym, no hidden cell is worked out, noise costs what it says, and features do not tell what they must not."
import itertools, multiprocessing, os
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from telemetry_loop import privacy as p
from telemetry_loop.config import TelemetryError
from telemetry_loop.schema import SENSITIVE

KEY, OTHER = b'a key for these tests', b'another key for tests'

@pytest.fixture(autouse=True)
def no_key_of_this_machine(monkeypatch, tmp_path):
    for name in ('TELEMETRY_LOOP_KEY', 'TELEMETRY_LOOP_ERASURE_KEY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))

# ---------------------------------------------------------------- pseudonyms
@given(st.lists(st.text(max_size=40), unique=True, max_size=30))
def test_one_person_one_name(ids):
    names = p.pseudonyms(ids, KEY)
    assert names == p.pseudonyms(ids, KEY) and len(set(names)) == len(ids) and all(n[0] == 'p' and len(n) == 17 for n in names)
    assert not set(names) & set(p.pseudonyms(ids, OTHER))
def test_known_answer(): # openssl: printf u1 | openssl dgst -sha256 -hmac 'a key for these tests'
    assert p.pseudonyms(['u1'], KEY) == ['p6a4c4e86156ec24b']
def test_a_name_torn_in_half_is_still_a_name(): assert len(p.pseudonyms(['\ud800'], KEY)) == 1
def test_where_the_key_comes_from(monkeypatch, tmp_path):
    assert p.key() == p.DEVELOPMENT_KEY and p.erasure_key() == p.DEVELOPMENT_ERASURE_KEY != p.key()
    file = tmp_path/'.config/telemetry-loop/key'; file.parent.mkdir(parents=True); file.write_bytes(KEY + b'\n')
    assert p.key() == KEY and p.erasure_key() == p.DEVELOPMENT_ERASURE_KEY
    monkeypatch.setenv('TELEMETRY_LOOP_KEY', OTHER.decode()); assert p.key() == OTHER
    monkeypatch.setenv('TELEMETRY_LOOP_KEY', ' short ')
    with pytest.raises(TelemetryError, match='TELEMETRY_LOOP_KEY .* 5 characters'): p.key()
def test_another_key_is_refused_in_one_line(monkeypatch):
    expected = p.fingerprint(p.DEVELOPMENT_KEY); assert p.check_key(expected) == p.DEVELOPMENT_KEY
    monkeypatch.setenv('TELEMETRY_LOOP_KEY', OTHER.decode())
    with pytest.raises(TelemetryError) as e: p.check_key(expected)
    assert expected in str(e.value) and p.fingerprint(OTHER) in str(e.value) and 'TELEMETRY_LOOP_KEY' in str(e.value) and len(str(e.value).splitlines()) == 1 and OTHER.decode() not in str(e.value)

# ---------------------------------------------------------------- the forgotten
def test_tombstones(tmp_path, monkeypatch):
    path = tmp_path/'releases/tombstones.txt'
    assert p.read_tombstones(path) == set() and p.is_erased(['u1'], path).tolist() == [False]
    p.add_tombstones(['u2', 'u1'], path); first = path.read_bytes(); p.add_tombstones(['u1'], path)
    assert path.read_bytes() == first and p.is_erased(['u1', 'u3', 'u2'], path).tolist() == [True, False, True] and p.is_erased([], path).shape == (0,)
    p.add_tombstones(['u3'], path); text = path.read_text()
    assert p.is_erased(['u1', 'u3'], path).all() and 'u1' not in text and p.pseudonyms(['u1'], p.key())[0][1:] not in text and p.erasure_token('u1') in text
    monkeypatch.setenv('TELEMETRY_LOOP_ERASURE_KEY', OTHER.decode())
    for act in (p.read_tombstones, lambda path: p.is_erased(['u1'], path), lambda path: p.add_tombstones(['u9'], path)):
        with pytest.raises(TelemetryError, match=p.fingerprint(OTHER)): act(path)
    assert path.read_text() == text
def test_a_damaged_tombstone_is_refused(tmp_path):
    path = tmp_path/'t.txt'; p.add_tombstones(['u1'], path); path.write_text(path.read_text()[:-3] + '\n')
    with pytest.raises(TelemetryError, match='line 2'): p.read_tombstones(path)
    path.write_text('')
    with pytest.raises(TelemetryError): p.read_tombstones(path)

# ---------------------------------------------------------------- cells with few people
def could_be(table, column, k, by): # what a reader who knows the labels and the totals can still hold possible: {row: values}
    shown, true = p.suppress(table, column, k, totals=[by]), table[column].to_numpy()
    groups = list(table.groupby(list(by)).indices.values()) if by else [np.arange(len(table))]
    found = {}
    for rows in groups:
        labels = shown[column].iloc[rows].tolist(); total = true[rows].sum()
        ranges = [range(k) if l == f'< {k}' else range(k, total + 1) if l == 'hidden' else [int(l)] for l in labels]
        fits = [c for c in itertools.product(*ranges) if sum(c) == total]
        found |= {r: ({c[i] for c in fits}, labels) for i, r in enumerate(rows)}
    return found

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('ab'), st.integers(0, 9)), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_no_small_cell_can_be_worked_out(cells, k, grouped):
    table = pd.DataFrame(cells, columns=['group', 'users'])
    for row, (values, labels) in could_be(table, 'users', k, ['group'] if grouped else ()).items():
        true = table['users'][row]
        assert true in values
        if not any(l[0].isdigit() for l in labels): continue      # nothing is shown, so neither is the total
        if true < k: assert values == set(range(k))
        elif len(values) > 1: assert len(values) >= k             # a cell hidden for another's sake

def test_hiding_only_the_small_cell_would_not_do(): # the negative control, and the remedy
    table = pd.DataFrame({'segment': list('abc'), 'users': [40, 3, 25]})
    naive = p.suppress(table, 'users', 5, totals=())
    assert naive['users'].tolist() == ['40', '< 5', '25'] and table['users'].sum() - 40 - 25 == 3
    assert p.suppress(table, 'users', 5)['users'].tolist() == ['40', '< 5', 'hidden']
def test_two_empty_cells_do_not_protect_each_other():
    table = pd.DataFrame({'segment': list('abcd'), 'users': [40, 0, 0, 25]})
    assert p.suppress(table, 'users', 5)['users'].tolist() == ['40', '< 5', '< 5', 'hidden']
def test_every_margin_is_kept(): # what is hidden for a segment leaves a week with one hidden cell
    table = pd.DataFrame([(w, s, n) for w, row in zip('123', [(30, 3, 40), (90, 50, 70), (45, 95, 80)]) for s, n in zip('abc', row)], columns=['week', 'segment', 'users'])
    found = p.suppress(table, 'users', 5, totals=[['week'], ['segment']])
    hidden = ~found['users'].str.isdigit()
    assert all((hidden.groupby(found[by]).sum() != 1).all() for by in ('week', 'segment')) and hidden.sum() < 9
def test_what_goes_with_a_hidden_count_goes_too():
    table = pd.DataFrame({'users': [40, 3, 25], 'rate': [.1, .2, .3]})
    found = p.suppress(table, 'users', 5, also=['rate'])
    assert found['rate'].isna().tolist() == [False, True, True] and table['rate'].notna().all() and table['users'].tolist() == [40, 3, 25]
def test_a_table_of_large_cells_stays_as_it_is(): assert p.suppress(pd.DataFrame({'users': [5, 6]}), 'users', 5)['users'].tolist() == ['5', '6']
def test_an_empty_table_stays_empty(): assert p.suppress(pd.DataFrame({'users': np.array([], int)}), 'users', 5).empty

# ---------------------------------------------------------------- noise with a budget
@pytest.mark.parametrize('epsilon,sensitivity', [(.1, 1), (.5, 1), (1., 1), (1., 4), (3., 1)])
def test_noise_is_as_large_as_theory_says(epsilon, sensitivity):
    n = 40_000
    noise = p.noisy_counts(np.full(n, 50), epsilon, np.random.default_rng(1), sensitivity) - 50
    error = abs(noise); half = 2.6*error.std()/np.sqrt(n)
    assert abs(error.mean() - p.noise_error(epsilon, sensitivity)) < half and abs(noise.mean()) < 2.6*noise.std()/np.sqrt(n) and noise.dtype.kind == 'i'
    if epsilon <= .5: assert abs(error.mean()*epsilon/sensitivity - 1) < .06 # 1/epsilon, nearly
def test_one_person_changes_no_answer_by_more_than_the_promise():
    n, epsilon = 400_000, 1.
    with_her, without = (np.bincount(p.noisy_counts(np.full(n, c), epsilon, np.random.default_rng(c)), minlength=90) for c in (61, 60))
    often = (with_her > 2000) & (without > 2000)
    ratio = abs(np.log(with_her[often]/without[often]))
    assert often.sum() > 5 and ratio.max() < epsilon + .08 and ratio.max() > epsilon - .08 # the bound holds, and is reached
def test_noise_needs_the_key_and_repeats_for_the_same_table():
    draw = lambda key, what: p.noisy_counts(np.zeros(50, int), .5, p.secret_rng(key, what)).tolist()
    assert draw(KEY, 'a') == draw(KEY, 'a') != draw(KEY, 'b') and draw(KEY, 'a') != draw(OTHER, 'a')
@pytest.mark.parametrize('epsilon', [0, -1, float('nan')])
def test_epsilon_must_be_above_zero(epsilon, tmp_path):
    with pytest.raises(TelemetryError): p.noisy_counts([1], epsilon, np.random.default_rng(0))
    with pytest.raises(TelemetryError): p.EpsilonLedger(tmp_path/'e', 1.).spend('a', epsilon)

def test_the_ledger_adds_up_and_refuses(tmp_path):
    ledger = p.EpsilonLedger(tmp_path/'runs/e.jsonl', 1.); assert ledger.spent == 0
    for i in range(10): assert ledger.spend(f't{i}', .1) == pytest.approx(1 - .1*(i + 1))
    assert ledger.spent == pytest.approx(1.) and ledger.spend('t3', .1) == pytest.approx(0) # the same table again is free
    with pytest.raises(TelemetryError, match="'t10' costs epsilon 0.01, "): ledger.spend('t10', .01)
    with pytest.raises(TelemetryError): ledger.spend('t3', .2) # the same table with less noise is another
    assert p.EpsilonLedger(tmp_path/'runs/e.jsonl', 1.1).spend('t10', .05) == pytest.approx(.05) # kept in the file
def test_a_damaged_ledger_is_refused(tmp_path):
    (tmp_path/'e').write_text('{"what": "a"}\n')
    with pytest.raises(TelemetryError, match='not known'): p.EpsilonLedger(tmp_path/'e', 1.).spend('b', .1)
def test_spending_at_once_does_not_overspend(tmp_path):
    fork = multiprocessing.get_context('fork'); start = fork.Barrier(4)
    def work(name):
        start.wait()
        for i in range(40):
            try: p.EpsilonLedger(tmp_path/'e', 5.).spend(f'{name}{i}', .1)
            except TelemetryError: pass
    running = [fork.Process(target=work, args=(n,)) for n in 'abcd']
    for r in running: r.start()
    for r in running: r.join()
    assert p.EpsilonLedger(tmp_path/'e', 5.).spent == pytest.approx(5.)

# ---------------------------------------------------------------- what must not be learned from
@pytest.mark.parametrize('name', [*p.BARRED, *SENSITIVE, 'Gender', 'user_gender', 'gender_is_f', 'AgeBand', 'ageBand_2', 'x.race', 'gender2'])
def test_sensitive_attributes_are_barred_by_name(name):
    with pytest.raises(TelemetryError, match='sensitive attribute') as e: p.bar_sensitive(['clicks', name])
    assert repr(name) in str(e.value)
def test_words_that_only_contain_one_are_not(): p.bar_sensitive(['clicks_1d', 'essex', 'trace_id', 'usage_28d', 'agenda', 'healthy', 'item_age'])

def world(n, seed, strength):
    rng = np.random.default_rng(seed)
    band = rng.choice(['18-24', '25-34', '35+'], n, p=[.3, .5, .2])
    return pd.DataFrame({'clicks': rng.poisson(3, n), 'city': rng.choice(list('abcd'), n), 'x': rng.normal(strength*(band == '18-24'))}), band
def test_independent_features_tell_nothing():
    found = [p.leakage_auc(*world(500, s, 0.)) for s in range(12)]
    assert sum(e.ci_lower <= .5 <= e.ci_upper for e in found) >= 9 and abs(np.mean([e.value for e in found]) - .5) < .02
def test_a_proxy_is_seen():
    found = p.leakage_auc(*world(1000, 1, 2.)); assert found.value > .7 and found.ci_lower > .65 and found.n == 1000
    x, band = world(1000, 1, 0.)
    two = np.where(band == '18-24', 'young', 'old')
    x['x'] = abs(np.random.default_rng(0).normal(size=1000) - 0) * np.where(two == 'young', 1, 0) # not a straight line
    assert p.leakage_auc(x, two).value > .95
def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0); score, is_in = rng.integers(0, 6, 80).astype(float), rng.random(80) < .4
    pairs = [(a > b) + .5*(a == b) for a in score[is_in] for b in score[~is_in]]
    value, influence = p._auc(score, is_in)
    assert value == pytest.approx(np.mean(pairs)) and influence.mean() == pytest.approx(0, abs=1e-12)
def test_few_people_say_nothing():
    assert p.leakage_auc(pd.DataFrame({'x': range(30)}), ['a']*25 + ['b']*5).value is None
    found = p.leakage_auc(pd.DataFrame({'x': range(60)}), ['a']*25 + ['b']*25 + ['c']*4 + [None]*6); assert found.n == 50
