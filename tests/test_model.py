"The network: causal, blind to padding, exact in its loss, quiet about the unknown."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from telemetry_loop.model import SequenceModel, Shape, acts, chunked_cross_entropy, left_aligned, sampled_cross_entropy, told

@pytest.fixture
def net():
    torch.manual_seed(1)
    net = SequenceModel(12, np.arange(12) % 4, Shape(16, 2, 2, 6, .3, ())).eval()
    for p in net.parameters(): p.data += .1*torch.randn_like(p)          # nothing may hold only at initialisation
    return net

def test_a_later_item_leaves_earlier_states_alone(net):
    a, b = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 2, 3, 9, 5, 6]])
    diff = (net(a) - net(b)).abs().amax(2)[0]
    assert diff[:4].max() < 1e-6 and diff[4:].min() > 1e-4

def test_order_matters(net):
    assert (net.last(torch.tensor([[1, 2, 3]])) - net.last(torch.tensor([[2, 1, 3]]))).abs().max() > 1e-3

def test_padding_changes_nothing(net):
    a = net.last(torch.tensor([[1, 2, 3]]))
    b = net.last(torch.tensor([[1, 2, 3, -1, -1], [4, 5, 6, 7, 8]]))[:1]
    assert (a - b).abs().max() < 1e-5
    assert (net.last(torch.tensor([[-1]])) - net(torch.tensor([[5, 6]]))[:, 0]).abs().max() < 1e-5   # nobody's history is the start

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 9), min_size=7, max_size=7), min_size=1, max_size=5), st.integers(1, 8))
def test_left_aligned_keeps_the_newest_in_order(rows, length):
    found = left_aligned(np.array(rows), length)
    for row, got in zip(rows, found):
        want = [i for i in row if i >= 0][-length:]
        assert got[got >= 0].tolist() == want == got[:len(want)].tolist()

def test_unknown_items_lean_on_their_category(net):
    net.forget(np.arange(12) < 6)
    assert torch.equal(net.table()[6:], net.kind.weight[net.category[6:]]) and not torch.equal(net.table()[1], net.kind.weight[1])

def test_the_short_way_to_the_last_state_is_the_long_way(net):
    asked = torch.tensor([[1, 2, 3, -1, -1], [4, 5, 6, 7, 8], [-1, -1, -1, -1, -1]])
    assert (net.last(asked) - net(asked)[torch.arange(3), (asked >= 0).sum(1)]).abs().max() < 1e-5

@pytest.fixture
def rich():
    torch.manual_seed(1)
    net = SequenceModel(12, np.arange(12) % 4, Shape(16, 2, 2, 6, .3, ('category', 'kind', 'dwell', 'time')), aims=True).eval()
    for p in net.parameters(): p.data += .3*torch.randn_like(p)
    return net

TOLD = acts(np.array([[1, 2, 3, -1], [4, 5, 6, 7]]), [[1, 2, 2, 0], [2, 1, 2, 1]], [[3., 70., np.nan, np.nan], [9., 9., 400., 1.]], [[0., 60., 9000., np.nan], [5., 1e5, 2e5, 3e6]])

def test_the_short_way_is_the_long_way_with_all_that_is_told(rich):
    item, said = torch.from_numpy(TOLD['item'].astype(np.int64)), told(TOLD, np.array([1e4, 4e6]))
    assert (rich.last(item, said) - rich(item, said)[torch.arange(2), torch.tensor([3, 4])]).abs().max() < 1e-5

@pytest.mark.parametrize('name, value', [('kind', 3), ('dwell', 5000.), ('when', 1e6)])
def test_what_is_told_of_an_act_reaches_later_states_alone(rich, name, value):
    other = TOLD.copy(); other[name][1, 2] = value
    item = torch.from_numpy(TOLD['item'].astype(np.int64))
    diff = (rich(item, told(TOLD, None)) - rich(item, told(other, None))).abs().amax(2)[1]
    first = 3 - (name == 'when')                                        # the state before it asks for it, and knows when that is
    assert diff[:first].max() < 1e-6 and diff[first:].max() > 1e-3

def test_the_moment_of_the_question_matters_and_only_where_it_is_asked(rich):
    item = torch.from_numpy(TOLD['item'].astype(np.int64))
    a, b = (rich(item, told(TOLD, np.array([t, 4e6]))) for t in (1e4, 1e7))
    assert (a - b)[1].abs().max() == 0 and (a - b)[0, :3].abs().max() < 1e-6 and (a - b)[0, 3].abs().max() > 1e-3

def test_one_act_of_one_person_is_told_too(rich):
    one, item = TOLD[:1, :1], torch.tensor([[1]])
    assert torch.isfinite(rich.last(item, told(one, np.array([50.])))).all() and told(one, None)['dwell'].shape == (1, 1)

def test_nothing_told_is_everything_unknown(rich):
    blank = acts(TOLD['item']); item = torch.from_numpy(TOLD['item'].astype(np.int64))
    assert (rich.last(item) - rich.last(item, told(blank, None))).abs().max() < 1e-5

@pytest.mark.parametrize('half', [False, True])
def test_weighted_loss_is_the_weighted_mean(half):
    torch.manual_seed(6)
    h, w, t, weight = torch.randn(37, 8).requires_grad_(), torch.randn(23, 8).requires_grad_(), torch.randint(0, 23, (37,)), torch.rand(37)*(torch.rand(37) < .7)
    plain = (F.cross_entropy(h @ w.T, t, reduction='none')*weight).sum()/weight.sum()
    ours = chunked_cross_entropy(h, w, t, 64, half, weight)
    assert abs(plain - ours) < (.02 if half else 1e-5)
    for a, b in zip(torch.autograd.grad(plain, (h, w)), torch.autograd.grad(ours, (h, w))): assert (a - b).norm() < (.02 if half else 1e-5)*a.norm()
    all_, none = torch.arange(23).expand(37, 23), torch.zeros(37, 23, dtype=torch.bool)
    assert abs(sampled_cross_entropy(h, w[t], w, t[:, None] == all_, 23, weight) - plain) < 1e-4

def test_bfloat16_scores_keep_the_signal():
    torch.manual_seed(3)
    h, w, t = torch.randn(300, 32).requires_grad_(), (.3*torch.randn(500, 32)).requires_grad_(), torch.randint(0, 500, (300,))
    plain, ours = F.cross_entropy(h @ w.T, t), chunked_cross_entropy(h, w, t, 10_000, half=True)
    assert abs(plain.item() - ours.item()) < .01
    for a, b in zip(torch.autograd.grad(plain, (h, w)), torch.autograd.grad(ours, (h, w))): assert (a - b).norm() < .01*a.norm()

def test_sampled_loss_knows_how_many_it_stands_for():
    torch.manual_seed(4)
    h, w, t = torch.randn(200, 8), .3*torch.randn(2000, 8), torch.randint(0, 2000, (200,))
    few = torch.randint(0, 2000, (40, 100))
    ours = torch.stack([sampled_cross_entropy(h, w[t], w[k], t[:, None] == k, 2000) for k in few]).mean()
    assert abs(ours - F.cross_entropy(h @ w.T, t)) < .02                 # ln(2000/100) = 3 nats off without the correction
    alone = sampled_cross_entropy(h, w[t], w[t[:1]], t[:, None] == t[:1], 2000)
    assert torch.isfinite(alone)                                         # a token whose only negative is its target learns nothing from it

@pytest.mark.parametrize('cells', [1, 64, 500, 10**7])
def test_chunked_cross_entropy_is_cross_entropy(cells):
    torch.manual_seed(2)
    h, w, t = (3*torch.randn(37, 8)).requires_grad_(), (3*torch.randn(23, 8)).requires_grad_(), torch.randint(0, 23, (37,))
    plain, ours = F.cross_entropy(h @ w.T, t), chunked_cross_entropy(h, w, t, cells)
    assert abs(plain.item() - ours.item()) < 1e-6*max(1, abs(plain.item()))
    for a, b in zip(torch.autograd.grad(2*plain, (h, w)), torch.autograd.grad(2*ours, (h, w))): assert (a - b).abs().max() < 1e-6
