"""What is compared: the batch is balanced, so that the truth of its distinct images is its own."""

from pathlib import Path

import pytest
import torch

from vertebra.bench.workload import Workload

pytestmark = pytest.mark.parity
pytest.importorskip("sklearn")


def workload(folder: Path, batch: int, dtype: torch.dtype = torch.float64) -> Workload:
    return Workload.create("resnet18", batch, 32, torch.device("cpu"), dtype, folder)


@pytest.mark.parametrize("batch", [3, 11, 32, 33, 64, 256])
def test_every_image_comes_equally_often(tmp_path, batch) -> None:
    index = workload(tmp_path, batch).index
    counts = index.bincount()
    assert len(index) == batch
    assert (counts == batch // len(counts)).all()


@pytest.mark.parametrize("mode", ["forward", "training", "sgd"])
def test_the_truth_of_the_distinct_images_is_that_of_the_batch(tmp_path, mode) -> None:
    work = workload(tmp_path, 33)  # eleven images, three times each
    oracle = work.oracle(mode)
    (provider,) = work.providers(["vertebra-nhwc"], mode)
    step = provider.make()
    assert len(work.images) == 32
    for i in range(2):  # an optimizer step leaves the weights alone
        verdict = oracle.judge(step(i))
        assert not verdict.wrong
        assert max(verdict.errors.values()) < 1e-11
