"""What a reward server and its client say to each other: JSON both ways, images as files in base64, NaN as null.

POST /score   {"reward": name, "images": [base64], "prompts": [{"text", "tag", "metadata"}]}
200           {"scores": [float | null], "details": {name: [float | null]}, "notes": [str], "version": {…}}
otherwise     {"error": one line}
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowtilt.errors import UserError, printable
from flowtilt.io.addresses import host_of
from flowtilt.io.images import LARGEST, read_image, to_png
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput

HOST = "127.0.0.1"
PORT = 8765
KEY = "FLOWTILT_REWARD_KEY"
"""Environment variable of the key that client and server share."""
KEY_HOST = "FLOWTILT_REWARD_HOST"
"""Environment variable of the servers that may have the key, comma-separated names or addresses."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of what others send; Pillow knows formats that start programs."""


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status, self.line = status, " ".join(line.split())


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        body: bytes of a request.
        images: of a request.
        values: commas and opening brackets of a request: each may become an object in memory.
        picture: pixels of one picture; larger ones are not decoded, and have no score.
        pixels: of all pictures of a request.
        held: bytes of all bodies that arrive or wait to be decoded.
        waiting: images taken and not yet answered, of all requests.
        waiting_pixels: theirs; a pixel takes 12 bytes.
        seconds: for a body to arrive.
    """

    body: int = 256 * 2**20
    images: int = 256
    values: int = 2**17
    picture: int = 16 * 2**20
    pixels: int = LARGEST
    held: int = 2**30
    waiting: int = 4096
    waiting_pixels: int = 512 * 2**20
    seconds: float = 60.0


@dataclass(frozen=True)
class Asked:
    """A request that is well formed; whether its files are pictures is not known yet."""

    reward: str
    files: list[bytes]
    prompts: list[Prompt]
    pixels: int


def key_from_environment(variable: str = KEY) -> str | None:
    """The key, none where none is set.

    Raises:
        UserError: it can't be sent in a header.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{variable}: only printable ASCII without spaces can be sent; make one with: openssl rand -hex 24")
    return key or None


def key_for(url: str, variable: str = KEY, hosts: str = KEY_HOST) -> str | None:
    """The key, if the server at `url` may have it: one of those that `hosts` names, or without that the first one that a program asks.

    Args:
        variable: environment variable of the key.
        hosts: environment variable of the servers that may have it.

    Raises:
        UserError: a second server would get it.
    """
    key, host = key_from_environment(variable), host_of(url)
    if key is None:
        return None
    if named := os.environ.get(hosts, ""):
        return key if host in {host_of(f"//{one.strip()}") for one in named.split(",")} else None
    given = _given_to.setdefault(variable, set())
    given.add(host)
    if len(given) > 1:
        raise UserError(f"{variable} would be sent to {' and '.join(sorted(given))}; name in {hosts} those that may have it, as in a,b")
    return key


_given_to: dict[str, set[str]] = {}
"""The hosts that may have a key, by its variable."""


def most_bytes(images: int) -> int:
    """Of an answer about so many images: notes and details of 16 KiB each are far more than any reward's."""
    return 2**20 + images * 2**14


def request(reward: str, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The body that asks for scores of images [N, 3, H, W] in [0, 1], rounded to 8 bits."""
    return {
        "reward": reward,
        "images": [base64.b64encode(to_png(image, compress_level=1)).decode() for image in images],
        "prompts": [{"text": p.text, "tag": p.tag, "metadata": dict(p.metadata)} for p in prompts],
    }


def read_request(body: bytes | bytearray, rewards: Iterable[str], limits: Limits) -> Asked:
    """The request of a body.

    Raises:
        Refusal: 400 for a malformed one, 404 for an unknown reward, 413 for too many values, images or pixels.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.values:
        raise Refusal(413, f"the body has more than {limits.values} values; send fewer images (images_per_request) or less metadata")
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise Refusal(400, 'the body must be an object {"reward", "images", "prompts"}')
    reward, images, prompts = said.get("reward"), said.get("images"), said.get("prompts")
    if not isinstance(reward, str):
        raise Refusal(400, '"reward" must be the name of a reward')
    if reward not in rewards:
        raise Refusal(404, f"no reward {reward[:100]!r} here; this server has {', '.join(rewards)}")
    if not isinstance(images, list) or not isinstance(prompts, list):
        raise Refusal(400, '"images" and "prompts" must be lists')
    if len(images) != len(prompts):
        raise Refusal(400, f'"images" has {len(images)} and "prompts" {len(prompts)}; there must be one prompt an image')
    if len(images) > limits.images:
        raise Refusal(413, f"{len(images)} images in a request; at most {limits.images}, send fewer (images_per_request)")
    files = [_file(image, i) for i, image in enumerate(images)]
    pixels = sum(_pixels(file, limits.picture) for file in files)
    if pixels > limits.pixels:
        raise Refusal(413, f"pictures of {pixels} pixels in a request; at most {limits.pixels}, send fewer (images_per_request)")
    return Asked(reward, files, [_prompt(prompt, i) for i, prompt in enumerate(prompts)], pixels)


def _file(image: Any, index: int) -> bytes:
    if not isinstance(image, str):
        raise Refusal(400, f"images[{index}] must be a file in base64, not {type(image).__name__}")
    try:
        return base64.b64decode(image, validate=True)
    except ValueError as error:
        raise Refusal(400, f"images[{index}] is not base64: {error}") from None


def _prompt(prompt: Any, index: int) -> Prompt:
    if not isinstance(prompt, dict) or not isinstance(prompt.get("text"), str):
        raise Refusal(400, f'prompts[{index}] must be an object with a "text"')
    tag, metadata = prompt.get("tag", ""), prompt.get("metadata", {})
    if not isinstance(tag, str) or not isinstance(metadata, dict):
        raise Refusal(400, f'prompts[{index}]: "tag" must be text and "metadata" an object')
    return Prompt(prompt["text"], tag, metadata)


def _pixels(file: bytes, most: int) -> int:
    """What decoding would yield; 0 for what `picture` won't decode."""
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as header:
            pixels = header.width * header.height
    except Exception:  # Pillow's readers raise anything at all
        return 0
    return pixels if pixels <= most else 0


def picture(file: bytes, most: int = LARGEST) -> tuple[Tensor | None, str]:
    """The image [3, H, W] in [0, 1] of a file of at most so many pixels, or none and the reason."""
    try:
        with Image.open(BytesIO(file), formats=FORMATS) as header:
            width, height = header.size
        if width * height <= most:
            return read_image(file), ""
        reason = f"{width} x {height} pixels are too many, at most {most}"
    except Image.UnidentifiedImageError:
        reason = f"not one of {', '.join(FORMATS)}"
    except UserError as error:
        reason = str(error).removeprefix("image: ").removeprefix("can't be read, ")
    except Exception as error:  # Pillow's readers raise anything at all
        reason = f"{type(error).__name__}: {error}"
    return None, f"image can't be read: {reason}"


def answer(output: RewardOutput, version: Mapping[str, Any]) -> dict[str, Any]:
    """The body that answers."""
    return {
        "scores": _to_json(output.scores),
        "details": {name: _to_json(values) for name, values in output.details.items()},
        "notes": list(output.notes),
        "version": dict(version),
    }


def read_answer(said: Mapping[str, Any], number: int) -> tuple[RewardOutput, dict[str, Any]]:
    """Scores, details and notes of `number` images, and the version.

    Raises:
        UserError: it is not an answer to so many images.
    """
    details, notes, version = said.get("details", {}), said.get("notes", []), said.get("version", {})
    if not isinstance(details, dict) or not isinstance(version, dict) or not isinstance(notes, list) or len(notes) != number:
        raise UserError(f'not the answer of a reward server: needs {number} "notes", "details" and "version"')
    scores = _from_json("scores", said.get("scores"), number)
    if bad := [name for name in details if not name or not name.isprintable()]:
        raise UserError(f"not the answer of a reward server: {bad[0][:50]!r} is no name of a detail")
    output = RewardOutput(scores, [printable(str(note)) for note in notes], {k: _from_json(k, v, number) for k, v in details.items()})
    return output, version


def _to_json(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _from_json(name: str, values: Any, number: int) -> Tensor:
    right = isinstance(values, list) and len(values) == number
    if not right or not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        raise UserError(f"not the answer of a reward server: {name!r} must be {number} numbers or nulls")
    try:
        return torch.tensor([float("nan") if value is None else float(value) for value in values], dtype=torch.float32)
    except OverflowError:
        raise UserError(f"not the answer of a reward server: {name!r} has a number that is too large") from None
