"""Repositories of the Hugging Face hub: the files of a pipeline or a LoRA that are needed, and no others.

A hub id is looked up once (which commit, which files, how large), what is missing is fetched file by file into the hub's
own cache with its progress bars, and the folder of that commit is what is read. Without a network the cache alone counts.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.io.download import wrong
from flowtilt.io.files import nearest_folder
from flowtilt.io.user_errors import first_line

INDEX = "model_index.json"
_PLAIN = r"[^.]+(?:-\d+-of-\d+)?"
_SAFE = re.compile(rf"{_PLAIN}\.safetensors|[^.]+\.safetensors\.index\.json")
_BIN = re.compile(rf"{_PLAIN}\.bin|[^.]+\.bin\.index\.json")
_TEXTS = (".json", ".txt", ".model", ".jinja")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|msgpack|h5|onnx|onnx_data|pb|xml|ckpt|pt|pth|gguf)|.*\.index\.(.*\.)?json")


@dataclass(frozen=True)
class File:
    """One file of a commit: bytes, and the sums that the hub states."""

    path: str
    size: int
    sums: Mapping[str, str]


@dataclass(frozen=True)
class Repository:
    """A commit of a repository.

    Args:
        gated: whether its licence must be accepted first.
        asked: the revision by which it was looked up, under which the cache will know the commit; none is the newest.
    """

    name: str
    commit: str
    files: Mapping[str, File]
    gated: bool
    asked: str | None = None

    def missing(self, files: Iterable[str]) -> list[File]:
        """Those of `files` that are not in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        return [self.files[file] for file in files if not isinstance(try_to_load_from_cache(self.name, file, revision=self.commit), str)]


def is_hub_id(text: str) -> bool:
    """Whether a text can be a hub id, "owner/name", perhaps with a folder of it, and no path of this machine."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)*", text) or ".." in text:
        return False
    return not os.path.lexists(text.partition("/")[0])


def look_up(name: str, revision: str | None = None) -> Repository:
    """What the hub says of a repository; raises what the hub's library raises."""
    from huggingface_hub import HfApi

    info: Any = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = {}
    for one in info.siblings or []:
        sums = {"sha256": one.lfs.sha256} if one.lfs else {"git_blob": one.blob_id} if one.blob_id else {}
        files[one.rfilename] = File(one.rfilename, one.size or 0, sums)
    return Repository(name, info.sha, files, bool(info.gated), revision)


def pipeline_files(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """The files that diffusers reads of a pipeline whose `model_index.json` is `index`.

    Of each component its configuration and its weights in their own precision, as safetensors where there are any. Left out are
    variants such as fp16, other formats, and what lies beside the components, such as the checkpoint in a single file.
    """
    chosen = [INDEX]
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.partition("/")[0], []).append(name)
    for component in _components(index):
        files = by_folder.get(component, [])
        last = {file: file.rpartition("/")[2] for file in files}
        weights = [file for file in files if _SAFE.fullmatch(last[file])] or [file for file in files if _BIN.fullmatch(last[file])]
        others = [file for file in files if not _WEIGHTS.fullmatch(last[file]) and last[file].endswith(_TEXTS)]
        chosen += [*others, *weights]
    return chosen


def _components(index: Mapping[str, Any]) -> list[str]:
    """The components that a pipeline's index names and does not leave empty."""
    return [name for name, value in index.items() if not name.startswith("_") and isinstance(value, list) and value[:1] != [None]]


def pipeline(name: str, revision: str | None = None) -> tuple[Repository, list[str]]:
    """A pipeline's repository and the files that are needed of it; its index is fetched. Raises what the hub's library raises."""
    from huggingface_hub import hf_hub_download

    found = look_up(name, revision)
    index = json.loads(Path(hf_hub_download(name, INDEX, revision=revision)).read_text(encoding="utf-8"))
    return found, pipeline_files(found.files, index)


def pipeline_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a pipeline in the hub's cache, what is missing of it fetched; the newest commit unless `revision` names one.

    Where the hub can't be reached or refuses, what is in the cache.

    Raises:
        UserError: what is in the cache is not all, or the disk is too small.
        Exception: what the hub's library raises.
    """
    try:
        found, files = pipeline(name, revision)
    except Exception as error:
        kept = None if isinstance(error, UserError) else cached_pipeline(name, revision)
        if kept is None:
            raise
        return kept
    fetch(found, files)
    return _folder(found)


def fetch(found: Repository, files: Sequence[str], *, to: Path | None = None, check: bool = False) -> list[Path]:
    """Files of a repository, fetched where they are missing, with a line that says how much before it begins.

    Args:
        to: a folder for them; none is the hub's cache.
        check: compare each with the size and the sum that the hub states, also those that were here before.

    Raises:
        UserError: too little space on the disk, or a file is not what the hub states.
        Exception: what the hub's library raises.
    """
    from huggingface_hub import hf_hub_download

    missing = found.missing(files) if to is None else [found.files[file] for file in files if not (to / file).is_file()]
    if missing:
        size = sum(file.size for file in missing)
        check_space(size, to)
        print(f"{found.name}: downloading {megabytes(size)} in {len(missing)} files", file=sys.stderr, flush=True)
    paths = []
    for number, file in enumerate(files):
        path = Path(hf_hub_download(found.name, file, revision=found.commit if number else found.asked, local_dir=to))
        if check and (problem := wrong(path, size=found.files[file].size, **found.files[file].sums)):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise UserError(f"hub repository {found.name}: {file} is damaged: {problem}; it was removed, try again")
        paths.append(path)
    return paths


def check_space(size: int, to: Path | None = None) -> None:
    """Raises UserError where the disk of a folder, or of the hub's cache, has less room than `size` bytes."""
    from huggingface_hub import constants

    place = to or Path(constants.HF_HUB_CACHE)
    if (free := shutil.disk_usage(nearest_folder(place)).free) < size:
        raise UserError(f"can't download {megabytes(size)}: {megabytes(free)} free in {place}; free some, or set HF_HOME to another disk")


def megabytes(size: float) -> str:
    """A number of bytes for a person."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def cached_pipeline(name: str, revision: str | None = None) -> Path | None:
    """The folder of a pipeline in the hub's cache; none where there is none.

    Raises:
        UserError: files are missing there.
    """
    from huggingface_hub import try_to_load_from_cache

    place = try_to_load_from_cache(name, INDEX, revision=revision)
    if not isinstance(place, str):
        return None
    folder = Path(place).parent
    for component in _components(json.loads(Path(place).read_text(encoding="utf-8"))):
        if lack := _lacking(folder / component):
            raise UserError(f"model {name}: only part of it is on this machine, {component}/{lack} is missing; {FETCH.format(name)}")
    return folder


FETCH = "fetch it where there is a network with `flowtilt download {}`"
"""What to do about a model that is not here."""


def _lacking(folder: Path) -> str:
    """A file that the folder of a component needs and does not have; "" where it has all."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    for index in (name for name in names if _SAFE.fullmatch(name) and name.endswith(".index.json")):
        shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        if gone := sorted(set(shards) - names):
            return gone[0]
    has_weights = any(_SAFE.fullmatch(name) or _BIN.fullmatch(name) for name in names)
    if "config.json" in names and not has_weights:
        return "*.safetensors"
    return "" if names else "*"


def _folder(found: Repository) -> Path:
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(found.name, INDEX, revision=found.commit))).parent


# LoRAs ----------------------------------------------------------------------------------------------------


def lora_file(place: str, names: Sequence[str], folders: Sequence[str], beside: Sequence[str], revision: str | None = None) -> Path:
    """The weights of a LoRA on the hub, "owner/name" or a folder or file of it, fetched with what lies `beside` them.

    Args:
        names: what weights are called, in the order in which they are looked for; else a single .safetensors counts.
        folders: where they may lie in a folder, "" being itself.
        revision: a commit; none is the newest.

    Raises:
        UserError: the hub can't be reached, has no such repository or commit, or no LoRA in it, or several.
    """
    owner, name, *rest = place.split("/")
    if owner == "runs":
        raise UserError(f"lora {place}: no such run here; `flowtilt train` makes one, or give its folder")
    repository, inside = f"{owner}/{name}", "/".join(rest)
    with _lora_errors(place, repository):
        from huggingface_hub import snapshot_download

        try:
            found = look_up(repository, revision)
        except Exception as error:
            if not is_offline(error):
                raise
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
            files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            return folder / _lora_in(place, files, inside, names, folders)
        weights = _lora_in(place, list(found.files), inside, names, folders)
        around = weights.rpartition("/")[0]
        wanted = [weights, *(file for file in (f"{around}/{one}".lstrip("/") for one in beside) if file in found.files)]
        return fetch(found, wanted)[0]


def _lora_in(place: str, files: Sequence[str], inside: str, names: Sequence[str], folders: Sequence[str]) -> str:
    if inside in files:
        return inside
    if file := _first(files, inside, names, folders):
        return file
    tops = sorted({file.rpartition("/")[0] for file in files if file.startswith(f"{inside}/" if inside else "")} - {inside})
    inner = [top for top in tops if _first(files, top, names, ("",))]
    repository = "/".join(place.split("/")[:2])
    if len(inner) == 1:
        return str(_first(files, inner[0], names, ("",)))
    if inner:
        raise UserError(f"lora {place}: holds several; give one of {', '.join(f'{repository}/{one}' for one in inner[:6])}")
    if INDEX in files:
        raise UserError(f"lora {place}: this is a whole pipeline; give it as --model")
    raise UserError(f"lora {place}: no LoRA in that repository{f' under {inside}' if inside else ''}; give one of its files by name")


def _first(files: Sequence[str], inside: str, names: Sequence[str], folders: Sequence[str]) -> str | None:
    for folder in folders:
        where = "/".join(filter(None, (inside, folder)))
        for name in names:
            if (path := f"{where}/{name}".lstrip("/")) in files:
                return path
        single = [file for file in files if file.rpartition("/")[0] == where and file.endswith(".safetensors")]
        if len(single) == 1 and folder == "" and INDEX not in files:
            return single[0]
    return None


@contextmanager
def _lora_errors(place: str, repository: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        local = f"no such file or folder, and {repository} "
        inside = place.removeprefix(repository).strip("/")
        part = f" --include '{inside}{'' if inside.endswith('.safetensors') else '/*'}'" if inside else ""
        why = reason(repository, error, f"fetch it where there is a network with `hf download {{}}{part}`")
        raise UserError(f"lora {place}: {local}{why}") from error


# why not --------------------------------------------------------------------------------------------------


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_offline(error: BaseException) -> bool:
    """Whether the hub could not be asked at all."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    found = list(chain(error))
    if any(isinstance(one, GatedRepoError) for one in found):
        return False
    if any(isinstance(one, OfflineModeIsEnabled | LocalEntryNotFoundError) for one in found):
        return True
    return not isinstance(error, HfHubHTTPError) and any(_is_network(one) for one in found)


def _is_network(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpcore")


def reason(repository: str, error: BaseException, fetch: str = "fetch it where there is a network with `hf download {}`") -> str:
    """Why a repository can't be read, after its name: "can't be …; do …".

    Args:
        fetch: how it is fetched, {} being its name; `FETCH` for models, of which `hf download` takes more than is needed.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    found = list(chain(error))
    if any(isinstance(one, hub.GatedRepoError) for one in found):
        return f"is gated: {licence(repository)}"
    if any(isinstance(one, hub.RevisionNotFoundError) for one in found):
        return "has no such revision on the hub"
    if any(isinstance(one, hub.RepositoryNotFoundError) for one in found):
        return "is not on the hub either; a private one needs `hf auth login`"
    if is_offline(error):
        how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        return f"is not in the hub's cache, and {how}; {fetch.format(repository)}"
    if INDEX in str(error) and any(
        isinstance(one, hub.EntryNotFoundError) and not isinstance(one, hub.LocalEntryNotFoundError) for one in found
    ):
        return (
            f"is no pipeline of diffusers (it has no {INDEX}); if it is a LoRA, give it as --lora {repository} and its base as --model; "
            f"pipelines are sometimes in a repository of another name, such as {repository}-diffusers"
        )
    return f"can't be had from the hub: {first_line(error)}"


def licence(repository: str) -> str:
    """What to do about a gated repository."""
    from huggingface_hub import get_token

    page = f"https://huggingface.co/{repository}"
    if get_token() is None:
        return f"accept its licence at {page}, then log in with `hf auth login`"
    return f"accept its licence at {page} with the account that you are logged in with (`hf auth whoami`)"


def allowed(repository: str) -> str:
    """What keeps this user from the files of a repository; "" where nothing does."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repository)
    except Exception as error:
        return reason(repository, error, FETCH)
    return ""
