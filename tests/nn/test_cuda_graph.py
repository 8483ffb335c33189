"""What `CudaGraphs` keeps and drops; the capture itself needs a GPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vertebra.nn.cuda_graph import CudaGraphs, _Captured


class Faked(CudaGraphs):
    """Captures on a CPU: a replay runs the model into the captured output."""

    captures = 0

    def _can_replay(self, x):
        return isinstance(x, torch.Tensor)

    def _capture(self, x):
        type(self).captures += 1
        own = torch.empty_like(x)
        y = {"y": self.model(torch.zeros_like(x)), "n": 1}
        return _Captured(lambda: y["y"].copy_(self.model(own)), own, y)


@pytest.fixture
def graphs():
    Faked.captures = 0
    return Faked(nn.Conv2d(3, 4, 1).requires_grad_(False).eval(), max_graphs=2)


def test_one_graph_for_each_kind_of_input(graphs):
    x = torch.randn(2, 3, 4, 4)
    first = graphs(x)["y"]
    torch.testing.assert_close(first, graphs.model(x))
    kept = first.clone()
    other = graphs(x + 1)["y"]
    assert torch.equal(first, kept)  # an output is the caller's
    torch.testing.assert_close(other, graphs.model(x + 1))
    assert Faked.captures == 1
    graphs(x.to(memory_format=torch.channels_last))
    assert Faked.captures == 2


def test_the_last_used_are_kept(graphs):
    a, b, c = (torch.randn(n, 3, 4, 4) for n in (1, 2, 3))
    for x in (a, b, a, c):  # b goes
        graphs(x)
    assert (Faked.captures, len(graphs._graphs)) == (3, 2)
    graphs(a)
    assert Faked.captures == 3
    graphs(b)
    assert Faked.captures == 4


@pytest.mark.parametrize(
    "change",
    [lambda g: g.double(), lambda g: g.load_state_dict(g.state_dict()), lambda g: g.forget()],
)
def test_graphs_go_when_weights_do(graphs, change):
    graphs(torch.randn(1, 3, 4, 4))
    change(graphs)
    assert not graphs._graphs


def test_copies_have_no_graphs(graphs):
    graphs(torch.randn(1, 3, 4, 4))
    plain = CudaGraphs(graphs.model)
    for twin in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(plain))):
        assert not twin._graphs
        assert list(twin.state_dict()) == ["model.weight", "model.bias"]
    assert graphs._graphs


def test_on_a_cpu_the_model_runs():
    graphs, x = CudaGraphs(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(graphs(x), graphs.model(x))
    assert not graphs._graphs


def test_at_least_one_graph():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CudaGraphs(nn.Identity(), max_graphs=0)
