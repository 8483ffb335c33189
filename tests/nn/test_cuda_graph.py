"""What `CudaGraphs` keeps and drops, and the steps of a capture, which itself needs a GPU."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

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


# ------------------------------------------------------------------ a capture, on a GPU that is not


class Feigned:
    """What `torch.cuda` does in a capture, noted; a replay of a graph runs the model again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        for name, stand_in in {
            "device": lambda device: self._block(f"device {device}"),
            "Stream": lambda: self._stream("side"),
            "current_stream": lambda: self._stream("current"),
            "stream": lambda stream: self._block(stream.name),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": lambda graph, **options: self._block(
                f"capture on {options.pop('stream').name} {options}"
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _stream(self, name: str) -> SimpleNamespace:
        def wait_stream(other: SimpleNamespace) -> None:
            self.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    @contextmanager
    def _block(self, name: str) -> Iterator[None]:
        self.log.append(name)
        yield
        self.log.append(f"end of {name}")


class Spy(nn.Module):
    """Notes how it is called."""

    def __init__(self, log: list[str], output: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.log, self.output = log, output

    def forward(self, x: torch.Tensor) -> Any:
        cached = torch.is_autocast_cache_enabled()
        modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), cached)
        assert not any(modes)
        assert not x.is_inference()
        self.log.append("run")
        return x * 2 if self.output is None else self.output


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Feigned:
    return Feigned(monkeypatch)


def test_a_capture_is_warmed_up_and_made_on_one_stream(gpu: Feigned) -> None:
    with torch.inference_mode(), torch.autocast("cpu"):
        x = torch.ones(3)
        captured = CudaGraphs(Spy(gpu.log))._capture(x)
        assert torch.is_autocast_cache_enabled()
    assert gpu.log == [
        "device cpu",
        "side waits for current",
        *("side", "run", "run", "run", "end of side"),
        "current waits for side",
        "capture on side {'capture_error_mode': 'thread_local'}",
        "run",
        "end of capture on side {'capture_error_mode': 'thread_local'}",
        "end of device cpu",
    ]
    captured.x.copy_(torch.zeros(3))  # outside of inference mode
    captured.replay()
    assert gpu.log[-1] == "replay"


def test_what_cannot_be_copied_is_refused(gpu: Feigned) -> None:
    x = torch.ones(3)
    for output in ((x, [x, None]), {"y": x, "n": 1, "name": "a"}):
        CudaGraphs(Spy(gpu.log, output))._capture(x)
    with pytest.raises(TypeError, match="cannot copy a SimpleNamespace"):
        CudaGraphs(Spy(gpu.log, (x, SimpleNamespace(y=x))))._capture(x)


def test_a_mode_has_graphs_of_its_own(graphs) -> None:
    graphs(torch.randn(1, 3, 4, 4))
    graphs.train()
    assert not graphs._graphs
    assert graphs.model.training


def test_modes_of_parts_of_a_model_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.ReLU())
    graphs = CudaGraphs(model)
    assert (graphs.training, model[0].training, model[1].training) == (True, False, True)


def test_under_transforms_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphs = CudaGraphs(nn.Identity())
    assert not graphs._can_replay(torch.ones(3).as_subclass(OnGpu))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
def test_replays_on_a_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda().eval()
    graphs = CudaGraphs(model, max_graphs=2)
    images = [torch.randn(n, 3, 16, 16, device="cuda") for n in (1, 2, 3, 1)]
    for autocast in (False, True):
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=autocast):
            first = graphs(images[0])
            kept = first.clone()
            assert torch.equal(graphs(images[3]), model(images[3]))
            assert torch.equal(first, kept)
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=autocast):
            for x in images:
                torch.testing.assert_close(graphs(x), model(x))
            assert len(graphs._graphs) == 2
