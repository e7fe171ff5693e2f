"""The reward models' published weights: which files they are, where they are looked for, how they are read.

Nothing is downloaded while a run starts: a file is in `FLOWTILT_WEIGHTS`, in flowtilt's own cache or in
the hub's, or an error says what to type. `flowtilt download NAME` fetches, with size and checksum.
"""

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowtilt.errors import UserError
from flowtilt.io.download import fetch, fetch_hub, wrong
from flowtilt.io.files import cache_folder
from flowtilt.io.user_errors import first_line


@dataclass(frozen=True)
class Hub:
    """Files of one commit of a hub repository. A single file may also lie under its own name in the weights' folder.

    Args:
        repo: the repository's id.
        revision: the commit.
        files: their names there; the hub names each one's size and SHA-256.
    """

    repo: str
    revision: str
    files: Sequence[str]

    @property
    def source(self) -> str:
        return f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True)
class Url:
    """One file by its address.

    Args:
        source: the address.
        sha256: the whole sum, or as much of its beginning as its publisher tells.
        size: bytes, where they are known.
        alias: another name under which users have the file.
    """

    source: str
    sha256: str
    size: int | None = None
    alias: str | None = None

    @property
    def files(self) -> tuple[str]:
        return (self.source.rpartition("/")[2].replace("%2B", "+"),)


_CLIP_L, _CLIP_L_COMMIT = "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"

WEIGHTS: dict[str, Hub | Url] = {
    "clip-l": Hub(_CLIP_L, _CLIP_L_COMMIT, ("config.json", "model.safetensors")),
    "clip-tokenizer": Hub(_CLIP_L, _CLIP_L_COMMIT, ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")),
    "pickscore": Hub("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", ("config.json", "model.safetensors")),
    "hpsv2": Hub("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a", ("HPS_v2.1_compressed.pt",)),
    "imagereward": Hub("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72", ("ImageReward.pt",)),
    "bert": Hub(
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ),
    "aesthetic": Url(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/6934dd81792f086e613a121dbce43082cb8be85e/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        3_714_759,
    ),
    "mask2former": Url(
        "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        "743b7d99",  # OpenMMLab writes the first eight digits into the name
        alias="mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",  # as GenEval's own script saves it
    ),
}

NEEDED: dict[str, tuple[str, ...]] = {
    "pickscore": ("pickscore", "clip-tokenizer"),
    "clipscore": ("clip-l", "clip-tokenizer"),
    "hpsv2": ("hpsv2", "clip-tokenizer"),
    "aesthetic": ("aesthetic", "clip-l", "clip-tokenizer"),
    "imagereward": ("imagereward", "bert"),
    "geneval": ("mask2former", "clip-l", "clip-tokenizer"),
}
"""What each reward reads. OCR's models come inside the rapidocr package, UnifiedReward's server has its own."""


def folder() -> Path:
    """Where downloads go and files are looked for first: FLOWTILT_WEIGHTS, else flowtilt's cache."""
    return cache_folder("FLOWTILT_WEIGHTS", "weights")


def find(name: str) -> Path:
    """The file that `name` is in `WEIGHTS`, or the folder where it is several.

    A folder is looked for under the repository's name, with and without its owner, then in the hub's cache.

    Raises:
        UserError: it is not there; says which file, from where, and into which folder.
    """
    entry = WEIGHTS[name]
    if len(entry.files) == 1:
        for file in (entry.files[0], getattr(entry, "alias", None)):
            if file and (folder() / file).is_file():
                return folder() / file
    elif isinstance(entry, Hub):
        for place in (folder() / entry.repo, folder() / entry.repo.rpartition("/")[2]):
            if all((place / file).is_file() for file in entry.files[:2]):
                return place
    if isinstance(entry, Hub):
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(entry.repo, file, revision=entry.revision) for file in entry.files[:2]]
        if all(isinstance(path, str) for path in cached):
            return Path(str(cached[0])) if len(entry.files) == 1 else Path(str(cached[0])).parent
    reward = min((reward for reward, needs in NEEDED.items() if name in needs), key=lambda reward: len(NEEDED[reward]))
    cache = isinstance(entry, Hub) and not os.environ.get("FLOWTILT_WEIGHTS")
    raise UserError(
        f"{entry.files[0] if len(entry.files) == 1 else name} is missing: `flowtilt download {reward}` fetches it from {entry.source} "
        f"into {'the hub cache' if cache else folder()}; or point FLOWTILT_WEIGHTS at the folder that has it"
    )


def download(name: str, to: Path | None = None) -> Path:
    """Fetches what `name` is in `WEIGHTS`, where it is missing, and checks it either way; returns what `find` will.

    Args:
        to: the folder, which is FLOWTILT_WEIGHTS later on; None is FLOWTILT_WEIGHTS now, else flowtilt's cache
            for single addresses and the hub's own for repositories.

    Raises:
        UserError: it can't be fetched, or is not what its publisher tells.
    """
    entry = WEIGHTS[name]
    if isinstance(entry, Url):
        place = to or folder()
        if entry.alias and (place / entry.alias).is_file() and not wrong(place / entry.alias, sha256=entry.sha256, size=entry.size):
            return place / entry.alias
        return fetch(entry.source, place / entry.files[0], sha256=entry.sha256, size=entry.size)
    if to is None and os.environ.get("FLOWTILT_WEIGHTS"):
        to = folder()
    if to and len(entry.files) > 1:
        to = to / entry.repo
    paths = fetch_hub(entry.repo, entry.revision, entry.files, to=to)
    return paths[0] if len(entry.files) == 1 else paths[0].parent


def read(path: Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """The dictionary in a .pt, .pth or .bin file, on the CPU; only tensors and plain values are ever unpickled.

    Args:
        allowed: harmless types that the file's publisher put beside the weights.

    Raises:
        UserError: the file can't be read, or holds what may not be unpickled.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors, or is damaged, so it is not read: {first_line(error)}") from error
    except Exception as error:  # in a damaged file the reader can fail anywhere
        raise UserError(f"{path}: can't be read, it may be cut short: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__} instead of named tensors; fetch the file again")
    return found
