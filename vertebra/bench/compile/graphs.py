"""What the compiler sees: graphs, breaks between them, and what is left of our ops in the graphs.

An op that runs on Triton is one opaque call in the graph, around which Inductor fuses nothing. One
that runs in eager PyTorch, as on a CPU, is operations that Inductor sees and fuses as it likes.
Both graphs are traced, on tensors without memory: this machine's, and that of one with kernels.
"""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from ...kernels import backend
from ..results import Comparison, Row
from ..session import Session
from .plan import Direction
from .process import new_row
from .step import Batch, Inference, Training
from .subjects import Subject

_OURS = "vertebra"  # the namespace of our registered ops


class Breaks(NamedTuple):
    """What `torch._dynamo.explain` has found."""

    graphs: int
    breaks: int
    reasons: list[str]


@dataclass
class Trace:
    """Operations in the graphs of both directions, and how often each of our ops is called."""

    operations: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    opaque: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, direction: str, graph: torch.fx.Graph) -> None:
        """Count what is in a graph."""
        targets = [node.target for node in graph.nodes if node.op == "call_function"]
        self.operations[direction] += len(targets)
        ours = [t for t in targets if getattr(t, "namespace", None) == _OURS]
        for name, count in Counter(str(t).split(".")[1] for t in ours).items():
            self.opaque[name] = self.opaque.get(name, 0) + count


def compare(
    comparison: Comparison, subject: Subject, direction: Direction, session: Session
) -> None:
    """Trace every compiled provider; fill in the rows."""
    plan = subject.plan
    comparison.rows.clear()
    for name, variant in plan.chosen.items():
        if not variant.compiled:
            continue
        session.tick(f"{name}: trace")
        row = new_row(name, plan)
        comparison.rows.append(row)
        step = subject.step(variant._replace(compiled=False), direction)
        try:
            _fill(row, step)
        except Exception as error:  # whatever a provider raises is its result
            row.status = "FAILED"
            row.detail = f"{type(error).__name__}: {error}".partition("\n")[0]
    torch.compiler.reset()
    comparison.finished = True


def _fill(row: Row, step: Inference) -> None:
    row.facts |= breaks(step)._asdict()
    row.facts["here"] = asdict(trace(step))
    if not row.peer:
        row.facts["on_triton"] = asdict(trace(step, on_triton=True))


def breaks(step: Inference) -> Breaks:
    """Return the graphs of a step's forward pass, and why there are several."""
    dynamo: Any = importlib.import_module("torch._dynamo")
    module = copy.deepcopy(step.module)  # whose statistics advance
    with torch.set_grad_enabled(isinstance(step, Training)):
        found = dynamo.explain(module)(step.batches[0].x)
    reasons = [reason.reason.partition("\n")[0] for reason in found.break_reasons]
    return Breaks(found.graph_count, found.graph_break_count, reasons)


def trace(step: Inference, *, on_triton: bool = False) -> Trace:
    """Return what is in the graphs of a step, of which nothing is run.

    Args:
        step: not compiled.
        on_triton: the graph is that of a machine on which our kernels run.
    """
    fake: Any = importlib.import_module("torch._subclasses.fake_tensor")
    common: Any = importlib.import_module("torch._dynamo.backends.common")
    boxed: Any = importlib.import_module("torch._functorch.aot_autograd")
    found = Trace()

    def compiler(direction: str) -> Callable[..., Any]:
        def compile(module: Any, _: Any) -> Any:
            found.add(direction, module.graph)
            return boxed.make_boxed_func(module.forward)

        return compile

    torch.compiler.reset()
    capture = common.aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    module = copy.deepcopy(step.module)
    with fake.FakeTensorMode(allow_non_fake_inputs=True), _kernels(on_triton):
        module._apply(torch.empty_like)  # pyright: ignore[reportPrivateUsage]
        batch = Batch(*(torch.empty_like(t) for t in step.batches[0]))
        run = torch.compile(module, backend=capture, dynamic=False)
        replace(step, module=module, run=run, batches=[batch])(0)
    return found


@contextmanager
def _kernels(there: bool) -> Generator[None]:
    """Let tensors of a CPU pass for those of a GPU, as far as our dispatch is concerned."""
    if not there:
        yield
        return
    dispatch = importlib.import_module("vertebra.kernels._op")
    with backend("auto"), patch.object(dispatch, "INTERPRETED", True):
        yield
