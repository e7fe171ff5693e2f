"""Which images `flowtilt score` judges, and the prompt of each."""

import os
from collections.abc import Sequence
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.evaluate.gather import Pair, by_number, images_in
from flowtilt.evaluate.layouts import evaluation, geneval, is_evaluation, run_samples
from flowtilt.evaluate.named import by_name, read_table, tables_of
from flowtilt.prompts import Prompt
from flowtilt.report.numbers import counted


def find_pairs(
    places: Sequence[Path], prompts: Sequence[Prompt] | None, images_per_prompt: int = 1, table: Path | None = None
) -> list[Pair]:
    """Images with their prompts.

    Args:
        places: image files, folders of them (in the order of their names, numbers counting as numbers), or folders that know
            their prompts: with Hugging Face's metadata.csv or metadata.jsonl, a run's samples, one folder in GenEval's layout
            (00000/metadata.jsonl beside 00000/samples/), one that `flowtilt evaluate --save-images` wrote.
        prompts: one for each `images_per_prompt` consecutive images, or one per row of a table that names its images; none
            where the folder knows them.
        table: the file that the prompts are from.

    Raises:
        UserError: a place is not there or has no image, there are not as many as the prompts ask for, a table's names do not
            fit, or a folder that knows its prompts is not whole, or is given beside other places or prompts.
    """
    for place in places:
        if not os.path.exists(place):  # a name may be too long for Path.exists
            raise UserError(f"score: no file or folder {place}")
    evaluations = [place for place in places if is_evaluation(place)]
    if evaluations and (len(places) > 1 or prompts is not None):
        raise UserError(f"score: {evaluations[0]} is an evaluation, which knows its prompts; give it alone and without --prompts")
    if evaluations:
        return evaluation(evaluations[0])
    tables: dict[Path, Sequence[Prompt]] = {}
    if prompts is not None:
        tables = {table: prompts} if table else {}
    elif known := run_samples(places):
        return known
    else:
        tables = {one: read_table(one) for place in places if place.is_dir() for one in tables_of(place)}
        if not tables and len(places) == 1 and (known := geneval(places[0])):
            return known
    files = sorted((place for place in places if place.is_file()), key=by_number)
    files += [file for place in places if not place.is_file() for file in images_in(place)]
    if named := by_name(files, places, tables):
        if images_per_prompt > 1:
            raise UserError(f"score: {table or next(iter(tables))} names the image of each row; leave --images-per-prompt out")
        return named
    if prompts is None:
        return [Pair(file, Prompt(""), k, 0) for k, file in enumerate(files)]
    if len(files) != len(prompts) * images_per_prompt:
        per = f" x {counted(images_per_prompt, 'image')} of each" if images_per_prompt > 1 else ""
        have = f"{counted(len(files), 'image')} but {counted(len(prompts), 'prompt')}{per}"
        raise UserError(f"score: {have}; --images-per-prompt says how many belong to each")
    return [Pair(file, prompts[k // images_per_prompt], k // images_per_prompt, k % images_per_prompt) for k, file in enumerate(files)]
