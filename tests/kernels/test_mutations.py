"""The contract test sees: three planted bugs per kernel, each of which it must reject.

A mutant is a kernel file with one line changed, imported in place of the real one. The files in
`mutations/` list them: PLANS holds (module, kernel, the case that its mutants must fail, how many
multiprocessors to assume, which sets the splits, {what the bug is: (old code, new code)}).
"""

import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vertebra.kernels import _triton
from vertebra.testing import contract
from vertebra.testing.cases import Case

MARGIN = 4096  # elements on either side of an input: more than rows of a case's images have


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


TABLES = sorted(Path(__file__).with_name("mutations").glob("*.py"))
PLANS = [plan for path in TABLES for plan in _load(f"mutations_{path.stem}", path).PLANS]
KERNEL_MODULES = [
    importlib.import_module(f"{_triton.__name__}.{module.name}")
    for module in pkgutil.iter_modules(_triton.__path__)
]


@pytest.fixture
def with_sms(monkeypatch):
    """Give every device as many multiprocessors as asked for, and so the same splits."""

    def use(sms: int) -> None:
        for module in KERNEL_MODULES:
            if hasattr(module, "processors"):
                monkeypatch.setattr(module, "processors", lambda device: sms)

    return use


@pytest.fixture
def _amid_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay every input amid memory of its own, in which there are numbers.

    A mutant that reads beyond an input computes a wrong answer of them. What else lies there is
    anything: not mapped, or not finite, at which NumPy warns before an answer can be compared.
    """

    def clone(t: Tensor) -> Tensor:
        values = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        whole = values.new_full((values.numel() + 2 * MARGIN,), 8.0)
        whole[MARGIN:-MARGIN] = values
        return whole.as_strided(t.shape, t.stride(), MARGIN + t.storage_offset())

    monkeypatch.setattr(contract, "_clone", clone)


@pytest.mark.usefixtures("_amid_memory")
@pytest.mark.parametrize(
    ("module", "kernel", "case", "sms", "old", "new"),
    [
        pytest.param(
            *(module, kernel, case, sms, *mutation),
            id=f"{kernel.strip('_')}-{what}",
            marks=pytest.mark.thorough if i else (),  # one of each kernel in `make test`
        )
        for module, kernel, case, sms, mutations in PLANS
        for i, (what, mutation) in enumerate(mutations.items())
    ],
)
def test_contract_rejects(
    module, kernel, case, sms, old, new, device, with_sms, tmp_path, monkeypatch
):
    with_sms(sms)
    _plant(module, kernel, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=r"budget|other bits"):
        contract.check(case, device)


@pytest.mark.thorough
@pytest.mark.usefixtures("_amid_memory")
@pytest.mark.parametrize(
    ("case", "sms"),
    [
        pytest.param(case, sms, id=f"{case.id}-{sms}")
        for case, sms in dict.fromkeys((case, sms) for _, _, case, sms, _ in PLANS)
    ],
)
def test_contract_accepts_the_original(case: Case, sms: int, device, with_sms) -> None:
    with_sms(sms)
    contract.check(case, device)


def test_every_kernel_is_mutated() -> None:
    kernels = {
        (module.__name__, name)
        for module in KERNEL_MODULES
        if not module.__name__.endswith("._fma")  # a yardstick, and no op's
        for name in re.findall(r"def (_\w+_kernel)\(", inspect.getsource(module))
    }
    assert kernels == {(module.__name__, name) for module, name, *_ in PLANS}
    assert all(len(mutations) >= 3 for *_, mutations in PLANS)


def _plant(module, kernel: str, old: str, new: str, folder: Path, monkeypatch) -> None:
    """Put a copy of `module`, with `old` replaced inside `kernel`, wherever `module` is used."""
    source = Path(inspect.getfile(module)).read_text()
    start = source.index(f"def {kernel}(")
    end = source.index("\n\n\n", start)
    body = source[start:end] + "\n\n"
    assert body.count(old) == 1, f"{old!r} occurs {body.count(old)} times in {kernel}"
    path = folder / "mutant.py"
    path.write_text(source[:start] + body.replace(old, new) + source[end:])
    name = f"{_triton.__name__}._mutant"
    monkeypatch.setitem(sys.modules, name, None)
    mutant = _load(name, path)
    replaced = {id(value): getattr(mutant, name) for name, value in _own(module)}
    replaced[id(module)] = mutant
    for user in (_triton, *KERNEL_MODULES):
        for attribute, value in list(vars(user).items()):
            if user is not module and id(value) in replaced:
                monkeypatch.setattr(user, attribute, replaced[id(value)])


def _own(module: ModuleType) -> list[tuple[str, object]]:
    """Return what `module` itself defines, by name."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
    ]
