"""`flowtilt score`: images that are there already, judged by any rewards."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.evaluate.folder import image_path
from flowtilt.evaluate.progress import progress
from flowtilt.files import read_lines, write_atomic
from flowtilt.pictures import LARGEST, read_image
from flowtilt.prompts import Prompt
from flowtilt.prompts.files import read_prompts
from flowtilt.report.numbers import counted
from flowtilt.rewards import PAPER, Reward, score
from flowtilt.rewards.versions import built_in_name

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
READ_PROMPTS = (*PAPER, "playground", "playground_strict", "playground_partial", "playground_smooth")
PROMPT_FREE = ("aesthetic",)
BATCH = 32


@dataclass(frozen=True)
class Pair:
    """An image file, its prompt, which prompt that is of which set, which image of it, and who drew it."""

    file: Path
    prompt: Prompt
    index: int
    copy: int
    set: str = "images"
    variant: str = "tuned"


def find_pairs(places: Sequence[Path], prompts: Sequence[Prompt] | None, images_per_prompt: int = 1) -> list[Pair]:
    """Images with their prompts.

    Args:
        places: image files, folders of them (in the order of their names, numbers counting as numbers), one
            folder in GenEval's layout (00000/metadata.jsonl beside 00000/samples/), or one that
            `flowtilt evaluate --save-images` wrote; the last two know their prompts.
        prompts: one for each `images_per_prompt` consecutive images; none where the folder knows them.

    Raises:
        UserError: a place is not there or has no image, there are not as many as the prompts ask for, or a folder that
            knows its prompts is not whole, or is given beside other places or prompts.
    """
    for place in places:
        if not place.exists():
            raise UserError(f"score: no file or folder {place}")
    evaluations = [place for place in places if _is_evaluation(place)]
    if evaluations and (len(places) > 1 or prompts is not None):
        raise UserError(f"score: {evaluations[0]} is an evaluation, which knows its prompts; give it alone and without --prompts")
    if prompts is None and len(places) == 1:
        known = _evaluation_layout(places[0]) if evaluations else _geneval_layout(places[0])
        if known:
            return known
    files = sorted((place for place in places if place.is_file()), key=_by_number)
    files += [file for place in places if not place.is_file() for file in _images(place)]
    if prompts is None:
        return [Pair(file, Prompt(""), k, 0) for k, file in enumerate(files)]
    if len(files) != len(prompts) * images_per_prompt:
        per = f" x {counted(images_per_prompt, 'image')} of each" if images_per_prompt > 1 else ""
        have = f"{counted(len(files), 'image')} but {counted(len(prompts), 'prompt')}{per}"
        raise UserError(f"score: {have}; --images-per-prompt says how many belong to each")
    return [Pair(file, prompts[k // images_per_prompt], k // images_per_prompt, k % images_per_prompt) for k, file in enumerate(files)]


def _is_evaluation(place: Path) -> bool:
    return (place / "protocol.json").is_file()


def _images(place: Path) -> list[Path]:
    """Those of a folder and its subfolders, without the small pictures of evaluations among them."""
    small = {protocol.parent / "pictures" for protocol in place.rglob("protocol.json")}
    found = [file for file in place.rglob("*") if file.suffix.lower() in ENDINGS and not small.intersection(file.parents)]
    if not found:
        raise UserError(f"score: no images in {place}; they end in {', '.join(ENDINGS)}")
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _geneval_layout(folder: Path) -> list[Pair]:
    """Images and prompts of GenEval's folders; none where no folder has a metadata.jsonl.

    Raises:
        UserError: some lack it, or their images: the mean over the others would pass for the benchmark's.
    """
    folders = sorted((place for place in folder.glob("*") if (place / "metadata.jsonl").is_file()), key=_by_number)
    samples = {place: [file for file in (place / "samples").glob("*") if file.suffix.lower() in ENDINGS] for place in folders}
    if not folders:
        return []
    nameless = sorted((place.parent for place in folder.glob("*/samples") if place.parent not in samples), key=_by_number)
    empty = [place for place, files in samples.items() if not files]
    for lacking, what in ((nameless, "metadata.jsonl"), (empty, "images in samples/")):
        if lacking:
            number = f"{len(lacking)} of {counted(len(folders) + len(nameless), 'folder')}"
            raise UserError(f"score: {number} in GenEval's layout lack {what}, {lacking[0]} first; complete them or move them away")
    prompts = {place: read_prompts(place / "metadata.jsonl")[0] for place in folders}
    return [
        Pair(file, prompts[place], index, copy)
        for index, place in enumerate(folders)
        for copy, file in enumerate(sorted(samples[place], key=_by_number))
    ]


def _evaluation_layout(folder: Path) -> list[Pair]:
    if not (folder / "results.json").is_file():
        raise UserError(f"score: {folder} is an evaluation that has not ended; the same `flowtilt evaluate` goes on with it")
    found = []
    for record in read_lines(folder / "scores.jsonl"):
        file = image_path(folder, record["set"], record["variant"], record["index"], record["copy"])
        if not file.is_file():
            raise UserError(
                f"score: {folder} is an evaluation without all its images; "
                "the same `flowtilt evaluate` with --save-images draws them once more"
            )
        prompt = Prompt(record["prompt"], record["tag"], record.get("metadata", {}))
        found.append(Pair(file, prompt, record["index"], record["copy"], record["set"], record["variant"]))
    return found


def score_images(pairs: Sequence[Pair], rewards: Mapping[str, Reward], *, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """`judge_images`, whole."""
    return with_columns(list(judge_images(pairs, rewards, device=device)), rewards)


def judge_images(pairs: Sequence[Pair], rewards: Mapping[str, Reward], *, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """One record an image: {"image", "set", "variant", "prompt", "tag", "index", "copy", "scores": {column: number or null}, "note"}.

    An image that can't be read has no scores and says why in its note.

    Raises:
        UserError: a reward fails, or needs prompts where there are none.
    """
    needing = [name for name, reward in rewards.items() if _reads_prompts(reward)]
    if needing and not any(pair.prompt.text for pair in pairs):
        raise UserError(f"score: {', '.join(needing)} need the prompts of the images; give them with --prompts")
    with progress(len(pairs)) as bar:
        for batch, images, faults in _batches(pairs):
            scores: dict[str, Tensor] = {}
            notes = faults
            if len(images):
                scores, notes = score(rewards, images.to(device), [pair.prompt for pair in batch])
            for k, pair in enumerate(batch):
                yield _record(pair, {column: None if value[k].isnan() else float(value[k]) for column, value in scores.items()}, notes[k])
            bar.update(len(batch))


def with_columns(records: list[dict[str, Any]], rewards: Mapping[str, Reward]) -> list[dict[str, Any]]:
    """The records, each with every column, in the order of the rewards; null where it has no score."""
    known = dict.fromkeys([*rewards, *(column for record in records for column in record["scores"])])
    ordered = [column for name in rewards for column in known if column.partition("/")[0] == name]
    return [{**record, "scores": {column: record["scores"].get(column) for column in ordered}} for record in records]


def _reads_prompts(reward: Reward) -> bool:
    """Whether it would judge the empty prompt, which nobody means. Of a reward of the user's we can't tell."""
    name = getattr(reward, "reward", None) or built_in_name(reward)
    return name in READ_PROMPTS and name not in PROMPT_FREE


def _record(pair: Pair, scores: dict[str, float | None], note: str) -> dict[str, Any]:
    return {
        "image": str(pair.file),
        "set": pair.set,
        "variant": pair.variant,
        "prompt": pair.prompt.text,
        "tag": pair.prompt.tag,
        "index": pair.index,
        "copy": pair.copy,
        "scores": scores,
        "note": note,
    }


def _batches(pairs: Sequence[Pair]) -> Iterator[tuple[list[Pair], Tensor, list[str]]]:
    """Consecutive images of one size, [n, 3, H, W]; one that can't be read comes alone, with [0] images and the reason."""
    batch: list[Pair] = []
    images: list[Tensor] = []
    for pair in pairs:
        try:
            image = read_image(pair.file)
        except UserError as error:
            if batch:
                yield batch, torch.stack(images), []
                batch, images = [], []
            yield [pair], torch.empty(0), [str(error)]
            continue
        if batch and (image.shape != images[0].shape or len(batch) == BATCH or (len(batch) + 1) * image[0].numel() > LARGEST):
            yield batch, torch.stack(images), []
            batch, images = [], []
        batch.append(pair)
        images.append(image)
    if batch:
        yield batch, torch.stack(images), []


def save_scores(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a line an image, as JSON or, by the file's ending, as CSV; a missing score is null or empty."""
    if path.suffix == ".jsonl":
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))
        return
    text = StringIO()
    columns = list(records[0]["scores"]) if records else []
    writer = csv.writer(text)
    writer.writerow(["image", "prompt", "tag", *columns, "note"])
    for record in records:
        scores = ["" if record["scores"][column] is None else record["scores"][column] for column in columns]
        writer.writerow([record["image"], record["prompt"], record["tag"], *scores, record["note"]])
    write_atomic(path, text.getvalue())
