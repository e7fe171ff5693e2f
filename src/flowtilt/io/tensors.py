"""Safetensors files that are equal where their tensors are, with the permissions of any other file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors, which must be contiguous, and metadata."""
    safetensors.torch.save_file(dict(tensors), path, dict(metadata) if metadata else None)
    settle(path)


def settle(path: Path) -> None:
    """Makes a file that safetensors wrote what `save_file` writes.

    Safetensors orders its metadata at random, and lets the owner alone read the file whatever the umask says.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if metadata := header.pop("__metadata__", None):
            header = {"__metadata__": dict(sorted(metadata.items()))} | header
            ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
            if len(ordered) == length:
                file.seek(8)
                file.write(ordered)
    # a new file shows the umask, which can't be read without changing it for other threads
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    path.chmod(mode)
