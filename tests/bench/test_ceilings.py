"""What a machine can do, and what follows from it."""

import pytest
import torch

from vertebra.bench import ceilings
from vertebra.bench.ceilings import Ceilings

ROUND = Ceilings(1e9, {"fp32": 1e12, "tf32": 4e12, "bf16": 8e12}, 5e11)


def test_a_cpu_has_ceilings() -> None:
    said: list[str] = []
    found = ceilings.measure(torch.device("cpu"), ("bf16",), tiny=True, say=said.append)
    assert list(found.matmul_flops_per_s) == ["fp32", "bf16"]
    assert found.fma_flops_per_s == found.matmul_flops_per_s["fp32"]
    rates = (found.copy_bytes_per_s, *found.matmul_flops_per_s.values())
    assert all(1e6 < rate < 1e15 for rate in rates)
    assert len(said) == 4
    assert Ceilings(**found.to_dict()) == found


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ({"bytes": 2e6}, 2.0),
        ({"flops": 8e9, "dtype": "bf16"}, 1.0),
        ({"flops": 4e9, "dtype": "fp32"}, 1.0),  # cuDNN's fp32 is tf32
        ({"bytes": 2e6, "flops": 8e9, "dtype": "bf16"}, 2.0),  # both at once, the slower counts
        ({"bytes": 2e6, "flops": 24e9, "dtype": "bf16"}, 3.0),
        ({}, 0.0),
    ],
)
def test_the_floor_is_the_slower_of_moving_and_computing(work, expected) -> None:
    assert ROUND.floor_ms(**work) == pytest.approx(expected)


def test_a_cpu_computes_fp32_in_fp32() -> None:
    assert Ceilings(1.0, {"fp32": 1e12}, 1.0).floor_ms(flops=1e9) == pytest.approx(1.0)


def test_the_multiply_adds_are_done(device) -> None:
    from vertebra.kernels._triton import _fma

    x, y = _fma.inputs(2, device)
    flops = _fma.repeat(y, x, 0.75, 0.5, rounds=2)
    expected = x.double()
    for _ in range(flops // (2 * x.numel())):
        expected = expected * 0.75 + 0.5
    assert flops == 2 * 32 * x.numel()
    torch.testing.assert_close(y, expected.float())
