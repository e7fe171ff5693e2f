"""Python files of the user as modules `flowtilt.io.user_modules.<stem>_<path>_<number>`.

The name holds the file's whole path, so that a child process, which is told names alone (multiprocessing's "spawn" and
"forkserver"), imports the same file. Each load has a number of its own, and with it globals of its own.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType

__path__: list[str] = []  # makes this module a package; `_Finder` finds what is in it
FOLDERS = "__folders__"
"""Attribute of such a module: its own folder and those that it added to sys.path."""

_numbers = count()
_homes: dict[str, Path] = {}
"""Modules that were imported as a file's neighbours, and the folder they came from."""
imported: dict[Path, set[Path]] = {}
"""The files of such modules, by that folder."""


def name_of(path: Path) -> str:
    """A new module name for a file."""
    stem = re.sub(r"\W", "", path.stem, flags=re.ASCII)
    return f"{__name__}.{stem}_{os.fsencode(os.path.abspath(path)).hex()}_{next(_numbers)}"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        try:
            file = os.fsdecode(bytes.fromhex(name.rsplit("_", 2)[1]))
        except (IndexError, ValueError):
            return None
        return spec_from_file_location(name, file, loader=_Loader(name, file))


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        folder = Path(self.path).parent
        with _neighbours(folder):
            before = set(sys.path)
            super().exec_module(module)
            setattr(module, FOLDERS, [str(folder), *(place for place in sys.path if place not in before)])


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Inside, imports look in this folder first.

    A module that another file's folder has under the same name is set aside meanwhile.
    """
    aside = {name: sys.modules.pop(name) for name, home in _homes.items() if home != folder and name in sys.modules}
    before = set(sys.modules)
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            place = getattr(sys.modules[name], "__file__", None)
            if place and not name.startswith(f"{__name__}.") and Path(os.path.abspath(place)).is_relative_to(folder):
                _homes.setdefault(name, folder)
                imported.setdefault(folder, set()).add(Path(os.path.abspath(place)))
        sys.modules.update(aside)


sys.meta_path.append(_Finder)
