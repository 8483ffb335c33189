"""The contract test sees: three planted bugs per kernel, each of which it must reject.

A mutant is a kernel file with one line changed, imported in place of the real one.
"""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from vertebra.kernels import _triton
from vertebra.kernels._triton import _affine, _tile, batch_norm_act, scale_bias_act
from vertebra.testing.cases import Case
from vertebra.testing.contract import check

APPLY = {
    "drops the residual": ("z += load_tile(residual_ptr", "z += 0 * load_tile(residual_ptr"),
    "shifts the channel": ("load_channels(scale_ptr, c, C", "load_channels(scale_ptr, c // 2, C"),
    "loses the tail": ("(m < M) & (c < C)", "(m < M - 1) & (c < C)"),
}
BACKWARD = {
    "forgets the activation": ("dz *= DACT(z)", "dz *= 1.0"),
    "counts rstd twice": ("tile, dz * slope,", "tile, dz * slope * rstd,"),
    "forgets the mean": ("sum_dz_deviation += dz * deviation", "sum_dz_deviation += dz * x"),
}
ADD_SPLITS = {
    "loses the last split": ("(s < splits)", "(s < splits - 1)"),
    "swaps the sums": ("(splits + s) * C + c", "s * C + c"),
    "keeps only the last block of splits": ("dscale += tl.load", "dscale = tl.load"),
}
MOMENTS = {
    "counts every lane alike": (
        "count = tl.maximum(count, 0).to(ACC)",
        "count = tl.maximum(count * 0 + tl.cdiv(stop - start, BLOCK_M), 0).to(ACC)",
    ),
    "updates past the end": ("delta = tl.where(m < stop, x - mean, 0.0)", "delta = x - mean"),
    "merges M2 without the means": ("m2 + count * (mean - merged) * (mean - merged)", "m2"),
}
MERGE = {
    "weighs the last split as the others": (
        "count = tl.minimum(M - s * split_m, split_m)",
        "count = (s * 0 + split_m)",
    ),
    "tracks the biased variance": ("m2 / (M - 1)", "m2 / M"),
    "swaps old and new": (
        "(1.0 - momentum) * old + momentum * statistic",
        "momentum * old + (1.0 - momentum) * statistic",
    ),
}
DX = {
    "forgets E[dz]": ("dz - dbias - deviation * dweight", "dz - deviation * dweight"),
    "forgets the projection": ("dz - dbias - deviation * dweight", "dz - dbias"),
    "forgets the activation": ("dz *= DACT(deviation * slope + bias)", "dz *= 1.0"),
}

# two splits of two tiles, the last one ragged
_BN = Case("batch_norm_act", (3, 4, 13, 21), act="silu", options=("affine", "stats"))
_EVAL = Case("scale_bias_act", (2, 12, 5, 7), act="silu", layout="nhwc")
# 150 splits, more than one block of them
_MANY = Case("batch_norm_act", (3, 4, 113, 113), layout="nhwc", options=("affine", "stats"))

# the case that each kernel's mutants must fail, and the multiprocessors that set its splits
PLANS = [
    (_affine, "_apply_kernel", _EVAL, 2, APPLY),
    (_affine, "_backward_kernel", _EVAL, 2, BACKWARD),
    (_affine, "_add_splits_kernel", _MANY, 64, ADD_SPLITS),
    (batch_norm_act, "_moments_kernel", _BN, 1, MOMENTS),
    (batch_norm_act, "_merge_kernel", _BN, 1, MERGE),
    (batch_norm_act, "_dx_kernel", _BN, 1, DX),
]
PARAMETERS = [
    pytest.param(module, kernel, case, sms, *mutation, id=f"{kernel.strip('_')}-{what}")
    for module, kernel, case, sms, mutations in PLANS
    for what, mutation in mutations.items()
]


@pytest.fixture
def with_sms(monkeypatch):
    """Give every device as many multiprocessors as asked for, and so the same splits."""

    def use(sms: int) -> None:
        for user in (_tile, _affine, batch_norm_act):
            monkeypatch.setattr(user, "processors", lambda device: sms)

    return use


@pytest.mark.parametrize(("module", "kernel", "case", "sms", "old", "new"), PARAMETERS)
def test_contract_rejects(
    module, kernel, case, sms, old, new, device, with_sms, tmp_path, monkeypatch
):
    with_sms(sms)
    _plant(module, kernel, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=r"budget|other bits"):
        check(case, device)


@pytest.mark.parametrize(("case", "sms"), [(_BN, 1), (_EVAL, 2), (_MANY, 64)])
def test_contract_accepts_the_original(case: Case, sms: int, device, with_sms) -> None:
    with_sms(sms)
    check(case, device)


def test_every_kernel_is_mutated() -> None:
    kernels = {
        (module.__name__, name)
        for module in (_affine, batch_norm_act, scale_bias_act)
        for name in re.findall(r"def (_\w+_kernel)\(", inspect.getsource(module))
    }
    assert kernels == {(module.__name__, name) for module, name, *_ in PLANS}
    assert all(len(mutations) >= 3 for *_, mutations in PLANS)


def _plant(module, kernel: str, old: str, new: str, folder: Path, monkeypatch) -> None:
    """Put a copy of `module`, with `old` replaced inside `kernel`, where `module` is used."""
    source = Path(inspect.getfile(module)).read_text()
    start = source.index(f"def {kernel}(")
    end = source.index("\n\n\n", start)
    body = source[start:end] + "\n\n"
    assert body.count(old) == 1, f"{old!r} occurs {body.count(old)} times in {kernel}"
    path = folder / "mutant.py"
    path.write_text(source[:start] + body.replace(old, new) + source[end:])
    spec = importlib.util.spec_from_file_location(f"{_triton.__name__}._mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    if module is _affine:
        for user in (batch_norm_act, scale_bias_act):
            monkeypatch.setattr(user, "_affine", mutant)
    else:
        monkeypatch.setattr(_triton, module.__name__.rpartition(".")[2], mutant)
