"""The judge: eager's error decides what is allowed, in the worst tensor of each group."""

import pytest
import torch

from vertebra.bench.oracle import Answers, Oracle


def truth() -> Answers:
    return {
        "logits": torch.randn(4, 10, dtype=torch.float64),
        "gradients:a": torch.randn(50, dtype=torch.float64),
        "gradients:b": torch.randn(5, 5, dtype=torch.float64),
    }


def calibrated(exact: Answers, dtype: torch.dtype = torch.float32) -> Oracle:
    oracle = Oracle(exact, dtype)
    oracle.calibrate({name: value.to(dtype) for name, value in exact.items()})
    return oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_answer_is_right(dtype) -> None:
    exact = truth()
    verdict = calibrated(exact, dtype).judge({k: v.to(dtype) for k, v in exact.items()})
    assert not verdict.wrong
    assert verdict.errors.keys() == verdict.allowed.keys() == {"logits", "gradients"}
    assert all(0 < error <= torch.finfo(dtype).eps for error in verdict.errors.values())


@pytest.mark.parametrize("name", ["logits", "gradients:a", "gradients:b"])
@pytest.mark.parametrize("planted", [1e-4, float("nan"), float("inf")])
def test_one_wrong_element_in_any_tensor_is_found_and_named(name, planted) -> None:
    exact = truth()
    oracle = calibrated(exact)
    answers = {k: v.float() for k, v in exact.items()}
    answers[name].flatten()[3] += planted
    verdict = oracle.judge(answers)
    assert name in verdict.wrong
    assert not verdict.errors[name.partition(":")[0]] <= verdict.allowed[name.partition(":")[0]]


def test_a_missing_or_misshapen_answer_is_wrong() -> None:
    exact = truth()
    oracle = calibrated(exact)
    answers = {k: v.float() for k, v in exact.items()}
    assert "gradients:a" in oracle.judge({**answers, "gradients:a": torch.zeros(7)}).wrong
    del answers["gradients:b"]
    assert "gradients:b" in oracle.judge(answers).wrong


def test_the_budget_is_twice_the_worst_of_eagers_runs() -> None:
    exact = truth()
    oracle = calibrated(exact)
    for size in (1e-3, 3e-3, 2e-3):
        oracle.calibrate({name: value * (1 + size) for name, value in exact.items()})
    assert not oracle.judge({name: value * (1 + 5.9e-3) for name, value in exact.items()}).wrong
    assert oracle.judge({name: value * (1 + 6.1e-3) for name, value in exact.items()}).wrong


def test_a_sum_may_have_the_roundings_of_its_terms() -> None:
    exact = {"dweight": torch.randn(50, dtype=torch.float64)}
    off = {"dweight": (exact["dweight"] * (1 + 5e-7)).float()}
    assert calibrated(exact).judge(off).wrong
    oracle = Oracle(exact, torch.float32, {"dweight": 100})
    oracle.calibrate({"dweight": exact["dweight"].float()})
    assert not oracle.judge(off).wrong
    assert oracle.judge({"dweight": exact["dweight"] * (1 + 5e-6)}).wrong


def test_the_terms_of_an_fp32_sum_over_bf16_maps_are_no_bf16_roundings() -> None:
    exact = {"dweight": torch.randn(50, dtype=torch.float64)}
    oracle = Oracle(exact, torch.bfloat16, {"dweight": 10_000})
    oracle.calibrate({"dweight": exact["dweight"].float()})
    eps = torch.finfo(torch.bfloat16).eps
    assert not oracle.judge({"dweight": exact["dweight"] * (1 + 1.9 * eps)}).wrong
    assert oracle.judge({"dweight": exact["dweight"] * (1 + 2.1 * eps)}).wrong


def test_rounding_around_a_gradient_that_is_zero_is_no_error() -> None:
    exact = truth() | {"gradients:zero": torch.zeros(8, dtype=torch.float64)}
    oracle = calibrated(exact)
    answers = {name: value.float() for name, value in exact.items()}
    answers["gradients:zero"] = torch.full((8,), 1e-11)
    assert not oracle.judge(answers).wrong
    answers["gradients:zero"] = torch.full((8,), 1e-2)
    assert oracle.judge(answers).wrong


def test_eager_that_is_wrong_itself_is_no_yardstick() -> None:
    exact = truth()
    with pytest.raises(ValueError, match="no yardstick"):
        Oracle(exact, torch.float32).calibrate({k: -v for k, v in exact.items()})


def test_few_noisy_tensors_have_budgets_of_their_own() -> None:
    """A sum that cancels in half precision neither ends a comparison nor opens it to others."""
    exact = {f"gradients:{i}": torch.randn(20, dtype=torch.float64) for i in range(20)}
    eager = {name: value.float() for name, value in exact.items()}
    eager["gradients:7"] = eager["gradients:7"] * 1.5
    oracle = Oracle(exact, torch.float32)
    oracle.calibrate(eager)
    assert oracle.noisy == ["gradients:7"]
    verdict = oracle.judge({**eager, "gradients:7": exact["gradients:7"] * 0.2})
    assert not verdict.wrong
    assert verdict.allowed["gradients"] < 1e-5
    assert "gradients:7" in oracle.judge({**eager, "gradients:7": eager["gradients:7"] * 3}).wrong
    for planted in (float("nan"), float("inf")):
        off = eager["gradients:7"].clone()
        off[3] = planted
        assert "gradients:7" in oracle.judge({**eager, "gradients:7": off}).wrong
    other = {**eager, "gradients:3": eager["gradients:3"] * 1.001}
    assert "gradients:3" in oracle.judge(other).wrong
    for name in ("gradients:1", "gradients:2"):
        eager[name] = eager[name] * 1.5
    with pytest.raises(ValueError, match="no yardstick: 3 of 20 gradients"):
        oracle.calibrate(eager)


def test_eager_that_is_not_finite_is_no_yardstick() -> None:
    exact = {f"gradients:{i}": torch.randn(20, dtype=torch.float64) for i in range(20)}
    eager = {name: value.float() for name, value in exact.items()}
    eager["gradients:7"][3] = float("nan")
    with pytest.raises(ValueError, match="no yardstick"):
        Oracle(exact, torch.float32).calibrate(eager)


def test_top1_is_the_share_of_images_that_agree() -> None:
    exact = truth()
    answers = {name: value.float() for name, value in exact.items()}
    assert calibrated(exact).judge(answers).top1 == 1
    answers["logits"] = answers["logits"].clone()
    answers["logits"][0] *= -1
    assert calibrated(exact).judge(answers).top1 == 0.75
