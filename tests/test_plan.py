"Plan: what was promised cannot be changed afterwards, and the promised power is reached; the naive sums miss it in the same harness."
import math, time
from dataclasses import asdict, replace
import numpy as np, pandas as pd, pytest, yaml
from hypothesis import given, settings, strategies as st
from telemetry_loop.config import TelemetryError
from telemetry_loop.plan import (Plan, check_exposed, duration, expected_share, limits, mde_of, needs, plan_digest, plot_power, power_of, read_plan, rehearse, sample_size)

SEED = 20261   # declared once
VALUES = dict(experiment='headline', hypothesis='Honest headlines bring readers back.', unit='user_id', control='plain', shares={'plain': .5, 'honest': .5}, primary=['engagement'], guardrails={'retention': .02}, directions={'engagement': 'up', 'retention': 'up'},
    secondary=['satisfaction'], segments=['platform'], covariate_days=14, outliers={'engagement': .999}, alpha=.05, power=.8, mde=.03, days=14, looks=[4, 7, 10, 14], stopping='group-sequential')
PLAN = Plan(**VALUES)

@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path/'p.yaml').write_text(text if isinstance(text, str) else yaml.safe_dump(text)); return tmp_path/'p.yaml'
    return write

# the plan
def test_read_as_written(file): assert read_plan(file(VALUES)) == PLAN and plan_digest(file(VALUES)) == plan_digest(PLAN) == plan_digest(str(file(VALUES)))

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.permutations(list(VALUES)), st.booleans())
def test_the_digest_is_of_the_content(tmp_path_factory, keys, comment):
    path = tmp_path_factory.mktemp('p')/'p.yaml'
    path.write_text('# why\n'*comment + yaml.safe_dump({k: (dict(reversed(v.items())) if isinstance(v := VALUES[k], dict) else v) for k in keys}, sort_keys=False))
    assert plan_digest(path) == plan_digest(PLAN) and list(read_plan(path).variants().items()) == [('plain', .5), ('honest', .5)]

CHANGES = [dict(experiment='x'), dict(hypothesis='Other.'), dict(unit='device'), dict(control='honest'), dict(shares={'plain': .6, 'honest': .4}), dict(primary=['satisfaction'], secondary=['engagement'], directions={'satisfaction': 'up', 'retention': 'up'}), dict(guardrails={'retention': .03}), dict(directions={'engagement': 'down', 'retention': 'up'}),
    dict(secondary=[]), dict(segments=[]), dict(covariate_days=7), dict(outliers={}), dict(alpha=.01), dict(power=.9), dict(mde=.02), dict(days=14, looks=[4, 7, 14]), dict(days=15, looks=[4, 7, 10, 15]), dict(stopping='anytime')]
def test_any_value_changes_the_digest():
    assert {k for c in CHANGES for k in c} == set(VALUES)
    assert len({plan_digest(PLAN), *(plan_digest(replace(PLAN, **c)) for c in CHANGES)}) == len(CHANGES) + 1
    assert plan_digest(replace(PLAN, mde=1.)) == plan_digest(replace(PLAN, mde=1)) and plan_digest(PLAN) == plan_digest(Plan(**VALUES))

@pytest.mark.parametrize('change,says', [(dict(shares={'plain': 1.}), '1 variant'), (dict(shares={'plain': .5, 'honest': .6}), 'sum to 1.1'), (dict(shares={'plain': 1., 'honest': 0.}), 'nobody meets'), (dict(shares={'plain': .5, '': .5}), "named ''"), (dict(shares={'plain': .5, True: .5}), 'named True'), (dict(control='x'), "control 'x'"), (dict(primary=[]), 'at least one'),
    (dict(primary=['engagement', 'engagement']), 'once'), (dict(secondary=['engagement']), 'cannot also be'), (dict(primary=['']), 'not empty'), (dict(guardrails={'retention': .02, 'engagement': .1}), 'cannot also be'), (dict(directions={'engagement': 'up'}), "'retention' needs one"), (dict(directions=VALUES['directions'] | {'x': 'up'}), "'x' is no metric"),
    (dict(directions={'engagement': 'better', 'retention': 'up'}), 'up or down'), (dict(guardrails={'retention': 0.}), 'margin'), (dict(guardrails={'retention': math.nan}), 'margin'), (dict(outliers={'x': .9}), "'x' is no metric"), (dict(outliers={'engagement': -1.}), 'cap'), (dict(alpha=0.), 'alpha 0.0'), (dict(alpha=math.nan), 'alpha nan'), (dict(power=.04), 'power'),
    (dict(mde=0.), 'mde 0.0'), (dict(mde=math.inf), 'mde inf'), (dict(covariate_days=-1), 'covariate_days'), (dict(days=0, looks=[]), 'days 0'), (dict(looks=[4, 7]), 'last on day 14'), (dict(looks=[7, 4, 14]), 'ascending'), (dict(looks=[7, 7, 14]), 'ascending'), (dict(looks=[7, 15]), 'within 1..14'), (dict(looks=[0, 14]), 'within 1..14'),
    (dict(stopping='fixed'), 'looked at once'), (dict(stopping='whenever'), 'stopping'), (dict(hypothesis=' '), 'hypothesis')])
def test_what_is_no_plan(file, change, says):
    with pytest.raises(TelemetryError, match=says) as e: replace(PLAN, **change)
    with pytest.raises(TelemetryError, match=says): read_plan(file(VALUES | change))
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('text,says', [(VALUES | dict(lift=.1), "unknown key 'lift'.*hypothesis"), ({k: v for k, v in VALUES.items() if k != 'mde'}, "missing key 'mde'"), (yaml.safe_dump(VALUES) + 'alpha: .2\n', "'alpha' is given 2 times"), ('a: [', 'not valid YAML'), ('', 'no keys'), ('- a', 'no keys'), ('mde: 2025-13-45', 'not valid YAML'), (VALUES | dict(alpha='5e-2'), "alpha is '5e-2'"), (VALUES | dict(days=True), 'days is True'), (VALUES | dict(primary='engagement'), 'primary')])
def test_files_that_are_no_plan(file, text, says):
    with pytest.raises(TelemetryError, match=says) as e: read_plan(file(text))
    assert '\n' not in str(e.value) and 'params' not in str(e.value)

def test_no_file(tmp_path):
    with pytest.raises(TelemetryError, match='no plan at'): read_plan(tmp_path/'none.yaml')

def test_in_plain_words():
    said = PLAN._repr_markdown_()
    for words in ('Honest headlines', '*plain* (50%), *honest* (50%)', '**engagement** rises', '3.0%', '**retention** must not fall by 2.0%', 'days 4, 7, 10', 'quantile 0.999', '14 days before', 'platform', plan_digest(PLAN)): assert words in said
    bare = replace(PLAN, guardrails={}, directions={'engagement': 'down'}, segments=[], outliers={}, covariate_days=0, secondary=[], stopping='anytime', looks=[])
    assert 'every day' in bare._repr_markdown_() and 'falls' in bare._repr_markdown_() and 'CUPED' not in bare._repr_markdown_()

def test_a_declared_size_is_part_of_the_plan(file):
    sized = replace(PLAN, units=5000)
    assert read_plan(file(VALUES | dict(units=5000))) == sized and plan_digest(sized) not in {plan_digest(PLAN), plan_digest(replace(PLAN, units=4000))} and '5,000 units are planned' in sized._repr_markdown_() and 'units are planned' not in PLAN._repr_markdown_()
    with pytest.raises(TelemetryError, match='units 1; it is a number of units'): replace(PLAN, units=1)

# was it kept
def exposures(*plans): return pd.DataFrame(dict(user_id=[f'u{i}' for i in range(len(plans))], event_time=pd.date_range('2025-01-06', periods=len(plans)), plan=plans))
def test_a_plan_edited_after_the_start_is_void():
    mine, other = plan_digest(PLAN), plan_digest(replace(PLAN, mde=.02))
    assert check_exposed(mine, exposures(mine, mine)).answer == 'pass' and check_exposed(mine, exposures()).answer == 'inconclusive'
    late = check_exposed(mine, exposures(mine, mine, other, other).sample(frac=1, random_state=1))
    assert late.answer == 'fail' and all(w in late.reason for w in ('2 of 4', mine, other, 'u2', '2025-01-08')) and 'u3' not in late.reason
    assert 'u0' in check_exposed(other, exposures(mine, mine, other)).reason
    for nothing in (None, ''): assert (v := check_exposed(mine, exposures(mine, nothing))).answer == 'fail' and 'carries none' in v.reason
    with pytest.raises(TelemetryError, match="no column 'plan'"): check_exposed(mine, exposures(mine).drop(columns='plan'))
    with pytest.raises(TelemetryError, match="digest is 'abc'"): check_exposed('abc', exposures(mine))

# power
def test_fixed_horizon_as_statsmodels_and_tea_tasting():
    from statsmodels.stats.power import NormalIndPower, TTestIndPower
    import tea_tasting as tt
    for d, share, alpha in ((.1, .5, .05), (.03, .1, .01), (.3, .8, .1)):
        n = sample_size(2., 2*d, alpha, .9, share=share); ratio = share/(1 - share)
        assert abs(n*(1 - share) - NormalIndPower().solve_power(d, alpha=alpha, power=.9, ratio=ratio)) < 1
        for test, off in ((NormalIndPower(), 1e-9), (TTestIndPower(), .005)): assert abs(power_of(n, 2., 2*d, alpha, share=share) - test.power(d, n*(1 - share), alpha=alpha, ratio=ratio)) < off
    rng = np.random.default_rng(SEED); data = pd.DataFrame(dict(x=rng.normal(10, 2, 2000)))
    theirs = tt.Mean('x', alpha=.05, power=.8, effect_size=.3).solve_power(data, 'n_obs')[0].n_obs
    assert abs(sample_size(data.x.std(), .3) - theirs) < 4

DESIGNS = [{}, dict(share=.1), dict(rho=.7), dict(looks=5), dict(looks=5, kind='pocock'), dict(looks=[1, 3, 10], kind='obrien-fleming'), dict(looks=14, kind='anytime'), dict(kind='anytime'), dict(looks=4, share=.2, rho=-.5)]
@pytest.mark.parametrize('d', DESIGNS, ids=str)
def test_size_power_and_effect_are_one_relation(d):
    n = sample_size(3., .4, .05, .85, **d)
    assert abs(power_of(n, 3., .4, .05, **d) - .85) < .001 and power_of(n - 2, 3., .4, .05, **d) < .85 and abs(mde_of(n, 3., .05, .85, **d) - .4) < .001
    assert power_of(n, 3., 0., **d) <= .05 + 1e-4 and power_of(n, 3., .4, **d) == power_of(n, 3., -.4, **d) and power_of(100*n, 3., 4., **d) == pytest.approx(1)
    used = [expected_share(n, 3., e, **d) for e in (0., .4, 4.)]
    assert used[0] >= used[1] >= used[2] > 0 and (used == [1, 1, 1]) == ('looks' not in d and 'kind' not in d)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(.01, 100), st.floats(.02, 1), st.floats(.001, .2), st.floats(.3, .99), st.floats(-.95, .95), st.floats(.05, .95))
def test_properties_of_a_size(sd, effect, alpha, power, rho, share):
    n = sample_size(sd, effect*sd, alpha, power, rho, share=share)
    assert n >= sample_size(sd, effect*sd, alpha, power, rho) and n <= sample_size(sd, effect*sd, alpha, power, share=share)
    assert abs(n - sample_size(1., effect, alpha, power, rho, share=1 - share)) <= 1 and n >= sample_size(sd, 1.1*effect*sd, alpha, power, rho, share=share)

def test_known_answers():
    assert sample_size(1., .1) == 3140 and sample_size(.5, .05) == 3140                         # (1.96 + .8416)^2 4/.01
    assert abs(sample_size(1., .1, rho=.6)/3140 - .64) < .001 and abs(sample_size(1., .1, share=.1)/3140 - .25/.09) < .001
    assert abs(sample_size(1., .1, looks=5)/3140 - 1.026) < .004 and abs(sample_size(1., .1, looks=5, kind='pocock')/3140 - 1.21) < .01  # Jennison & Turnbull's inflation: 1.03, 1.21-1.23
    assert limits()[1] == pytest.approx([1.959964]) and limits(5)[1] == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=.001)
    assert limits([2, 4, 8])[0].tolist() == [.25, .5, 1]

@pytest.mark.parametrize('call,says', [(lambda: sample_size(0., .1), 'sd is 0.0'), (lambda: sample_size(math.nan, .1), 'sd is nan'), (lambda: sample_size(1., 0.), 'mde is 0.0'), (lambda: sample_size(1., .1, alpha=0), 'alpha is 0'), (lambda: sample_size(1., .1, power=1.), 'power is 1.0'), (lambda: sample_size(1., .1, alpha=.1, power=.05), 'power is 0.05'), (lambda: sample_size(1., .1, rho=1.), 'rho is 1.0'),
    (lambda: sample_size(1., .1, share=0.), 'share is 0.0'), (lambda: sample_size(1., .1, looks=0), 'looks is 0'), (lambda: sample_size(1., .1, looks=2.5), 'looks is 2.5'), (lambda: sample_size(1., .1, looks=math.nan), 'looks is nan'), (lambda: sample_size(1., .1, looks=[2, 1]), r'looks is \[2, 1\]'), (lambda: sample_size(1., .1, looks=[]), r'looks is \[\]'), (lambda: sample_size(1., .1, looks=3, kind='fixed'), 'cries out'), (lambda: sample_size(1., .1, kind='hope'), "kind is 'hope'"),
    (lambda: power_of(0, 1., .1), 'n is 0'), (lambda: power_of(10, 1., math.nan), 'mde is nan'), (lambda: mde_of(math.inf, 1.), 'n is inf'), (lambda: duration([], 1., .1), 'arrivals has 0'), (lambda: duration([0, 0], 1., .1), '0 units'), (lambda: duration([5, -1], 1., .1), '1 of them'), (lambda: duration([500]*5, 1., .1), '2,500 units in 5 days, which find an effect of 0.112'), (lambda: duration([5e3]*5, 1., .1, every=0), 'every is 0'),
    (lambda: rehearse([1., 1.], 100, 0.), 'one value only'), (lambda: rehearse([1., math.nan], 100, 0.), '1 values that are missing'), (lambda: rehearse([1., 2.], 10, 0., looks=10), '10 looks'), (lambda: rehearse(np.ones((4, 3)), 10, 0.), r'shape \(4, 3\)')])
def test_numbers_that_cannot_be(call, says):
    with pytest.raises(TelemetryError, match=says) as e: call()
    assert '\n' not in str(e.value)

# days
def test_days_with_falling_arrivals():
    even, falling = [1000]*40, 1000*.9**np.arange(40)
    assert duration(even, 1., .1) == 4 and duration(falling, 1., .1) == 4 and duration(even, 1., .05) == 13
    with pytest.raises(TelemetryError, match='find an effect of'): duration(falling, 1., .05)     # as if even: 13 days; in truth never
    for d in (dict(), dict(every=3), dict(every=7, kind='pocock'), dict(kind='anytime'), dict(rho=.5, share=.3)):
        days = duration(1500*.93**np.arange(60), 1., .06, **d); total = np.cumsum(1500*.93**np.arange(60))
        step = d.get('every') or (1 if 'kind' in d else None); rest = {k: v for k, v in d.items() if k != 'every'}
        at = lambda day: power_of(total[day - 1], 1., .06, looks=None if step is None else sorted({*total[step - 1:day:step], total[day - 1]}), **rest)
        assert at(days) >= .8 > at(days - 1)
    assert duration([0, 0, 5000, 0], 1., .1, every=1) == 3                                        # days on which nobody came
    assert duration([1e9]*3, 1., .1) == 1 and duration([4000, *[1]*20], 1., .1, every=1) == 1

# rehearsed: 5,000 experiments each, raw units
def world(seed=SEED, m=40_000):
    rng = np.random.default_rng(seed); before = rng.gamma(2, 1, m)
    return np.stack([.6*before + rng.gamma(2, .8, m), before], 1)

@pytest.mark.parametrize('d', [{}, dict(share=.2), dict(cuped=True), dict(looks=5), dict(looks=5, kind='pocock'), dict(looks=[1, 2, 6, 7, 14]), dict(looks=14, kind='anytime'), dict(looks=5, cuped=True, share=.3)], ids=str)
def test_planned_power_is_reached_within_two_points(d):
    d = dict(d); people = world(); sd = people[:, 0].std(); cuped = d.pop('cuped', False)
    n = sample_size(sd, .12*sd, rho=np.corrcoef(people.T)[0, 1] if cuped else 0., **d); who = people if cuped else people[:, 0]
    assert abs(rehearse(who, n, .12*sd, seed=SEED, **d).value - .8) < .02
    assert abs(rehearse(who, n, 0., seed=SEED, **d).value - power_of(n, sd, 0., **d)) < .01

def test_proportions_through_their_sd():
    p = .3; clicks = np.r_[np.ones(300), np.zeros(700)]; n = sample_size(math.sqrt(p*(1 - p)), .04)
    assert abs(rehearse(clicks, n, .04, seed=SEED).value - .8) < .02

def test_the_naive_sums_miss_their_promise():
    people = world(); y = people[:, 0]; sd = y.std(); n = sample_size(sd, .12*sd); say = lambda *a, **k: rehearse(*a, seed=SEED, **k).value
    assert say(y, n, .12*sd, share=.1) < .5                                                       # unequal shares ignored
    assert say(y, n, .12*sd, looks=14, kind='anytime') < .6 and say(y, n, .12*sd, looks=5, kind='pocock') < .76   # looks ignored in the size
    assert say(people, sample_size(sd, .12*sd, rho=.85), .12*sd) < .6                             # a covariate overrated
    assert say(y, n, 0., looks=5, z=1.96) == pytest.approx(.142, abs=.02) and say(y, n, 0., looks=14, z=1.96) > .18     # looks ignored in the limits

def test_rehearsals_repeat_and_are_quick():
    y = world()[:, 0]; begun = time.process_time()
    assert rehearse(y, 3140, .1, seed=3) == rehearse(y, 3140, .1, seed=3) != rehearse(y, 3140, .1, seed=4) and time.process_time() - begun < 10
    assert rehearse(y, 3140, .1, runs=7).n == 7 and rehearse(y, 3_000_000, 0., runs=1).n == 1

# the plan's own numbers
def test_needs():
    base = {'engagement': (6., 4., .6), 'retention': (.6, .49)}
    found = needs(PLAN, base).set_index('metric')
    assert found.units['engagement'] == sample_size(4., .18, rho=.6, looks=[4, 7, 10, 14]) and found.units['retention'] == sample_size(.49, .012, looks=[4, 7, 10, 14]) and found.power.isna().all()
    assert needs(replace(PLAN, covariate_days=0), base).units[0] == sample_size(4., .18, looks=[4, 7, 10, 14])
    three = replace(PLAN, shares={'plain': .5, 'a': .4, 'b': .1}, stopping='anytime', looks=[])
    assert needs(three, base).units[0] == math.ceil(sample_size(4., .18, .025, rho=.6, looks=14, kind='anytime', share=1/6)/.6)
    once = replace(PLAN, stopping='fixed', looks=[14], primary=['engagement', 'satisfaction'], secondary=[], directions=VALUES['directions'] | {'satisfaction': 'up'})
    assert needs(once, base | {'satisfaction': (3., 1.)}).units[0] == sample_size(4., .18, .025, rho=.6)
    falling = 4000*.8**np.arange(14); total = falling.cumsum()
    assert needs(PLAN, base, falling).power[0] == pytest.approx(power_of(total[-1], 4., .18, rho=.6, looks=total[[3, 6, 9, 13]]))
    assert len(needs(replace(PLAN, stopping='anytime', looks=[]), base, 4000*.3**np.arange(14))) == 2     # days that bring next to nobody
    for args, says in ((({'engagement': (6., 4.)},), "no 'retention'"), ((base | {'engagement': (0., 4.)},), 'engagement has mean 0'), ((base | {'engagement': (6., 0.)},), 'engagement: sd is 0'), ((base, [5]*3), '3 days'), ((base, [0]*14), '0 units')):
        with pytest.raises(TelemetryError, match=says): needs(PLAN, *args)

def test_the_picture():
    import matplotlib; matplotlib.use('Agg')
    ax = plot_power(1., .1); lines = {l.get_label(): l.get_ydata() for l in ax.lines[:3]}
    assert len(lines) == 3 and all((np.diff(y) >= -1e-9).all() for y in lines.values()) and (lines['one look'] >= lines['anytime']).all()
    matplotlib.pyplot.close('all')

def test_plans_are_plain_values(): assert asdict(PLAN) == VALUES | dict(units=0)
