"""OCR: how much of the text that a prompt asks for can be read in the image.

The rule is flow_grpo's and DiffusionNFT's: with the text between the prompt's first two double quotes as the
target (the first that are no inches; see `quotes`), spaces removed and lower case on both sides,

    reward = 1                                              where the target occurs in what was read
             1 - min(Levenshtein(read, target), L) / L      elsewhere, L the target's length

in [0, 1]. They read with PaddleOCR 2.9.1; here it is the PP-OCRv6 that comes inside the rapidocr package, on the
CPU, so numbers are near the published ones and not equal to them. It reads Latin scripts with their accents,
Chinese and Japanese; not Cyrillic, Arabic, Hebrew, Korean or Indic ones, not Vietnamese, and Greek only in parts.
"""

import math
import os
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.quotes import quoted
from flowtilt.rewards.reading_order import reading_order

DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
NO_TARGET = 'no text in double quotes: write what the image should show as in: a sign that says "Hello"'
MOST_OBLONG = 8
"""Times that one side of what the engine sees is longer than the other, at most."""
MOST_READERS = 4
ALIKE = str.maketrans("‘’‚‛ʼ“”„‟‐‑–—−⁄", "'''''\"\"\"\"-----/")
"""Signs that fonts draw alike, so that the engine writes one for the other."""


def target(prompt: str) -> str | None:
    """The text that a prompt asks for: the first that is in double quotes, which are not inches; None without one."""
    return next((part for part in quoted(prompt) if plain(part)), None)


def text_score(read: str, prompt: str, *, compat: bool = False) -> float:
    """The reward in [0, 1] of the text read in an image, lines in reading order; NaN where the prompt has no target.

    Args:
        compat: as flow_grpo has it. A single quote makes the rest of the prompt the target, of white space only
            U+0020 is removed, and characters are compared as they are, neither NFKC nor `ALIKE` applied.
    """
    wanted, read = (_target_compat(prompt), _plain_compat(read)) if compat else (plain(target(prompt) or ""), plain(read))
    if not wanted:
        return math.nan
    return 1.0 if wanted in read else 1 - min(levenshtein(read, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """Text as it is compared: NFKC, typographic quotes and dashes made ASCII, lower case, nothing invisible."""
    text = unicodedata.normalize("NFKC", text).translate(ALIKE).lower()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def _target_compat(prompt: str) -> str:
    return _plain_compat(prompt.partition('"')[2].partition('"')[0])


def _plain_compat(text: str) -> str:
    return text.replace(" ", "").lower()


def levenshtein(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that makes `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, have in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, want in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (have != want))
    return row[-1]


class OCR:
    """`text_score` of what the engine reads, with a note on each image that misses something.

    An image does not depend on its batch or on the number of threads: each is read alone, by an engine of one thread.

    Args:
        device: not used; the engine runs on the CPU.
        side: pixels to which the detector enlarges a smaller image's shorter side. 512 takes less than half the
            time of 736 for images of 512 x 512.
        compat: see `text_score`.

    Raises:
        UserError: rapidocr is not installed, or it is a release without these models.
    """

    def __init__(self, *, device: torch.device | str = "cpu", side: int = 736, compat: bool = False):
        try:
            import onnxruntime  # noqa: F401 - rapidocr imports it only once it reads
            import rapidocr  # noqa: F401
        except ImportError as error:
            raise UserError(f"the reward ocr needs rapidocr and onnxruntime ({error}): pip install rapidocr onnxruntime") from error
        if type(side) is not int or side < 32:
            raise UserError(f"the reward ocr: side must be a whole number of pixels, 32 or more, not {side!r}")
        for file in (DETECTOR, RECOGNISER):
            if not (_models() / file).is_file():
                raise UserError(
                    f"{_models() / file} is missing: rapidocr 3.10 carries it; pip install --force-reinstall 'rapidocr==3.10.*'"
                )
        self.compat = compat
        self.version = {"rapidocr": version("rapidocr"), "models": [DETECTOR, RECOGNISER], "side": side}
        self._reader = _Reader(side)
        self._pool = ThreadPoolExecutor(min(MOST_READERS, cores()), "ocr")

    @staticmethod
    def applies(prompt: Prompt) -> str:
        """Asks for a target, and for one that the engine can read: without its letters the score could only be low."""
        text = target(prompt.text)
        if text is None:
            return NO_TARGET
        wanted = plain(text)
        known = None if wanted.isascii() else readable()
        unknown = "".join(dict.fromkeys(c for c in wanted if known is not None and c not in known))
        if any(c.isalnum() for c in unknown) or set(wanted) == set(unknown):
            return f'the text reader does not know "{unknown}" of "{text}"; it reads Latin scripts, Chinese and Japanese'
        return ""

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, H, W]; an error of the engine is raised."""
        reasons = [self._reason(prompt) for prompt in prompts]
        readings = self._pool.map(lambda picture, reason: "" if reason else self._read(picture), to_pil(images), reasons)
        scores, notes = [], []
        for prompt, reason, read in zip(prompts, reasons, readings, strict=True):
            score = math.nan if reason else text_score(read, prompt.text, compat=self.compat)
            scores.append(score)
            notes.append(reason if reason or score == 1 else _missed(read, prompt.text))
        return RewardOutput(torch.tensor(scores, dtype=torch.float32), notes)

    def _reason(self, prompt: Prompt) -> str:
        if self.compat:
            return "" if _target_compat(prompt.text) else NO_TARGET
        return self.applies(prompt)

    def _read(self, picture: Image.Image) -> str:
        """The words in reading order, joined by spaces, which do not count."""
        found = self._reader.engine(_not_too_oblong(picture))
        return "" if found.txts is None else " ".join(found.txts[k] for k in reading_order(found.boxes))


def _not_too_oblong(picture: Image.Image) -> Image.Image:
    """A strip stands on black: the detector enlarges the shorter side, and would make one of a pixel's height endless."""
    least = -(-max(picture.size) // MOST_OBLONG)
    if min(picture.size) >= least:
        return picture
    canvas = Image.new("RGB", (max(picture.width, least), max(picture.height, least)))
    canvas.paste(picture)
    return canvas


def _missed(read: str, prompt: str) -> str:
    wanted = target(prompt) or prompt.partition('"')[2]
    read = read if len(read) <= 80 else read[:79] + "…"
    return f'read "{read}", wanted "{wanted}"' if read else f'read nothing, wanted "{wanted}"'


class _Reader(threading.local):
    """An engine for each thread that asks, made when it first does."""

    def __init__(self, side: int):
        self.engine = _engine(side)


def _engine(side: int) -> Any:
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime"
    # the models are named, so that a later rapidocr with other defaults neither downloads them nor changes the scores
    return RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "error",
            "Det.limit_side_len": side,
            "Det.model_path": str(_models() / DETECTOR),
            "Rec.model_path": str(_models() / RECOGNISER),
            f"{threads}.intra_op_num_threads": 1,
            f"{threads}.inter_op_num_threads": 1,
        }
    )


@cache
def readable() -> frozenset[str] | None:
    """The characters that the recogniser can write, as `plain` has them, out of its file; None where the extra is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    if not (_models() / RECOGNISER).is_file():
        return None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(_models() / RECOGNISER), options, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return frozenset("".join(map(plain, characters)))


def _models() -> Path:
    """Where rapidocr keeps its models, without importing it."""
    spec = find_spec("rapidocr")
    return Path(spec.origin if spec and spec.origin else "").parent / "models"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
