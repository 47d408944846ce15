"""Millions of messy lines to events, sessions and features: ours against hand-written DuckDB SQL and plain pandas, in one run.

`python benchmarks/ingest.py [--millions 1 10 50] [--peers sql pandas] [--json OUT]`

The log is one simulated world with the faults of params.yaml, copied with other ids until it is long enough. Each program runs in a process of its own (ours in one a stage, as in the pipeline), with the same
threads and engine memory, and the rows it writes must have the digests ours have: quarantined lines, events, sessions, decisions with their outcomes, acts, and views as of each decision.

The peers are written for this log and do less than ours: no cache, no incremental pieces, one plan, only the event types and columns the simulator sends, no reasons per rule, no metrics, paths,
splits or checks, nothing hidden in the background (this log has none). Two small tables they take from ours, because to work them out would copy the code: what each device's clock was believed
to be on each day, and who is a bot."""
import argparse, hmac, json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SEED, USERS = 7, 1000 # of the world that is copied
LIMITS = {'sql': 1.5, 'pandas': 8., 'gb': 4., 'growth': 7.}
TYPES = ('account', 'item', 'decision', 'impression', 'click', 'heartbeat', 'close', 'conversion', 'complaint', 'survey', 'exposure', 'consent', 'control', 'request')
LEGAL, OTHERS = ('account', 'consent', 'control'), ('account', 'consent', 'exposure', 'item', 'request')
OUTCOMES = ('click', 'heartbeat', 'close', 'conversion', 'complaint', 'survey')

# the log

def world(to:Path):
    "Live the first windows, once."
    from dataclasses import replace
    from telemetry_loop.config import load_params
    from telemetry_loop.policy import PolicyConfig, bootstrap_policy
    from telemetry_loop.simulate import SimulateConfig, World
    cfg = replace(load_params(SimulateConfig, 'simulate', ROOT/'params.yaml'), users=USERS)
    World(cfg, SEED).live(bootstrap_policy(load_params(PolicyConfig, 'policy', ROOT/'params.yaml')), cfg.days, to=to)

def copies(base:Path, to:Path, lines:int)->int: # lines written
    "The same days again and again; events, users, devices and decisions get other ids, items keep theirs."
    to.mkdir(parents=True)
    days = sorted(base.glob('*.jsonl'))
    once = sum(p.read_bytes().count(b'\n') for p in days)
    whole, rest = divmod(lines, once)
    place, part = re.compile(rb'(?<=_id":"[eudv])(?=[0-9a-f])'), rest/once
    for p in days:
        text = p.read_bytes()
        cut = place.split(text)
        some = place.split(text[:text.find(b'\n', int(part*len(text))) + 1] if rest else b'') # the last copy is lived in part
        with open(to/p.name, 'wb') as f:
            for k in range(whole): f.write((b'%03d' % k).join(cut))
            f.write((b'%03d' % whole).join(some))
    return sum(p.read_bytes().count(b'\n') for p in to.iterdir())

# ours

def stage(name:str):
    "One of the three stages, nothing kept from before."
    import importlib
    start = time.perf_counter(); importlib.import_module(f'telemetry_loop.{name}').run()
    return {name: time.perf_counter() - start}

def lend():
    "What the peers take from ours: beliefs about clocks by day, and bots."
    import duckdb
    con, parts = duckdb.connect(), []
    for folder in sorted(Path('runs/cache/ingest/window').iterdir()):
        day = con.execute(f"SELECT min(received_time)::DATE FROM read_parquet('{folder}/events.parquet')").fetchone()[0]
        parts.append(f"SELECT DATE '{day}' AS day, device, skew_s FROM read_parquet('{folder}/clocks.parquet')")
    con.execute(f"COPY ({' UNION ALL '.join(parts)} ORDER BY ALL) TO 'lent_clocks.parquet'")
    shutil.copy('artifacts/sessions/bots.parquet', 'lent_bots.parquet')

# peer: SQL

def rules()->tuple: # spec for json_transform, SELECT list of values, SQL condition of a sound line, SELECT list of columns
    "The tracking plan as one SQL condition."
    from telemetry_loop.schema import tracking_plan
    plan = {k: v for k, v in tracking_plan()['events'].items() if k in TYPES}
    found = {}
    for body in plan.values(): found |= {n: r for n, r in body['properties'].items() if 'const' not in r}
    found['type'] = {'type': 'string', 'enum': list(TYPES)}
    spec, values, tests = {}, [], []
    for n, r in found.items():
        kind = r['type']
        raw = f'f."{n}"' + '::VARCHAR'*(kind != 'array')
        text = f"CASE WHEN ({raw})[1] = '\"' THEN CASE WHEN contains({raw}, '\\') THEN json_extract_string({raw}, '$') ELSE ({raw})[2:-2] END END"
        spec[n] = ('VARCHAR[]' if r['items']['type'] == 'string' else 'DOUBLE[]') if kind == 'array' else 'JSON'
        if 'pattern' in r: values.append(f"CASE WHEN length({raw}) = 26 AND ({raw})[12] = 'T' AND ({raw})[25] = 'Z' THEN try_cast(({raw})[2:-2] AS TIMESTAMP) END AS {n}")
        else: values.append({'string': text, 'array': raw, 'boolean': f'try_cast({raw} AS BOOLEAN)', 'number': f'try_cast({raw} AS DOUBLE)', 'integer': f'try_cast({raw} AS DOUBLE)'}[kind] + f' AS {n}')
        if kind != 'array': values.append(f'{raw} IS NULL AS no_{n}')
        ok = f'no_{n}' if kind != 'array' else f'{n} IS NULL'
        bounds = [f'{n} {sign} {r[k]}' for k, sign in dict(minimum='>=', maximum='<=', exclusiveMinimum='>').items() if k in r]
        if 'maxLength' in r: bounds.append(f"length({n}) BETWEEN {r['minLength']} AND {r['maxLength']}")
        if 'enum' in r: bounds.append(f"{n} IN {tuple(r['enum'])}")
        if kind == 'integer': bounds.append(f'{n} = floor({n})')
        if kind == 'array' and r['items']['type'] == 'number': bounds.append(f'(len({n}) = 0 OR (list_min({n}) > 0 AND list_max({n}) <= 1))')
        must = [k for k, body in plan.items() if n in body['required']]
        if len(must) == len(plan): tests.append(' AND '.join([f'{n} IS NOT NULL', *bounds]))
        else:
            tests.append(f"({' AND '.join([f'{n} IS NOT NULL', *bounds])} OR {ok})")
            if must: tests.append(f"({n} IS NOT NULL OR type NOT IN ({', '.join(map(repr, must))}))")
    names = ', '.join(f'{n}::BIGINT AS {n}' if r['type'] == 'integer' else n for n, r in found.items())
    return json.dumps(spec), ', '.join(values), f"coalesce({' AND '.join(tests)}, false)", names

def sql():
    "Straight SQL from lines to features."
    import duckdb, pyarrow as pa
    from telemetry_loop.config import read_params
    params = read_params()
    con = duckdb.connect(config=dict(threads=params['run']['threads'], memory_limit=f"{params['run']['memory_gb']}GB", temp_directory='spill', preserve_insertion_order=False))
    do, out, took = con.execute, Path('peer_sql'), {}
    (out/'events').mkdir(parents=True)
    lists = lambda names: ', '.join(repr(n) for n in names)
    ms = lambda x: f'epoch_ms({x})'

    start = time.perf_counter()
    spec, values, sound, names = rules()
    late, room = 86400*params['clocks']['late_days'], 3600*params['ingest']['max_skew_hours']
    source = "read_csv('data/*.jsonl', columns={'line': 'VARCHAR'}, header=false, delim=e'\\x02\\x03\\x02\\x03', quote='', escape='', auto_detect=false, strict_mode=false, max_line_size=2097152)"
    do(f"""COPY (SELECT {names}, sound, CASE WHEN NOT sound OR {ms('received_time')} - {ms('event_time')} > {1000*(late - room)} THEN line END AS line FROM (
            SELECT *, {sound} AND (type IN ('decision', 'request', 'item', 'exposure') OR sent_time IS NULL OR {ms('sent_time')} - {ms('received_time')} BETWEEN {-1000*(room + late)} AND {1000*room})
                AND {ms('event_time')} - {ms("CASE WHEN type IN ('decision', 'request', 'item', 'exposure') THEN received_time ELSE coalesce(sent_time, received_time) END")} <= {1000*room} AS sound FROM (
            SELECT line, {values} FROM (
            SELECT line, json_transform(CASE WHEN json_valid(line) AND ltrim(line)[1] = '{{' THEN line END, '{spec}') AS f FROM {source} WHERE line != '')))) TO 'lines.parquet' (FORMAT parquet)""")
    do("CREATE VIEW told AS SELECT * EXCLUDE (file_row_number), file_row_number AS row, coalesce(device_id, user_id) AS device FROM read_parquet('lines.parquet', file_row_number=true) WHERE sound")
    do('CREATE TEMP TABLE twice AS SELECT hash(event_id) AS h FROM told GROUP BY h HAVING count(*) > 1')
    do('CREATE TEMP TABLE again AS SELECT row FROM (SELECT row, row_number() OVER (PARTITION BY event_id ORDER BY received_time, row) AS nth FROM told WHERE hash(event_id) IN (FROM twice)) WHERE nth > 1')
    key = os.environ['TELEMETRY_LOOP_KEY'].encode()
    ids = [r[0] for r in do('SELECT DISTINCT user_id FROM told WHERE user_id IS NOT NULL UNION SELECT DISTINCT device_id FROM told WHERE device_id IS NOT NULL').fetchall()]
    con.register('named', pa.table({'id': ids, 'name': ['p' + hmac.digest(key, i.encode(), 'sha256').hex()[:16] for i in ids]}))
    do('CREATE TEMP TABLE people AS SELECT * FROM named')
    far = 86400*params['clocks']['far_days']
    do(f"""CREATE TEMP TABLE clock AS SELECT d.id AS device, l.day AS day, skew_s, coalesce(near, lead) - skew_s AS slack FROM (
            SELECT device, received_time::DATE AS day, max(s) AS lead, max(s) FILTER (abs(s) <= {far}) AS near FROM (SELECT device, received_time, ({ms('sent_time')} - {ms('received_time')})/1000 AS s FROM told
                WHERE type NOT IN ('decision', 'request', 'item', 'exposure') AND device IS NOT NULL AND sent_time IS NOT NULL AND row NOT IN (FROM again)) GROUP BY ALL) l
        JOIN people d ON d.id = l.device JOIN read_parquet('lent_clocks.parquet') c ON c.device = d.name AND c.day = l.day WHERE skew_s != 0 OR coalesce(near, lead) > skew_s""") # the few devices that need anything done
    do(f"""CREATE TEMP VIEW timed AS SELECT t.* EXCLUDE (event_time), event_time AS device_time, coalesce(c.skew_s, 0.) AS skew_s, slack, event_time - to_milliseconds(coalesce(round(1000*c.skew_s)::BIGINT, 0)) AS said_time, least(said_time, received_time) AS event_time
        FROM told t LEFT JOIN clock c ON c.device = t.device AND c.day = received_time::DATE AND type NOT IN ('decision', 'request', 'item', 'exposure') WHERE row NOT IN (FROM again)""")
    do(f"""CREATE TEMP TABLE cut AS SELECT row, least(event_time, min(CASE WHEN ({ms('said_time')} - {ms('received_time')})/1000 <= slack THEN received_time END) OVER (PARTITION BY device, received_time::DATE ORDER BY device_time DESC RANGE UNBOUNDED PRECEDING), received_time) AS cut_time
        FROM timed WHERE slack > 0""") # what was sent later happened later
    do("""CREATE TEMP TABLE no AS SELECT user_id, received_time AS since, until FROM (SELECT *, lead(received_time) OVER (PARTITION BY user_id ORDER BY received_time) AS until FROM (
            SELECT *, max(event_time) OVER (PARTITION BY user_id ORDER BY received_time ROWS UNBOUNDED PRECEDING) AS newest FROM (
            SELECT user_id, granted, received_time, coalesce(cut_time, event_time) AS event_time FROM timed LEFT JOIN cut USING (row) WHERE type = 'consent' AND purpose = 'analytics'
                QUALIFY row_number() OVER (PARTITION BY user_id, received_time ORDER BY coalesce(cut_time, event_time) DESC, granted) = 1)) WHERE event_time = newest) WHERE NOT granted""")
    days = [r[0] for r in do('SELECT DISTINCT received_time::DATE FROM told ORDER BY 1').fetchall()]
    columns = [c for c in (d[0] for d in do('SELECT * FROM told LIMIT 0').description) if c not in ('row', 'line', 'sound', 'device', 'user_id', 'device_id', 'event_time')]
    final = 'coalesce(cut_time, t.event_time)'
    for day in days:
        do(f"""COPY (SELECT {', '.join(f't.{c}' for c in columns)}, u.name AS user_id, d.name AS device_id, {final} AS event_time, device_time, skew_s
            FROM timed t LEFT JOIN people u ON u.id = t.user_id LEFT JOIN people d ON d.id = t.device_id LEFT JOIN cut ON cut.row = t.row
            WHERE t.received_time >= DATE '{day}' AND t.received_time < DATE '{day}' + 1 AND ({ms('t.received_time')} - {ms(final)} <= {1000*late} OR type IN ({lists(LEGAL)}))
                AND (type IN ({lists(LEGAL)}) OR NOT EXISTS (FROM no WHERE no.user_id = t.user_id AND t.received_time >= since AND (until IS NULL OR t.received_time < until)))
            ORDER BY {final}, event_id) TO '{out}/events/{day}.parquet' (FORMAT parquet)""")
    do(f"COPY (SELECT line FROM read_parquet('lines.parquet') WHERE NOT sound UNION ALL SELECT line FROM timed t LEFT JOIN cut ON cut.row = t.row WHERE {ms('t.received_time')} - {ms(final)} > {1000*late} AND type NOT IN ({lists(LEGAL)})) TO '{out}/dead.parquet'")
    took['ingest'] = time.perf_counter() - start

    start = time.perf_counter()
    cfg = params['sessions']
    gap, again = f"INTERVAL {round(60*cfg['gap_minutes'])} SECONDS", f"INTERVAL {round(3600*cfg['attribution_hours'])} SECONDS"
    do(f"CREATE VIEW events AS SELECT * FROM read_parquet('{out}/events/*.parquet')")
    do("CREATE TEMP TABLE bots AS SELECT user_id FROM read_parquet('lent_bots.parquet')")
    do(f"""CREATE TEMP TABLE marks AS SELECT u, event_time, lag(event_time) OVER w AS last, row_number() OVER w AS n, sum(d) OVER w - d AS ds, sum(c) OVER w - c AS cs, d, c, lead(event_time) OVER w IS NULL AS final
        FROM (SELECT user_id AS u, event_time, (type = 'decision')::INT AS d, (type = 'click')::INT AS c FROM events WHERE user_id IS NOT NULL AND type NOT IN ({lists(OTHERS)}) AND user_id NOT IN (FROM bots))
        WINDOW w AS (PARTITION BY u ORDER BY event_time ROWS UNBOUNDED PRECEDING) QUALIFY last IS NULL OR event_time > last + {gap} OR final""") # one sort: a visit is what lies between two starts
    do(f"""CREATE TEMP TABLE sessions AS SELECT s.u AS user_id, s.event_time AS start, coalesce(next_last, f.event_time) AS "end", coalesce(next_ds, f.ds + f.d) - s.ds AS decisions, coalesce(next_cs, f.cs + f.c) - s.cs AS clicks, coalesce(next_n, f.n + 1) - s.n AS events FROM (
            SELECT *, lead(last) OVER w AS next_last, lead(ds) OVER w AS next_ds, lead(cs) OVER w AS next_cs, lead(n) OVER w AS next_n FROM marks WHERE last IS NULL OR event_time > last + {gap} WINDOW w AS (PARTITION BY u ORDER BY event_time)) s
        JOIN (FROM marks WHERE final) f ON f.u = s.u""")
    do('DROP TABLE marks')
    do(f"COPY (SELECT *, user_id || '-' || {ms('start')} AS session_id FROM sessions ORDER BY user_id, start) TO '{out}/sessions.parquet'")
    do("""CREATE TEMP TABLE taken AS SELECT event_id FROM (SELECT event_id, row_number() OVER (PARTITION BY decision_id ORDER BY received_time, event_time, event_id) AS nth FROM events WHERE type = 'decision'
        AND decision_id IN (SELECT decision_id FROM events WHERE type = 'decision' GROUP BY decision_id HAVING count(*) > 1)) WHERE nth > 1""")
    do("CREATE TEMP TABLE decided AS SELECT decision_id, user_id, event_time, slate FROM events WHERE type = 'decision' AND event_id NOT IN (FROM taken)")
    do(f"""CREATE TEMP TABLE joined AS SELECT type, decision_id, item_id, user_id, place, event_time, event_id, elapsed FROM (
            SELECT e.*, slate, coalesce(e.position, list_position(slate, e.item_id) - 1) AS place FROM (SELECT type, decision_id, item_id, user_id, position, event_time, event_id, elapsed FROM events WHERE type IN ({lists(OUTCOMES)}) AND decision_id IS NOT NULL) e
            JOIN decided d ON d.decision_id = e.decision_id AND d.user_id = e.user_id
                AND e.event_time BETWEEN d.event_time - INTERVAL {round(1000*cfg['clock_seconds'])} MILLISECONDS AND d.event_time + {again}) WHERE slate[place + 1] = item_id""")
    do(f"""CREATE TEMP TABLE opened AS SELECT decision_id, item_id, user_id, {ms('event_time')} AS began, row_number() OVER w AS nth, lead({ms('event_time')}) OVER w AS reopened FROM joined WHERE type = 'click' AND item_id IS NOT NULL
        WINDOW w AS (PARTITION BY decision_id, item_id ORDER BY event_time, event_id)""")
    do(f"""CREATE TEMP TABLE stays AS SELECT o.decision_id, o.item_id, any_value(o.user_id) AS user_id, o.nth, any_value(o.began) AS began, max(claim) FILTER (NOT closing) AS beat, min(claim) FILTER (closing) AS closed FROM opened o
        LEFT JOIN (SELECT decision_id, item_id, {ms('event_time')} AS said, type = 'close' AS closing, round(1000*elapsed)::BIGINT AS claim FROM joined WHERE type IN ('heartbeat', 'close') AND elapsed >= 0) s
            ON s.decision_id = o.decision_id AND s.item_id = o.item_id AND said >= o.began AND (reopened IS NULL OR said < reopened) GROUP BY o.decision_id, o.item_id, o.nth""")
    do(f"""CREATE TEMP TABLE dwell AS SELECT decision_id, item_id, sum(least(coalesce(least(stay, next - began), stay), {round(60000*params['dwell']['cap_minutes'])}))/1000 AS dwell FROM (
            SELECT *, coalesce(closed, beat, 0) AS stay, lead(began) OVER (PARTITION BY user_id ORDER BY began, decision_id, item_id, nth) AS next FROM stays) GROUP BY decision_id, item_id""")
    do(f"""CREATE TEMP TABLE found AS SELECT *, clicked AND dwell >= {cfg['satisfied_seconds']} AS satisfied FROM (SELECT f.* REPLACE (CASE WHEN clicked THEN coalesce(d.dwell, 0) ELSE 0 END AS dwell) FROM (
            SELECT decision_id, place, any_value(item_id) AS item_id, bool_or(type = 'click') AS clicked, bool_or(type = 'conversion') AS converted, bool_or(type = 'complaint') AS hidden, 0. ::DOUBLE AS dwell FROM joined GROUP BY ALL) f LEFT JOIN dwell d USING (decision_id, item_id))""")
    names = ('clicked', 'dwell', 'satisfied', 'converted', 'hidden')
    lambdas = ', '.join(f"list_transform(range(len(slate)), lambda i: coalesce(list_extract({n}, list_position(places, i)), {'0.' if n == 'dwell' else 'false'})) AS {n}" for n in names)
    worth = ' + '.join(f"{w}*list_extract({n}, i)::INT" for n, w in cfg['reward'].items())
    do(f"""COPY (SELECT *, list_transform(range(1, len(slate) + 1), lambda i: ({worth})::DOUBLE) AS reward FROM (
            SELECT d.*, s.user_id || '-' || {ms('s.start')} AS session_id, {lambdas} FROM (
            SELECT decision_id, user_id, event_time, seq, policy_id, model_version, personalised, candidates, slate, propensities, position_propensities, weights, even, repeat FROM events WHERE type = 'decision' AND event_id NOT IN (FROM taken) AND user_id NOT IN (FROM bots)) d
        ASOF JOIN sessions s ON s.user_id = d.user_id AND d.event_time >= s.start
        LEFT JOIN (SELECT decision_id, list(place) AS places, {', '.join(f'list({n}) AS {n}' for n in names)} FROM found GROUP BY decision_id) f ON f.decision_id = d.decision_id) ORDER BY event_time, decision_id) TO '{out}/decisions.parquet'""")
    for t in ('joined', 'opened', 'stays', 'dwell', 'found', 'sessions'): do(f'DROP TABLE {t}')
    do(f"""CREATE TEMP TABLE did AS SELECT user_id, item_id, decision_id, CASE WHEN type = 'click' THEN 'clicked' ELSE 'satisfied' END AS kind, event_time, received_time FROM events
        WHERE (type = 'click' OR (type IN ('heartbeat', 'close') AND elapsed >= {cfg['satisfied_seconds']})) AND user_id NOT IN (FROM bots)""")
    do('CREATE TEMP TABLE once AS SELECT user_id, item_id, decision_id, kind, min(event_time) AS event_time, max(event_time) AS last, min(received_time) AS known_time FROM did GROUP BY user_id, item_id, decision_id, kind')
    do(f"""COPY (SELECT user_id, item_id, kind, event_time, known_time FROM once WHERE last <= event_time + {again} UNION ALL
        SELECT user_id, item_id, kind, start, min(received_time) FROM (SELECT *, max(fresh) OVER (PARTITION BY user_id, item_id, decision_id, kind ORDER BY event_time) AS start FROM (
            SELECT *, CASE WHEN NOT coalesce(event_time <= lag(event_time) OVER (PARTITION BY user_id, item_id, decision_id, kind ORDER BY event_time) + {again}, false) THEN event_time END AS fresh
            FROM did SEMI JOIN (FROM once WHERE last > event_time + {again}) USING (user_id, item_id, decision_id, kind))) WHERE event_time <= start + {again} GROUP BY user_id, item_id, decision_id, kind, start UNION ALL
        SELECT user_id, item_id, 'conversion', event_time, received_time FROM events WHERE type = 'conversion' AND decision_id IS NULL AND user_id NOT IN (FROM bots)
        ORDER BY user_id, event_time, known_time, item_id, kind) TO '{out}/acts.parquet'""")
    for t in ('did', 'once'): do(f'DROP TABLE {t}')
    took['sessions'] = time.perf_counter() - start

    start = time.perf_counter()
    day = 86_400_000
    both = "epoch_ms(event_time) AS e, greatest(epoch_ms(event_time), epoch_ms(received_time)) AS a"
    do(f"CREATE TEMP TABLE asked AS SELECT row_number() OVER () AS q, decision_id, user_id, epoch_ms(event_time) AS t, slate FROM read_parquet('{out}/decisions.parquet')")
    do('CREATE TEMP TABLE who AS SELECT user_id, row_number() OVER () AS u FROM (SELECT DISTINCT user_id FROM asked)')
    do(f"CREATE TEMP TABLE clicks AS SELECT u, item_id, {both} FROM events LEFT JOIN who USING (user_id) WHERE type = 'click' AND user_id IS NOT NULL AND item_id IS NOT NULL")
    # different items: a pair that met once counts from a to e + 7 days; the few that met again, while any of their spans lasts
    span = 7*day
    do(f'CREATE TEMP TABLE pairs AS SELECT u, item_id, count(*) AS n, min(a) AS a, min(e) AS e FROM clicks WHERE u IS NOT NULL AND a < e + {span} GROUP BY u, item_id')
    do(f"""CREATE TEMP TABLE spans AS SELECT u, a, e + {span} AS x FROM pairs WHERE n = 1 UNION ALL
        SELECT u, min(a), max(x) FROM (SELECT *, sum(fresh) OVER (PARTITION BY u, item_id ORDER BY a, x ROWS UNBOUNDED PRECEDING) AS nth FROM (
            SELECT c.u, c.item_id, c.a, c.e + {span} AS x, CASE WHEN c.a <= max(c.e + {span}) OVER (PARTITION BY c.u, c.item_id ORDER BY c.a, c.e ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) THEN 0 ELSE 1 END AS fresh
            FROM clicks c JOIN pairs p ON p.u = c.u AND p.item_id = c.item_id AND p.n > 1 WHERE c.a < c.e + {span})) GROUP BY u, item_id, nth""")
    windows = (1, 7, 28)
    enter = ', '.join(f'(a - e < {w*day})::INT AS n{w}' for w in windows)
    leave = ' UNION ALL '.join(f"SELECT NULL, u, e + {w*day}, 1, {', '.join('-1' if v == w else '0' for v in windows)}, 0, NULL FROM clicks WHERE u IS NOT NULL AND a - e < {w*day} AND e + {w*day} < (SELECT max(t) FROM asked)" for w in windows)
    do(f"""CREATE TEMP TABLE of_users AS SELECT q, n1, n7, n28, items, (t - seen)/{day}. ::DOUBLE AS since FROM (
            SELECT q, t, sum(n1) OVER w AS n1, sum(n7) OVER w AS n7, sum(n28) OVER w AS n28, sum(items) OVER w AS items, max(seen) OVER w AS seen FROM (
                SELECT q, u, t, 0 AS after, 0 AS n1, 0 AS n7, 0 AS n28, 0 AS items, NULL::BIGINT AS seen FROM asked JOIN who USING (user_id) UNION ALL
                SELECT NULL, u, a, 1, {enter}, 0, NULL FROM clicks WHERE u IS NOT NULL UNION ALL {leave} UNION ALL
                SELECT NULL, u, a, 1, 0, 0, 0, 1, NULL FROM spans UNION ALL SELECT NULL, u, x, 1, 0, 0, 0, -1, NULL FROM spans WHERE x < (SELECT max(t) FROM asked) UNION ALL
                SELECT NULL, u, a, 1, 0, 0, 0, 0, e FROM (SELECT user_id, {both} FROM events WHERE type IN ('decision')) JOIN who USING (user_id))
            WINDOW w AS (PARTITION BY u ORDER BY t, after)) WHERE q IS NOT NULL""") # questions lie in the stream they ask: one sort, no join
    do('CREATE TEMP TABLE shown AS SELECT q, u, t, unnest(slate) AS item_id, generate_subscripts(slate, 1) AS place FROM asked JOIN who USING (user_id)')
    do(f"""CREATE TEMP TABLE of_items AS SELECT q, place, clicks, CASE WHEN n + 5. > 0 THEN (s + 15.)/(n + 5.) END AS mean FROM (
            SELECT q, place, sum(c) OVER w AS clicks, sum(n) OVER w AS n, sum(s) OVER w AS s FROM (
                SELECT q, place, item_id, t, 0 AS after, 0 AS c, 0 AS n, 0 AS s FROM shown UNION ALL
                SELECT NULL, NULL, item_id, a, 1, 1, 0, 0 FROM clicks WHERE a - e < {span} UNION ALL SELECT NULL, NULL, item_id, e + {span}, 1, -1, 0, 0 FROM clicks WHERE a - e < {span} UNION ALL
                SELECT NULL, NULL, item_id, a, 1, 0, 1, score FROM (SELECT item_id, score, {both} FROM events WHERE type = 'survey' AND item_id IS NOT NULL))
            WINDOW w AS (PARTITION BY item_id ORDER BY t, after)) WHERE q IS NOT NULL""")
    do(f"CREATE TEMP TABLE of_both AS SELECT q, place, sum(pow(2., -((t - 1 - e)//{span}))) AS clicks FROM shown JOIN clicks USING (u, item_id) WHERE a < t AND (t - 1 - e)//{span} <= 8 GROUP BY q, place")
    do(f"""COPY (SELECT decision_id, n1::DOUBLE AS "user_clicks_1d@1", n7::DOUBLE AS "user_clicks_7d@1", n28::DOUBLE AS "user_clicks_28d@1", u.items::DOUBLE AS "user_items_7d@1", since AS "user_since_visit@1",
            i.clicks AS "item_clicks_7d@1", mean AS "item_satisfaction@1", b AS "user_item_clicks@1" FROM asked JOIN of_users u USING (q)
        LEFT JOIN (SELECT q, list(i.clicks::DOUBLE ORDER BY place) AS clicks, list(mean ORDER BY place) AS mean, list(coalesce(b.clicks, 0.) ORDER BY place) AS b FROM of_items i LEFT JOIN of_both b USING (q, place) GROUP BY q) i USING (q)
        ORDER BY t, decision_id) TO '{out}/views.parquet'""")
    do(f"""CREATE TEMP TABLE items AS SELECT item_id, category, available_time, (row_number() OVER (ORDER BY item_id) - 1)::INTEGER AS item FROM (
        SELECT item_id, first(category ORDER BY event_time, event_id) AS category, min(event_time) AS available_time FROM events WHERE type = 'item' GROUP BY item_id UNION ALL
        SELECT item_id, '', min(event_time) FROM read_parquet('{out}/acts.parquet') WHERE item_id NOT IN (SELECT item_id FROM events WHERE type = 'item') GROUP BY item_id)""")
    do(f"COPY (SELECT item_id, coalesce(category, '') AS category, available_time FROM items ORDER BY item_id) TO '{out}/items.parquet'")
    do(f"COPY (SELECT user_id, item, event_time, known_time, kind FROM read_parquet('{out}/acts.parquet') JOIN items USING (item_id) WHERE kind IN ({lists(params['features']['positive'])}) ORDER BY user_id, event_time, known_time, item, kind) TO '{out}/interactions.parquet'")
    do(f"COPY (SELECT date_trunc('day', greatest(event_time, known_time))::TIMESTAMP AS date, item, count(*) AS clicks FROM read_parquet('{out}/acts.parquet') JOIN items USING (item_id) WHERE kind = 'clicked' GROUP BY ALL ORDER BY date, item) TO '{out}/popularity.parquet'")
    took['features'] = time.perf_counter() - start
    return took

# peer: pandas

def _sound(event, plan)->bool:
    "One parsed line against the tracking plan."
    if not isinstance(event, dict) or event.get('type') not in plan: return False
    body = plan[event['type']]
    if any(event.get(n) is None for n in body['required']): return False
    for n, r in body['properties'].items():
        x = event.get(n)
        if x is None or 'const' in r: continue
        kind = r['type']
        if kind == 'string':
            if not isinstance(x, str) or not r.get('minLength', 0) <= len(x) <= r.get('maxLength', 10**9) or 'enum' in r and x not in r['enum'] or 'pattern' in r and not re.fullmatch(r['pattern'].strip('^$'), x): return False
        elif kind == 'boolean':
            if not isinstance(x, bool): return False
        elif kind == 'array':
            if not isinstance(x, list) or not all(isinstance(i, str) if r['items']['type'] == 'string' else 0 < i <= 1 for i in x): return False
        elif not isinstance(x, (int, float)) or isinstance(x, bool) or not r.get('minimum', -1e308) <= x <= r.get('maximum', 1e308) or kind == 'integer' and x != int(x): return False
    return True

def plain_pandas():
    "json.loads and groupbys from lines to features."
    import numpy as np, pandas as pd
    from telemetry_loop.config import read_params
    from telemetry_loop.schema import tracking_plan
    params, out, took, plan = read_params(), Path('peer_pandas'), {}, {k: v for k, v in tracking_plan()['events'].items() if k in TYPES}
    (out/'events').mkdir(parents=True)
    ms = lambda t: t.astype('datetime64[ms]').astype('int64')
    server = ['decision', 'request', 'item', 'exposure']

    start = time.perf_counter()
    rows, dead = [], []
    for path in sorted(Path('data').glob('*.jsonl')):
        for line in path.open(encoding='utf-8'):
            try: event = json.loads(line)
            except ValueError: event = None
            if _sound(event, plan): rows.append(event)
            else: dead.append(line.rstrip('\n'))
    columns = list(dict.fromkeys(n for body in plan.values() for n in body['properties']))
    t = pd.DataFrame(rows, columns=columns); del rows
    for c in ('event_time', 'sent_time', 'received_time'): t[c] = pd.to_datetime(t[c], format='%Y-%m-%dT%H:%M:%S.%fZ').astype('datetime64[ms]')
    for c in ('position', 'seq', 'score'): t[c] = t[c].astype('Int64')
    t = t.sort_values('received_time', kind='stable').drop_duplicates('event_id')
    key = os.environ['TELEMETRY_LOOP_KEY'].encode()
    ids = pd.unique(pd.concat([t['user_id'], t['device_id']]).dropna())
    names = dict(zip(ids, ('p' + hmac.digest(key, i.encode(), 'sha256').hex()[:16] for i in ids)))
    t['user_id'], t['device_id'] = t['user_id'].map(names), t['device_id'].map(names)
    t['day'], phone = t['received_time'].dt.floor('D'), ~t['type'].isin(server)
    t['device'] = t['device_id'].fillna(t['user_id']).where(phone)
    t['lead'] = (ms(t['sent_time']) - ms(t['received_time'])).where(phone & t['sent_time'].notna())/1000
    near = t['lead'].where(t['lead'].abs() <= 86400*params['clocks']['far_days'])
    lead = near.groupby([t['device'], t['day']]).transform('max').fillna(t['lead'].groupby([t['device'], t['day']]).transform('max'))
    lent = pd.read_parquet('lent_clocks.parquet')
    lent['day'] = pd.to_datetime(lent['day']).astype('datetime64[ms]')
    t['skew_s'] = t[['device', 'day']].merge(lent, on=['device', 'day'], how='left')['skew_s'].fillna(0.).to_numpy()
    t['slack'] = (lead - t['skew_s']).fillna(0.)
    t['device_time'] = t['event_time']
    said = t['event_time'] - pd.to_timedelta((1000*t['skew_s']).round().astype('int64'), unit='ms')
    t['event_time'] = said.where(said < t['received_time'], t['received_time']).astype('datetime64[ms]')
    cut = t[t['slack'] > 0].assign(said=said[t['slack'] > 0]).sort_values(['device', 'day', 'device_time'], ascending=[True, True, False], kind='stable')
    known = cut['received_time'].where((ms(cut['said']) - ms(cut['received_time']))/1000 <= cut['slack'])
    least = known.groupby([cut['device'], cut['day']]).cummin().groupby([cut['device'], cut['day']]).ffill()
    least = least.groupby([cut['device'], cut['day'], cut['device_time']]).transform('min').fillna(cut['received_time'])
    t.loc[cut.index, 'event_time'] = pd.concat([cut['event_time'], least], axis=1).min(axis=1).astype('datetime64[ms]')
    legal = t['type'].isin(LEGAL)
    words = t[(t['type'] == 'consent') & (t['purpose'] == 'analytics')].sort_values(['user_id', 'received_time', 'event_time', 'granted'], ascending=[True, True, False, True]).drop_duplicates(['user_id', 'received_time'])
    words = words[words['event_time'] == words.groupby('user_id')['event_time'].cummax()]
    words = words[['user_id', 'received_time', 'granted']].sort_values('received_time')
    asof = pd.merge_asof(t[['user_id', 'received_time', 'event_id']].dropna(subset=['user_id']).sort_values('received_time'), words, on='received_time', by='user_id')
    barred = set(asof.loc[asof['granted'].eq(False), 'event_id'])
    t = t[legal | (~t['event_id'].isin(barred) & (ms(t['received_time']) - ms(t['event_time']) <= 86_400_000*params['clocks']['late_days']))]
    t = t.sort_values(['event_time', 'event_id'])
    days, t = t['day'], t.drop(columns=['day', 'device', 'lead', 'slack'])
    for day, part in t.groupby(days): part.to_parquet(out/'events'/f'{day:%Y-%m-%d}.parquet', index=False)
    pd.DataFrame({'line': dead}).to_parquet(out/'dead.parquet')
    took['ingest'] = time.perf_counter() - start

    start = time.perf_counter()
    cfg, bots = params['sessions'], set(pd.read_parquet('lent_bots.parquet')['user_id'])
    gap, again = pd.Timedelta(minutes=cfg['gap_minutes']), pd.Timedelta(hours=cfg['attribution_hours'])
    own = t[t['user_id'].notna() & ~t['type'].isin(OTHERS) & ~t['user_id'].isin(bots)].sort_values(['user_id', 'event_time'], kind='stable')
    new = ~(own.groupby('user_id')['event_time'].diff() <= gap)
    own['start'] = own['event_time'].where(new).groupby(own['user_id']).ffill()
    own = own.assign(d=own['type'] == 'decision', c=own['type'] == 'click')
    sessions = own.groupby(['user_id', 'start']).agg(end=('event_time', 'max'), decisions=('d', 'sum'), clicks=('c', 'sum'), events=('event_id', 'count')).reset_index()
    named = lambda s: s['user_id'] + '-' + ms(s['start']).astype(str)
    sessions.assign(session_id=named(sessions)).to_parquet(out/'sessions.parquet', index=False)
    decided = t[t['type'] == 'decision'].sort_values(['received_time', 'event_time', 'event_id']).drop_duplicates('decision_id')
    o = t[t['type'].isin(OUTCOMES) & t['decision_id'].notna()][['type', 'decision_id', 'item_id', 'user_id', 'position', 'event_time', 'event_id', 'elapsed']].merge(decided[['decision_id', 'user_id', 'event_time', 'slate']].rename(columns=dict(event_time='decided')), on=['decision_id', 'user_id'])
    o = o[(o['event_time'] >= o['decided'] - pd.Timedelta(seconds=cfg['clock_seconds'])) & (o['event_time'] <= o['decided'] + again)]
    o['place'] = [p if p is not pd.NA else (list(s).index(i) if i in s else -1) for p, s, i in zip(o['position'], o['slate'], o['item_id'])]
    o = o[[0 <= p < len(s) and s[p] == i for p, s, i in zip(o['place'], o['slate'], o['item_id'])]]
    o['at'], key = ms(o['event_time']), ['decision_id', 'item_id']
    opened = o[o['type'] == 'click'].sort_values(key + ['at', 'event_id'])[key + ['user_id', 'at']]
    opened['nth'], opened['reopened'] = opened.groupby(key).cumcount(), opened.groupby(key)['at'].shift(-1)
    said = o[o['type'].isin(['heartbeat', 'close']) & (o['elapsed'] >= 0)][key + ['type', 'at', 'elapsed']].rename(columns=dict(at='said'))
    both = opened.merge(said, on=key)
    both = both[(both['said'] >= both['at']) & ~(both['said'] >= both['reopened'])]
    both['claim'] = (1000*both['elapsed']).round()
    closed = both[both['type'] == 'close'].groupby(key + ['nth'])['claim'].min().rename('closed')
    beat = both[both['type'] == 'heartbeat'].groupby(key + ['nth'])['claim'].max().rename('beat')
    opened = opened.merge(closed, on=key + ['nth'], how='left').merge(beat, on=key + ['nth'], how='left')
    opened['stay'] = opened['closed'].fillna(opened['beat']).fillna(0)
    opened = opened.sort_values(['user_id', 'at', *key, 'nth'])
    until = opened.groupby('user_id')['at'].shift(-1) - opened['at']
    opened['stay'] = opened['stay'].where(~(until <= opened['stay']), until).clip(upper=60_000*params['dwell']['cap_minutes'])
    dwell = (opened.groupby(key)['stay'].sum()/1000).rename('dwell')
    found = o.assign(clicked=o['type'] == 'click', converted=o['type'] == 'conversion', hidden=o['type'] == 'complaint').groupby(['decision_id', 'place'])[['clicked', 'converted', 'hidden']].any().reset_index()
    d = decided[~decided['user_id'].isin(bots)][['decision_id', 'user_id', 'event_time', 'seq', 'policy_id', 'model_version', 'personalised', 'candidates', 'slate', 'propensities', 'position_propensities', 'weights', 'even', 'repeat']].merge(own[['event_id', 'decision_id', 'start']].merge(decided[['event_id']]).drop(columns='event_id'), on='decision_id')
    shown = d[['decision_id', 'slate']].explode('slate').rename(columns=dict(slate='item_id'))
    shown['place'] = shown.groupby('decision_id').cumcount()
    shown = shown.merge(found.astype(dict(place='int64')), on=['decision_id', 'place'], how='left').merge(dwell, on=key, how='left')
    for c in ('clicked', 'converted', 'hidden'): shown[c] = shown[c].fillna(False).astype(bool)
    shown['dwell'] = shown['dwell'].where(shown['clicked']).fillna(0.)
    shown['satisfied'] = shown['clicked'] & (shown['dwell'] >= cfg['satisfied_seconds'])
    shown['reward'] = sum(w*shown[c].astype(float) for c, w in cfg['reward'].items())
    d = d.merge(shown.groupby('decision_id')[['clicked', 'dwell', 'satisfied', 'converted', 'hidden', 'reward']].agg(list), on='decision_id').sort_values(['event_time', 'decision_id'])
    d['session_id'] = named(d)
    d.drop(columns='start').to_parquet(out/'decisions.parquet', index=False)
    a = t[((t['type'] == 'click') | (t['type'].isin(['heartbeat', 'close']) & (t['elapsed'] >= cfg['satisfied_seconds']))) & ~t['user_id'].isin(bots)][['user_id', 'item_id', 'decision_id', 'type', 'event_time', 'received_time']]
    a['kind'] = np.where(a['type'] == 'click', 'clicked', 'satisfied')
    who = ['user_id', 'item_id', 'decision_id', 'kind']
    a = a.sort_values(who + ['event_time'])
    a['start'] = a['event_time'].where(~(a.groupby(who, dropna=False)['event_time'].diff() <= again))
    a['start'] = a.groupby(who, dropna=False)['start'].ffill()
    acts = a[a['event_time'] <= a['start'] + again].groupby(who + ['start'], dropna=False)['received_time'].min().reset_index().rename(columns=dict(start='event_time', received_time='known_time'))
    loose = t[(t['type'] == 'conversion') & t['decision_id'].isna() & ~t['user_id'].isin(bots)].rename(columns=dict(received_time='known_time')).assign(kind='conversion')
    acts = pd.concat([x[['user_id', 'item_id', 'kind', 'event_time', 'known_time']] for x in (acts, loose)]).sort_values(['user_id', 'event_time', 'known_time', 'item_id', 'kind'])
    acts.to_parquet(out/'acts.parquet', index=False)
    took['sessions'] = time.perf_counter() - start

    start = time.perf_counter()
    DAY = 86_400_000
    asked = pd.DataFrame(dict(decision_id=d['decision_id'], user_id=d['user_id'], t=ms(d['event_time']))).sort_values('t', kind='stable')
    told = t[['type', 'user_id', 'item_id', 'score']].assign(e=ms(t['event_time']), a=np.maximum(ms(t['event_time']), ms(t['received_time'])))
    clicks = told[(told['type'] == 'click') & told['user_id'].notna() & told['item_id'].notna()]
    def counted(ask, rows, by, days, what=1): # sum of `what` over rows known before t and no older than days
        "Cumulative sums of what enters and leaves, looked up as of each question."
        rows = rows.assign(x=what)
        change = rows[[by, 'a', 'x']].rename(columns=dict(a='m'))
        if days:
            rows = rows[rows['a'] - rows['e'] < days*DAY]
            change = pd.concat([rows[[by, 'a', 'x']].rename(columns=dict(a='m')), rows.assign(m=rows['e'] + days*DAY, x=-rows['x'])[[by, 'm', 'x']]])
        change = change.sort_values('m', kind='stable')
        change['n'] = change.groupby(by)['x'].cumsum()
        got = pd.merge_asof(ask[[by, 't']].reset_index().sort_values('t', kind='stable'), change[[by, 'm', 'n']].drop_duplicates([by, 'm'], keep='last'), left_on='t', right_on='m', by=by, allow_exact_matches=False)
        return got.set_index('index')['n'].reindex(ask.index).fillna(0.).astype(float)
    for w in (1, 7, 28): asked[f'user_clicks_{w}d@1'] = counted(asked, clicks, 'user_id', w)
    c7 = clicks[clicks['a'] - clicks['e'] < 7*DAY].assign(x=clicks['e'] + 7*DAY).sort_values(['user_id', 'item_id', 'a', 'x'])
    c7['reach'] = c7.groupby(['user_id', 'item_id'])['x'].cummax()
    fresh = ~(c7['a'] <= c7.groupby(['user_id', 'item_id'])['reach'].shift())
    spans = c7.groupby(['user_id', 'item_id', fresh.cumsum().rename('span')]).agg(a=('a', 'min'), x=('x', 'max')).reset_index()
    asked['user_items_7d@1'] = counted(asked, spans.assign(e=spans['a']), 'user_id', None) - counted(asked, spans.assign(a=spans['x'], e=spans['x']), 'user_id', None)
    seen = told[(told['type'] == 'decision') & told['user_id'].notna()].sort_values('a', kind='stable')[['user_id', 'a', 'e']]
    seen['m'] = seen.groupby('user_id')['e'].cummax()
    asked['user_since_visit@1'] = ((asked['t'] - pd.merge_asof(asked, seen.drop_duplicates(['user_id', 'a'], keep='last'), left_on='t', right_on='a', by='user_id', allow_exact_matches=False)['m'].to_numpy())/DAY)
    of = d[['decision_id', 'user_id', 'slate']].assign(t=ms(d['event_time'])).explode('slate').rename(columns=dict(slate='item_id')).sort_values('t', kind='stable')
    of['place'] = of.groupby('decision_id').cumcount()
    of = of.reset_index(drop=True)
    of['item_clicks_7d@1'] = counted(of, clicks, 'item_id', 7)
    survey = told[(told['type'] == 'survey') & told['item_id'].notna()]
    of['item_satisfaction@1'] = (counted(of, survey, 'item_id', None, survey['score'].astype(float)) + 15.)/(counted(of, survey, 'item_id', None) + 5.)
    met = of.reset_index().merge(clicks[['user_id', 'item_id', 'a', 'e']], on=['user_id', 'item_id'])
    met = met[met['a'] < met['t']]
    age = (met['t'] - 1 - met['e'])//(7*DAY)
    of['user_item_clicks@1'] = (2.**-age).where(age <= 8, 0.).groupby(met['index']).sum().reindex(of.index).fillna(0.)
    lists = of.sort_values(['decision_id', 'place']).groupby('decision_id')[['item_clicks_7d@1', 'item_satisfaction@1', 'user_item_clicks@1']].agg(list)
    asked.drop(columns=['user_id', 't']).merge(lists, on='decision_id').to_parquet(out/'views.parquet', index=False)
    item = t[t['type'] == 'item'].sort_values(['event_time', 'event_id']).groupby('item_id').agg(category=('category', 'first'), available_time=('event_time', 'min')).reset_index()
    more = acts[~acts['item_id'].isin(item['item_id'])].groupby('item_id')['event_time'].min().rename('available_time').reset_index()
    item = pd.concat([item, more]).fillna({'category': ''}).sort_values('item_id')
    item.to_parquet(out/'items.parquet', index=False)
    acts['item'] = acts['item_id'].map(dict(zip(item['item_id'], range(len(item))))).astype('int32')
    acts[acts['kind'].isin(params['features']['positive'])].sort_values(['user_id', 'event_time', 'known_time', 'item', 'kind'])[['user_id', 'item', 'event_time', 'known_time', 'kind']].to_parquet(out/'interactions.parquet', index=False)
    c = acts[acts['kind'] == 'clicked']
    c.assign(date=c[['event_time', 'known_time']].max(axis=1).dt.floor('D')).groupby(['date', 'item']).size().rename('clicks').reset_index().to_parquet(out/'popularity.parquet', index=False)
    took['features'] = time.perf_counter() - start
    return took

# what both must agree on

ANSWERS = {
    'quarantined': ('artifacts/ingest/quarantine.parquet', 'dead.parquet', ('line',)),
    'events': ('artifacts/ingest/events/*.parquet', 'events/*.parquet', None),
    'sessions': ('artifacts/sessions/sessions/*.parquet', 'sessions.parquet', ('user_id', 'session_id', 'start', '"end"', 'decisions', 'clicks', 'events')),
    'decisions': ('artifacts/sessions/decisions/*.parquet', 'decisions.parquet', None),
    'acts': ('artifacts/sessions/acts/*.parquet', 'acts.parquet', None),
    'views': ('artifacts/features/views.parquet', 'views.parquet', None),
    'items': ('artifacts/features/items.parquet', 'items.parquet', None),
    'interactions': ('artifacts/features/interactions.parquet', 'interactions.parquet', ('user_id', 'item', 'event_time', 'known_time', 'kind')),
    'popularity': ('artifacts/features/popularity.parquet', 'popularity.parquet', None)}

def compare(peer:str, asked=tuple(ANSWERS)):
    "Rows and sum of their hashes, ours and theirs, from the files; another digest stops the benchmark."
    import duckdb
    con = duckdb.connect(config=dict(threads=2, memory_limit='2GB'))
    for name in asked:
        mine, theirs, columns = ANSWERS[name]
        theirs = f'{peer}/{theirs}'
        if columns is None: columns = [f'"{d[0]}"' for d in con.execute(f"SELECT * FROM read_parquet('{theirs}', union_by_name=true) LIMIT 0").description]
        types = {f'"{d[0]}"': str(d[1]) for d in con.execute(f"SELECT * FROM read_parquet('{mine}') LIMIT 0").description}
        cast = [f'CAST({c} AS {types[key]})' if (key := c if c[0] == '"' else f'"{c}"') in types else c for c in columns]
        digest = lambda path: con.execute(f"SELECT count(*), coalesce(sum(hash({', '.join(cast)})::HUGEINT), 0) FROM read_parquet('{path}', union_by_name=true)").fetchone()
        a, b = digest(mine), digest(theirs)
        if a != b: raise SystemExit(f'{name}: ours {a[0]:,} rows with digest {a[1]:x}, {peer} {b[0]:,} rows with {b[1]:x}; a time is worth nothing when the answers differ; compare {mine} with {theirs}')

# one process each

STAGES = ('ingest', 'sessions', 'features')
CHILDREN = {name: lambda name=name: stage(name) for name in STAGES} | dict(lend=lend, sql=sql, pandas=plain_pandas, compare_sql=lambda: compare('peer_sql'), compare_pandas=lambda: compare('peer_pandas'))

def child(name:str, folder:Path)->dict: # seconds, cpu_s, gb, phases
    "Run one program to its end."
    env = os.environ | {'PYTHONPATH': str(ROOT), 'TELEMETRY_LOOP_KEY': 'telemetry-loop development key'}
    start = time.perf_counter()
    p = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--child', name], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    said = p.stdout.read()
    _, status, used = os.wait4(p.pid, 0)
    if status: raise SystemExit(f'{name} ended with status {os.waitstatus_to_exitcode(status)}')
    return dict(seconds=time.perf_counter() - start, cpu_s=used.ru_utime + used.ru_stime, gb=used.ru_maxrss/1e6, phases=json.loads(said.splitlines()[-1]))

def ours(folder:Path)->dict: # as `child`
    "The stages one after another, each in a process of its own as `dvc repro` runs them."
    each = [child(name, folder) for name in STAGES]
    return dict(seconds=sum(e['seconds'] for e in each), cpu_s=sum(e['cpu_s'] for e in each), gb=max(e['gb'] for e in each), phases={k: v for e in each for k, v in e['phases'].items()}, stage_gb={n: e['gb'] for n, e in zip(STAGES, each)})

def measure(base:Path, folder:Path, millions:float, peers:list)->dict:
    "Ours and the peers on a log of this length."
    n = copies(base, folder/'data', round(1e6*millions))
    shutil.copy(ROOT/'params.yaml', folder/'params.yaml')
    said = lambda name, r: print(f'{n:12,} lines  {name:8}{r["seconds"]:8.1f} s  {r["cpu_s"]:8.1f} cpu s  {n/r["seconds"]:10,.0f} events/s  {r["gb"]:5.2f} GB   ' + ', '.join(f'{k} {v:.1f}' for k, v in r['phases'].items()), flush=True)
    found = {'lines': n, 'ours': ours(folder)}
    said('ours', found['ours']); child('lend', folder)
    for peer in peers:
        found[peer] = child(peer, folder)
        said(peer, found[peer]); child(f'compare_{peer}', folder)
    return found

def verdict(found:dict)->dict: # what -> (value, limit, whether larger is better)
    "Ratios against the limits of the issue, where this run measured them."
    out, at = {}, {round(1e-6*f['lines'], 1): f for f in found.values()}
    for m, f in at.items():
        out[f'{m:g} M, ours, peak GB'] = (f['ours']['gb'], LIMITS['gb'], False)
        if 'sql' in f: out[f'{m:g} M, ours / SQL, seconds'], out[f'{m:g} M, ours / SQL, cpu seconds'] = [(f['ours'][k]/f['sql'][k], LIMITS['sql'], False) for k in ('seconds', 'cpu_s')]
        if 'pandas' in f: out[f'{m:g} M, pandas / ours, seconds'], out[f'{m:g} M, pandas / ours, cpu seconds'] = [(f['pandas'][k]/f['ours'][k], LIMITS['pandas'], True) for k in ('seconds', 'cpu_s')]
    if {10, 50} <= set(at): out['50 M / 10 M, ours, seconds'], out['50 M / 10 M, ours, cpu seconds'] = [(at[50]['ours'][k]/at[10]['ours'][k], LIMITS['growth'], False) for k in ('seconds', 'cpu_s')]
    return out

def main():
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument('--millions', type=float, nargs='+', default=[1., 10., 50.], help='lengths of the log; peers stand for the SQL at up to 10, for pandas at up to 1')
    cli.add_argument('--peers', nargs='*', choices=('sql', 'pandas'), default=['sql', 'pandas']); cli.add_argument('--json', type=Path)
    args, found = cli.parse_args(), {}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); world(tmp/'base')
        for m in args.millions:
            found[f'{m:g}'] = measure(tmp/'base', tmp/'run', m, [p for p in args.peers if m <= {'sql': 10, 'pandas': 1}[p]])
            shutil.rmtree(tmp/'run')
    told = verdict(found)
    for what, (value, limit, more) in told.items(): print(f'{what:40} {value:8.2f}   at {"least" if more else "most"} {limit:g}   {"kept" if (value >= limit if more else value <= limit) else "NOT KEPT"}', flush=True)
    if args.json: args.json.write_text(json.dumps({'measured': found, 'against_limits': {k: {'value': round(v, 3), 'limit': l} for k, (v, l, _) in told.items()}, 'cores': os.cpu_count(), 'load': os.getloadavg()[0]}, indent=1) + '\n')

if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: print(json.dumps(CHILDREN[sys.argv[2]]()))
    else: main()
