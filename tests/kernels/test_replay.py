"""A replayed call launches what the ordinary one does: the same binaries with the same arguments.

Without a GPU: Triton's JIT binds, specialises and looks up for real, for a GPU that is not there;
binaries are stood in for by objects that note how they are launched.
"""

import contextlib
import functools
import importlib
import itertools
import pkgutil
import sys
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel, LazyDict
from triton.runtime.driver import driver

from vertebra.kernels import _op, _signature, _triton
from vertebra.kernels._triton import _plan, _replay
from vertebra.kernels._triton._launch import captured, launch
from vertebra.kernels._triton._plan import Plan
from vertebra.kernels._triton._replay import Replay
from vertebra.kernels._triton._stand_in import stand_in
from vertebra.testing.cases import Case, cases, example
from vertebra.testing.contract import leaves_of

LAUNCHED: list[tuple[Any, ...]] = []
"""What binaries were entered with, themselves first."""


class Binary(CompiledKernel):
    """Stands in for what a compilation yields."""

    def __init__(self, source, **_) -> None:
        self.src, self.name, self.module = source, source.name, object()
        self.function, self.packed_metadata = id(self), source.hash()
        self._run = lambda *args: LAUNCHED.append((self, *args))


def prepare() -> None:
    stand_in("sm_90")
    _op.INTERPRETED = True
    torch.set_num_threads(1)
    modules = [importlib.import_module(f"{_triton.__name__}.{m.name}") for m in _modules()]
    for kernel in (k for m in [*modules, sys.modules[__name__]] for k in vars(m).values()):
        if isinstance(kernel, triton.JITFunction):
            assert kernel.device_caches[0]  # creates what the next line replaces
            kernel.compile = Binary


def _modules():
    return pkgutil.iter_modules(_triton.__path__)


def launches(call, *args: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """Return what `call` returns, and what was launched meanwhile."""
    LAUNCHED.clear()
    return call(*args), list(LAUNCHED)


def assert_same(ordinary, replayed) -> None:
    """Compare (args, outputs, launches) of two calls, pointers by what they point to."""
    scratch: dict[int, tuple[int, int]] = {}
    known, known2 = _named(*ordinary[:2]), _named(*replayed[:2])
    for mine, other in zip(ordinary[2], replayed[2], strict=True):
        assert mine[:7] == other[:7]  # binary, grid, stream, function, metadata; then come hooks
        for value, twin in zip(_flat(mine[10:]), _flat(other[10:]), strict=True):
            if not isinstance(value, Tensor):
                assert type(value) is type(twin)
                assert value == twin
                continue
            pointer, pointer2 = value.data_ptr(), _pointer(twin)
            assert known.get(pointer) == known2.get(pointer2)
            if pointer not in known:
                assert scratch.setdefault(pointer, (pointer2, value.nbytes))[0] == pointer2
    regions = sorted(scratch.values())
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(regions))


def _flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


def _pointer(value: Tensor | int) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _named(args, outputs) -> dict[int, str]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    named = {"argument": args, "output": outputs}
    return {
        t.data_ptr(): f"{kind} {i}"
        for kind, tensors in named.items()
        for i, t in enumerate(tensors)
        if isinstance(t, Tensor) and t.numel()
    }


def spied(case: Case, inputs, seen: list) -> None:
    """Run a case both ways; note each call of an implementation, with what it launched."""
    original = Replay.__call__

    def spy(self, *args):
        outputs, launched = launches(functools.partial(original, self), *args)
        seen.append((args, outputs, launched))
        return outputs

    with patch.object(Replay, "__call__", spy):
        y = case.run(inputs)["y"]
        if y.requires_grad:
            y.backward(inputs["dy"])


@pytest.mark.jitted
def test_declared_cases_are_replayed_as_they_are_launched() -> None:
    found = [*cases("compile"), *cases("test")[::11]]  # all of them are many minutes
    for case in (case for case in found if case.differentiable):
        inputs = case.inputs("cpu")
        inputs |= leaves_of(case, inputs)
        _replay.forget()
        runs: list[list] = [[], [], []]
        for seen in runs:
            spied(case, inputs, seen)
        assert len(runs[0]) == 2, case
        for ordinary, recorded, replayed in zip(*runs, strict=True):
            assert ordinary[2], case
            assert_same(ordinary, recorded)
            assert_replayed(ordinary, replayed)
        assert [type(plan) for plan in _plans()] == [Plan, Plan], case


@pytest.mark.jitted
def test_without_gradients_the_whole_op_is_replayed() -> None:
    convolutions = [c for c in cases("compile", "conv2d_act") if "triton:gather" in c.options]
    # of two convolutions back to back, all is by tensor descriptors
    others = [c for c in cases("compile") if c.op not in ("conv2d_act", "conv2d_b2b")]
    for case in [*others[::2], *convolutions]:
        inputs = case.inputs("cpu")
        _replay.forget()
        runs: list[list] = [[], [], []]
        for seen in runs:
            spied(case, inputs, seen)
        # the op's own replay comes last; at first that of the registered op is inside of it
        assert len(runs[0]) == 2, case
        assert len(runs[2]) == 1, case
        assert runs[0][-1][2], case
        assert_replayed(runs[0][-1], runs[2][-1])
        assert Plan in map(type, _plans()), case


@pytest.mark.jitted
def test_tensor_descriptors_are_not_replayed() -> None:
    """Nor is what PyTorch computes itself: both are launched the ordinary way every time."""
    for candidate in ("triton:tiles", "cudnn"):
        options = (candidate, "3x3", "pad=1", "bias")
        case = example("conv2d_act", shape=(2, 48, 5, 6), options=options)
        inputs = case.inputs("cpu")
        _replay.forget()
        for _ in range(4):
            _, launched = launches(case.run, inputs)
            assert len(launched) == 1
        assert Plan not in map(type, _plans())
        assert "ordinary" in _plans()


def assert_replayed(ordinary, replayed) -> None:
    assert_same(ordinary, replayed)
    assert not any(isinstance(v, Tensor) for launch in replayed[2] for v in _flat(launch))


def _plans() -> list[Plan | str]:
    return [plan for replay in _replay._replays for plan in replay.plans]


@triton.jit
def _scale_kernel(y_ptr, x_ptr, bias_ptr, scratch, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)


def scale(x: Tensor, bias: Tensor | None, factor: float, name: str) -> Tensor:
    y = torch.empty_like(x)
    arguments = {"y_ptr": y, "x_ptr": x, "bias_ptr": bias, "n": x.stride(0), "BLOCK": 64}
    scratch = (*x.new_empty(2, 8), x.new_empty(3), None)
    launch(_scale_kernel, (1, 2), x.device, **arguments, scratch=scratch, factor=factor)
    return y


def agree(replay: Replay, *args: Any, times: int = 3) -> None:
    """Require of each of some calls that it launches what the implementation would."""
    for _ in range(times):
        ordinary = (args, *launches(replay._implementation, *args))
        assert_same(ordinary, (args, *launches(replay, *args)))


@pytest.mark.jitted
def test_whatever_a_binary_depends_on_is_told_apart() -> None:
    replay = Replay(scale, _op.is_plain)
    memory = torch.zeros(4096)
    x, bias = memory[:64], torch.zeros(64)
    variants = [
        (x, None),
        (x, bias),
        (memory[64:128], bias),
        (memory[1:65], bias),
        (memory[2:66], bias),
        (x, bias[1:]),
        (memory[:128:2], bias),
        (memory[:65], bias),
        (x.half(), bias),
        (x, bias.bfloat16()),
        (x.view(8, 8), bias),
    ]
    for _ in range(3):
        for variant in variants:
            agree(replay, *variant, 1.0, "none", times=1)
    assert [type(plan) for plan in replay.plans] == [Plan] * (len(variants) - 1)
    agree(replay, x, bias, 1.0, "relu")
    assert len(replay.plans) == len(variants)


@pytest.mark.jitted
def test_floats_are_handed_on_not_kept() -> None:
    replay = Replay(scale, _op.is_plain)
    x = torch.zeros(64)
    for factor in (0.3, 0.3, 0.3, 0.5, 1.0, 0.0, 0.40625, float("inf")):
        agree(replay, x, None, factor, "none", times=1)
    assert [type(plan) for plan in replay.plans] == [Plan]
    agree(replay, x, None, 1, "none")  # Triton makes the integer 1 a constant
    agree(replay, x, None, 0.3, "none")


@triton.jit
def _odd_kernel(y_ptr, some, more, n, WHAT: tl.constexpr, HOW: tl.constexpr, KIND: tl.constexpr):
    tl.store(y_ptr, 0)


@pytest.mark.jitted
def test_every_kind_of_argument_is_handed_on() -> None:
    def odd(x: Tensor, first: float, last: float, name: str) -> Tensor:
        y, scratch = torch.empty_like(x), x.new_empty(2, 5)
        arguments = {"some": (last, (None, first), -7, y), "more": (scratch[1], (), 2**40, first)}
        kinds = {"WHAT": float("inf"), "HOW": (True, "a 'name'", tl.float16), "KIND": _scale_kernel}
        launch(_odd_kernel, (3,), x.device, y_ptr=y, n=x.numel(), **arguments, **kinds)
        return y

    replay = Replay(odd, _op.is_plain)
    for first, last in itertools.permutations((0.5, 0.25, -0.0, float("inf")), 2):
        agree(replay, torch.zeros(64), first, last, "none", times=1)
    assert [type(plan) for plan in replay.plans] == [Plan]


@pytest.mark.jitted
def test_floats_that_decide_belong_to_the_signature() -> None:
    def inverse(x: Tensor, bias: Tensor | None, factor: float, name: str) -> Tensor:
        return scale(x, bias, 1 / factor, name)

    def chosen(x: Tensor, bias: Tensor | None, factor: float, name: str) -> Tensor:
        return scale(x, bias if factor > 0.45 else None, 2.0, name)

    x = torch.zeros(64)
    for implementation in (inverse, chosen):
        replay = Replay(implementation, _op.is_plain)
        for _ in range(4):
            for factor in (0.5, 0.25):
                agree(replay, x, x, factor, "none", times=1)
        assert [type(plan) for plan in replay.plans] == [Plan, Plan]


@pytest.mark.jitted
def test_what_computes_besides_is_not_replayed() -> None:
    def doubled(x: Tensor, bias: Tensor | None, factor: float, name: str) -> Tensor:
        return scale(x * 2, bias, factor, name)

    replay = Replay(doubled, _op.is_plain)
    x = torch.zeros(64)
    for _ in range(4):
        ordinary = launches(replay, x, x, 1.0, "none")[1]
        assert isinstance(ordinary[0][11], Tensor)
    assert not any(isinstance(plan, Plan) for plan in replay.plans)


@pytest.mark.jitted
def test_tensors_that_are_one_need_not_be_the_next_time() -> None:
    replay = Replay(scale, _op.is_plain)
    x, other = torch.zeros(64), torch.zeros(64)
    for _ in range(3):
        launches(replay, x, x, 1.0, "none")
    assert [type(plan) for plan in replay.plans] == [Plan]
    agree(replay, x, other, 1.0, "none")


@pytest.mark.jitted
def test_views_of_arguments_move_with_them() -> None:
    def second_half(x: Tensor, bias: Tensor | None, factor: float, name: str) -> Tensor:
        return scale(x[32:], bias, factor, name)

    replay = Replay(second_half, _op.is_plain)
    for _ in range(4):
        x = torch.zeros(64)
        _, (launched,) = launches(replay, x, None, 1.0, "none")
        assert _pointer(launched[11]) == x[32:].data_ptr()
    assert [type(plan) for plan in replay.plans] == [Plan]


@pytest.mark.jitted
def test_scratch_holds_what_lies_in_it() -> None:
    made: list[Tensor] = []
    allocate = _plan._ALLOCATE["cpu"]
    with patch.dict(_plan._ALLOCATE, cpu=lambda *given: made.append(allocate(*given)) or made[-1]):
        replay, x = Replay(scale, _op.is_plain), torch.zeros(64)
        agree(replay, x, None, 1.0, "none")
    ((*_, pieces, _, _, _),) = launches(replay, x, None, 1.0, "none")[1]
    begin, end = made[-1].data_ptr(), made[-1].data_ptr() + made[-1].nbytes
    for pointer, size in zip(pieces[:3], (8, 8, 3), strict=True):
        assert begin <= pointer <= end - 4 * size


@pytest.mark.jitted
def test_signatures_are_bounded_and_forgotten() -> None:
    replay = Replay(scale, _op.is_plain)
    with patch.object(_signature, "MAX_SIGNATURES", 4):
        for _, size in itertools.product(range(3), range(8, 20)):
            agree(replay, torch.zeros(size), None, 1.0, "none", times=1)
            assert len(replay.plans) <= 4
    _replay.forget()
    assert not replay.plans


@pytest.mark.jitted
def test_who_watches_launches_sees_them() -> None:
    replay = Replay(scale, _op.is_plain)
    x = torch.zeros(64)
    agree(replay, x, None, 1.0, "none")

    def entered() -> list[tuple[Any, ...]]:
        return launches(replay, x, None, 1.0, "none")[1]

    assert entered()[0][7:10] == (None, None, None)
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(print)
        assert entered()[0][7] is not None
        chain.remove(print)
    assert entered()[0][7] is None
    with captured() as found:
        assert entered() == []
    assert len(found) == 1
    seen: list[Any] = []
    _scale_kernel.add_pre_run_hook(lambda *_, **named: seen.append(named))
    entered()
    assert len(seen) == 1


@pytest.mark.jitted
def test_what_pytorch_does_not_just_run_is_not_replayed() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    replay = Replay(scale, _op.is_plain)
    x, bias = torch.zeros(64), torch.zeros(64)
    known: list[bool] = []

    def look(y: Tensor, found: Tensor = x) -> Tensor:
        known.append(replay._signatures.find((found, bias, 1.0, "none")) is not None)
        return y

    agree(replay, x, bias, 1.0, "none")
    look(x)
    assert known == [True]
    for _ in range(3):
        with Mode():
            agree(replay, x, bias, 1.0, "none", times=1)
            look(x)
        for other in (x.as_subclass(Subclass), torch._neg_view(x)):
            agree(replay, other, bias, 1.0, "none", times=1)
            look(x, other)
        with FakeTensorMode(allow_non_fake_inputs=True):
            look(x)
        torch.func.vmap(look)(torch.zeros(2, 64))
        torch.func.vmap(lambda y: look(y, y))(torch.zeros(2, 64))
        torch.func.grad(lambda y: look(y).sum())(x)
    assert not any(known[1:])
    assert [type(plan) for plan in replay.plans] == [Plan]
    with torch.inference_mode():
        agree(replay, x, bias, 1.0, "none")
    with torch.autocast("cpu"):
        agree(replay, x, bias, 1.0, "none")
    agree(replay, torch.nn.Parameter(x), bias, 1.0, "none")
    assert [type(plan) for plan in replay.plans] == [Plan] * 4


@pytest.mark.jitted
def test_the_stream_is_the_current_one() -> None:
    replay = Replay(scale, _op.is_plain)
    x = torch.zeros(64)
    agree(replay, x, None, 1.0, "none")
    with patch.object(driver.active, "get_current_stream", lambda _: 7):
        ((_, *launched),) = launches(replay, x, None, 1.0, "none")[1]
    assert launched[3] == 7


def test_a_plan_enters_the_device_of_its_tensors(monkeypatch) -> None:
    device = [0]

    @contextlib.contextmanager
    def on(index: int):
        device.append(index)
        yield
        device.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[-1])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(
        _plan,
        "driver",
        SimpleNamespace(
            active=SimpleNamespace(get_current_stream=lambda index: (index, device[-1]))
        ),
    )
    for index in (0, 1):
        text = _plan._Text(torch.device("cuda", index), 1)
        text.lines.append("return stream, p0, args")
        run, _ = text.compiled()
        assert run([64], ("none",)) == ((index, index), 64, ("none",))
        assert device == [0]


@pytest.mark.jitted
def test_the_launcher_is_seen_through() -> None:
    """The function in C gets from a plan what Triton's launcher would hand on to it."""

    class Launched(Binary):
        scratch = 0

        def __init__(self, source, **options) -> None:
            super().__init__(source, **options)
            run: Any = object.__new__(CudaLauncher)  # whose __init__ asks for the driver
            run.launch = lambda *args: LAUNCHED.append(args)
            run.arg_annotations, run.kernel_signature = ["an annotation"], b"a signature"
            run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
            run.global_scratch_size, run.global_scratch_align = self.scratch, 128
            run.profile_scratch_size, run.profile_scratch_align = 0, 1
            self._run = run

    allocated: list[int] = []
    triton.set_allocator(lambda size, *_: allocated.append(size))
    x, bias = torch.zeros(64), torch.zeros(64)
    for Launched.scratch, name in ((0, "none"), (256, "relu")):
        _scale_kernel.device_caches.clear()
        assert _scale_kernel.device_caches[0]  # creates what the next line replaces
        _scale_kernel.compile = Launched
        replay = Replay(scale, _op.is_plain)
        ordinary, _, _, replayed = (
            [*_flat(launches(call, x, bias, 0.3, name)[1][0])] for call in (scale, *[replay] * 3)
        )
        assert [type(plan) for plan in replay.plans] == [Plan]
        for mine, other in zip(ordinary, replayed, strict=True):
            if isinstance(mine, knobs.HookChain | LazyDict):  # hooks, of which there are none
                assert other is None
                continue
            assert type(other) is type(_pointer(mine))
            if not isinstance(mine, Tensor) or mine is x or mine is bias:
                assert other == _pointer(mine)
    assert allocated == [512] * 4


@pytest.mark.jitted
def test_recording_does_not_wait_for_dynamo() -> None:
    replay = Replay(scale, _op.is_plain)
    agree(replay, torch.zeros(64), None, 1.0, "none")
    assert "torch._dynamo.convert_frame" not in sys.modules


@pytest.mark.jitted
def test_outputs_without_elements_are_allocated_once() -> None:
    def with_nothing(x: Tensor, bias: Tensor | None, factor: float, name: str):
        nothing, y, more = x.new_empty(0), scale(x, bias, factor, name), x.new_empty(2, 0)
        return nothing, y, more

    replay = Replay(with_nothing, _op.is_plain)
    x = torch.zeros(64)
    agree(replay, x, None, 1.0, "none")
    first, second = (replay(x, None, 1.0, "none") for _ in range(2))
    assert [tuple(t.shape) for t in first] == [(0,), (64,), (2, 0)]
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, False, True]


@pytest.mark.jitted
def test_threads_do_not_share_a_call() -> None:
    replay = Replay(scale, _op.is_plain)
    wrong: list[int] = []

    def work(size: int) -> None:
        for i in range(300):
            x = torch.zeros(size)
            before = len(LAUNCHED)
            replay(x, None, float(i), "none")
            mine = [m for m in LAUNCHED[before:] if _pointer(m[11]) == x.data_ptr()]
            if [m[-3:-1] for m in mine] != [(float(i), 1)]:
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(size,)) for size in (64, 64, 65)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
