"The network: causal, blind to padding, exact in its loss, quiet about the unknown."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from telemetry_loop.model import SequenceModel, Shape, chunked_cross_entropy, left_aligned, sampled_cross_entropy

@pytest.fixture
def net():
    torch.manual_seed(1)
    net = SequenceModel(12, np.arange(12) % 4, Shape(16, 2, 2, 6, .3)).eval()
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
