"""`flowtilt evaluate`: samples sets of prompts and scores them, in a folder from which an interrupted evaluation resumes.

The folder: protocol.json (what is done, fixed at the start), scores-<rank>.jsonl (a line an image, as it is
done), pictures/, images/ if they are to be kept, and in the end scores.jsonl, results.json and report.html.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture
from torch import Tensor

from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.evaluate import BLOCK, Row, generate
from flowtilt.evaluate.progress import progress
from flowtilt.evaluate.results import results_of
from flowtilt.io.files import append_line, clean, disk_errors, made_by, read_errors, read_lines, write_atomic, write_json, write_lines
from flowtilt.io.images import to_pil, to_png
from flowtilt.io.locks import FILES as LOCKS
from flowtilt.io.locks import HOLDER, Hold
from flowtilt.io.run_folder import EvaluationFolder
from flowtilt.models.base import RoleModel
from flowtilt.models.editing import sources_beside
from flowtilt.prompts import Prompt
from flowtilt.report.evaluation import write_evaluation_page
from flowtilt.rewards import Reward
from flowtilt.rewards.facts import ranges_of
from flowtilt.rewards.judging import judge
from flowtilt.sampling.sampler import Sampler

PROTOCOL = EvaluationFolder.protocol
WRITTEN = {PROTOCOL, EvaluationFolder.scores, EvaluationFolder.results, EvaluationFolder.report, HOLDER}
"""What is written by way of a temporary file."""
THUMBNAIL = 256
"""Pixels of the pictures that the report is made of."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one name, which images of them are sampled, and the rewards that can score any of them."""

    name: str
    prompts: Sequence[Prompt]
    rows: Sequence[Row]
    rewards: Mapping[str, Reward]


@dataclass(frozen=True)
class Block:
    """Images that are sampled and scored together: fixed by the protocol, so that no batch depends on the rank that samples it."""

    of: PromptSet
    variant: str
    rows: Sequence[Row]

    def names(self) -> list[tuple[str, str, int, int]]:
        """What names each image among all."""
        return [(self.of.name, self.variant, *row) for row in self.rows]

    def images(self, folder: Path) -> list[Path]:
        """Where each image is kept at its full size."""
        return [image_path(folder, *name) for name in self.names()]


def image_path(folder: Path, set: str, variant: str, index: int, copy: int) -> Path:
    """Where an evaluation keeps an image at its full size."""
    return EvaluationFolder(folder).images / set / variant / f"{index:05d}-{copy:02d}.png"


@contextmanager
def opened(folder: Path, protocol: Callable[[], Mapping[str, Any]], world: World) -> Iterator[None]:
    """Makes the folder of an evaluation, or finds the one that was interrupted; inside, nobody else works there.

    Raises:
        UserError: the folder holds something else, or an evaluation by another protocol, or another process is at work there.
    """
    hold: list[Hold] = []
    try:
        world.on_rank0(lambda: hold.append(_hold(folder, protocol())))
        yield
    finally:
        for one in hold:
            one.release()


def _hold(folder: Path, protocol: Mapping[str, Any]) -> Hold:
    plain = json.loads(json.dumps(protocol))
    _check_free(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    hold = Hold(folder, "an evaluation")
    try:
        _check_free(folder)  # another start may have been quicker
        place = folder / PROTOCOL
        with read_errors(folder):
            clean(folder, WRITTEN.__contains__)
            for images in EvaluationFolder(folder).images.glob("*/*/"):
                clean(images, lambda name: re.fullmatch(r"\d{5,}-\d{2,}\.png", name) is not None)
        if place.is_file():
            kept = _protocol_of(place)
            differing = [key for key in {**kept, **plain} if kept.get(key) != plain.get(key)]
            if differing:
                raise UserError(f"{folder}: holds an evaluation whose {', '.join(differing)} differ; choose another folder with -o")
        else:
            write_json(place, plain)
        _save_records(folder, _records(folder))  # whole lines alone: a line that a kill tore is not written on
    except BaseException:
        hold.release()
        raise
    return hold


def _check_free(folder: Path) -> None:
    """Raises UserError where a folder is neither an evaluation nor empty, but for what a killed start leaves."""
    with read_errors(folder):
        if not folder.exists() or (folder / PROTOCOL).is_file():
            return
        left = {path.name for path in folder.iterdir()} - set(LOCKS) if folder.is_dir() else {folder.name}
    if any(made_by(name) not in (PROTOCOL, HOLDER) for name in left):
        raise UserError(f"{folder}: not empty and no evaluation; choose another folder with -o")


def _protocol_of(place: Path) -> dict[str, Any]:
    try:
        with read_errors(place):
            found = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{place}: damaged; choose another folder with -o")
    return found


def run(
    folder: Path,
    drawing: RoleModel,
    sets: Sequence[PromptSet],
    variants: Sequence[str],
    sampler: Sampler,
    *,
    seed: int,
    micro_batch: MicroBatch,
    world: World,
    save_images: bool,
) -> dict[str, Any]:
    """Draws and judges what the folder does not hold yet, and writes its results; the first rank returns them.

    An image that was scored but not kept is sampled again from its noise, and its scores stay.

    Args:
        variants: roles of `drawing`: ("tuned",), or ("tuned", "base") to compare.
        save_images: whether full-size PNG files are kept, not only what the report shows.

    Raises:
        UserError: a reward fails or the disk is full; what was done is kept.
    """
    blocks = [
        Block(one, variant, one.rows[start : start + BLOCK])
        for one in sets
        for start in range(0, len(one.rows), BLOCK)
        for variant in variants
    ]
    done = {_key(record) for record in _records(folder)}
    todo = [
        block
        for block in blocks
        if not done.issuperset(block.names()) or (save_images and not all(file.is_file() for file in block.images(folder)))
    ]
    world.barrier()  # nobody writes before everybody has read
    mine = [todo[k] for k in world.share(len(todo))]
    total = sum(len(block.rows) for block in todo)
    drawing.model.encode.prepare(block.of.prompts[index].caption for block in mine for index, _ in block.rows)
    with progress(total, hidden=bool(world.rank)) as bar:
        for block in mine:
            images = generate(drawing, block.variant, block.of.prompts, block.rows, sampler, seed, micro_batch)
            if save_images:
                for file, image in zip(block.images(folder), images, strict=True):
                    write_atomic(file, to_png(image))
            if not done.issuperset(block.names()):
                _judge(folder, block, images, world)
            bar.update(min(len(block.rows) * world.size, total - bar.n))  # the others have come as far, near enough
    world.barrier()
    results = _finish(folder, blocks, variants) if world.rank == 0 else {}
    world.barrier()
    return results


def _judge(folder: Path, block: Block, images: Tensor, world: World) -> None:
    """Scores, the pictures for the report, and a line for each image."""
    one, rows = block.of, block.rows
    scores, notes = judge(one.rewards, images, [one.prompts[index] for index, _ in rows], world.device)
    pictures = to_pil(images)
    sources = sources_beside(images, [one.prompts[index] for index, _ in rows])
    beside = None if sources is None else to_pil(sources)
    for k, (index, copy) in enumerate(rows):
        picture = _save_small(folder, f"{one.name}/{block.variant}/{index:05d}-{copy:02d}", pictures[k])
        source = {"source": _save_small(folder, f"{one.name}/source/{index:05d}", beside[k])} if beside else {}
        values = {column: None if value[k].isnan() else float(value[k]) for column, value in scores.items()}
        prompt = one.prompts[index]
        record = {
            "set": one.name,
            "index": index,
            "copy": copy,
            "prompt": prompt.text,
            "tag": prompt.tag,
            "variant": block.variant,
            "scores": values,
            "note": notes[k],
            "picture": picture,
            **source,
            **({"metadata": dict(prompt.metadata)} if prompt.metadata else {}),
        }
        append_line(folder / f"scores-{world.rank}.jsonl", record)


def _save_small(folder: Path, name: str, picture: Picture) -> str:
    """Keeps a picture for the report, and returns its name in the folder."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    pixel_art = max(small.size) <= 64
    file = f"{EvaluationFolder.pictures}/{name}.{'png' if pixel_art else 'jpg'}"
    buffer = BytesIO()
    small.save(buffer, "PNG") if pixel_art else small.save(buffer, "JPEG", quality=85)
    _write(folder / file, buffer.getvalue())
    return file


def _write(path: Path, data: bytes) -> None:
    """Plainly: a picture that a kill tears is drawn again, since its line in scores.jsonl comes after it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _key(record: Mapping[str, Any]) -> tuple[str, str, int, int]:
    return record["set"], record["variant"], record["index"], record["copy"]


def _records(folder: Path) -> list[dict[str, Any]]:
    """Every image that is done, by whichever process. One whose line is damaged counts as not done."""
    with read_errors(folder):
        records = [record for file in _score_files(folder) for record in read_lines(file)]
    return [record for record in records if _is_whole(record)]


def _score_files(folder: Path) -> list[Path]:
    parts = [file for file in folder.glob("scores-*.jsonl") if re.fullmatch(r"scores-\d+\.jsonl", file.name)]
    return [EvaluationFolder(folder).scores, *sorted(parts)]


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a line has all that the results and the report are made of."""
    kinds = {"set": str, "variant": str, "prompt": str, "tag": str, "note": str, "picture": str, "index": int, "copy": int, "scores": dict}
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _save_records(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    write_lines(EvaluationFolder(folder).scores, list(records))
    for part in _score_files(folder)[1:]:
        part.unlink()


def _finish(folder: Path, blocks: Sequence[Block], variants: Sequence[str]) -> dict[str, Any]:
    """scores.jsonl in the order of the blocks, results.json and the report."""
    found = {_key(record): record for record in _records(folder)}
    records = [found[key] for block in blocks for key in block.names()]
    rewards = {name: reward for block in blocks for name, reward in block.of.rewards.items()}
    results = results_of(records, variants, _protocol_of(folder / PROTOCOL), ranges_of(rewards))
    _save_records(folder, records)
    write_json(EvaluationFolder(folder).results, results)
    write_evaluation_page(folder)
    return results
