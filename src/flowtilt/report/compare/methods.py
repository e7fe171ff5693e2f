"""Which runs are one method, and what each method is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.report.compare.entries import Entry, differing, load_entry, plain

MOST = 3
"""Settings in a name; of more the first are told, as long as that is enough to tell methods apart."""
PLAIN = ("objective", "optimizer", "rollout")
"""Tables whose keys are known by their last word."""


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but the seed, or that somebody has put together."""

    label: str
    entries: list[Entry]

    @cached_property
    def settings(self) -> dict[str, str]:
        """Those of all its runs; "various" where they differ."""
        mixed = dict.fromkeys(differing([entry.settings for entry in self.entries]), "various")
        return self.entries[0].settings | mixed

    @property
    def seeds(self) -> list[int]:
        return sorted(entry.seed for entry in self.entries)


def find_methods(folders: Sequence[Path], labels: Mapping[str, Sequence[Path]]) -> list[Method]:
    """Runs put into methods, in order of first appearance.

    Args:
        folders: runs, grouped by all of their recipe but the seed and what changes no result.
        labels: name -> runs that are one method, whatever their recipes; they need not be among `folders`.

    Raises:
        UserError: a folder is no run or has no evaluation, is given twice, or can't be told from another.
    """
    named = {path.resolve(): name for name, paths in labels.items() for path in paths}
    _refuse_twins(folders)
    _refuse_twins([path for paths in labels.values() for path in paths])
    given = {path.resolve(): path for path in (*folders, *(path for paths in labels.values() for path in paths))}
    groups: dict[str | tuple[tuple[str, str], ...], list[Entry]] = {}
    for place, path in given.items():
        entry = load_entry(path)
        groups.setdefault(named.get(place) or tuple(sorted(entry.settings.items())), []).append(entry)
    unnamed = [entries for key, entries in groups.items() if not isinstance(key, str)]
    for entries in unnamed:
        _refuse_equal_seeds(entries)
    names = iter(_names(unnamed))
    methods = [
        Method(key if isinstance(key, str) else next(names), sorted(entries, key=lambda entry: entry.seed))
        for key, entries in groups.items()
    ]
    for method in methods:
        if sum(other.label == method.label for other in methods) > 1:
            where = " and ".join(str(other.entries[0].folder) for other in methods if other.label == method.label)
            raise UserError(f"compare: two methods are called {method.label}, those of {where}; name one with --label NAME=RUN,RUN")
    return methods


def _refuse_twins(folders: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (place := folder.resolve()) in seen:
            raise UserError(f"compare: {seen[place]} is given twice; leave one out")
        seen[place] = folder


def _refuse_equal_seeds(entries: Sequence[Entry]) -> None:
    seen: dict[int, Entry] = {}
    for entry in entries:
        if entry.seed in seen:
            both = f"{seen[entry.seed].folder} and {entry.folder}"
            way_out = "leave one out, or name both with --label NAME=RUN"
            raise UserError(f"compare: {both} have the same recipe and seed, so nothing tells them apart; {way_out}")
        seen[entry.seed] = entry


def _names(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """The recipes' names where these tell groups apart, else the one setting that differs, else what was changed of the first."""
    if not groups:
        return []
    recipes = [{entry.recipe.name for entry in entries} for entries in groups]
    if all(len(names) == 1 for names in recipes) and len(set.union(*recipes)) == len(groups):
        return [next(iter(names)) for names in recipes]
    settings = _whole_rewards([entries[0].settings for entries in groups])
    keys = telling(settings)
    if len(keys) == 1:
        return [_setting(one, keys[0]) for one in settings]
    changes = [[_setting(one, key) for key in keys if one.get(key) != settings[0].get(key)] for one in settings]
    short = [", ".join(found[:MOST]) + (f" and {len(found) - MOST} more" if len(found) > MOST else "") for found in changes]
    labels = short if len(set(short)) == len(short) else [", ".join(found) for found in changes]
    return [groups[0][0].recipe.name, *labels[1:]]


def _whole_rewards(settings: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Settings with one key for a reward that is a table and that only some of them have, "reward NAME", in place of the table's."""

    def name_of(key: str) -> str:
        return key.split(".")[1] if key.startswith("rewards.") and key.count(".") > 1 else ""

    own = [{name_of(key) for key in one} - {""} for one in settings]
    partly = set().union(*own) - set.intersection(*own)
    return [
        {key: value for key, value in one.items() if name_of(key) not in partly} | {f"reward {name}": "" for name in sorted(has & partly)}
        for one, has in zip(settings, own, strict=True)
    ]


def telling(settings: Sequence[dict[str, str]]) -> list[str]:
    """Keys that differ, without those that merely come with another objective."""
    keys = differing(settings)
    if "objective.type" not in keys:
        return keys

    def comes_with_it(key: str) -> bool:
        values = {one[key] for one in settings if key in one}
        return key.startswith("objective.") and any(key not in one for one in settings) and len(values) == 1

    return [key for key in keys if not comes_with_it(key)]


def _setting(settings: Mapping[str, str], key: str) -> str:
    """lr=0.001: without its table where no other key ends alike."""
    if key.startswith("reward "):
        return f"{'with' if key in settings else 'without'} {key}"
    table, _, last = key.rpartition(".")
    alone = sum(other.rpartition(".")[2] == last for other in settings) == 1
    name = last if table in PLAIN and last != "type" and alone else key
    return f"{name}={plain(settings[key])}" if key in settings else f"without {name}"
