"""Where a number comes from: machine, versions, source."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..kernels import current_backend
from ..kernels._choices import device_name
from ..kernels._op import INTERPRETED

_PACKAGE = Path(__file__).parents[1]
_PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Return what decides the speed of a run on `device`; "commit" is for people."""
    return {
        "vertebra": __version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "source": _source(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "device": device_name(device),
        "backend": current_backend(),
        "interpreted": INTERPRETED,
        "cores": os.cpu_count(),
        **(_gpu(device) if device.type == "cuda" else {}),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether results from two environments may stand side by side."""
    return {**a, "commit": None} == {**b, "commit": None}


def _source() -> str:
    """Return a digest of this package's code, which a tree without git has too."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with its build, "+cpu" or "+cu130"
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
    }


def _output(*command: str) -> str | None:
    """Return what a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=_PACKAGE, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
