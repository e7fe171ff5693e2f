"""All that `flowtilt download` knows by name: rewards' weights and prompt sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.prompts import sets


@dataclass(frozen=True)
class Item:
    """One line of the list.

    Args:
        name: a name that is a reward's and a prompt set's is two items, and is downloaded as both.
        kind: "weights" or "prompts".
        about: the files that a reward reads, or what a set holds.
        sources: addresses.
        there: all of it has been downloaded.
        size: bytes; None where nobody has told them and it is not here.
    """

    name: str
    kind: str
    about: str
    sources: Sequence[str]
    there: bool
    size: int | None


def listing() -> list[Item]:
    """Every reward that reads weights, then every prompt set. Nothing is checked here but that the files are there."""
    items = []
    for reward, needs in weights.NEEDED.items():
        sizes = [_size(name) for name in needs]
        sources = [weights.WEIGHTS[name].source for name in needs]
        items.append(Item(reward, "weights", " + ".join(needs), sources, all(_find(name) for name in needs), _total(sizes)))
    for name, found in sets.SETS.items():
        places = [sets.folder() / file for _, file in found.files(name)]
        sizes = [place.stat().st_size if place.is_file() else source.size for place, source in zip(places, found.sources, strict=True)]
        there = all(place.is_file() for place in places)
        items.append(Item(name, "prompts", found.about, [source.url for source in found.sources], there, _total(sizes)))
    return items


def _find(name: str) -> Path | None:
    try:
        return weights.find(name)
    except UserError:
        return None


def _size(name: str) -> int | None:
    """Bytes of the files that are here, or as their publisher tells."""
    place, entry = _find(name), weights.WEIGHTS[name]
    if place is None:
        return getattr(entry, "size", None)
    files = [place] if place.is_file() else [place / file for file in entry.files]
    return sum(file.stat().st_size for file in files if file.is_file())


def _total(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else sum(size for size in sizes if size is not None)


def get(names: Sequence[str], to: Path | None = None) -> list[Path]:
    """Downloads what each name stands for, and checks what is there already; returns files and folders.

    Args:
        to: a folder for all of it, to be named by FLOWTILT_WEIGHTS and FLOWTILT_PROMPTS; None is the caches.

    Raises:
        UserError: an unknown name, before anything is fetched; or a download failed.
    """
    for name in names:
        if name not in weights.NEEDED and name not in sets.SETS:
            known = list(dict.fromkeys([*weights.NEEDED, *sets.SETS]))
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"`flowtilt download --list` lists them: {', '.join(known)}"
            raise UserError(f"download {name!r}: no reward with weights and no prompt set; {hint}")
    needed = dict.fromkeys(file for name in names for file in weights.NEEDED.get(name, ()))
    paths = [weights.download(file, to) for file in needed]
    return paths + [path for name in dict.fromkeys(names) if name in sets.SETS for path in sets.download(name, to)]
