"Survival: staying under censoring, hazards, and visits to come."
import hashlib, io, os, subprocess, sys, zipfile
import numpy as np, pandas as pd, pytest
from telemetry_loop.config import TelemetryError
from telemetry_loop.estimate import Estimate
from telemetry_loop.survival import Visits, _log_likelihood, bgnbd, cox, kaplan_meier, log_rank, plot_staying, restricted_mean, staying

SEED = 5501 # declared once
inside = lambda e, v: e.ci_lower <= v <= e.ci_upper

def test_curve_by_hand():
    "Textbook product-limit: 1 leaves of 4, one censored, 1 of 2, 1 of 1."
    t = kaplan_meier([1, 2, 2, 3, 4], [1, 1, 0, 0, 1])
    assert t.staying.tolist() == pytest.approx([.8, .6, 0]) and t.at_risk.tolist() == [5, 4, 1]
    assert staying(t, 0).value == 1 and staying(t, 2.5).value == pytest.approx(.6) and staying(t, 9, watched=4).value is None
    assert restricted_mean([1, 2, 2, 3, 4], [1, 1, 0, 0, 1], 3).value == pytest.approx(1 + .8 + .6)
    assert ((t.ci_lower <= t.staying) & (t.staying <= t.ci_upper)).all()

def joiners(n, mean, rng, end=60): joined, stay = rng.uniform(0, end, n), rng.exponential(mean, n); return np.minimum(stay, end - joined), stay <= end - joined

def test_curve_and_restricted_mean_cover():
    rng, s, days = np.random.default_rng(SEED + 1), [], []
    for _ in range(200):
        d, e = joiners(400, 30., rng)
        s.append(inside(staying(kaplan_meier(d, e), 28), np.exp(-28/30))); days.append(inside(restricted_mean(d, e, 28), 30*(1 - np.exp(-28/30))))
    assert np.mean(s) >= .91 and np.mean(days) >= .91 and max(np.mean(s), np.mean(days)) <= .99

def test_twenty_thousand():
    d, e = joiners(20_000, 30., np.random.default_rng(SEED + 2)); truth = np.exp(-28/30)
    assert abs(staying(kaplan_meier(d, e), 28).value - truth) < .01
    assert abs((d[e] > 28).mean() - truth) > .1 and abs((d > 28).mean() - truth) > .1

def test_hazard_ratio_and_log_rank():
    rng = np.random.default_rng(SEED + 3); a, b, c = joiners(3000, 30., rng), joiners(3000, 30*np.exp(-.2), rng), joiners(3000, 30., rng)
    both = lambda p, q: pd.DataFrame(dict(t=np.r_[p[0], q[0]], e=np.r_[p[1], q[1]], z=np.repeat([0, 1], 3000)))
    found = cox(both(a, b), 't', 'e', ['z'])['z']
    assert abs(np.log(found.value) - .2) < 3*np.log(found.ci_upper/found.ci_lower)/3.92 and found.ci_lower > 1
    assert log_rank(*[both(a, b)[k] for k in 'tez'])['p_value'] < .001 < .01 < log_rank(*[both(a, c)[k] for k in 'tez'])['p_value']

def test_bad_durations_are_refused_by_name():
    t = pd.DataFrame(dict(t=[1., 2, 3, 4], e=[1, 1, 0, 1], z=[0, 1, 0, 1], k=1, w=[np.nan, 1, 2, 3], s='u'))
    for words, call in {'duration has 1 values that are negative': lambda: kaplan_meier([-1, 2], [1, 1]), 'all are censored': lambda: kaplan_meier([1, 2], [0, 0]), 'other than 0 and 1': lambda: kaplan_meier([1, 2], [1, 2]),
                        'one length': lambda: kaplan_meier([1, 2], [1]), 'duration has 0 values': lambda: kaplan_meier([], []), 'group has 1 variant': lambda: log_rank([1, 2], [1, 1], ['a', 'a']), 'group has 1 values': lambda: log_rank([1, 2], [1, 1], ['a']),
                        "lacks the column 'y'": lambda: cox(t, 't', 'e', ['y']), "'k' is constant": lambda: cox(t, 't', 'e', ['k']), "'w' has 1 values": lambda: cox(t, 't', 'e', ['w']), 'not numeric': lambda: cox(t, 't', 'e', ['s']),
                        'covariates is empty': lambda: cox(t, 't', 'e', []), 'same thing twice': lambda: cox(t.assign(y=1 - t.z), 't', 'e', ['z', 'y']), 'same for everyone who left': lambda: cox(t.assign(e=[0, 1, 0, 1]), 't', 'e', ['z']),
                        'horizon is 9': lambda: restricted_mean([1, 2], [1, 1], 9)}.items():
        with pytest.raises(TelemetryError, match=words) as told: call()
        assert '\n' not in str(told.value)

# ---- BG/NBD
CDNOW = (.243, 4.414, .793, 2.426)
point = lambda *values: Visits(*[Estimate(v, None, None, 0) for v in values], 0.)

def shoppers(n, rng, r=.243, alpha=4.414, a=.793, b=2.426, ahead=0.):
    rate, drop, T = rng.gamma(r, 1/alpha, n), rng.beta(a, b, n), rng.uniform(27, 39, n)
    x, t_x, later, now, on = *np.zeros((4, n)), np.ones(n, bool)
    while on.any():
        now = now + rng.exponential(1/np.maximum(rate, 1e-12)); on = on & (now <= T + ahead); early = on & (now <= T)
        x += early; t_x = np.where(early, now, t_x); later += on & (now > T); on = on & (rng.random(n) >= drop)
    return x, t_x, T, later

def test_published_person():
    assert point(*CDNOW).expected(39., [2], [30.43], [38.86])[0] == pytest.approx(1.226, abs=1e-3)
    assert point(*CDNOW).alive([0, 2], [0, 30.43], [38.86, 38.86])[0] == 1

def test_likelihood_is_the_integral():
    "One customer, integrated numerically over rate and dropout."
    from scipy import integrate, stats
    r, alpha, a, b = 1.2, 3., .8, 2.5; x, t_x, T = 3, 10., 14.
    def density(p, lam): return stats.gamma.pdf(lam, r, scale=1/alpha)*stats.beta.pdf(p, a, b)*((1 - p)**x*lam**x*np.exp(-lam*T) + p*(1 - p)**(x - 1)*lam**x*np.exp(-lam*t_x))
    total, _ = integrate.dblquad(density, 0, 8, 0, 1, epsabs=1e-12)
    assert _log_likelihood(np.log([r, alpha, a, b]), np.array([x]), np.array([t_x]), np.array([T]))[0] == pytest.approx(np.log(total), abs=1e-4)

def test_parameters_come_back_and_the_forecast_holds():
    x, t_x, T, later = shoppers(20_000, np.random.default_rng(SEED + 4), ahead=39.); model = bgnbd(x, t_x, T)
    for e, v in zip((model.r, model.alpha, model.a, model.b), CDNOW): assert abs(np.log(e.value/v)) < 3*np.log(e.ci_upper/e.ci_lower)/3.92
    promised, naive = model.expected(39., x, t_x, T).mean(), (x/T*39).mean()
    assert abs(promised/later.mean() - 1) < .06 and naive/later.mean() > 1.3                              # the naive takes the silent for alive
    chance = model.alive(x, t_x, T); assert ((chance > 0) & (chance <= 1)).all()
    day = bgnbd(x, 7*t_x, 7*T)                                                                            # weeks or days: the same people
    assert day.r.value == pytest.approx(model.r.value, rel=1e-4) and day.alpha.value == pytest.approx(7*model.alpha.value, rel=1e-4)
    assert day.log_likelihood == pytest.approx(model.log_likelihood - x.sum()*np.log(7), rel=1e-8)

def test_longer_silence_less_alive():
    chance = point(*CDNOW).alive([4]*20, [20.]*20, np.linspace(20, 200, 20)); assert (np.diff(chance) < 0).all()

SUMMARY, DIGEST = 'lifetimes/datasets/cdnow_customers_summary.csv', '09d92ca80daaabe8be0f997d4c539f9c9606106baa5b199081fe01cbce5fa9f6'

@pytest.fixture(scope='module')
def cdnow(tmp_path_factory):
    "The CDNOW summary (ID, frequency, recency, T; 2,357 customers): a CSV file named in CDNOW, or the one that the package lifetimes carries. Its rows are not part of the repository; the package is read, not installed."
    if (path := os.environ.get('CDNOW')): return pd.read_csv(path)
    folder = tmp_path_factory.mktemp('cdnow')
    done = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--disable-pip-version-check', '--no-deps', '--only-binary', ':all:', '--retries', '0', '--timeout', '5', '-d', str(folder), 'lifetimes==0.11.3'], capture_output=True, text=True)
    if done.returncode: pytest.skip('the CDNOW summary is not part of the repository, and the package lifetimes 0.11.3 that carries it cannot be had here; name a CSV file in CDNOW')
    with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel: text = wheel.read(SUMMARY)
    assert hashlib.sha256(text).hexdigest() == DIGEST
    return pd.read_csv(io.BytesIO(text))

def test_published_fit(cdnow):
    "Fader, Hardie & Lee 2005, table 2; to the fourth digit as the acceptance figures' own fit."
    assert len(cdnow) == 2357; m = bgnbd(cdnow.frequency, cdnow.recency, cdnow['T']); found = (m.r, m.alpha, m.a, m.b)
    assert [e.value for e in found] == pytest.approx(CDNOW, abs=1.1e-3) and [e.value for e in found] == pytest.approx((.2426, 4.4136, .7930, 2.4261), abs=5e-4) and m.log_likelihood == pytest.approx(-9582.4256, abs=1e-4)
    assert all(e.ci_lower < v < e.ci_upper for e, v in zip(found, CDNOW))
    naive = cdnow.frequency/cdnow['T']*39                                                                   # takes everybody for alive: a rate, and no end
    assert naive.mean() > 1.15*m.expected(39., cdnow.frequency, cdnow.recency, cdnow['T']).mean()

def test_published_expectation():
    "The customer of Fader, Hardie & Lee's note: two repeat purchases, the last in week 30.43 of 38.86, has 1.226 more to come in 39 weeks."
    assert point(*CDNOW).expected(39, [2], [30.43], [38.86])[0] == pytest.approx(1.226, abs=5e-4)

def test_impossible_visits_are_refused_by_name():
    for words, call in {'x has 1 values that are no counts': lambda: bgnbd([1.5], [1], [2]), 'T has 1 values': lambda: bgnbd([0], [0], [0]), 't_x has 1 impossible': lambda: bgnbd([1], [3], [2]), 't_x has 2 impossible': lambda: bgnbd([0, 1], [1, 0], [2, 2]),
                        'x is 0 for everyone': lambda: bgnbd([0, 0], [0, 0], [2, 2]), 'same people': lambda: bgnbd([1], [1, 1], [2]), 't is 0': lambda: point(*CDNOW).expected(0, [1], [1], [2])}.items():
        with pytest.raises(TelemetryError, match=words): call()

def test_picture():
    import matplotlib; matplotlib.use('Agg')
    curves = dict(a=kaplan_meier([1, 2], [1, 1]), b=kaplan_meier([3, 4], [0, 1]).to_dict('records'))                  # a table, or what a file keeps of it
    ax = plot_staying(curves, 'a'); assert [x.get_text() for x in ax.get_legend().get_texts()] == ['a', 'b'] and ax.lines[1].get_ydata()[0] == 1; matplotlib.pyplot.close('all')
