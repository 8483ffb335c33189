"""Bad input: an error that states the rule, what came and the fix, before anything is changed."""

import pytest
import torch

from vertebra.kernels import (
    backend,
    batch_norm_act,
    batch_norm_act_pool,
    drop_path_add,
    global_avg_pool,
    global_response_norm,
    layer_norm_2d,
    scale_bias_act,
    squeeze_excite,
)

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


@pytest.mark.parametrize("name", BAD)
def test_bad_input_after_good(name: str, device: torch.device) -> None:
    """Checks are passed once by calls that are alike, and only by those."""
    changed, error, words = BAD[name]
    x = torch.randn(2, C, 4, 5, device=device, requires_grad=True)
    vector = VECTOR.to(device)
    good = {"x": x, "scale": vector, "bias": vector.clone(), "residual": x.detach()}
    good |= {"mean": vector.clone(), "var": vector.clone()}
    for _ in range(2):
        scale_bias_act(**good)
    with pytest.raises(error, match=f"scale_bias_act: .*{words}"):
        scale_bias_act(**(good | changed))
    with pytest.raises(ValueError, match="both mean and var"):
        scale_bias_act(**(good | {"var": None}))
    strided = torch.stack([vector, vector], 1)[:, 0]
    with backend("triton"), pytest.raises(NotImplementedError, match="not contiguous"):
        scale_bias_act(**(good | {"bias": strided}))


OF_LAYER_NORM = [name for name, (changed, *_) in BAD.items() if {*changed} & {"x", "bias", "eps"}]


@pytest.mark.parametrize("name", OF_LAYER_NORM)
def test_bad_input_of_layer_norm(name: str) -> None:
    changed, error, words = BAD[name]
    with pytest.raises(error, match=f"layer_norm_2d: .*{words}"):
        layer_norm_2d(**{"x": X, "weight": VECTOR, "bias": VECTOR} | changed)


def test_mixed_vector_dtypes() -> None:
    half = VECTOR.half()
    with pytest.raises(TypeError, match=r"share one dtype; scale is torch.float16 and bias is"):
        scale_bias_act(X.half(), half, VECTOR)


def test_what_cannot_be_pooled() -> None:
    with pytest.raises(ValueError, match=r"pool: x must have at least one pixel.*\(2, 3, 0, 5\)"):
        batch_norm_act_pool(torch.randn(2, C, 0, 5))
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 3, 1, 1\).*eval"):
        batch_norm_act_pool(torch.randn(1, C, 1, 1))
    with pytest.raises(ValueError, match=r"training=False the running statistics.*training=True"):
        batch_norm_act_pool(X, training=False)
    with pytest.raises(ValueError, match="both running_mean and running_var"):
        batch_norm_act_pool(X, running_mean=VECTOR)


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


FC1, FC2 = torch.rand(2, C), torch.rand(C, 2)
BAD_FCS = {
    "rank": BAD["rank"],
    "not a tensor": BAD["not a tensor"],
    "residual shape": BAD["residual shape"],
    "residual dtype": BAD["residual dtype"],
    "transposed": (
        {"fc1_weight": FC2},
        ValueError,
        r"fc1_weight must have shape \(R, C\) or \(R, C, 1, 1\).*C = 3.*got \(3, 2\); transpose",
    ),
    "no hidden channel": ({"fc1_weight": FC1[:0]}, ValueError, r"at least R = 1 rows, here 0"),
    "a 3x3 convolution": (
        {"fc2_weight": torch.rand(C, 2, 3, 3)},
        ValueError,
        r"fc2_weight must have shape \(C, R\).*got \(3, 2, 3, 3\)",
    ),
    "unequal fcs": ({"fc2_weight": torch.rand(C, 4)}, ValueError, r"here 2; got \(3, 4\)"),
    "bias length": ({"fc1_bias": VECTOR}, ValueError, r"fc1_bias must have shape \(2,\).*\(3,\)"),
    "weight dtype": ({"fc2_weight": FC2.double()}, TypeError, r"x's dtype.*float64.*\.to\(dtype\)"),
    "weight device": ({"fc1_weight": FC1.to("meta")}, ValueError, r"fc1_weight is on meta"),
    "activation": ({"act": "tanh"}, ValueError, r"act must be one of none, relu.*got 'tanh'"),
    "gate": ({"gate": "relu"}, ValueError, r"gate must be one of sigmoid, hard_sigmoid.*'relu'"),
    "rank of shares": (
        {"shares": torch.rand(2, 3)},
        ValueError,
        r"shares must have shape \(N, T, C\), got \(2, 3\); of means give s\[:, None\]",
    ),
    "shape of shares": (
        {"shares": torch.rand(2, 1, 4)},
        ValueError,
        r"shares must have shape \(N, T, C\) and be torch.float32 .*; got \(2, 1, 4\)",
    ),
    "dtype of shares": (
        {"shares": torch.rand(2, 1, 3).double()},
        ValueError,
        r"be torch.float32 .*got \(2, 1, 3\) and torch.float64; give those of x",
    ),
    "type of shares": ({"shares": torch.rand(2, 1, 3).half()}, TypeError, r"must be float32 or"),
    "device of shares": (
        {"shares": torch.rand(2, 1, 3, device="meta")},
        ValueError,
        r"shares are on meta and x on cpu",
    ),
    "last activation": ({"out_act": "tanh"}, ValueError, r"out_act must be one of.*got 'tanh'"),
}


@pytest.mark.parametrize("name", BAD_FCS)
def test_bad_input_of_squeeze_excite(name: str) -> None:
    changed, error, words = BAD_FCS[name]
    fcs = {"fc1_weight": FC1, "fc1_bias": None, "fc2_weight": FC2, "fc2_bias": VECTOR}
    with pytest.raises(error, match=f"squeeze_excite: .*{words}"):
        squeeze_excite(**{"x": X, **fcs, **changed})


def test_mixed_dtypes_of_fcs() -> None:
    with pytest.raises(TypeError, match=r"share one dtype; fc1_weight is torch.float16 and fc2_"):
        squeeze_excite(X.half(), FC1.half(), None, FC2, None)


def test_residual_is_promoted_under_autocast(device: torch.device) -> None:
    """As the add it replaces would, and only there."""
    x, residual = X.to(device, torch.bfloat16), X.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = scale_bias_act(x, None, None, residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x + residual)


@pytest.mark.parametrize(
    "name", ["rank", "not a tensor", "integers", "channel count", "vector rank", "vector dtype"]
)
def test_bad_input_of_global_response_norm(name: str) -> None:
    changed, error, words = BAD[name]
    with pytest.raises(error, match=f"global_response_norm: .*{words}"):
        global_response_norm(**{"x": X, "weight": VECTOR, "bias": VECTOR} | changed)


def test_eps_of_global_response_norm() -> None:
    with pytest.raises(ValueError, match=r"global_response_norm: eps must be positive, got 0"):
        global_response_norm(X, VECTOR, VECTOR, eps=0)


@pytest.mark.parametrize(
    "name", ["rank", "not a tensor", "integers", "channel count", "vector dtype", "eps"]
)
def test_bad_input_of_global_avg_pool(name: str) -> None:
    changed, error, words = BAD[name]
    with pytest.raises(error, match=f"global_avg_pool: .*{words}"):
        global_avg_pool(**{"x": X, "weight": VECTOR, "bias": VECTOR, "eps": 1e-6} | changed)


def test_global_avg_pool_normalises_only_with_eps() -> None:
    with pytest.raises(ValueError, match=r"global_avg_pool: .*belong to LayerNorm; give its eps"):
        global_avg_pool(X, VECTOR, VECTOR)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.randn(2, C)}, ValueError, r"\(N, C, H, W\), got \(2, 3\)"),
        ({"gamma": torch.rand(4)}, ValueError, r"gamma must have shape \(3,\).*\(4,\)"),
        ({"gamma": torch.rand(C, 1, 1)}, ValueError, r"gamma must have shape \(3,\)"),
        ({"residual": torch.randn(2, C, 4, 1)}, ValueError, r"residual must have x's shape"),
        ({"drop_prob": 1.5}, ValueError, r"probability of \[0, 1\], got 1\.5"),
        ({"drop_prob": -0.1}, ValueError, r"probability of \[0, 1\], got -0\.1"),
        ({"drop_prob": float("nan")}, ValueError, r"probability of \[0, 1\], got nan"),
        ({"noise": torch.rand(3)}, ValueError, r"noise must have shape \(2,\).*\(3,\); expand"),
        ({"noise": torch.rand(2, 1)}, ValueError, r"noise must have shape \(2,\)"),
        ({"noise": torch.rand(2).half()}, TypeError, r"noise must be float32, got torch\.float16"),
        ({"noise": torch.rand(2, device="meta")}, ValueError, r"noise is on meta and x on cpu"),
    ],
)
def test_bad_drop_path(changed: dict, error: type[Exception], words: str) -> None:
    arguments = {"x": X, "residual": X, "gamma": VECTOR, "drop_prob": 0.5} | changed
    with pytest.raises(error, match=f"drop_path_add: .*{words}"):
        drop_path_add(**arguments)
