"""Prompts of a data set: of the Hugging Face hub, or of a folder laid out like one.

Which files are a split's is read from the card (README.md, `configs`), else from their names: those that have the split's name in
them, or all where no file names any split. Only the columns that are asked for are read.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from flowtilt.config.prompt_data import PromptData
from flowtilt.errors import UserError
from flowtilt.io import parquet
from flowtilt.io.download import hub_errors
from flowtilt.io.nested import load_yaml
from flowtilt.prompts.decoding import visible
from flowtilt.prompts.files import CAPTIONS, READERS, read_prompts
from flowtilt.prompts.prompt import Prompt

CARD = "README.md"
PARQUET = ".parquet"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files, by split."""


def load(data: PromptData) -> list[Prompt]:
    """The prompts of a data set's split; repeated captions once.

    Raises:
        UserError: there is no such data set, split or column, a file can't be read, or the hub can't be reached.
    """
    folder, names, _ = _located(data.dataset, data.revision)
    chosen = _of_split(data, names, _card(data, folder, names))
    paths = _fetched(data, chosen) if folder is None else [folder / name for name in chosen]
    found: dict[str, Prompt] = {}
    for path in paths:
        for prompt in _read(data, path):
            found.setdefault(prompt.text, prompt)
    if not found:
        raise UserError(f"prompts {data.dataset}: no prompt in its split {data.split}")
    return list(found.values())


def commit(data: PromptData) -> str | None:
    """The commit of a hub's data set as it is read; none of a folder."""
    return _located(data.dataset, data.revision)[2]


@cache
def _located(dataset: str, revision: str | None) -> tuple[Path | None, tuple[str, ...], str | None]:
    """A local folder, or none for the hub; the names of all files; the commit."""
    folder = Path(dataset)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return folder, tuple(name for path in files if not (name := path.relative_to(folder).as_posix()).startswith(".")), None
    if folder.is_absolute() or dataset.startswith("."):
        raise UserError(f"prompts {dataset}: no such folder")
    from huggingface_hub import HfApi, snapshot_download

    try:
        with hub_errors(f"{dataset} (data set)"):
            told = HfApi().dataset_info(dataset, revision=revision)
        return None, tuple(sorted(file.rfilename for file in told.siblings or [])), told.sha
    except UserError:
        try:  # without a network, what was fetched before
            kept = Path(snapshot_download(dataset, repo_type="dataset", revision=revision, local_files_only=True))
        except Exception:
            kept = None
        if kept is None:
            raise
        return None, tuple(sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file())), kept.name


def _fetched(data: PromptData, names: Sequence[str]) -> list[Path]:
    from huggingface_hub import hf_hub_download

    sha = _located(data.dataset, data.revision)[2]
    with hub_errors(f"{data.dataset} (data set)"):
        return [Path(hf_hub_download(data.dataset, name, repo_type="dataset", revision=sha)) for name in names]


def _card(data: PromptData, folder: Path | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """`configs` of the card, those with a name and files; [] where there are none."""
    if CARD not in names:
        return []
    place = folder / CARD if folder else _fetched(data, [CARD])[0]
    text = place.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        found = load_yaml(head[1]) if head else {}
    except ValueError:
        return []
    configs = found.get("configs") if isinstance(found, dict) else []
    named = (
        [{"config_name": "default", **config} for config in configs or [] if isinstance(config, dict)] if isinstance(configs, list) else []
    )
    return [config for config in named if isinstance(config["config_name"], str) and config.get("data_files")]


def _of_split(data: PromptData, names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The files of the split, of one format."""
    read = [name for name in names if Path(name).suffix.lower() in (PARQUET, *READERS)]
    known = {config["config_name"]: config["data_files"] for config in configs}
    if data.config is not None and known and data.config not in known:
        raise UserError(f"prompts {data.dataset}: there is no config {data.config!r}; there are {', '.join(known)}")
    listed = known.get(data.config or ("default" if "default" in known else next(iter(known), None)))
    if data.config is not None and not known:
        read = [name for name in read if data.config in Path(name).parts or Path(name).stem == data.config]
    splits = _listed(read, listed) if listed else _named(read)
    if data.split not in splits:
        there = f"there are {', '.join(splits)}" if splits else "it has no .parquet, .jsonl, .json, .csv or .tsv file"
        raise UserError(f"prompts {data.dataset}: there is no split {data.split!r}; {there}")
    found = splits[data.split]
    first = Path(found[0]).suffix.lower()
    return [name for name in found if Path(name).suffix.lower() == first]


def _listed(names: Sequence[str], listed: Any) -> dict[str, list[str]]:
    """By split, as the card's `data_files` says: one pattern, several, or several with their splits."""
    entries = listed if isinstance(listed, list) else [listed]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, patterns = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            matched = [name for name in names if fnmatch.fnmatch(name, str(pattern).replace("**/", "*"))]
            found.setdefault(str(split), []).extend(matched)
    return {split: files for split, files in found.items() if files}


def _named(names: Sequence[str]) -> dict[str, list[str]]:
    """By split, as the files' names say."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = re.split(r"[^a-zA-Z]+", name.rpartition(".")[0].lower())
        if split := next((split for split, known in SPLITS.items() if any(word in words for word in known)), None):
            found.setdefault(split, []).append(name)
    ordered = {split: found[split] for split in SPLITS if split in found}
    return ordered or ({"train": list(names)} if names else {})


def _read(data: PromptData, path: Path) -> Iterator[Prompt]:
    if path.suffix.lower() == PARQUET:
        yield from _parquet(data, path)
        return
    for prompt in read_prompts(path, quiet=True, caption=data.column):
        tag = prompt.metadata.get(data.tag, "") if data.tag else prompt.tag
        if data.tag and data.tag not in prompt.metadata:
            raise UserError(f"prompts {prompt.where}: no column {data.tag!r} for the tags")
        yield Prompt(prompt.text, str(tag), prompt.metadata, prompt.where)


def _parquet(data: PromptData, path: Path) -> Iterator[Prompt]:
    table = parquet.opened(path, f"prompts {path}")
    names = list(table.schema_arrow.names)
    column = data.column or next((name for name in CAPTIONS if name in names), "prompt")
    wanted = [data.tag] if data.tag else ["tag"] if "tag" in names else []
    for name in (column, *wanted):
        if name not in names:
            raise UserError(f"prompts {data.dataset}: no column {name!r}; it has {', '.join(names)[:200]}")
    for number, record in enumerate(parquet.rows(table, [column, *wanted], f"prompts {path}")):
        text, where = record.get(column), f"{path.name}, row {number + 1}"
        if not isinstance(text, str):
            raise UserError(f"prompts {data.dataset}: {column} holds no text ({where}); name the column with the captions")
        if clean := visible(text).strip():
            tag = record.get(wanted[0]) if wanted else ""
            yield Prompt(clean, "" if tag is None else str(tag), {}, where)
