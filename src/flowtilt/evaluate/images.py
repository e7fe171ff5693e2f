"""`flowtilt score`: images that are there already, judged by any rewards."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.evaluate.gather import Pair
from flowtilt.evaluate.progress import progress
from flowtilt.io.files import write_atomic
from flowtilt.io.images import LARGEST, read_image
from flowtilt.rewards import Reward, score
from flowtilt.rewards.facts import facts_of

BATCH = 32


def score_images(pairs: Sequence[Pair], rewards: Mapping[str, Reward], *, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """`judge_images`, whole."""
    return with_columns(list(judge_images(pairs, rewards, device=device)), rewards)


def judge_images(pairs: Sequence[Pair], rewards: Mapping[str, Reward], *, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """One record an image: {"image", "set", "variant", "prompt", "tag", "index", "copy", "scores": {column: number or null}, "note"}.

    An image that can't be read has no scores and says why in its note.

    Raises:
        UserError: a reward fails, or needs prompts where there are none.
    """
    # of a user's own that does not say so we can't tell
    needing = [name for name, reward in rewards.items() if facts_of(name, reward).reads_prompt]
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


def _record(pair: Pair, scores: dict[str, float | None], note: str) -> dict[str, Any]:
    return {
        "image": os.fsencode(pair.file).decode(errors="backslashreplace"),
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
    """Writes a line per image, as JSON or, by the file's ending, as CSV; a missing score is null or empty."""
    if path.suffix != ".csv":
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
