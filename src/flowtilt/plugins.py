"""What users bring in a file of their own, "path/to/file.py:name"."""

import importlib.util
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError


def from_file(key: str, source: str) -> Any:
    """What `source` names, its file run as a module of its own.

    Args:
        key: where the user wrote it, for errors.

    Raises:
        UserError: no such file or name, or the file fails.
    """
    place, _, name = source.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise UserError(f"{key}: no file {place or source!r}; give file.py:name")
    spec = importlib.util.spec_from_file_location(f"flowtilt_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: {place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{key}: importing {place} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{key}: nothing called {name!r} in {place}")
    return found
