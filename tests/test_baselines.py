"The simple models: known answers, padding, order, empty input."
import numpy as np
from scipy import sparse
import pytest
from telemetry_loop.baselines import EASE, GapMarkov, ItemKNN, MostPopular, to_read

MODELS = (MostPopular, ItemKNN, GapMarkov)
people = [np.array([0, 1, 2, 3]), np.array([1, 2, 4]), np.array([2, 0]), np.array([2])]

def test_popularity_counts_and_has_no_ties():
    s = MostPopular().fit(people, 7).score(np.array([[-1]]))[0]
    assert np.argsort(-s).tolist() == [2, 0, 1, 3, 4, 5, 6]

def test_markov_matches_a_loop():
    model = GapMarkov(decay=.7, gaps=2, power=1.).fit(people, 7)
    counts = np.zeros((7, 7))
    for s in people:
        for i in range(len(s)):
            for gap in (1, 2):
                if i + gap < len(s): counts[s[i], s[i+gap]] += .7**gap
    counts /= np.maximum(counts.sum(1, keepdims=True), 1e-12)
    assert np.allclose(model.score(np.array([[0, 1, 2]]))[0], .7*counts[2] + .49*counts[1], atol=1e-7)

def test_markov_never_crosses_people():
    assert GapMarkov().fit([np.array([0]), np.array([1])], 2).follows.nnz == 0

def test_knn_matches_the_dense_cosine():
    x = np.zeros((4, 7))
    for u, s in enumerate(people): x[u, s] = 1
    norm = np.maximum(np.sqrt((x**2).sum(0)), 1)
    cos = (x/norm).T @ (x/norm); np.fill_diagonal(cos, 0)
    assert np.allclose(ItemKNN().fit(people, 7).score(np.array([[0, 2]]))[0], cos[0] + cos[2], atol=1e-7)

def test_knn_counts_a_repeat_once():
    a, b = ItemKNN().fit([np.array([0, 1, 0, 1])], 2), ItemKNN().fit([np.array([0, 1])], 2)
    assert np.allclose(a.near.toarray(), b.near.toarray())

@pytest.mark.parametrize('model', MODELS)
def test_padding_and_batch_do_not_matter(model):
    m = model().fit(people, 7)
    together = m.score(np.array([[-1, -1, 0, 1], [-1, 1, 2, 4]]))
    assert np.allclose(together[0], m.score(np.array([[0, 1]]))[0]) and together.shape == (2, 7)

@pytest.mark.parametrize('model', MODELS)
def test_nothing_to_learn_from(model):
    assert np.isfinite(model().fit([], 3).score(np.array([[-1, 0]]))).all()
    assert model().fit(people, 7).score(np.zeros((0, 5), int)).shape == (0, 7)

def test_whole_rows_and_entries_add_up_to_the_same():
    rng = np.random.default_rng(5)
    many = [rng.integers(0, 300, rng.integers(2, 40)) for _ in range(400)]
    ask = np.full((50, 40), -1)
    for row, s in zip(ask, many): row[-len(s):] = s
    for model in (EASE(50.).fit(many, 300).lean(60), GapMarkov().fit(many, 300)):
        assert isinstance(model._table, np.ndarray)
        whole, model._table = model.score(ask), sparse.csr_matrix(model._table)
        assert np.allclose(whole, model.score(ask), rtol=1e-5, atol=1e-7)
    few, none = sparse.random(5000, 5000, .001, 'csr'), sparse.csr_matrix((5000, 5000))
    assert all(sparse.issparse(to_read(m.data, m.indices, m.indptr)) for m in (few, none))
