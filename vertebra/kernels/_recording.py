"""Calls of PyTorch's ops, noted while a function runs, and run again without the function.

For small images a network spends much of its time in Python, where modules ask who watches them and
ops what they are given. What a function of one tensor calls is noted once, and written down as a
function without a question or a branch. Its text is Python, compiled once, and reads like this:

    def run(x):
        t1 = op0(x, c1, c2, (0, 0), (1, 1), (1, 1), 1, 'relu', (), '')
        t2 = op3(x, c4, c5, (0, 0), (1, 1), (1, 1), 1, 'none', (), '')
        t3 = op6(t2, t1, c7, c8, (1, 1), (1, 1), (1, 1), 1, 'add', 1.0, 'relu', (), None)
        del t1, t2
        return t3

Tensors are x, what the calls made of it, and constants, which whoever records has to answer for. As
the text knows who reads what last, a value that is not read again is overwritten by the result of
an op that can: op6 adds to t2 in its place. A map's sum then moves two maps where it would move
three.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._watch import Watch

Run = Callable[[Tensor], Any]

_aten: Any = torch.ops.aten
_mkldnn: Any = torch.ops.mkldnn


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor that depends on x, or is made anew each time.

    Attributes:
        number: 0 for x.
        memory: the number of the value that this is a view of, or its own.
        like: shape, strides, place in the memory and dtype.
    """

    number: int
    memory: int
    like: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"t{self.number}" if self.number else "x"

    @property
    def numel(self) -> int:
        return math.prod(self.like[0])

    def is_laid_out_as(self, other: _Value) -> bool:
        """Return whether shape, strides and dtype are the same."""
        (shape, where, dtype), (others, others_where, others_dtype) = self.like, other.like
        return shape == others and where[:1] == others_where[:1] and dtype == others_dtype


class _Call(NamedTuple):
    """A call of an op, its tensors being values or constants."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[_Value]

    @property
    def values(self) -> list[_Value]:
        """The values that it is given, one as often as it is."""
        return [v for v in _flat((self.args, self.kwargs)) if isinstance(v, _Value)]


def record(function: Run, x: Tensor, is_constant: Callable[[Tensor], bool]) -> Recorder:
    """Return what `function` calls to compute `function(x)`, and that.

    Args:
        function: computes with PyTorch's ops and nothing else.
        x: as `function` takes it.
        is_constant: says of a tensor that is not made on the way whether it stays what it is.
    """
    with Recorder(x, is_constant) as recorder:
        recorder.y = function(x)
    return recorder


class Recorder(Watch):
    """Notes the calls of a function of x, and holds none of the tensors in between."""

    y: Any

    def __init__(self, x: Tensor, is_constant: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._is_constant = is_constant
        self._calls: list[_Call] = []
        self._views: list[Tensor] = []  # of constants
        # by id: whether that is still the tensor, and its value, None for a view of constants
        self._known: dict[int, tuple[weakref.ref[Tensor], _Value | None]] = {}
        self._alike: dict[tuple[Any, ...], _Value] = {}  # by memory and `like`
        self._count = 0
        self._repeatable = True
        self._know(x, self._value(x, None))

    @property
    def text(self) -> Text | None:
        """What computes y from x by the same calls; None if calls do not tell, or autograd has it.

        y is a tensor, or a list or tuple of tensors.
        """
        kind = type(self.y) if type(self.y) in (list, tuple) else None
        results = [self.y] if kind is None else self.y
        if not all(isinstance(t, Tensor) and not t.requires_grad for t in results):
            return None
        ys = self._meant(results) if self._repeatable else ()
        if not (ys and all(isinstance(y, _Value) for y in ys)):
            return None
        return Text(_overwriting(_summing(_needed(self._calls, ys), ys), ys), ys, kind)

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        results = result if isinstance(result, (list, tuple)) else [result]
        if not all(isinstance(t, Tensor) for t in results):
            self._repeatable = False  # Python goes on with a number
            return
        call = _Call(func, self._meant(args), self._meant(kwargs), [])
        if func.is_view and not call.values:
            self._views += results
            for t in results:
                self._know(t, None)
            return
        given = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor)]
        count = self._count
        for t in results:
            value = self._find(t)
            if not isinstance(value, _Value):
                value = self._value(t, next((g for g in given if _share_memory(t, g)), None))
                self._know(t, value)
            call.results.append(value)
        if not func.is_view or self._count > count:  # and no view that there is already
            self._calls.append(call)

    def _know(self, t: Tensor, value: _Value | None) -> None:
        self._known[id(t)] = weakref.ref(t), value

    def _value(self, t: Tensor, base: Tensor | None) -> _Value:
        """Return a new value, for a tensor or for a view of `base`."""
        of = None if base is None else self._find(base)
        if base is not None and not isinstance(of, _Value):
            self._repeatable = False  # a constant may be written to
        number = self._count
        memory = of.memory if isinstance(of, _Value) else number
        where = (t.stride(), t.storage_offset()) if t.layout == torch.strided else (number,)
        like = (t.shape, where, t.dtype)
        value = self._alike.setdefault((memory, like), _Value(number, memory, like))
        self._count += value.number == number
        return value

    def _find(self, t: Tensor) -> _Value | Tensor | None:
        """Return the value that a tensor is, or itself, a constant; None if it is neither."""
        found = self._known.get(id(t))
        if found is not None and found[0]() is t:
            return t if found[1] is None else found[1]
        return t if self._is_constant(t) else None

    def _meant(self, tree: Any) -> Any:
        """Return arguments with values in place of their tensors."""
        if isinstance(tree, Tensor):
            found = self._find(tree)
            self._repeatable &= found is not None
            return found
        if isinstance(tree, (list, tuple)):
            return tuple(map(self._meant, tree))
        if isinstance(tree, dict):
            return {key: self._meant(branch) for key, branch in tree.items()}
        return tree


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or b.layout != torch.strided:
        return a is b
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata  # pyright: ignore


def _flat(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return _flat(list(tree.values()))
    if isinstance(tree, (list, tuple)):
        return [v for branch in tree for v in _flat(branch)]
    return [tree]


def _needed(calls: list[_Call], ys: tuple[_Value, ...]) -> list[_Call]:
    """Return the calls without views that nobody reads."""
    read, needed = {*ys}, list[_Call]()
    for call in reversed(calls):
        if not call.op.is_view or not read.isdisjoint(call.results):
            read.update(call.values)
            needed.append(call)
    return needed[::-1]


# ----------------------------------------------------------------------- results in place of values


class _InPlace(NamedTuple):
    """What does the same as an op, in the place of one of its arguments, which it takes first."""

    op: Any
    place: int


def _itself(x: Tensor, **_: Any) -> Tensor:
    return x


_IN_PLACE: dict[Any, _InPlace] = {
    _aten.mul.Tensor: _InPlace(_aten.mul_.Tensor, 0),
    _aten.add.Tensor: _InPlace(_aten.add_.Tensor, 0),
    _aten.relu.default: _InPlace(_aten.relu_.default, 0),
    _mkldnn._convolution_pointwise.binary: _InPlace(_mkldnn._convolution_pointwise_.binary, 1),
    _aten.clone.default: _InPlace(_itself, 0),
}


def _summing(calls: list[_Call], ys: tuple[_Value, ...]) -> list[_Call]:
    """Return the calls, a sum in the place of a term that it would be copied to next."""
    reads = Counter([v.memory for call in calls for v in call.values] + [y.memory for y in ys])
    written = list[_Call]()
    for call in calls:
        before = written[-1] if written and call.op is _aten.copy_.default else None
        found = None if before is None else _IN_PLACE.get(before.op)
        if before is None or found is None:
            written.append(call)
            continue
        (z,), term = before.results, before.args[found.place]
        if (
            call.args == (term, z)
            and term.is_laid_out_as(z)
            and reads[z.memory] == 1
            and [v.memory for v in before.values].count(term.memory) == 1
        ):
            written[-1] = _in_place(before, found)._replace(results=[term])
        else:
            written.append(call)
    return written


def _in_place(call: _Call, found: _InPlace) -> _Call:
    args = list(call.args)
    args.insert(0, args.pop(found.place))
    return call._replace(op=found.op, args=tuple(args))


def _overwriting(calls: list[_Call], ys: tuple[_Value, ...]) -> list[_Call]:
    """Return the calls, each in the place of what nobody reads after it, if it can be."""
    reads = {v.memory: i for i, call in enumerate(calls) for v in (*call.values, *call.results)}
    reads.update({y.memory: len(calls) for y in ys})
    made = {v.number: v for call in calls for v in call.results if v.number == v.memory}
    made.pop(0, None)  # x, which a call may return

    def is_spare(value: Any, i: int) -> bool:
        """Whether call i, and nothing after it, reads a value's memory, as this value, and once."""
        return (
            isinstance(value, _Value)
            and value.memory in made
            and value.numel == made[value.memory].numel
            and reads[value.memory] == i
            and [v for v in calls[i].values if v.memory == value.memory] == [value]
            and [v.like for v in calls[i].results] == [value.like]
            and value not in calls[i].results
        )

    written = list(calls)
    for i, call in enumerate(calls):
        found = _IN_PLACE.get(call.op)
        if found is not None and is_spare(call.args[found.place], i):
            written[i] = _in_place(call, found)
    return written


# ---------------------------------------------------------------------------------------- the text


class Text:
    """The text of a function of x, and the objects that it names.

    Args:
        calls: what it does, to the end.
        ys: what it returns.
        kind: list or tuple, in which it returns them; None for the one that there is.

    Attributes:
        calls: what it does, to the end.
        text: in Python.
    """

    def __init__(self, calls: list[_Call], ys: tuple[_Value, ...], kind: type | None) -> None:
        self.calls = calls
        self._names: dict[str, Any] = {}
        last = {v: i for i, call in enumerate(calls) for v in (*call.values, *call.results)}
        last.update({y: len(calls) for y in ys})
        lines = ["def run(x):"]
        for i, call in enumerate(calls):
            lines.append(self._line(call))
            done = [v.name for v in dict.fromkeys((*call.values, *call.results)) if last[v] == i]
            lines += [f"del {', '.join(done)}"] if done else []
        together = "".join(f"{y.name}, " for y in ys)
        result = ys[0].name if kind is None else f"{self._name('kind', kind)}(({together}))"
        self.text = "\n    ".join([*lines, f"return {result}"])

    def compiled(self) -> Run:
        exec(compile(self.text, "<a recording>", "exec"), self._names)
        return self._names["run"]

    def _line(self, call: _Call) -> str:
        args = [self._value(v) for v in call.args]
        args += [f"{name}={self._value(v)}" for name, v in call.kwargs.items()]
        # an overload's own caller does nothing but call this
        op = self._name("op", getattr(call.op, "_op", call.op))
        results = "".join(f"{v.name}, " for v in call.results)
        results = results.removesuffix(", ") if len(call.results) == 1 else f"({results})"
        return f"{results} = {op}({', '.join(args)})"

    def _value(self, value: Any) -> str:
        """Return what stands for an argument: a variable, a literal or a name."""
        if isinstance(value, _Value):
            return value.name
        if type(value) is tuple:
            return f"({''.join(f'{self._value(v)}, ' for v in value)})"
        return repr(value) if type(value) in _LITERALS else self._name("c", value)

    def _name(self, stem: str, value: Any) -> str:
        name = f"{stem}{len(self._names)}"
        self._names[name] = value
        return name


_LITERALS = (bool, int, str, type(None))
