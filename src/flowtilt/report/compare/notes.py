"""What makes a comparison less sure than it looks, in sentences of plain text."""

from collections.abc import Sequence

from flowtilt.report.compare.entries import Entry
from flowtilt.report.compare.methods import Method
from flowtilt.report.numbers import counted, fixed
from flowtilt.report.reading import said


def notes(methods: Sequence[Method], odd: Sequence[str]) -> list[str]:
    """One for each thing found, the gravest first."""
    entries = [entry for method in methods for entry in method.entries]
    found = [f"Scores can't be compared: {'; '.join(odd)}."] if odd else _other_bases(entries)
    return [
        *found,
        *_unread(entries),
        *_put_together(methods),
        *_unfinished(methods),
        *_lengths(methods),
        *_seeds(methods),
        *_machines(entries),
    ]


def _other_bases(entries: Sequence[Entry]) -> list[str]:
    """Before training, runs of one seed and protocol draw the same images; where they don't, a file or a machine is another."""
    first: dict[tuple[int, str | None, tuple[str, ...]], Entry] = {}
    for entry in (entry for entry in entries if entry.steps[0] == 0):
        other = first.setdefault((entry.seed, entry.recipe.lora.init, entry.recipe.lora.on), entry)
        if abs(other.scores[0] - entry.scores[0]) > 1e-3 * max(abs(float(other.scores[0])), 1e-9):
            scores = f"{fixed(float(other.scores[0]), 4)} in {other.folder} and {fixed(float(entry.scores[0]), 4)} in {entry.folder}"
            return [
                f"Before training, seed {entry.seed} scores {scores}, which should be the same: "
                "a prompt file, the base's weights, a reward or the machine must be another."
            ]
    return []


def _unread(entries: Sequence[Entry]) -> list[str]:
    return [f"Not all files of {entry.folder} could be read: {'; '.join(said(entry.run.lost))}." for entry in entries if entry.run.lost]


def _put_together(methods: Sequence[Method]) -> list[str]:
    found = []
    for method in methods:
        if keys := [key for key, value in method.settings.items() if value == "various"]:
            found.append(f"The runs put together as {method.label} are not of one recipe: {', '.join(keys)}.")
    return found


def _unfinished(methods: Sequence[Method]) -> list[str]:
    going = []
    for method in methods:
        for entry in method.entries:
            if not entry.run.finished:
                going.append(f"{method.label}, seed {entry.seed} ({entry.run.step:,} of {counted(entry.recipe.rollouts, 'rollout')})")
    return [f"Not finished: {'; '.join(going)}."] if going else []


def _lengths(methods: Sequence[Method]) -> list[str]:
    uneven = [method for method in methods if len({entry.steps[-1] for entry in method.entries}) > 1]
    ends = [f"{method.label} after {' and '.join(f'{step:,.0f}' for step in _ends(method))} rollouts" for method in uneven]
    return [f"Seeds end at different rollouts, and final scores are taken there: {'; '.join(ends)}."] if ends else []


def _ends(method: Method) -> list[float]:
    return sorted({float(entry.steps[-1]) for entry in method.entries})


def _seeds(methods: Sequence[Method]) -> list[str]:
    if len({tuple(method.seeds) for method in methods}) == 1:
        return []
    seeds = "; ".join(f"{method.label} has {', '.join(map(str, method.seeds))}" for method in methods)
    return [f"Methods have different seeds, so their evaluations start from different noise: {seeds}."]


def _machines(entries: Sequence[Entry]) -> list[str]:
    machines = {_machine(entry): None for entry in entries}
    known = [machine for machine in machines if machine]
    return [f"Seconds were measured on different machines: {'; '.join(known)}."] if len(known) > 1 else []


def _machine(entry: Entry) -> str:
    environment = entry.run.environment
    device = environment.get("device")
    if not device:
        return ""
    name = f"{environment.get('processor')}, {environment.get('threads')} threads" if device == "cpu" else str(device)
    processes = environment.get("processes")
    return f"{processes} x {name}" if isinstance(processes, int) and processes > 1 else name
