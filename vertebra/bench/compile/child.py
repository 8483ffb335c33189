"""A process of its own: from its start to its first answer, and on through a sequence of shapes.

What to do is `Spec`, as JSON in a folder; what came of it is `Account`, rewritten there after every
step, so that a process that is ended tells how far it got. `process` starts it by `BOOTSTRAP`.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...interop import accelerate
from .. import peers
from ..ceilings import DTYPES
from ..clock import synchronize
from ..oracle import Answers
from ..workload import compiled
from .plan import POLICIES
from .step import Batch, Gradient, Inference, Training, place

BOOTSTRAP = """
import sys, time
start = time.perf_counter()
import torch
then = time.perf_counter()
import vertebra
now = time.perf_counter()
from vertebra.bench.compile import child
child.main(sys.argv[1], {"torch": then - start, "vertebra": now - then})
"""


@dataclass(frozen=True)
class Spec:
    """What a process is to do.

    Attributes:
        source: of the module, in "module.pt": "reference", "accelerated" or "vertebra".
        library: whose module it is, to be imported.
        gradients: of the module's parameters.
        visits: how many batches there are, "batch-0.pt" the first.
        training: forward and backward; else forward.
        wants_dx: whether the input gets a gradient.
        mode: Inductor's, or None to run eagerly.
        policy: what is known of the shapes.
        backend: of torch.compile.
        again: calls after the first, at every shape.
        device: and the rest as in `Plan`.
    """

    source: str
    library: str
    gradients: Sequence[Gradient]
    visits: int
    training: bool
    wants_dx: bool
    mode: Any
    policy: str
    backend: str
    again: int
    device: str
    dtype: str
    channels_last: bool
    threads: int


@dataclass
class Call:
    """A visit: the first call at a shape, what it compiled and why, and the calls after it."""

    first_s: float
    graphs: int = 0
    reasons: list[str] = field(default_factory=list[str])
    again_ms: list[float] = field(default_factory=list[float])


@dataclass
class Account:
    """What came of it.

    Attributes:
        doing: what was going on when it was written.
        error: what was raised.
        imports_s: by package; "compiler" is what torch.compile needs beside.
        device_s: the first use of the device.
        build_s: to load the module and move it to its place.
        visits: in their order.
        compiling_s: what compiling took, by phase.
        kernels: that Inductor generated.
        library_calls: that it left to libraries.
        host_bytes: the most memory that the process had, the compiler's own processes left out.
        device_bytes: the most that was allocated on a GPU.
    """

    doing: str = "importing"
    error: str | None = None
    imports_s: dict[str, float] = field(default_factory=dict[str, float])
    device_s: float = 0.0
    build_s: float = 0.0
    visits: list[Call] = field(default_factory=list[Call])
    compiling_s: dict[str, float] = field(default_factory=dict[str, float])
    kernels: int = 0
    library_calls: int = 0
    host_bytes: int = 0
    device_bytes: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Account:
        """Return the last account that a process gave."""
        path = folder / "account.json"
        if not path.exists():
            return cls()
        content = json.loads(path.read_text())
        content["visits"] = [Call(**call) for call in content["visits"]]
        return cls(**content)

    def write(self, folder: Path, doing: str) -> None:
        """Write it down, whole or not at all."""
        self.doing = doing
        partial = folder / "account.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(folder / "account.json")


def main(folder: str, imports_s: dict[str, float]) -> None:
    """Do what the spec in a folder says."""
    account = Account(imports_s=imports_s)
    try:
        _run(Path(folder), account)
    except Exception as error:
        account.error = f"{type(error).__name__}: {error}".partition("\n")[0]
        account.write(Path(folder), account.doing)
        raise


def _run(folder: Path, account: Account) -> None:
    content = json.loads((folder / "spec.json").read_text())
    content["gradients"] = [Gradient(*gradient) for gradient in content["gradients"]]
    spec = Spec(**content)
    torch.set_num_threads(spec.threads)
    torch.backends.cudnn.benchmark = True  # eager PyTorch at its best
    account.write(folder, "importing")
    _import(spec, account)
    account.write(folder, "starting the device")
    device = torch.device(spec.device)
    start = time.perf_counter()
    torch.zeros(1, device=device)
    synchronize(device)
    account.device_s = time.perf_counter() - start
    account.write(folder, "building")
    start = time.perf_counter()
    module = _load(folder, spec, device)
    synchronize(device)
    account.build_s = time.perf_counter() - start
    run: Any = None
    for i in range(spec.visits):
        batch = Batch(*torch.load(folder / f"batch-{i}.pt"))
        batch = batch.to(device, DTYPES[spec.dtype], spec.channels_last)
        if spec.mode is not None and spec.policy == "marked":
            _mark(batch.x)
        account.write(folder, f"at its first call of shape {tuple(batch.x.shape)}")
        synchronize(device)
        start = time.perf_counter()
        if run is None:
            run = module
            if spec.mode is not None:
                run = compiled(module, spec.mode, POLICIES[spec.policy], spec.backend)  # pyright: ignore[reportArgumentType]
        _visit(folder, spec, account, _bind(spec, module, run, batch), start, device, i)
    account.write(folder, "done")


def _import(spec: Spec, account: Account) -> None:
    """Import what the provider needs, the library first: some bring parts of the compiler."""
    if spec.library != "vertebra":
        start = time.perf_counter()
        getattr(peers, spec.library)()
        account.imports_s[spec.library] = time.perf_counter() - start
        if spec.source == "reference":
            account.imports_s.pop("vertebra")
    if spec.mode is not None:
        start = time.perf_counter()
        importlib.import_module("torch._inductor.compile_fx")
        account.imports_s["compiler"] = time.perf_counter() - start


def _load(folder: Path, spec: Spec, device: torch.device) -> nn.Module:
    module: nn.Module = torch.load(folder / "module.pt", weights_only=False)
    if spec.source == "accelerated":  # what was saved is the library's own
        accelerate(module)
    return place(module, device, DTYPES[spec.dtype], spec.channels_last, spec.training)


def _mark(x: torch.Tensor) -> None:
    dynamo: Any = importlib.import_module("torch._dynamo")
    for dimension in (0, 2, 3):
        if x.shape[dimension] > 1:  # which is what a compiler always makes a case of its own
            dynamo.mark_dynamic(x, dimension)


def _bind(spec: Spec, module: nn.Module, run: Any, batch: Batch) -> Inference:
    if spec.training:
        return Training(module, run, [batch], spec.gradients, spec.wants_dx)
    return Inference(module, run, [batch])


def _visit(
    folder: Path,
    spec: Spec,
    account: Account,
    step: Inference,
    start: float,
    device: torch.device,
    i: int,
) -> None:
    """Call at a shape that comes by, and keep the first and the last answer."""
    before = _graphs()
    answers = step(0)
    synchronize(device)
    call = Call(time.perf_counter() - start)
    account.visits.append(call)
    call.graphs = _graphs() - before
    _keep(answers, folder / f"first-{i}.pt")
    del answers
    for _ in range(spec.again):
        start = time.perf_counter()
        step(0)
        synchronize(device)
        call.again_ms.append((time.perf_counter() - start) * 1e3)
    _keep(step(0), folder / f"last-{i}.pt")
    if spec.mode is not None:
        _account_for_compiling(account, call)
    account.host_bytes = _most_resident()
    if device.type == "cuda":
        account.device_bytes = torch.cuda.max_memory_allocated(device)


def _most_resident() -> int:
    """Return the most memory that this process has had; 0 where the system does not say.

    Not from `getrusage`, which counts what the process was forked from.
    """
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 0 if found is None else 1024 * int(found[1])


def _keep(answers: Answers, path: Path) -> None:
    torch.save({name: answer.cpu() for name, answer in answers.items()}, path)


def _graphs() -> int:
    """Return how many graphs Dynamo has had compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]


def _account_for_compiling(account: Account, call: Call) -> None:
    """Add what the compilations since the last time took, by phase, and why they came about."""
    utils: Any = importlib.import_module("torch._dynamo.utils")
    metrics: Any = importlib.import_module("torch._inductor.metrics")
    account.kernels = metrics.generated_kernel_count
    account.library_calls = utils.counters["inductor"]["extern_calls"]
    for found in utils.get_compilation_metrics():
        for phase, seconds in _phases(found).items():
            account.compiling_s[phase] = account.compiling_s.get(phase, 0.0) + seconds
        if found.recompile_reason:
            reason = found.recompile_reason.partition(": ")[2] or found.recompile_reason
            call.reasons.append(reason.partition("  #")[0].partition("\n")[0].strip())
    utils.clear_compilation_metrics()


def _phases(found: Any) -> dict[str, float]:
    """Return the seconds of one compilation by phase; PyTorch counts each with those within.

    Tracing is Dynamo's. "code" is Inductor's way to source code; with an empty cache on a CPU, that
    includes trials of the C++ compiler and a precompiled header. "kernels" is how long it then
    waited for compilers of C++ or Triton.
    """

    def seconds(name: str) -> float:
        return (getattr(found, f"{name}_us", None) or 0) / 1e6

    whole = seconds("duration")
    autograd = seconds("aot_autograd_cumulative_compile_time")
    inductor = seconds("inductor_cumulative_compile_time")
    kernels = min(seconds("triton_compile_time"), inductor)
    within = max(autograd, inductor)
    return {
        "tracing": max(0.0, whole - within),
        "autograd": within - inductor,
        "code": inductor - kernels,
        "kernels": kernels,
    }
