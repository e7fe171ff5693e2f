"""What users bring in files of their own, rewards and adapters: "path/to/file.py:function"."""

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from flowtilt.errors import UserError
from flowtilt.faults import FAULTS, HINT, told
from flowtilt.files import shown

_homes: dict[str, Path] = {}
"""Modules that were imported as a reward file's neighbours, and the folder they came from."""
_imported: dict[Path, set[Path]] = {}
"""The files of such modules, by that folder."""


def absolute(source: str) -> str:
    """The same source for a program that runs in another folder; names and addresses as they are."""
    place, colon, name = source.rpartition(":")
    return f"{os.path.abspath(place)}:{name}" if colon and "://" not in source else source


def neighbours(files: Iterable[str]) -> list[Path]:
    """The modules that reward files have imported from their own folders, installed packages left out."""
    found = {place for file in files for place in _imported.get(Path(os.path.abspath(file)).parent, ())}
    return sorted(place for place in found if not {"site-packages", "dist-packages"} & set(place.parts))


def is_file(source: str) -> bool:
    """Whether a source without ":function" is a file all the same."""
    return source.endswith(".py") or Path(source).is_file()


def without_function(path: Path) -> str:
    """What to write instead of the file alone."""
    if not path.is_file():
        return f"no file {shown(path)}"
    names = functions(path)
    which = f"it has {', '.join(names)}" if names else "no function or class was found in it"
    return f'add ":function" to {shown(path)}, as in {shown(path)}:{names[0] if names else "function"}; {which}'


def functions(path: Path) -> list[str]:
    """The public functions and classes at a file's top level, read without running it; none of a file that can't be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return list(dict.fromkeys(node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")))


def load(path: Path) -> ModuleType:
    """The file's module, run anew; files beside it can be imported by their names while it runs.

    Raises:
        UserError: there is no such file, or it is no Python.
        Exception: whatever the file raises.
    """
    if not path.is_file():
        raise UserError(f"no file {shown(path)}")
    spec = importlib.util.spec_from_file_location(f"flowtilt_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{shown(path)} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    with _neighbours(Path(os.path.abspath(path)).parent):
        spec.loader.exec_module(module)
    return module


def from_file(key: str, source: str) -> Any:
    """The function or class that a source names.

    Args:
        key: where the user named it, for errors.

    Raises:
        UserError: no such file or function, or the file fails.
    """
    place, _, name = source.rpartition(":")
    if not place:
        raise UserError(f"{key}: {without_function(Path(source))}")
    try:
        module = load(Path(place))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except FAULTS as error:
        raise UserError(f"{key}: importing {shown(place)} failed: {told(error)} ({HINT})") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{key}: {_unknown_function(Path(place), name)}")
    return found


def _unknown_function(path: Path, name: str) -> str:
    """That a file has no such function, and which ones it has."""
    names = functions(path)
    near = get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}" if names else ""
    return f"no function {name!r} in {shown(path)}{hint}"


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Inside, imports look in this folder first; outside, sys.path is as it was.

    A module that another reward's folder has under the same name is set aside meanwhile.
    """
    aside = {name: sys.modules.pop(name) for name, home in _homes.items() if home != folder and name in sys.modules}
    before = set(sys.modules)
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            place = getattr(sys.modules[name], "__file__", None)
            if place and Path(os.path.abspath(place)).is_relative_to(folder):
                _homes.setdefault(name, folder)
                _imported.setdefault(folder, set()).add(Path(os.path.abspath(place)))
        sys.modules.update(aside)
