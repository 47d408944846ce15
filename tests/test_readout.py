"What an experiment's numbers say: every answer as plainly as the others, in words and pictures."
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from telemetry_loop.contrast import moments
from telemetry_loop.experiment import analyse
from telemetry_loop.plan import Plan
from telemetry_loop.readout import COLOURS, answer, beside, course_said, metrics_table, plot_answers, plot_shares, segments_said, sentence

SEED = 59
PLAN = Plan('try', 'More joy.', 'user_id', 'old', {'old': .5, 'new': .5}, ['joy'], {'noise': .05}, {'joy': 'up', 'noise': 'down'}, ['clicks'], [], 0, {}, .05, .8, .03, 14, [14], 'fixed')

def entry(joy=0., noise=0., clicks=0., keep=1., seed=SEED): # an entry of metrics/experiment.json
    rng = np.random.default_rng(seed); arm = rng.random(8000) < .5
    t = pd.DataFrame(dict(variant=np.where(arm, 'new', 'old'), joy=rng.normal(5 + 5*joy*arm, 1), noise=rng.normal(2 + 2*noise*arm, .5), clicks=rng.normal(3 + 3*clicks*arm, 1)))[(~arm) | (rng.random(8000) < keep)]
    found = analyse(moments(t, 'variant', ['joy', 'noise', 'clicks']), 'old', plan=PLAN).as_dict()
    return found | dict(hypothesis=PLAN.hypothesis, shares=PLAN.variants(), exposed=t.variant.value_counts().to_dict())

STORIES = dict(won=entry(.05), broke=entry(.05, .2), worse=entry(-.05), none=entry(), lost=entry(.05, keep=.8))
KINDS = dict(won='win', broke='harm', worse='harm', none='no difference shown', lost='invalid')

def test_every_answer_is_told_in_its_first_line_and_picture():
    assert {k: v['verdict']['kind'] for k, v in STORIES.items()} == KINDS
    said = answer(dict(experiments=STORIES, crossings=[])); assert said.startswith('**Of 5 experiments 1 helped, 2 did harm, 1 showed no difference, 1 not valid.**')
    assert '- **broke: No, it did harm.** Guardrail noise is broken: a loss of' in said and '- **none: No difference was shown.** No primary moved; an effect of 3.00% would have been found' in said and '- **lost: The experiment is not valid.** The variants did not get their declared shares' in said
    ax = plot_answers(dict(experiments=STORIES, crossings=[])); labels = [t.get_text() for t in ax.get_yticklabels()][::-1]
    assert labels == ['won: helped\njoy', 'broke: did harm\njoy', 'broke: did harm\nnoise (guardrail)', 'worse: did harm\njoy', 'none: showed no difference\njoy', 'lost: not valid'] and [t.get_text().strip() for t in ax.texts] == ['no difference can be read']
    dots = {round(float(l.get_ydata()[0])): (float(l.get_xdata()[0]), l.get_color()) for l in ax.lines if l.get_marker() == 'o'}
    assert dots[5][0] > 4 and dots[5][1] == COLOURS['win'] and dots[4][0] > 4 and dots[4][1] != COLOURS['harm'] and dots[3][0] < -15 and dots[3][1] == dots[2][1] == COLOURS['harm'] and dots[2][0] < -4 and dots[1][1] == COLOURS['no difference shown']
    margin = [l.get_xdata()[0] for l in ax.lines if np.ptp(l.get_ydata()) > .5 and l.get_xdata()[0] != 0]; assert margin == [-5.]   # more noise is worse, so it is drawn to the left
    assert plot_answers(dict(experiments={}, crossings=[])) is None; plt.close('all')

def test_what_moved_beside_the_question_is_said():
    one = entry(.05, clicks=-.2); assert ' Beside that, clicks fell, -' in answer(dict(experiments=dict(a=one), crossings=[])) and beside(STORIES['won'], 'new') == ''
    assert metrics_table(one).set_index('metric').answer.to_dict() == dict(joy='rose', noise='kept', clicks='fell')
    lost = entry(.05, clicks=-.2, keep=.8); assert 'Beside that' not in answer(dict(experiments=dict(a=lost), crossings=[]))   # nothing of it can be read

def test_missing_people_are_seen():
    ax = plot_shares(STORIES['lost']); said = [t.get_text() for t in ax.texts]; met = STORIES['lost']['exposed']
    assert said == [f'{met[v]:,}: {abs(met["new"] - met["old"])/2:,.0f} {word} than the plan says' for v, word in (('new', 'fewer'), ('old', 'more'))] and plot_shares(dict(exposed={'a': 1})) is None; plt.close('all')

def test_refusals_in_plain_words():
    assert sentence('nothing.') == sentence('nothing') == 'Nothing.'
    assert course_said(dict(novelty=dict(new=dict(refused="column 'days since exposure' has 0 days with at least 100 units in each arm; wait"))), 'new') == "The effect cannot be followed day by day: column 'days since exposure' has 0 days with at least 100 units in each arm."
    assert segments_said(dict(segments=dict(new=dict(newcomer=dict(refused='too few; join them')))), 'new') == '- **newcomer**: cannot be told: too few'
