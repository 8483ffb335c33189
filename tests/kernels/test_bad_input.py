"""Bad input: an error that states the rule, what came and the fix, before anything is changed."""

import pytest
import torch

from vertebra.kernels import batch_norm_act, batch_norm_act_pool, scale_bias_act

C = 3
X = torch.randn(2, C, 4, 5)
VECTOR = torch.rand(C)

# what is passed, the error, and words of its message: the rule, the value, the fix
BAD = {
    "rank": ({"x": torch.randn(2, C, 4)}, ValueError, r"\(N, C, H, W\), got \(2, 3, 4\).*reshape"),
    "not a tensor": ({"x": [[1.0]]}, TypeError, r"torch\.Tensor, got list"),
    "integers": ({"x": torch.ones(2, C, 4, 5, dtype=torch.int32)}, TypeError, r"int32.*float\(\)"),
    "channel count": ({"bias": torch.rand(4)}, ValueError, r"bias must have shape \(3,\).*\(4,\)"),
    "vector rank": ({"bias": torch.rand(C, 1)}, ValueError, r"bias must have shape \(3,\)"),
    "vector dtype": ({"bias": VECTOR.double()}, TypeError, r"x's dtype.*float64.*\.to\(dtype\)"),
    "vector device": ({"bias": VECTOR.to("meta")}, ValueError, r"bias is on meta and x on cpu"),
    "residual shape": (
        {"residual": torch.randn(2, C, 4, 1)},
        ValueError,
        r"residual must have x's shape \(2, 3, 4, 5\), got \(2, 3, 4, 1\).*downsample",
    ),
    "residual dtype": ({"residual": X.half()}, TypeError, r"residual.*float32, got.*float16.*\.to"),
    "residual device": ({"residual": X.to("meta")}, ValueError, r"residual is on meta"),
    "activation": ({"act": "tanh"}, ValueError, r"none, relu, silu.*got 'tanh'"),
    "eps": ({"eps": 0.0}, ValueError, r"eps must be positive, got 0\.0"),
}


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in (scale_bias_act, batch_norm_act) for name in BAD]
    + [(batch_norm_act_pool, name) for name in BAD if "residual" not in name],
)
def test_bad_input(op, name: str) -> None:
    changed, error, words = BAD[name]
    mean, var = VECTOR.clone(), VECTOR.clone()
    stats = ("mean", "var") if op is scale_bias_act else ("running_mean", "running_var")
    weight = "scale" if op is scale_bias_act else "weight"
    arguments = {"x": X, weight: VECTOR, "bias": VECTOR, stats[0]: mean, stats[1]: var} | changed
    with pytest.raises(error, match=f"{op.__name__}: .*{words}"):
        op(**arguments)
    assert torch.equal(mean, VECTOR)
    assert torch.equal(var, VECTOR)


def test_mixed_vector_dtypes() -> None:
    half = VECTOR.half()
    with pytest.raises(TypeError, match=r"share one dtype; scale is torch.float16 and bias is"):
        scale_bias_act(X.half(), half, VECTOR)


@pytest.mark.parametrize("missing", ["mean", "var"])
def test_half_of_the_statistics(missing: str) -> None:
    stats = {"mean": VECTOR, "var": VECTOR, missing: None}
    with pytest.raises(ValueError, match="both mean and var"):
        scale_bias_act(X, None, None, **stats)
    running = {"running_" + k: v for k, v in stats.items()}
    with pytest.raises(ValueError, match="both running_mean and running_var"):
        batch_norm_act(X, **running)


def test_one_value_per_channel_has_no_variance() -> None:
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 3, 1, 1\).*eval"):
        batch_norm_act(torch.randn(1, C, 1, 1))


def test_what_cannot_be_pooled() -> None:
    with pytest.raises(ValueError, match=r"pool: x must have at least one pixel.*\(2, 3, 0, 5\)"):
        batch_norm_act_pool(torch.randn(2, C, 0, 5))
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 3, 1, 1\).*eval"):
        batch_norm_act_pool(torch.randn(1, C, 1, 1))
    with pytest.raises(ValueError, match=r"training=False the running statistics.*training=True"):
        batch_norm_act_pool(X, training=False)
    with pytest.raises(ValueError, match="both running_mean and running_var"):
        batch_norm_act_pool(X, running_mean=VECTOR)


def test_residual_is_promoted_under_autocast(device: torch.device) -> None:
    """As the add it replaces would, and only there."""
    x, residual = X.to(device, torch.bfloat16), X.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = scale_bias_act(x, None, None, residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x + residual)
