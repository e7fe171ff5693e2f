"""Published numbers, taken again with the published weights: what `flowtilt doctor --public` runs.

DiffusionNFT's table (arXiv 2509.16117): SD3.5-Medium at 512 pixels, 40 Euler steps without guidance, PickScore on DrawBench. Its code
samples on diffusers' own noise levels (`levels = "stock"`) in fp16, and reads 256 tokens by the T5.

GenEval 2 has a number too, on Flow-DPPO's project page, whose protocol is not published. It is taken where its file and a judge are.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.evaluate.assess import assess
from flowtilt.rewards.judge.asking import URL

BASE = "stabilityai/stable-diffusion-3.5-medium"
IMAGES = 50
"""Prompts of DrawBench, one image each: the mean of 50 has a standard error of about .2."""


@dataclass(frozen=True)
class PublicNumber:
    """A published mean, and how it was taken.

    Args:
        name: what is evaluated; also the folder of its evaluation.
        score: as published, of all prompts.
        tolerance: three standard errors of the mean of `IMAGES` images; none where the protocol is not published, so that there is no
            range to be within.
        column: of the scores.
        file: of prompts that the user brings; without it and a judge's address in FLOWTILT_JUDGE_URL the number is left out.
    """

    name: str
    model: str
    loras: tuple[str, ...]
    score: float
    tolerance: float | None
    prompts: str = "drawbench"
    reward: str = "pickscore"
    column: str = "pickscore/raw"
    resolution: int | None = 512
    steps: int = 40
    dtype: str | None = "float16"
    levels: str | None = "stock"
    t5_length: int | None = 256
    guidance: float = 1.0
    file: str = ""


GENEVAL2 = "geneval2_data.jsonl"
NUMBERS = (
    PublicNumber("base", BASE, (), 20.51, 0.6),
    PublicNumber("DiffusionNFT", BASE, ("worstcoder/SD3.5M-DiffusionNFT-MultiReward",), 23.80, 0.6),
    PublicNumber("GenEval2", BASE, (), 0.124, None, GENEVAL2, "geneval2", "geneval2", dtype=None, levels=None, guidance=4.5, file=GENEVAL2),
)


def command(number: PublicNumber, folder: Path, images: int) -> str:
    """What to type to take a number by hand."""
    lora = "".join(f" --lora {place}" for place in number.loras)
    keys = {"resolution": number.resolution, "levels": number.levels, "t5-length": number.t5_length, "dtype": number.dtype}
    given = "".join(f" --{key} {value}" for key, value in keys.items() if value is not None)
    sampled = f"--images {images} --solver euler --steps {number.steps} --guidance {number.guidance:g} --seed 0"
    scored = f"--prompts {number.prompts} --rewards {number.reward}"
    return f"flowtilt evaluate --model {number.model}{lora} {scored} {sampled}{given} -o {folder / number.name}"


def reproduce(
    folder: Path, numbers: Sequence[PublicNumber] = NUMBERS, images: int = IMAGES, say: Callable[[str], None] | None = None
) -> Iterator[str]:
    """A line for each number: "ok" where it is within its range, "WRONG" where it is not, "MISSING" where it can't be taken, "-" where it
    was left out or has no range.

    Evaluations are kept in `folder`; the same call goes on where it was interrupted.

    Args:
        say: takes the command of each before it begins.
    """
    for number in numbers:
        if number.file and not (os.path.isfile(number.file) and os.environ.get(URL)):
            yield f"-       {number.name}: left out; it needs {number.file} here and a judge's address in {URL} (docs/guides/judge.md)"
            continue
        if say:
            say(command(number, folder, images))
        try:
            results = _taken(number, folder, images)
        except UserError as error:
            yield f"MISSING {number.name}: {error}"
            continue
        variant = "tuned" if number.loras else "base"
        mean = next(iter(results["sets"].values()))["columns"][number.column][variant]["mean"]
        if number.tolerance is None:
            how = f"published {number.score:g}, of a protocol that is not; no range is expected"
            yield f"-       {number.name}: {number.column} {mean:.3f} of {images} images, {how}"
            continue
        # fewer images than were meant widen the range by the root of their ratio
        tolerance = number.tolerance * (IMAGES / images) ** 0.5
        low, high = number.score - tolerance, number.score + tolerance
        status = "ok     " if low <= mean <= high else "WRONG  "
        found = f"{number.column} {mean:.2f} of {images} images"
        yield f"{status} {number.name}: {found}, published {number.score:.2f}, expected {low:.2f} to {high:.2f}"


def _taken(number: PublicNumber, folder: Path, images: int) -> dict[str, Any]:
    return assess(
        folder / number.name,
        model=number.model,
        loras=[Path(place) for place in number.loras],
        prompts=[number.prompts],
        rewards=[number.reward],
        images=images,
        resolution=number.resolution,
        dtype=number.dtype,
        levels=number.levels,
        t5_length=number.t5_length,
        solver="euler",
        steps=number.steps,
        guidance=number.guidance,
        seed=0,
    )
