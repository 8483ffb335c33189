"""Weights on the Hugging Face hub, and in the folders that `save_pretrained` writes."""

from __future__ import annotations

import re
from pathlib import Path

FILES = ("model.safetensors", "pytorch_model.bin")  # in the order they are tried

_REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_repository(name: str) -> bool:
    """Return whether `name` can be a hub id: "owner/name", or "owner/name@revision"."""
    return _REPOSITORY.fullmatch(name) is not None and not name.endswith(
        (".safetensors", ".bin", ".pth", ".pt")
    )


def download(name: str) -> Path:
    """Return the weights of a repository on the hub: from the local cache, or fetched into it."""
    for file in FILES:
        if (path := fetch(name, file)) is not None:
            return path
    raise FileNotFoundError(f"the hub's {name!r} has none of {', '.join(FILES)}")


def fetch(name: str, file: str) -> Path | None:
    """Return a file of a repository on the hub, None if it has none of that name."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"weights {name!r} are on the Hugging Face hub, and huggingface_hub is not installed; "
            "pip install 'vertebra[hub]', or pass a local file"
        ) from error
    match = _REPOSITORY.fullmatch(name)
    if match is None:
        raise ValueError(f"a hub id is 'owner/name' or 'owner/name@revision'; got {name!r}")
    try:
        return Path(hf_hub_download(match["id"], file, revision=match["revision"]))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"weights {name!r}: {file} is not in the local cache, and the Hugging Face hub cannot "
            "be reached; go online once, or pass a local file"
        ) from error
    except EntryNotFoundError:
        return None


def in_folder(folder: Path) -> Path:
    """Return the weights of a folder."""
    for file in FILES:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(f"the folder {folder} has none of {', '.join(FILES)}")
