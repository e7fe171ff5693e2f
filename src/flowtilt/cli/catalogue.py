"""All that `flowtilt download` knows by name: rewards' weights and prompt sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io.published import Published
from flowtilt.prompts import sets
from flowtilt.rewards.about import built_in, download_weights, find_weights


@dataclass(frozen=True)
class Item:
    """One line of the list.

    Args:
        name: a name that is a reward's and a prompt set's is two items, and is downloaded as both.
        kind: "weights" or "prompts".
        about: the files that a reward reads, with their licences where known, or what a set holds.
        sources: addresses.
        there: all of it has been downloaded.
        size: bytes; None where they are not known and it is not here.
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
    for name, files in _weights().items():
        sizes = [_size(entry) for entry in files]
        about = " + ".join(entry.name + (f" ({entry.licence})" if entry.licence else "") for entry in files)
        items.append(Item(name, "weights", about, [entry.source for entry in files], all(map(_find, files)), _total(sizes)))
    for name, found in sets.SETS.items():
        places = [sets.folder() / file for _, file in found.files(name)]
        sizes = [place.stat().st_size if place.is_file() else source.size for place, source in zip(places, found.sources, strict=True)]
        there = all(place.is_file() for place in places)
        items.append(Item(name, "prompts", found.about, [source.url for source in found.sources], there, _total(sizes)))
    return items


def _weights() -> dict[str, tuple[Published, ...]]:
    """The files of each reward that reads any."""
    return {name: one.weights for name, one in built_in().items() if one.weights}


def _find(entry: Published) -> Path | None:
    try:
        return find_weights(entry.name)
    except UserError:
        return None


def _size(entry: Published) -> int | None:
    """Bytes of the files that are here, or as their publisher states."""
    place = _find(entry)
    if place is None:
        return entry.size
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
        if name not in _weights() and name not in sets.SETS:
            known = list(dict.fromkeys([*_weights(), *sets.SETS]))
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"`flowtilt download --list` lists them: {', '.join(known)}"
            raise UserError(f"download {name!r}: no reward with weights and no prompt set; {hint}")
    needed = dict.fromkeys(entry.name for name in names for entry in _weights().get(name, ()))
    paths = [download_weights(file, to) for file in needed]
    return paths + [path for name in dict.fromkeys(names) if name in sets.SETS for path in sets.download(name, to)]
