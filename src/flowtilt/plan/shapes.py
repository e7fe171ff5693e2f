"""Operations on meta tensors, without asking torch twice.

A network's blocks are alike, and torch's rules of shapes are Python: they took most of the time of a plan.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SEEN: dict[Any, Any] = {}
"""What operations have made of meta tensors, where they make new ones: kind, shapes, strides and dtypes, by all that they were given."""


def outcome(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
    """What an operation gives; of meta tensors an equal one where it has been seen."""
    if func is torch.ops.aten.where.self and any(x.is_meta for x in given):  # it takes no tensors of two devices
        args = tuple(x.to("meta") for x in args)
        given = list(args)
    if not given or not all(x.is_meta for x in given):
        return func(*args, **kwargs)
    try:
        key = (func, _hashable(args), _hashable(tuple(kwargs.items())))
        seen = _SEEN.get(key)
    except TypeError:  # something that has no hash
        return func(*args, **kwargs)
    if seen is not None:
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in seen[1]]
        return made[0] if seen[0] is Tensor else seen[0](made)
    out = func(*args, **kwargs)
    kind = Tensor if isinstance(out, Tensor) else type(out)
    if kind in (Tensor, tuple, list):
        made = [out] if isinstance(out, Tensor) else list(out)
        if all(isinstance(x, Tensor) and x.is_meta for x in made) and _new(made, given):
            _SEEN[key] = kind, [(x.shape, x.stride(), x.dtype) for x in made]
    return out


def _hashable(value: Any) -> Any:
    """All that an outcome on the meta device depends on; 1, 1.0 and True are not the same."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_hashable, value))
    return type(value), value


def _new(made: list[Tensor], given: list[Tensor]) -> bool:
    """Whether each has a storage of its own that is no larger than itself."""
    storages = [x.untyped_storage() for x in made]
    own = {storage._cdata for storage in storages}
    if len(own) < len(made) or own & {x.untyped_storage()._cdata for x in given}:
        return False
    alike = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in made]
    return all(storage.nbytes() == x.untyped_storage().nbytes() for storage, x in zip(storages, alike, strict=True))


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among an operation's arguments or results, in lists too; torch's own walk through them takes ten times as long."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += tensors(x)
    return found
