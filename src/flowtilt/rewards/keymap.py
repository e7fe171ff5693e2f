"""Published state dicts under the names that transformers gives the same tensors."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn

from flowtilt.errors import UserError

Module = TypeVar("Module", bound=nn.Module)


def rename(
    tensors: Mapping[str, Tensor], table: Mapping[str, str | None], path: Path, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors under their new names.

    Args:
        tensors: a published state dict.
        table: old to new name; the first match counts. "#" stands for a number and "*" for any ending, "{q,k,v}" in
            a new name for three tensors, equal parts of the old one's rows. None drops what is not used.
        path: where they come from, for messages.
        dtype: of those that are floats.

    Raises:
        UserError: a name is in no row of the table.
    """
    rows = [(re.compile(re.escape(old).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")), new) for old, new in table.items()]
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        match, new = next(((m, new) for row, new in rows if (m := row.fullmatch(name))), (None, None))
        if match is None:
            unknown.append(name)
        elif new is not None:
            new = _fill(new, match.groups())
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            found |= _three(new, tensor) if "{q,k,v}" in new else {new: tensor}
    if unknown:
        raise UserError(f"{path}: not the weights that belong here, {_some(unknown)} is not among their names; fetch the file again")
    return found


def _fill(new: str, groups: tuple[str, ...]) -> str:
    """The new name with each "#" and "*" replaced, in order, by what it stood for in the old one."""
    rest = iter(groups)
    return re.sub(r"[#*]", lambda _: next(rest), new)


def _three(new: str, tensor: Tensor) -> dict[str, Tensor]:
    return {new.replace("{q,k,v}", letter): part for letter, part in zip("qkv", tensor.tensor_split(3), strict=True)}


def build(make: Callable[[], Module]) -> Module:
    """What `make` builds, with parameters that are not initialised yet, leaving torch's random state as it was."""
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]), no_init_weights():
        return make()


def fill(module: Module, tensors: Mapping[str, Tensor], path: Path) -> Module:
    """The module with these tensors as its frozen parameters, in eval mode.

    Raises:
        UserError: a name or shape is missing, too many or different.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    other = [name for name in wanted.keys() & tensors.keys() if wanted[name] != tensors[name].shape]
    for names, fault in ((missing, "missing"), (extra, "too many"), (sorted(other), "of another shape")):
        if names:
            raise UserError(
                f"{path}: {_some(names)} {fault} for {type(module).__name__} of transformers {transformers.__version__}; "
                "the file is damaged or another model's, or this transformers is not supported"
            )
    module.load_state_dict(dict(tensors), assign=True)
    return module.eval().requires_grad_(False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
