"Slates logged evenly, with a reward whose truth is known."
import numpy as np, pandas as pd
from telemetry_loop.estimators import Tables

TABLES = Tables(bins=12, penalty=20.)

def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True)); return e/e.sum(1, keepdims=True)

def slates(n=2000, k=3, m=8, seed=20261, signal=1.):
    "Uniform logging over m candidates, k places, five decisions a user; -> rows, candidates, true gain per decision."
    rng = np.random.default_rng(seed); i = np.arange(n)[:, None]
    score, pop = rng.normal(size=(2, n, m)); prob = softmax(score)
    shown = np.argsort(rng.random((n, m)), axis=1)[:, :k]
    like = 1/(1 + np.exp(1 - signal*score)); reward = (rng.random((n, k)) < like[i, shown])*1.
    name = np.char.add('d', np.arange(n).astype(str))
    rows = pd.DataFrame(dict(decision_id=np.repeat(name, k), user_id=np.repeat(np.char.add('u', (np.arange(n)//5).astype(str)), k), who='anybody', position=np.tile(np.arange(k), n), item_id=shown.ravel().astype(str),
        reward=reward.ravel(), clicked=1 - reward.ravel(), satisfied=reward.ravel(), hidden=(rng.random(n*k) < .02)*1., propensity=1/m, target_prob=prob[i, shown].ravel(), score=score[i, shown].ravel(),
        log_popularity=pop[i, shown].ravel(), event_time=pd.Timestamp('2026-01-01'), seq=np.repeat(np.arange(n), k)))
    cand = pd.DataFrame(dict(decision_id=np.repeat(name, k*m), position=np.tile(np.repeat(np.arange(k), m), n), item_id=np.tile(np.arange(m).astype(str), n*k), target_prob=np.repeat(prob, k, axis=0).ravel(),
        score=np.repeat(score, k, axis=0).ravel(), log_popularity=np.repeat(pop, k, axis=0).ravel()))
    return rows, cand, k*float(((prob - 1/m)*like).sum(1).mean())
