"Where people go next, and whether they used to; machines are told from people."
from pathlib import Path
import ibis, numpy as np, pandas as pd, pytest
from evidence import DAY, SEED, act, decision, home, read, said
from telemetry_loop import sessions
from telemetry_loop.behaviour import paths

# --- paths

def test_steps_of_a_visit_over_midnight_are_counted_once(tmp_path):
    rows = [decision('a', 43_000, ['x']), act('click', 43_100, 'a', 'x'), act('click', 43_250, 'a', 'x'), decision('b', 43_300, ['x']), decision('c', 90_000, ['x'])] # midnight is 43,200
    with home(tmp_path/'a', rows):
        sessions.run(); p = pd.read_parquet('artifacts/sessions/paths.parquet')
        moves = pd.concat([pd.read_parquet(f) for f in Path('runs/cache/sessions/slab').glob('*/moves.parquet')]).groupby(['from_state', 'to_state'])['n'].sum()
    assert moves[moves != 0].to_dict() == {('start', 'decision'): 2, ('decision', 'click'): 1, ('click', 'click'): 1, ('click', 'decision'): 1, ('decision', 'end'): 2}
    assert len(read('sessions', tmp_path/'a')) == 2 and not p.empty

def walk(rng, days, users, skew): # -> moves; later days follow `skew`: (from, to, share)
    chain = dict(start=dict(decision=1.), decision=dict(click=.4, decision=.35, end=.25), click=dict(click=.3, decision=.4, conversion=.06, complaint=.04, end=.2), conversion=dict(decision=.5, end=.5), complaint=dict(decision=.3, end=.7))
    out = []
    for u in range(users):
        for day in range(days):
            here = {k: dict(v) for k, v in chain.items()}
            if skew and day >= days//2:
                a, b, share = skew; rest = 1 - here[a].get(b, 0)
                here[a] = {k: v*(1 - share)/rest for k, v in here[a].items() if k != b} | {b: share}
            state = 'start'
            while state != 'end': nxt = str(rng.choice(list(here[state]), p=np.array(list(here[state].values()))/sum(here[state].values()))); out.append((day, f'u{u}', state, nxt, 1)); state = nxt
            if rng.random() < .003: out.append((day, f'u{u}', 'survey', 'control', 1))                       # so rare that any share is chance
    return ibis.memtable(pd.DataFrame(out, columns=['slab', 'user_id', 'from_state', 'to_state', 'n']))

@pytest.mark.parametrize('skew', [('click', 'complaint', .1), ('decision', 'end', .33)])
def test_the_skewed_path_is_on_top(skew):
    p = paths(walk(np.random.default_rng(SEED), 8, 300, skew), 4)
    top = p.iloc[0]
    assert (top['from_state'], top['to_state']) == skew[:2] and top['share'] == pytest.approx(skew[2], abs=.03) and not top['lower'] <= 0 <= top['upper']
    assert (p.groupby('from_state')['share'].sum().drop('survey') - 1).abs().max() < 1e-9

def test_paths_that_did_not_change_are_not_called_changed():
    called = [((p['lower'] > 0) | (p['upper'] < 0)).any() for s in range(20) for p in [paths(walk(np.random.default_rng([SEED, s]), 4, 40, None), 2)]]
    assert np.mean(called) <= .15                                                                          # 95 %, all intervals together; 20 logs

# --- bots

def living(rng, kind, user, days=4): # -> rows of one user
    rows, t0 = [], 0
    for day in range(days):
        if kind == 'person': starts = day*DAY + np.cumsum(np.r_[rng.uniform(-4, 8)*3600, np.exp(rng.normal(3.3, .8, rng.integers(1, 8)))])
        if kind == 'heavy': starts = day*DAY + np.sort(rng.uniform(-5*3600, 11*3600, 60))                  # sixteen hours a day
        if kind == 'fast': starts = day*DAY + 3000 + np.cumsum(rng.uniform(.8, 1.5, 60))
        if kind == 'crawler': starts = day*DAY + 3000 + np.cumsum(rng.uniform(20, 90, 20))
        if kind == 'regular': starts = day*DAY + 3000 + np.cumsum(np.full(20, 600.) + rng.normal(0, 5, 20))
        if kind == 'always': starts = day*DAY + np.sort(rng.uniform(-12*3600, 12*3600, 60))
        for k, t in enumerate(starts):
            name = f'{user}.{day}.{k}'; slate = ['a', 'b', 'c']
            rows.append(decision(name, t, slate, user))
            for j, item in enumerate(slate):
                rows.append(act('impression', t + .3, name, item, user, position=j))
                opened = rng.random() < dict(crawler=1., fast=.7).get(kind, .2)
                if not opened: continue
                wait = .1 + .02*j if kind == 'fast' else 2 + rng.exponential(4) + 3*j
                rows.append(act('click', t + .3 + wait, name, item, user, position=j))
                if kind not in ('fast', 'crawler'): rows += [act('heartbeat', t + .3 + wait + 10*b, name, item, user, elapsed=10.*b) for b in range(1, 1 + int(rng.exponential(2.)))]
    return rows

def test_machines_are_told_from_people(tmp_path):
    "Behaviour made up here, in no simulator: five machines of each kind, people, and people who do nothing else all day."
    rng, rows = np.random.default_rng(SEED), []
    for kind, n in dict(person=80, heavy=10, fast=5, crawler=5, regular=5, always=5).items():
        for i in range(n): rows += living(rng, kind, f'{kind}{i}')
    with home(tmp_path/'a', rows):
        sessions.run(); b, m, s, d, a = pd.read_parquet('artifacts/sessions/bots.parquet'), said(), read('sessions'), read('decisions'), read('acts')
    assert sorted(b['user_id']) == sorted(f'{kind}{i}' for kind in ('fast', 'crawler', 'regular', 'always') for i in range(5))
    assert m['bots']['users'] == 20 and m['bots']['events'] == b['events'].sum() and m['bots']['share']['value'] == pytest.approx(b['events'].sum()/len(rows)) and sum(m['bots']['by_reason'].values()) == 20
    for t in (s, d, a): assert not set(t['user_id']) & set(b['user_id']) and set(t['user_id']) <= {f'person{i}' for i in range(80)} | {f'heavy{i}' for i in range(10)}
    assert m['users'] == 90 and m['decisions'] == len(d) and m['clicks_joined'] == sum(sum(x) for x in d['clicked'])

def test_a_log_where_nobody_can_stay_accuses_nobody(tmp_path):
    "No heartbeats at all, and every item shown is opened: what a log never says is no behaviour."
    rng = np.random.default_rng(SEED)
    rows = []
    for u in range(30):
        for k in range(40):
            t = k*5000 + rng.uniform(0, 3000)
            rows += [decision(f'{u}.{k}', t, ['a'], f'u{u}'), act('click', t + rng.uniform(2, 60), f'{u}.{k}', 'a', f'u{u}')]
    with home(tmp_path/'a', [r for r in rows if (r['event_time'].hour + 12) % 24 > 8]): sessions.run(); assert said()['bots']['users'] == 0
