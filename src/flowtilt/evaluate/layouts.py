"""Folders that know the prompts of their images: GenEval's, evaluations, the samples of a run."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.evaluate.folder import image_path
from flowtilt.evaluate.gather import Pair, by_number, grouped, hidden
from flowtilt.io.files import read_lines
from flowtilt.io.images import ENDINGS
from flowtilt.io.run_folder import EvaluationFolder, RunFolder, SamplesFolder
from flowtilt.prompts import Prompt
from flowtilt.prompts.files import read_prompts
from flowtilt.report.numbers import counted

INDEX = SamplesFolder.index


def is_evaluation(place: Path) -> bool:
    """Whether `flowtilt evaluate` made this folder."""
    return EvaluationFolder(place).protocol.is_file()


def evaluation(folder: Path) -> list[Pair]:
    """The images that `flowtilt evaluate --save-images` kept.

    Raises:
        UserError: it has not ended, or without its images.
    """
    if not EvaluationFolder(folder).results.is_file():
        raise UserError(f"score: {folder} is an evaluation that has not ended; the same `flowtilt evaluate` goes on with it")
    found = []
    for record in read_lines(EvaluationFolder(folder).scores):
        file = image_path(folder, record["set"], record["variant"], record["index"], record["copy"])
        if not file.is_file():
            raise UserError(
                f"score: {folder} is an evaluation without all its images; "
                "the same `flowtilt evaluate` with --save-images samples them once more"
            )
        prompt = Prompt(record["prompt"], record["tag"], record.get("metadata", {}))
        found.append(Pair(file, prompt, record["index"], record["copy"], record["set"], record["variant"]))
    return found


def geneval(folder: Path) -> list[Pair]:
    """Images and prompts of GenEval's folders; none where no folder has a metadata.jsonl.

    Raises:
        UserError: some lack it, or their images: the mean over the others would pass for the benchmark's.
    """
    folders = sorted((place for place in folder.glob("*") if (place / "metadata.jsonl").is_file()), key=by_number)
    samples = {place: [file for file in (place / "samples").glob("*") if _is_image(file)] for place in folders}
    if not folders:
        return []
    nameless = sorted((place.parent for place in folder.glob("*/samples") if place.parent not in samples), key=by_number)
    empty = [place for place, files in samples.items() if not files]
    for lacking, what in ((nameless, "metadata.jsonl"), (empty, "images in samples/")):
        if lacking:
            number = f"{len(lacking)} of {counted(len(folders) + len(nameless), 'folder')}"
            raise UserError(f"score: {number} in GenEval's layout lack {what}, {lacking[0]} first; complete them or move them away")
    prompts = {place: read_prompts(place / "metadata.jsonl")[0] for place in folders}
    return [
        Pair(file, prompts[place], index, copy)
        for index, place in enumerate(folders)
        for copy, file in enumerate(sorted(samples[place], key=by_number))
    ]


def run_samples(places: Sequence[Path]) -> list[Pair]:
    """The samples that training kept: of a run, of its samples/, or of single steps, each step a set; none for other folders.

    Raises:
        UserError: an index that can't be read, or an image of it that is not there.
    """
    steps: list[Path] = []
    for place in places:
        inside = RunFolder(place).samples if RunFolder(place).is_run() else place
        found = [place] if (place / INDEX).is_file() else sorted(inside.glob(f"step-*/{INDEX}"), key=by_number)
        steps += [one.parent if one.name == INDEX else one for one in found]
        if not found:
            return []
    rows = {step: _rows(step) for step in steps}
    if not all(rows.values()):
        return []
    return [pair for step, known in rows.items() for pair in grouped(known, partial(Pair, set=step.name))]


def _rows(step: Path) -> list[tuple[Path, Prompt]]:
    """Images and prompts of a step's index; none where it is another program's."""
    try:
        index: Any = json.loads((step / INDEX).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"score: {step / INDEX} can't be read ({error}); give the images themselves") from None
    rows = index if isinstance(index, list) else []
    if not all(isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("file", "prompt")) for row in rows):
        return []
    if any(row["file"] != Path(row["file"]).name or "\0" in row["file"] for row in rows):
        return []
    found = [(step / row["file"], Prompt(row["prompt"], str(row.get("tag") or ""))) for row in rows]
    if lost := [file for file, _ in found if not os.path.isfile(file)]:  # a name may be too long for Path.is_file
        raise UserError(
            f"score: {step} lacks {counted(len(lost), 'image')} of its {INDEX}, {lost[0].name} first; give the images themselves"
        )
    return found


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and not hidden(file, file.parent) and file.is_file()
