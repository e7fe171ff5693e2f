"""UnifiedReward, arXiv 2503.05236: a vision-language model gives 1 to 5 points for alignment and quality.

It answers over HTTP, in the form of OpenAI's chat completions, from a server that the user starts. Question,
picture and rule are flow_grpo's and DiffusionNFT's: the image squashed to 512 x 512, temperature 0, and

    reward = points / 5, in 0.2 ... 1

An answer without points gives NaN; there it counts as 0, which lies outside the scale.
"""

import math
import os
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowtilt.errors import UserError, printable
from flowtilt.io.addresses import host_of
from flowtilt.io.images import to_pil
from flowtilt.io.threads import in_threads
from flowtilt.io.web import Refused, post_json
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput

URL, KEY = "FLOWTILT_UNIFIEDREWARD_URL", "FLOWTILT_UNIFIEDREWARD_KEY"
START = "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --chat-template chatml-llava --port 17140"
SIDE = 512
# word for word as the model was trained with it, the line that says <image> included
QUESTION = """<image>
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of depicted objects, \
their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall \
aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
POINTS = re.compile(r"final score[\s*]*:[\s*]*([1-5](?:\.\d+)?)(?!\d)", re.IGNORECASE)
POINTS_COMPAT = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")


def points(answer: str, *, compat: bool = False) -> float:
    """The points in an answer, 1 to 5, the first where there are several; NaN where there are none.

    Args:
        compat: as flow_grpo reads them: 0 where there are none, "10" is 1, above 5 as it is, and "**Final Score:** 4" is none.
    """
    found = (POINTS_COMPAT if compat else POINTS).search(answer)
    if compat:
        return float(found[1]) if found else 0.0
    return min(float(found[1]), 5.0) if found else math.nan


class UnifiedReward:
    """Points / 5 as the score and `points` as a detail; the note of an image whose answer has none quotes it.

    The server's key, where it wants one, is read from FLOWTILT_UNIFIEDREWARD_KEY: a recipe is saved with its run. It is sent
    to the host of FLOWTILT_UNIFIEDREWARD_URL alone, where that is set.

    Args:
        device: not used; the model runs in the server.
        server: the address up to "/v1"; without one, FLOWTILT_UNIFIEDREWARD_URL.
        model: the name under which the server has it.
        workers: images that are asked for at the same time.
        timeout: seconds for one try.
        patience: seconds for which a failed request is tried again.
        max_missing: the share of a batch whose answers may be without points; one always may.
        compat: see `points`.

    Raises:
        UserError: no address. Called: the server can't be reached or refuses, or too many answers have no points.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        server: str | None = None,
        model: str = "UnifiedReward-7b-v1.5",
        workers: int = 16,
        timeout: float = 120.0,
        patience: float = 60.0,
        max_missing: float = 0.2,
        compat: bool = False,
    ):
        address = (server or os.environ.get(URL, "")).strip().rstrip("/")
        if not address:
            raise UserError(
                f"the reward unifiedreward needs its server: {START} --api-key KEY, then {URL}=http://127.0.0.1:17140/v1, {KEY}=KEY"
            )
        if not address.startswith(("http://", "https://")):
            raise UserError(f"the reward unifiedreward: {address!r} is no address of a server; want one like http://127.0.0.1:17140/v1")
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):  # http.client would quote it in its error
            raise UserError(f"{KEY}: a key is printable ASCII, in one line")
        self.address = f"{address}/chat/completions"
        self.model = model
        self.version = {"model": model}
        self.workers = workers
        self.timeout = timeout
        self.patience = patience
        self.max_missing = max_missing
        self.compat = compat
        usual = os.environ.get(URL, "").strip()
        # a recipe may name another server than the one that the key is for
        self._key = key if key and (not usual or host_of(usual) == host_of(address)) else None

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, H, W]."""
        tasks = [partial(self._ask, picture, prompt.text) for picture, prompt in zip(to_pil(images), prompts, strict=True)]
        answers = in_threads(tasks, self.workers)
        found = torch.tensor([points(answer, compat=self.compat) for answer in answers], dtype=torch.float32)
        missing = found.isnan()
        lost = int(missing.sum())
        if lost >= 2 and lost > self.max_missing * len(answers):
            example = _quoted(answers[int(missing.nonzero()[0])])
            raise UserError(
                f'{self.address}: {lost} of {len(answers)} answers have no "Final Score:" of 1 to 5, the first is {example}; '
                f"is {self.model!r} UnifiedReward?"
            )
        notes = [f"no score in the answer {_quoted(answer)}" if gone else "" for answer, gone in zip(answers, missing, strict=True)]
        return RewardOutput(found / 5, notes, {"points": found})

    def _ask(self, picture: Image.Image, prompt: str) -> str:
        """The model's answer; "" where it says nothing."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": _content(picture, prompt)}]}
        try:
            reply = post_json(self.address, body, key=self._key, timeout=self.timeout, patience=self.patience)
        except Refused as error:
            if error.status in (401, 403):
                raise UserError(f"{error}; {'correct' if self._key else 'set'} {KEY}") from None
            raise
        return content_of(self.address, reply)


def content_of(address: str, reply: Mapping[str, Any]) -> str:
    """The text of a chat completion; "" where it has none.

    Raises:
        UserError: it is no chat completion.
    """
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{address}: answers without choices[0].message.content: {_quoted(str(reply)[:200])}") from None
    return content if isinstance(content, str) else ""


def _content(picture: Image.Image, prompt: str) -> list[dict]:
    buffer = BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    url = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
    # a plain replacement, since captions may hold braces
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION.replace("{prompt}", prompt)}]


def _quoted(answer: str) -> str:
    text = printable(" ".join(answer.split()))
    return f'"{text[:100]}{"…" if len(text) > 100 else ""}"'
