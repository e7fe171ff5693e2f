"""The answers that were paid for, by what was asked: a line each in a run's folder, so that a repeat costs nothing."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.io.files import disk_errors, read_errors
from flowtilt.rewards.judge.budget import Spent
from flowtilt.rewards.judge.reading import Answer, tokens


def key_of(body: Mapping[str, Any]) -> str:
    """What tells a request from others: all of it, the pictures too, but not where it is sent."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


class Kept:
    """Answers by request. In memory until `open` names a folder, then in NAME-RANK.jsonl there.

    A line is flushed when it is written and not synced: what a power failure loses is asked again.
    """

    def __init__(self, name: str):
        self._name = name
        self._lock = threading.Lock()
        self._there: dict[str, Answer] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._file: Path | None = None

    def open(self, folder: Path, rank: int) -> Spent:
        """Finds what every rank has written into `folder`, and goes on there; returns what that has cost."""
        spent = Spent()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if re.fullmatch(rf"{re.escape(self._name)}-\d+\.jsonl", path.name):  # of another reward: judge-2-0.jsonl
                spent += self._find(path)
        self._file = folder / f"{self._name}-{rank}.jsonl"
        with self._lock:
            there, self._there = self._there, {}
        for key, answer in there.items():
            self.add(key, answer)
        return spent

    def _find(self, path: Path) -> Spent:
        """Notes where each answer of a file is; a line that a kill has torn is left out."""
        spent, at = Spent(), 0
        with read_errors(path), path.open("rb") as file:
            for line in file:
                if record := _parsed(line):
                    self._places[record["key"]] = (path, at)
                    spent += Spent(1, record["read"], record["written"])
                at += len(line)
        return spent

    def get(self, key: str) -> Answer | None:
        """The answer to a request that was asked before."""
        if key in self._there:
            return self._there[key]
        if key not in self._places:
            return None
        path, at = self._places[key]
        with read_errors(path), path.open("rb") as file:
            file.seek(at)
            record = _parsed(file.readline())
        if record is None:
            return None
        first = record["first"]
        return Answer(record["text"], None if first is None else tokens(first) or ())

    def add(self, key: str, answer: Answer) -> None:
        """Keeps an answer."""
        if self._file is None:
            self._there[key] = answer
            return
        record = {"key": key, "text": answer.text, "first": answer.first, "read": answer.read, "written": answer.written}
        line = (json.dumps(record) + "\n").encode()
        with self._lock, disk_errors(self._file), self._file.open("ab+") as file:
            end = file.seek(0, 2)
            if end:  # a kill may have torn the last line
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            self._places[key] = (self._file, end + len(line) - len(line.lstrip(b"\n")))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        counts = record["read"], record["written"]
        whole = isinstance(record["key"], str) and isinstance(record["text"], str) and all(isinstance(count, int) for count in counts)
        return record if whole and (record["first"] in (None, []) or tokens(record["first"])) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
