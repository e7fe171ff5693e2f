"""What users bring in files of their own, rewards and adapters: "path/to/file.py:function"."""

import ast
import importlib
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from flowtilt.errors import UserError
from flowtilt.io import user_modules as userfiles
from flowtilt.io.files import shown
from flowtilt.io.user_errors import HINT, describe_error, is_fault


def absolute(source: str) -> str:
    """The same source for a program that runs in another folder; names and addresses as they are."""
    place, colon, name = source.rpartition(":")
    return f"{os.path.abspath(place)}:{name}" if colon and "://" not in source else source


def neighbours(files: Iterable[str]) -> list[Path]:
    """The modules that reward files have imported from their own folders, installed packages left out."""
    found = {place for file in files for place in userfiles.imported.get(Path(os.path.abspath(file)).parent, ())}
    return sorted(place for place in found if not {"site-packages", "dist-packages"} & set(place.parts))


def is_file(source: str) -> bool:
    """Whether a source without ":function" is a file all the same."""
    return source.endswith(".py") or Path(source).is_file()


def is_missing_file(source: str) -> bool:
    """Whether a source "file.py:function" names a file that is not there."""
    place, colon, _ = source.rpartition(":")
    return bool(colon) and "://" not in source and not Path(place).is_file()


def without_function(path: Path, what: str = "function") -> str:
    """What to write instead of the file alone; `what` is wanted of it."""
    if not path.is_file():
        return f"no file {shown(path)}"
    names = functions(path)
    which = f"it has {', '.join(names)}" if names else "no function or class was found in it"
    return f'add ":{what}" to {shown(path)}, as in {shown(path)}:{names[0] if names else what}; {which}'


def functions(path: Path) -> list[str]:
    """The public functions and classes at a file's top level, read without running it; none of a file that can't be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return list(dict.fromkeys(node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")))


def load(path: Path) -> ModuleType:
    """The file's module, run anew; files beside it can be imported by their names, and child processes find it by its own.

    Raises:
        UserError: there is no such file, or it is no Python.
        Exception: whatever the file raises.
    """
    if not path.is_file():
        raise UserError(f"no file {shown(path)}")
    if path.suffix != ".py":
        raise UserError(f"{shown(path)} is not a Python file")
    from flowtilt.io.containment import contained  # needs torch, which reading a recipe does without

    with contained(f"importing {shown(path)}", slow=f"{shown(path)} to be imported"):
        return importlib.import_module(userfiles.name_of(path))


def module_of(reward: Any) -> str:
    """Name of the module that a reward's or adapter's function or class is from."""
    inner = reward.func if isinstance(reward, partial) else reward
    return str(getattr(inner, "__module__", ""))


def is_ours(reward: Any) -> bool:
    """Whether flowtilt brings it, not the user."""
    name = module_of(reward)
    return name.startswith("flowtilt.") and not name.startswith(f"{userfiles.__name__}.")


def search_path(reward: Any) -> list[str]:
    """The folders in which its file looks for others."""
    return list(getattr(sys.modules.get(module_of(reward)), userfiles.FOLDERS, ()))


def from_file(key: str, source: str, what: str = "function") -> Any:
    """The function or class that a source names.

    Args:
        key: where the user named it, for errors.
        what: is wanted: a "function", or a "class".

    Raises:
        UserError: no such file or function, or the file fails.
    """
    place, _, name = source.rpartition(":")
    if not place:
        raise UserError(f"{key}: {without_function(Path(source), what)}")
    try:
        module = load(Path(place))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f"{key}: importing {shown(place)} failed: {describe_error(error)} ({HINT})") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{key}: {_unknown(what, Path(place), name)}")
    return found


def _unknown(what: str, path: Path, name: str) -> str:
    """That a file has no such function or class, and which ones it has."""
    names = functions(path)
    near = get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}" if names else ""
    return f"no {what} {name!r} in {shown(path)}{hint}"
