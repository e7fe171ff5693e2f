"""Published files: which they are, where they are looked for, how they are fetched.

Nothing is downloaded while a run starts: a file is in `FLOWTILT_WEIGHTS`, in flowtilt's own cache or in
the hub's, or an error says what to type. `flowtilt download NAME` fetches, with size and checksum.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io import hub
from flowtilt.io.download import fetch, fetch_hub, hub_wrong, wrong
from flowtilt.io.files import cache_folder
from flowtilt.io.notices import notice


@dataclass(frozen=True)
class Hub:
    """Files of one commit of a hub repository. A single file may also lie under its own name in the weights' folder.

    Args:
        name: what flowtilt calls them.
        repo: the repository's id.
        revision: the commit.
        files: their names there; the hub names each one's size and SHA-256.
        licence: as the publisher states it; "" where it is not known.
        size: bytes of all files, where they are known.
        sha256: of a single file, where its publisher or others have stated it; the hub's own word is checked either way.
        former: ids that the repository had before; caches under them have the same commits.
        elsewhere: where other programs keep a single file, "~" being the user's home.
    """

    name: str
    repo: str
    revision: str
    files: Sequence[str]
    licence: str = ""
    size: int | None = None
    sha256: str = ""
    former: Sequence[str] = ()
    elsewhere: Sequence[str] = ()

    @property
    def source(self) -> str:
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True)
class Url:
    """One file by its address.

    Args:
        name: what flowtilt calls it.
        source: the address.
        sha256: the whole sum, or as much of its beginning as its publisher states.
        licence: as the publisher states it; "" where it is not known.
        size: bytes, where they are known.
        alias: another name under which users have the file.
        mirror: another address of the same file, which is tried first.
    """

    name: str
    source: str
    sha256: str
    licence: str = ""
    size: int | None = None
    alias: str | None = None
    mirror: str | None = None

    @property
    def files(self) -> tuple[str]:
        return (self.source.rpartition("/")[2].replace("%2B", "+"),)


Published = Hub | Url


def folder() -> Path:
    """Where downloads go and files are looked for first: FLOWTILT_WEIGHTS, else flowtilt's cache."""
    return cache_folder("FLOWTILT_WEIGHTS", "weights")


def find(entry: Published, download_as: str) -> Path:
    """The file of an entry, or the folder where it has several.

    A folder is looked for under the repository's name, with and without its owner, then in the hub's cache.

    Args:
        download_as: what `flowtilt download` fetches it with, for the error.

    Raises:
        UserError: it is not there; says which file, from where, and into which folder.
    """
    if len(entry.files) == 1:
        for file in (entry.files[0], getattr(entry, "alias", None)):
            if file and (folder() / file).is_file():
                return folder() / file
    elif isinstance(entry, Hub):
        for place in (folder() / entry.repo, folder() / entry.repo.rpartition("/")[2]):
            if all((place / file).is_file() for file in entry.files[:2]):
                return place
    if isinstance(entry, Hub):
        if cached := _cached(entry):
            return cached[1] if len(entry.files) == 1 else cached[1].parent
        if place := _elsewhere(entry):
            return place
    what = entry.files[0] if len(entry.files) == 1 else entry.name
    cache = isinstance(entry, Hub) and not os.environ.get("FLOWTILT_WEIGHTS")
    raise UserError(
        f"{what} is missing: `flowtilt download {download_as}` fetches it from {getattr(entry, 'mirror', None) or entry.source} "
        f"into {'the hub cache' if cache else folder()}; or point FLOWTILT_WEIGHTS at the folder that has it"
    )


def _cached(entry: Hub) -> tuple[str, Path] | None:
    """The id, its own or a former one, under which the hub's cache has an entry, and the first of its files there."""
    from huggingface_hub import try_to_load_from_cache

    for repo in (entry.repo, *entry.former):
        paths = [try_to_load_from_cache(repo, file, revision=entry.revision) for file in entry.files[:2]]
        if all(isinstance(path, str) for path in paths):
            return repo, Path(str(paths[0]))
    return None


def _elsewhere(entry: Hub) -> Path | None:
    """Where another program keeps its file."""
    return next((Path(place) for place in map(os.path.expanduser, entry.elsewhere) if os.path.isfile(place)), None)


def missing_size(entry: Published) -> int | None:
    """Bytes that are to come of an entry; 0 where it is here, none where nobody says."""
    try:
        find(entry, entry.name)
        return 0
    except UserError:
        pass
    if entry.size is None and isinstance(entry, Hub):
        try:
            files = hub.look_up(entry.repo, entry.revision).files
        except Exception:  # what keeps it from being fetched is said when it is
            return None
        return sum(files[name].size for name in entry.files if name in files)
    return entry.size


def total(sizes: Iterable[int | None]) -> tuple[int, bool]:
    """The sum of the sizes that are known, and whether all are."""
    found = list(sizes)
    return sum(size or 0 for size in found), None not in found


def download(entry: Published, to: Path | None = None) -> Path:
    """Fetches an entry where it is missing, and checks it either way; returns what `find` will.

    Args:
        to: the folder, which is FLOWTILT_WEIGHTS later on; None is FLOWTILT_WEIGHTS now, else flowtilt's cache
            for single addresses and the hub's own for repositories.

    Raises:
        UserError: it can't be fetched, or is not what its publisher states.
    """
    if isinstance(entry, Url):
        place = to or folder()
        if entry.alias and (place / entry.alias).is_file() and not wrong(place / entry.alias, sha256=entry.sha256, size=entry.size):
            return place / entry.alias
        return _fetch(entry, place / entry.files[0])
    if to is None and os.environ.get("FLOWTILT_WEIGHTS"):
        to = folder()
    if to and len(entry.files) > 1:
        to = to / entry.repo
    cached = None if to else _cached(entry)
    place = None if to or cached else _elsewhere(entry)
    if place and not hub_wrong(entry.repo, entry.revision, place, entry.files[0]):
        return place
    paths = fetch_hub(cached[0] if cached else entry.repo, entry.revision, entry.files, to=to)
    if len(entry.files) > 1:
        return paths[0].parent
    if problem := wrong(paths[0], sha256=entry.sha256):
        raise UserError(f"{paths[0]} is not the published file, though the hub says so: {problem}; check HF_ENDPOINT")
    return paths[0]


def _fetch(entry: Url, path: Path) -> Path:
    """The file of an address, from its mirror where that answers; what one has sent the other goes on with."""
    if entry.mirror and not path.exists():
        try:
            return fetch(entry.mirror, path, sha256=entry.sha256, size=entry.size)
        except UserError as error:
            notice(f"{error}; trying {entry.source}")
    return fetch(entry.source, path, sha256=entry.sha256, size=entry.size)
