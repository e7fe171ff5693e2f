"""The published prompt sets by name: where each lies, pinned to a commit and a checksum, and how it comes here.

They belong to their publishers and are not part of flowtilt: a set is fetched when it is first named.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from flowtilt.config.prompt_data import SCHEME, parse
from flowtilt.errors import UserError
from flowtilt.io.download import fetch
from flowtilt.io.files import cache_folder
from flowtilt.prompts import datasets
from flowtilt.prompts.files import load_prompts
from flowtilt.prompts.prompt import Prompt


@dataclass(frozen=True)
class Source:
    """One file of a set; its suffix names the format.

    Args:
        url: the address, of one commit.
        git_blob: Git's id of the content.
        size: bytes; None where the commit's tree does not tell.
        tag: of all its prompts, where the file has no tags of its own.
    """

    url: str
    git_blob: str
    size: int | None = None
    tag: str = ""


@dataclass(frozen=True)
class PromptSet:
    """A set and what to say of it in a list."""

    about: str
    sources: Sequence[Source]

    def files(self, name: str) -> list[tuple[Source, str]]:
        """Its sources with the names of their files here."""
        return [(source, f"{name}-{source.tag}".strip("-") + Path(source.url).suffix) for source in self.sources]


_GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts"
_GENEVAL2 = "https://raw.githubusercontent.com/facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3"
_NFT = "https://raw.githubusercontent.com/NVlabs/DiffusionNFT/24af5554898d85e93efa492f42b5e9cdf4156e9b/dataset"
_IMAGEREWARD = "https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/benchmark"
_HPDV2 = "https://huggingface.co/datasets/zhwang/HPDv2/resolve/b9517430f34b1080d4f741118d2a440155a165cd/benchmark"

SETS: dict[str, PromptSet] = {
    "geneval": PromptSet(
        "GenEval's 553 prompts in six tags",
        [Source(f"{_GENEVAL}/evaluation_metadata.jsonl", "efc21c7e639cd45554a1e44fac87157211f16d51", 85_209)],
    ),
    "geneval-nft": PromptSet(
        "DiffusionNFT's test file: the same 553 four times over in another order, read once",
        [Source(f"{_NFT}/geneval/test_metadata.jsonl", "27cdaf5cc1356fe15aeadbb8df55682ca74228f0", 340_835)],
    ),
    "geneval-train": PromptSet(
        "DiffusionNFT's generated training prompts",
        [Source(f"{_NFT}/geneval/train_metadata.jsonl", "0b97e8a6802c08fc7537cd00c76ae79c851bddcb")],
    ),
    "geneval2": PromptSet(
        "GenEval 2's 800 prompts with their questions",
        [Source(f"{_GENEVAL2}/geneval2_data.jsonl", "823f48414446157fe252f92e3c60c803c33c303c", 423_220)],
    ),
    "ocr": PromptSet(
        "1,018 prompts with the text to render in double quotes",
        [Source(f"{_NFT}/ocr/test.txt", "8deb4f8d8f2e863f45353354243669b3c991a6a2", 217_565)],
    ),
    "ocr-train": PromptSet(
        "training prompts with the text to render in double quotes",
        [Source(f"{_NFT}/ocr/train.txt", "3ce0521b77b0a9031191d66ecc36ebaaf27a3922")],
    ),
    "pickapic": PromptSet(
        "2,048 test prompts of Pick-a-Pic",
        [Source(f"{_NFT}/pickscore/test.txt", "45f05231b969fb5f74c8debd606b22cd3be27f8e", 239_891)],
    ),
    "pickapic-train": PromptSet(
        "25,432 training prompts of Pick-a-Pic",
        [Source(f"{_NFT}/pickscore/train.txt", "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b", 2_906_730)],
    ),
    "drawbench": PromptSet(
        "DrawBench's 200 prompts; each five times in DiffusionNFT's file, read once",
        [Source(f"{_NFT}/drawbench/test.txt", "8d96e7cf7017ce6ce299a6eec96e21467a2ac7aa", 65_164)],
    ),
    "imagereward": PromptSet(
        "ImageReward's 100 benchmark prompts",
        [Source(f"{_IMAGEREWARD}/benchmark-prompts.json", "24b1d4222f97110ea24317640f28795efa71165c", 14_558)],
    ),
    "hpdv2": PromptSet(
        "HPD v2's benchmark, 3,200 prompts in four styles, repeated ones read once",
        [
            Source(f"{_HPDV2}/anime.json", "b042bd6096b1337f4a7eef8c9b1233f71910f9c7", 62_816, "anime"),
            Source(f"{_HPDV2}/concept-art.json", "62f8ba6d263251840631eda54010ad2f91b1d5de", 85_787, "concept-art"),
            Source(f"{_HPDV2}/paintings.json", "303e19b56e4c1c336d396a9cf252cade5baaaaf9", 81_338, "paintings"),
            Source(f"{_HPDV2}/photo.json", "a114fe4a4738353438c5f95dc3e23b85882a1ca4", 44_606, "photo"),
        ],
    ),
}


def folder() -> Path:
    """Where sets are kept: FLOWTILT_PROMPTS, else flowtilt's cache."""
    return cache_folder("FLOWTILT_PROMPTS", "prompts")


def load(source: str | Path) -> list[Prompt]:
    """The prompts of a named set, of a file (see `load_prompts`), or of a data set (see `config.prompt_data`).

    Whatever has a slash or a dot in it is a path ("mine.txt", "./geneval"), whatever has neither is a set's name;
    so a stray file never changes what a name means. A set that is not in `folder()` yet is fetched.

    Raises:
        UserError: there is no such set or file, the set can't be fetched, or its file is not the published one.
    """
    text = str(source)
    try:
        data = parse(text)
    except ValueError as error:
        raise UserError(str(error)) from None
    if data:
        return datasets.load(data)
    if is_path(source):
        return load_prompts(source)
    if text not in SETS:
        near = get_close_matches(text, SETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SETS)}"
        raise UserError(f"prompts {text!r}: no such set ({hint}); a file is given as ./{text}")
    found: dict[str, Prompt] = {}
    for file, path in zip(SETS[text].sources, download(text), strict=True):
        for prompt in load_prompts(path, quiet=True):  # what is published is as it is
            found.setdefault(prompt.key, replace(prompt, tag=file.tag) if file.tag else prompt)
    return list(found.values())


def is_path(source: str | Path) -> bool:
    """Whether this is a file's path, and no set's or data set's name."""
    if isinstance(source, str) and source.startswith(SCHEME):
        return False
    return isinstance(source, Path) or any(mark in source for mark in ("/", os.sep, "."))


def download(name: str, to: Path | None = None) -> list[Path]:
    """The files of a set in `to` or `folder()`, fetched where they are missing; each is checked either way.

    Raises:
        UserError: a file can't be fetched, or another one lies in its place.
    """
    paths = []
    for source, file in SETS[name].files(name):
        path = (to or folder()) / file
        try:
            paths.append(fetch(source.url, path, git_blob=source.git_blob, size=source.size))
        except UserError as error:
            other = "a file of your own is given by its path"
            other = other if path.exists() else f"you can also put the file there yourself, as {path}; {other}"
            raise UserError(f"prompts {name}: {error}; {other}") from error
    return paths
