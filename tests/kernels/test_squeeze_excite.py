"""What is special about squeeze_excite: its launches, its grids, and NaN that spreads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vertebra.kernels import backend, squeeze_excite
from vertebra.kernels._act import GATES
from vertebra.kernels._triton import _fcs
from vertebra.kernels._triton._launch import captured
from vertebra.kernels._triton._tile import processors
from vertebra.testing import aot
from vertebra.testing.cases import cases, example
from vertebra.testing.cases.squeeze_excite import REGNETY, SHARES, STEM
from vertebra.testing.contract import leaves_of

H100 = processors(torch.device("meta"))


@pytest.mark.parametrize("options", [("bias",), ("bias", "residual"), ("bias", "frozen")], ids=str)
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_launches(act: str, options: tuple[str, ...], device: torch.device) -> None:
    """Three forward and four backward, three without the weights' gradients."""
    case = example("squeeze_excite", act=act, options=options)
    inputs = case.inputs(device)
    inputs |= leaves_of(case, inputs)
    with captured() as forward:
        y = case.run(inputs)["y"]
    with captured() as backward:
        y.backward(inputs["dy"])
    assert len(forward) == 3
    assert len(backward) == (3 if "frozen" in options else 4)


def test_shares_save_a_launch(device: torch.device) -> None:
    """Nobody reads x for its means; and what wants a gradient of the means runs the definition."""
    case = example("squeeze_excite", options=("bias", "residual", *SHARES))
    inputs = case.inputs(device)
    with captured() as launches:
        case.run(inputs)
    assert [launch.kernel.__name__ for launch in launches] == ["_squeeze_kernel", "_scale_kernel"]
    shares = inputs["shares"]
    assert shares is not None
    inputs["shares"] = shares.requires_grad_()
    with backend("triton"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
        case.run(inputs)
    (found,) = torch.autograd.grad(case.run(inputs)["y"].square().sum(), shares)
    assert found.abs().sum() > 0


def test_nothing_is_kept_without_a_gradient(device: torch.device) -> None:
    """The means and v leave their kernels only for the backward pass."""
    case = example("squeeze_excite")
    for inputs, kept in (
        (case.inputs(device), False),
        ({**case.inputs(device), **leaves_of(case, case.inputs(device))}, True),
    ):
        with captured() as launches:
            case.run(inputs)
        assert (launches[1].arguments["s_ptr"] is not None) == kept
        assert (launches[2].arguments["vectors"][1] is not None) == kept


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [STEM, *REGNETY], ids=str)
def test_maps_fill_the_gpu(shape, layout: str) -> None:
    """Every map-sized launch has a program for every multiprocessor, also for one large image."""
    size, R = shape
    case = example("squeeze_excite", shape=size, dtype=torch.bfloat16, layout=layout)
    for options in (("bias", f"r={R}"), ("bias", "residual", f"r={R}")):
        for launch in aot.launches(replace(case, options=options)):
            if "maps" in launch.arguments:
                assert launch.grid[0] >= H100, launch.kernel.__name__


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id) for c in cases("bench", "squeeze_excite")]
)
def test_a_program_owns_every_pixel_once(case) -> None:
    """Images and splits of the last forward launch cover the map, and none is empty."""
    *_, scale = [one for one in aot.launches(case) if one.kernel.__name__ == "_scale_kernel"]
    N, C, H, W = case.shape
    a = scale.arguments
    splits = -(-H * W // a["split_p"])
    assert scale.grid[0] == -(-C // a["BLOCK_C"]) * splits * -(-N // a["IMAGES"])
    assert a["IMAGES"] == 1 or splits == 1
    assert a["IMAGES"] * a["BLOCK_C"] * a["CHUNK"] <= 2048 * a["num_warps"]


def test_a_tile_of_products_fits_its_registers() -> None:
    for N in (1, 3, 8, 256):
        for R, C in ((1, 1), (5, 17), (128, 512), (928, 3712)):
            for splits in (1, 7, 392):
                for dtype, partials in _fcs.PARTIALS.items():
                    tile = _fcs.pick_product(N, R, C, splits, dtype)
                    assert partials >= tile.IMAGES * tile.ROWS * tile.CHUNK
                    assert partials >= tile.IMAGES * tile.BLOCK_S * tile.CHUNK
                    assert all(size.bit_count() == 1 for size in tile)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_nan_and_infinity_pass_as_in_eager(gate: str, act: str, device: torch.device) -> None:
    """A NaN or an infinity spoils the image it is in, as in eager, and no other."""
    x = torch.randn(4, 3, 2, 3, device=device)
    x[0, 1, 0, 0], x[2, 0, 1, 2] = float("nan"), float("inf")
    fc1, fc2 = torch.rand(2, 3, device=device), torch.rand(3, 2, device=device)
    arguments = (x, fc1, None, fc2, None, None, act, gate, "relu")
    with backend("eager"):
        expected = squeeze_excite(*arguments)
    with backend("triton"), np.errstate(all="ignore"):  # the interpreter computes with numpy
        found = squeeze_excite(*arguments)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[[1, 3]].isfinite().all()
    assert found[0].isnan().all()


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: str, device: torch.device) -> None:
    """The gates and their derivatives, at their kinks, far outside of them and at NaN."""
    v = torch.tensor([-3.0, 3.0, -50.0, 50.0, 0.0, 2.5, float("nan")], device=device)
    fc2 = torch.zeros(7, 1, device=device)
    x = torch.ones(1, 7, 1, 1, device=device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        bias = v.clone().requires_grad_()
        y = squeeze_excite(x, torch.ones(1, 7, device=device), None, fc2, bias, gate=gate)
        return y.flatten().detach(), torch.autograd.grad(y.sum(), bias)[0]

    with backend("eager"):
        expected = run()
    with backend("triton"), np.errstate(all="ignore"):
        found = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
