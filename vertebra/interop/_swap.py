"""Putting modules on other classes: the same object, parameters, keys and hooks, another `forward`.

A recipe is a class here with a `forward` for one class of a library. A module is given a class made
of both, which derives from its own: `isinstance` holds, and no class is changed. Only instances of
that very class are taken, and only where its `forward` reads as one that the recipe was written
from: a subclass, and a library that has changed, keep what they have.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import inspect
import textwrap
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from torch import nn

R = TypeVar("R", bound=type)
Refuses = Callable[[Any], "str | None"]


class Recipe(NamedTuple):
    """How modules of one class are accelerated."""

    mixin: type
    methods: dict[str, frozenset[str]]  # of the class, each with the readings that are known
    refuses: Refuses
    for_fused: bool  # of use in fused models alone


class Repeats:
    """A recipe that changes nothing: its modules call what follows from their state, and no more.

    So it can be recorded (`vertebra.nn._recorded`).
    """

    REPEATS = True


_recipes: dict[str, Recipe] = {}


def accelerates(
    path: str,
    refuses: Refuses = lambda module: None,
    *,
    for_fused: bool = False,
    **methods: str,
) -> Callable[[R], R]:
    """Make a class the recipe for another.

    Args:
        path: of that class, as "torchvision.models.resnet.BasicBlock".
        refuses: returns what about a module keeps it from being accelerated, in words, or None.
        for_fused: it is of use in models that `fuse` makes, and no others are changed.
        methods: by name, the methods that the recipe replaces, or relies on: their known readings
            (`reading`), separated by blanks.
    """

    def register(mixin: R) -> R:
        known = {name: frozenset(readings.split()) for name, readings in methods.items()}
        _recipes[path] = Recipe(mixin, known, refuses, for_fused)
        return mixin

    return register


def reading(function: Any) -> str:
    """Return what tells what a function does from what others do: a digest of its syntax."""
    return reading_of(inspect.getsource(function))


def reading_of(source: str) -> str:
    """Return the digest of a function's source: no comments, docstring, annotations, decorators.

    The same under every version of Python, which the tokens of a source are not.
    """
    (function,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(function, ast.FunctionDef)
    has_docstring = ast.get_docstring(function) is not None
    body = function.body[1:] if has_docstring else function.body
    text = _written([function.name, function.args, body])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_SAYS_NOTHING = frozenset({"annotation", "type_comment", "kind", "ctx", "simple", "type_params"})


def _written(node: Any) -> str:
    """Return a syntax tree as text."""
    if isinstance(node, list):
        return f"[{' '.join(map(_written, cast('list[Any]', node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (_written(v) for k, v in ast.iter_fields(node) if k not in _SAYS_NOTHING)
    return f"({type(node).__name__} {' '.join(fields)})"


class Swapped(nn.Module):
    """What all classes that modules are put on have in common.

    A pickled module is one of its own class again: what loads it needs none of this. But one of a
    fused model, which needs this library anyway, `stays` what it is.
    """

    _own: ClassVar[type[nn.Module]]
    stays = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, (_, *rest), *state = super().__reduce_ex__(1)  # the oldest that takes another class
        if self.stays:
            return (_make_swapped, (self._own,), *state)
        return (make, (self._own, *rest), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


def _make_swapped(own: type[nn.Module]) -> nn.Module:
    """Return a module without state, on the class that those of class `own` are put on, if any."""
    load(own.__module__.partition(".")[0])
    cls = _swapped(own)
    return nn.Module.__new__(own if isinstance(cls, str) else cls)


@cache
def load(library: str) -> None:
    """Register the recipes for a library, which whoever has a module of it has imported."""
    importlib.import_module(f"{__package__}._{library}")


def path_of(cls: type) -> str:
    """Return where a class is defined."""
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _swapped(own: type[nn.Module]) -> type[nn.Module] | str:
    """Return the class that modules of class `own` are put on, or why there is none."""
    recipe = _recipes.get(path_of(own))
    if recipe is None:
        return f"no recipe for {path_of(own)}"
    for name in ("__reduce__", "__reduce_ex__", "__deepcopy__", "__getstate__"):
        if getattr(own, name, None) is not getattr(nn.Module, name, None):
            return f"{path_of(own)} copies or pickles itself in a way of its own"
    for name, known in recipe.methods.items():
        method = getattr(own, name, None)
        found = None if method is None else reading(method)
        if found not in known:
            reason = f"{path_of(own)}.{name} is not the one this version was written for"
            warnings.warn(f"not accelerated: {reason} ({found})", stacklevel=4)
            return reason
    names = {"_own": own, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (Swapped, recipe.mixin, own), names)


def has_recipe(cls: type, fused: bool = False) -> bool:
    """Return whether there is a recipe for modules of this class, in a fused model or any."""
    recipe = _recipes.get(path_of(cls))
    return recipe is not None and (fused or not recipe.for_fused)


def recipes(library: str) -> dict[str, Recipe]:
    """Return the recipes for the classes of a library, by path; its recipes must be loaded."""
    return {path: r for path, r in _recipes.items() if path.startswith(f"{library}.")}


def target(module: nn.Module) -> type[nn.Module] | str:
    """Return the class that a module would be put on, or why none."""
    own = type(module)
    cls = _swapped(own)
    if isinstance(cls, str):
        return cls
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    return _recipes[path_of(own)].refuses(module) or cls


def swap(module: nn.Module, fused: bool = False) -> None:
    """Put a module, of a model to be fused or not, on its accelerated class, if it has one."""
    if not isinstance(module, Swapped) and has_recipe(type(module), fused):
        cls = target(module)
        if not isinstance(cls, str):
            module.__class__ = cls


def unswap(module: nn.Module) -> None:
    """Put a module back on its own class."""
    if isinstance(module, Swapped):
        own: Any = module._own  # pyright: ignore[reportPrivateUsage]
        module.__class__ = own
