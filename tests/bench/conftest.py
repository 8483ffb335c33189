"""Plain PyTorch on images of a few pixels."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _eager(eager_on_one_thread: None) -> None:
    """What is tested here is the measuring."""


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Store with pytest-benchmark's results what decides about them."""
    from vertebra.bench import environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["vertebra"] = environment.describe(device)
