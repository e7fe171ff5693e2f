"""What a reward may answer: one number per image in any of the usual forms. Anything else is refused in a line."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtilt.errors import UserError, printable
from flowtilt.prompts import Prompt


def checked(column: str, values: Any, prompts: Sequence[Prompt]) -> Tensor:
    """The scores [N] fp32 on the CPU, of a tensor or NumPy array of real numbers, or a list of them.

    Raises:
        UserError: says what came and what was wanted, or for which prompt the score is infinite.
    """
    found = _as_tensor(values)
    if found is None or found.shape != (len(prompts),):
        raise UserError(f"reward {column}: returned {_described(values)}, want a tensor of shape [{len(prompts)}], one score per image")
    exact = found.detach()
    found = exact.float().cpu()
    if found.isinf().any():
        worst = int(found.isinf().nonzero()[0])
        what = "infinite" if exact[worst].isinf() else f"{float(exact[worst]):g}, which is too large for float32,"
        raise UserError(f'reward {column}: {what} for "{prompts[worst].text}"; return NaN where there is no score')
    return found


def details_of(name: str, details: Any) -> dict[str, Any]:
    """The columns "reward/detail" of a `RewardOutput`'s details.

    Raises:
        UserError: they are no table of names.
    """
    if not isinstance(details, Mapping) or not all(isinstance(key, str) and key for key in details):
        raise UserError(f"reward {name}: details are {_described(details)}, want a dict of name: scores")
    return {f"{name}/{key}": value for key, value in details.items()}


def notes_of(name: str, notes: Any, number: int) -> list[str]:
    """One note per image, all empty where the reward gives none.

    Raises:
        UserError: there are as many notes as there should not be, or they are no text.
    """
    if notes is None or (isinstance(notes, Sequence) and not notes):
        return [""] * number
    if isinstance(notes, str) or not isinstance(notes, Sequence) or not all(isinstance(note, str) for note in notes):
        raise UserError(f"reward {name}: notes are {_described(notes)}, want a list of {number} texts, one per image")
    if len(notes) != number:
        raise UserError(f"reward {name}: returned {len(notes)} of {number} notes, want one an image")
    return [printable(note) for note in notes]


def seed_of(name: str, prompts: Sequence[Prompt], sums: Tensor) -> int:
    """A seed for what a reward draws at random: a function of its name, the prompts and the images' sums [N] on the CPU."""
    key = repr((name, [prompt.text for prompt in prompts], sums.tolist())).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") & (2**63 - 1)


def _as_tensor(values: Any) -> Tensor | None:
    """A real tensor whose data can be read; none of anything else."""
    try:
        if isinstance(values, list | tuple):
            values = torch.tensor([_number(value) for value in values], dtype=torch.float64)
        elif isinstance(values, np.ndarray):
            values = torch.from_numpy(values.astype(np.float64)) if values.dtype.kind in "fiub" else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    readable = isinstance(values, Tensor) and values.layout is torch.strided and not (values.is_meta or values.is_quantized)
    return values if readable and not values.is_complex() else None


def _number(value: Any) -> float:
    """One score of a list: a number or what holds exactly one."""
    if isinstance(value, str | bytes | complex) or (isinstance(value, Tensor | np.ndarray) and value.ndim):
        raise TypeError
    return float(value)


def _described(values: Any) -> str:
    """What a reward has returned, in a few words."""
    if isinstance(values, Tensor):
        kind = "" if values.layout is torch.strided else f"{str(values.layout).removeprefix('torch.')} "
        where = " on the meta device" if values.is_meta else ""
        return f"a {kind}tensor of shape {list(values.shape)} and {str(values.dtype).removeprefix('torch.')}{where}"
    if isinstance(values, np.ndarray):
        return f"an array of shape {list(values.shape)} and {values.dtype}"
    if values is None:
        return "None (is a return missing?)"
    if isinstance(values, list | tuple):
        kinds = ", ".join(dict.fromkeys(type(value).__name__ for value in values))
        return f"a {type(values).__name__} of {len(values)} values" + (f" ({kinds})" if kinds else "")
    if isinstance(values, Mapping):
        return "a dict (several scores go into RewardOutput(scores, details={...}))"
    return f"a {type(values).__name__}"
