"""Files of a run or an evaluation as somebody may have left them: what cannot be read is missing, counted, and said once."""

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowtilt.io.files import parse_lines
from flowtilt.report.numbers import counted, number

Record = dict[str, Any]
DEEPEST = 40
"""Levels of JSON or TOML that are read; no file of ours has ten."""
LAST_STEP = 1e12
"""Greatest rollout that a record can be of."""


@dataclass
class Reader:
    """Reads the files of a folder. `lost` collects what could not be read: a file's name and what of it, in words."""

    folder: Path
    lost: dict[str, str] = field(default_factory=dict)

    def lose(self, name: str, what: str = "cannot be read") -> None:
        self.lost[name] = f"{self.lost[name]}, {what}" if name in self.lost else what

    def data(self, name: str) -> bytes | None:
        """A file's bytes, none where there is no file or it cannot be read."""
        path = self.folder / name
        try:
            if not path.exists():
                return None
            if path.is_file():  # what is a pipe would be waited for
                return path.read_bytes()
        except (OSError, ValueError):
            pass
        self.lose(name)
        return None

    def text(self, name: str) -> str:
        """A file's text; what is no UTF-8 is shown as replaced."""
        return (self.data(name) or b"").decode("utf-8", "replace")

    def json(self, name: str) -> Any:
        """The JSON in a file, none where there is none."""
        data = self.data(name)
        if data is None:
            return None
        try:
            return parsed(data)
        except ValueError:
            self.lose(name)
            return None

    def object(self, name: str) -> Record:
        """The JSON object in a file, {} where there is none."""
        found = self.json(name)
        if found is not None and not isinstance(found, dict):
            self.lose(name)
        return found if isinstance(found, dict) else {}

    def toml(self, name: str) -> Record:
        """The TOML in a file, {} where there is none."""
        try:
            found = tomllib.loads(self.text(name))
            return _not_too_deep(found)
        except (ValueError, RecursionError):
            self.lose(name)
            return {}

    def lines(self, name: str) -> list[Record]:
        """The JSON objects of a lines file. The end of a file that is still being written, or was torn, is not missed."""
        found, damaged = parse_lines(self.data(name) or b"", parsed)
        if damaged:
            self.lose(name, f"{counted(len(damaged), 'line')} cannot be read")
        return found

    def steps(self, name: str) -> list[Record]:
        """The objects of a lines file that are of a rollout."""
        records = self.lines(name)
        found = [record for record in records if is_step(record)]
        if len(found) < len(records):
            self.lose(name, f"{counted(len(records) - len(found), 'line')} without a rollout")
        return found


def parsed(data: bytes) -> Any:
    """JSON of any bytes.

    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        return _not_too_deep(json.loads(data.decode("utf-8")))
    except RecursionError:
        raise ValueError("nested too deep") from None


def _not_too_deep(value: Any) -> Any:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [part for one in level if isinstance(one, dict | list) for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return value
    raise ValueError("nested too deep")


def is_step(record: Record) -> bool:
    step = number(record, "rollout")
    return 0 <= step <= LAST_STEP and step == int(step)


def is_list_of(value: Any, kind: type) -> bool:
    """Whether it is a list of such values alone; True is no int."""
    return isinstance(value, list) and all(isinstance(part, kind) and not isinstance(part, bool) for part in value)


def said(lost: dict[str, str]) -> Iterable[str]:
    """One clause for each file."""
    return (f"{name}: {what}" for name, what in lost.items())
