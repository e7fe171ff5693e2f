"""UnifiedReward, arXiv 2503.05236: a vision-language model gives 1 to 5 points for alignment and quality.

It answers over HTTP, in the form of OpenAI's chat completions, from a server that the user starts. Question,
picture and rule are flow_grpo's and DiffusionNFT's: the image squashed to 512 x 512, temperature 0, and

    reward = points / 5, in 0.2 ... 1

An answer without points gives NaN; there it counts as 0, which lies outside the scale. The newer versions are asked and read as their
authors do (`unified_versions`).
"""

import os
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
from flowtilt.rewards.unified_versions import VERSIONS, points, version_of

URL, KEY = "FLOWTILT_UNIFIEDREWARD_URL", "FLOWTILT_UNIFIEDREWARD_KEY"
START = "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --chat-template chatml-llava --port 17140"
SIDE = 512


class UnifiedReward:
    """Points / 5 as the score and `points` as a detail; the note of an image whose answer has none quotes it.

    The server's key, where it wants one, is read from FLOWTILT_UNIFIEDREWARD_KEY: a recipe is saved with its run. It is sent
    to the host of FLOWTILT_UNIFIEDREWARD_URL alone, where that is set.

    Args:
        device: not used; the model runs in the server.
        server: the address up to "/v1"; without one, FLOWTILT_UNIFIEDREWARD_URL.
        model: the name under which the server has it.
        version: "1.5", "qwen" or "2.0"; none takes that of the model's name.
        workers: images that are asked for at the same time.
        timeout: seconds for one try.
        patience: seconds for which a failed request is tried again.
        max_missing: the share of a batch whose answers may be without points; one always may.
        compat: see `unified_versions.points`; of versions that have a final score.

    Raises:
        UserError: no address, or no such version. Called: the server can't be reached or refuses, or too many answers have no points.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        server: str | None = None,
        model: str = "UnifiedReward-7b-v1.5",
        version: str | None = None,
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
        number = version or version_of(model)
        if number not in VERSIONS:
            raise UserError(f"the reward unifiedreward: no version {number!r}; there are {', '.join(VERSIONS)}")
        if compat and VERSIONS[number].details:
            raise UserError(f"the reward unifiedreward: compat reads a final score, which version {number} does not give; leave it out")
        self._asked = VERSIONS[number]
        self.model = model
        self.version = {"model": model, "version": number}
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
        read = [(points(answer, compat=True), {}) if self.compat else self._asked.read(answer) for answer in answers]
        found = torch.tensor([value for value, _ in read], dtype=torch.float32)
        missing = found.isnan()
        lost = int(missing.sum())
        if lost >= 2 and lost > self.max_missing * len(answers):
            example = _quoted(answers[int(missing.nonzero()[0])])
            raise UserError(
                f"{self.address}: {lost} of {len(answers)} answers have no {self._asked.wants}, the first is {example}; "
                f"is {self.model!r} UnifiedReward {self.version['version']}? option version names another"
            )
        notes = [f"no score in the answer {_quoted(answer)}" if gone else "" for answer, gone in zip(answers, missing, strict=True)]
        axes = {axis: torch.tensor([said[axis] for _, said in read], dtype=torch.float32) for axis in self._asked.details}
        return RewardOutput(found / 5, notes, {"points": found, **axes})

    def _ask(self, picture: Image.Image, prompt: str) -> str:
        """The model's answer; "" where it says nothing."""
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": _content(picture, self._asked.question, prompt)}],
        }
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


def _content(picture: Image.Image, question: str, prompt: str) -> list[dict]:
    buffer = BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    url = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
    # a plain replacement, since captions may hold braces
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.replace("{prompt}", prompt)}]


def _quoted(answer: str) -> str:
    text = printable(" ".join(answer.split()))
    return f'"{text[:100]}{"…" if len(text) > 100 else ""}"'
