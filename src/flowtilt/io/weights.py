"""Files of weights, read without unpickling code."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowtilt.errors import UserError
from flowtilt.io.user_errors import first_line


def read(path: Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """The dictionary in a .pt, .pth or .bin file, on the CPU; only tensors and plain values are ever unpickled.

    Args:
        allowed: harmless types that the file's publisher put beside the weights.

    Raises:
        UserError: the file can't be read, or holds what may not be unpickled.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors, or is damaged, so it is not read: {first_line(error)}") from error
    except Exception as error:  # in a damaged file the reader can fail anywhere
        raise UserError(f"{path}: can't be read, it may be cut short: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__} instead of named tensors; fetch the file again")
    return found
