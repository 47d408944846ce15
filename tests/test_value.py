"An evaluation in words and pictures: each answer for the log that deserves it, and nothing claimed of a refused one."
import matplotlib; matplotlib.use('Agg')
import pandas as pd, pytest
from telemetry_loop.ope import OpeConfig, advice, evidence
from telemetry_loop.support import DEFAULT_LIMITS
from telemetry_loop.value import CALLED, assumed, advised, agreement, answer, at_fault, checks, plot_explore, plot_gains, plot_knobs, plot_support, plot_weights, reasons, would_help
from slate_log import slates

CFG = OpeConfig(folds=5, bins=12, penalty=20., estimator='dr', explore=.05)

@pytest.fixture(scope='module')
def logs():
    "One log evaluated as it is, with the same policy as target, and with halved propensities."
    rows, candidates, _ = slates()
    same = rows.assign(target_prob=rows.propensity), candidates.assign(target_prob=1/8)
    return {name: evidence(r, c, CFG, DEFAULT_LIMITS, 7)[0] for name, (r, c) in dict(better=(rows, candidates), worse=(rows.assign(reward=1 - rows.reward), candidates), same=same, halved=(rows.assign(propensity=rows.propensity/2), candidates)).items()}, rows, candidates

def test_each_log_gets_the_answer_it_deserves(logs):
    found, _, _ = logs
    assert {k: would_help(v) for k, v in found.items()} == dict(better='yes', worse='no', same='not clear', halved='cannot tell')
    assert answer(found['better']).startswith('**Yes, it would help: +') and answer(found['halved']).startswith('**This log cannot tell.**') and '%' in answer(found['better'])
    assert 'mean weight' in reasons(found['halved']) and reasons(found['better']) == '- Every check passed.'
    assert agreement(found['halved']).startswith('As the log cannot tell') and 'all overlap' in agreement(found['better'])

def test_a_log_without_propensities_claims_nothing(logs):
    empty, _ = evidence(logs[1][:0], logs[2][:0], CFG, DEFAULT_LIMITS, 7)
    assert answer(empty).startswith('**This log cannot tell.** 1 check objects') and set(checks(empty, DEFAULT_LIMITS).found) == {'0', '-'}

def test_an_estimator_that_disagrees_is_named(logs):
    odd = logs[0]['better'] | {'gain': logs[0]['better']['gain'] | {'clipped': dict(value=9., ci_lower=8., ci_upper=10., n=9)}}
    assert 'cut off disagrees' in agreement(odd)

def test_every_estimator_has_a_name_and_every_picture_draws(logs):
    found, rows, candidates = logs
    for ope in found.values():
        assert set(ope['estimates']) | set(ope['otherwise']) == set(CALLED) and set(ope['gain']) == set(ope['estimates']) - {'dm'} and set(ope['tuned']) <= set(CALLED)
        plot_gains(ope); plot_knobs(ope); assert len(checks(ope, DEFAULT_LIMITS)) == 5
    plot_weights(rows.assign(weight=rows.target_prob/rows.propensity)); plot_weights(pd.DataFrame(dict(weight=[])))
    told = advice(rows, candidates, CFG)
    assert 0 < told.give.sum() <= .05 + 1e-9 and 0 < told.cut[0] < 1 and 'anybody' in advised(told, found['better'])
    plot_explore(told); plot_explore(told[:0]); assert 'would not shorten' in advised(told.assign(give=0.), found['better']) and 'nothing that could say' in advised(told[:0], found['better'])
    dots = plot_support(told).collections[0].get_offsets(); assert len(dots) == len(told) and told.wanted.sum() == pytest.approx(len(rows)) and told.rows.sum() == len(rows); plot_support(told[:0])

def test_a_log_that_cannot_be_believed_gives_no_advice_and_one_that_tried_too_little_does(logs):
    found, rows, candidates = logs
    told = advice(rows, candidates, CFG)
    assert at_fault(found['halved']) and advised(told, found['halved']).startswith('Before exploring anywhere, mend') and not at_fault(found['better'])
    thin = found['better'] | dict(support=found['better']['support'] | dict(verdict='refuse', reasons=['low_ess: 9 rows', 'heavy_tail: 1.2']))
    assert not at_fault(thin) and advised(told, thin).startswith('Spending')

def test_a_line_says_what_the_log_says_against_its_assumption(logs):
    found, rows, candidates = logs
    only = rows[['decision_id', 'position', 'propensity']].assign(logger='only', wrote=True); vectors = pd.DataFrame(dict(item_id=[str(i) for i in range(8)], vector=[[float(i)] for i in range(8)]))
    ope, _ = evidence(rows, candidates.assign(logging_prob=1/8), CFG, DEFAULT_LIMITS, 7, vectors=vectors, loggers=only)
    assert set(ope['estimates']) == set(CALLED) and ope['otherwise']['mips']['alone'] and 'none found' in assumed(ope, 'mips') and 'every item stands alone' in agreement(ope) # what a slate earns follows its score, not its items
    label = lambda ope: [t.get_text() for t in plot_gains(ope).get_yticklabels()]
    assert 'similar items together (none found)' in label(ope) and 'inverse propensity of all who logged' in label(ope) and not any('similar' in x for x in label(found['better']))
    ope['otherwise']['mips'] |= dict(alone=False, broken=True)
    assert 'similar items together (they differ)' in label(ope) and 'no interval is claimed' in agreement(ope)
