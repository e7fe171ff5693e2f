"""Modules that come to the device while they are used and leave no copy there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

SMALL = 36 * 2**30
"""A GPU with less memory, in bytes, holds text encoders and reward models only while they work, unless told otherwise."""


def should_offload(offload: bool | str, device: torch.device) -> bool:
    """Whether those modules wait in the computer's memory: as told, or with "auto" on a GPU of less than 36 GiB."""
    if isinstance(offload, bool):
        return offload
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < SMALL


def storage_device(offload: bool | str, device: torch.device) -> torch.device:
    """Where those modules are kept."""
    return torch.device("cpu") if should_offload(offload, device) else device


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the weights of `modules` are on `device`; afterwards they are where they were, the very same tensors."""
    tensors = {id(x): x for module in modules for x in chain(module.parameters(), module.buffers())}.values()
    away = [(x, x.data) for x in tensors if x.device != device]
    try:
        for x, kept in away:
            x.data = kept.to(device)
        yield
    finally:
        for x, kept in away:
            x.data = kept
        if away:
            torch.cuda.empty_cache()
