"""Do the real weights give the published numbers? `flowtilt doctor --rewards` asks on a machine that has them.

Scores of given images are published for ImageReward alone, in its README. Of the others this checks what
their authors' figures imply: the range, and that an image's own caption scores above another one's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.io.download import fetch
from flowtilt.io.images import read_image
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, RewardOutput, load_reward

OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
CAT = "A cat with two horns on its head"
TOLERANCE = 0.02
"""Of ImageReward's README, which says that numbers differ slightly by device; ours are fp32."""


@dataclass(frozen=True)
class Reference:
    """A published image: where it is, its Git blob, its caption, and ImageReward's published score."""

    url: str
    git_blob: str
    caption: str
    imagereward: float | None = None


_IMAGES = "https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/assets/images"
_DEMO = "https://raw.githubusercontent.com/tgxs002/HPSv2/866735ecaae999fa714bd9edfa05aa2672669ee3/hpsv2/assets/demo_image.jpg"
REFERENCES = (
    Reference(f"{_IMAGES}/1.webp", "dc4eb5ba76db95fe46265b71c2e224d0b8544683", OCEAN, 0.5811622738838196),
    Reference(f"{_IMAGES}/2.webp", "ce63393f897b523aef909978997c634eacbcfb31", OCEAN, 0.2745276093482971),
    Reference(f"{_IMAGES}/3.webp", "eb2c966cf5d605cbd2b7a704464373028e5a21e1", OCEAN, -1.4131819009780884),
    Reference(f"{_IMAGES}/4.webp", "73bda58054517ec4d21dfa36127e64be04a1a528", OCEAN, -2.029569625854492),
    Reference(_DEMO, "edfe1e9b2d783765d0d94adc315dbdd9d251d629", CAT),
)

RANGES = {
    "pickscore": (0.60, 1.0),
    "clipscore": (0.10, 0.45),
    "hpsv2": (0.10, 0.45),
    "aesthetic": (2.0, 9.0),
    "imagereward": (-2.5, 2.2),
}
"""Where scores of ordinary images lie."""


def compare(names: Sequence[str]) -> Iterator[str]:
    """A line for each check: "ok", "WRONG", "MISSING" (no weights) or "note".

    Args:
        names: of built-in rewards.

    Raises:
        UserError: the published images can't be fetched.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images: list[Tensor] | None = None
    for name in names:
        try:
            reward = load_reward(name, name, device=device)
        except UserError as error:
            yield f"MISSING {name}: {error}"
            continue
        if name not in (*RANGES, "geneval"):
            yield f"note    {name}: loads; there is no published score of an image to compare with"
            continue
        images = images or [read_image(path) for path in fetch_images()]
        yield from _check(name, reward, [image.to(device) for image in images])


def fetch_images() -> list[Path]:
    """The published images, in the folder of the weights; each is checked against its Git blob."""
    folder = weights.folder() / "reference"
    return [fetch(one.url, folder / f"{k}{Path(one.url).suffix}", git_blob=one.git_blob) for k, one in enumerate(REFERENCES)]


def _check(name: str, reward: Reward, images: Sequence[Tensor]) -> Iterator[str]:
    if name == "geneval":
        prompt = Prompt("a photo of a cat", "single_object", {"include": [{"class": "cat", "count": 1}]})
        found = reward(images[4][None], [prompt])
        notes = "" if isinstance(found, Tensor) else "; ".join(found.notes)
        score = float(_scores(found)[0])
        yield _line(score == 1, name, f"one cat in HPSv2's picture of a cat: score {score:g}{f' ({notes})' if notes else ''}")
        return
    own = [float(_scores(reward(image[None], [Prompt(one.caption)]))[0]) for image, one in zip(images, REFERENCES, strict=True)]
    if name == "imagereward":
        for one, score in zip(REFERENCES, own, strict=True):
            if one.imagereward is not None:
                right = abs(score - one.imagereward) <= TOLERANCE
                yield _line(right, name, f"{Path(one.url).name}: {score:.4f}, published {one.imagereward:.4f}")
    low, high = RANGES[name]
    yield _line(all(low < score < high for score in own), name, f"scores {', '.join(f'{s:.3f}' for s in own)}, expected in {low} to {high}")
    if name != "aesthetic":
        other = [float(_scores(reward(images[k][None], [Prompt(caption)]))[0]) for k, caption in ((0, CAT), (4, OCEAN))]
        right = own[0] > other[0] and own[4] > other[1]
        yield _line(right, name, f"own captions {own[0]:.3f}, {own[4]:.3f}; exchanged {other[0]:.3f}, {other[1]:.3f}")


def _scores(found: Tensor | RewardOutput) -> Tensor:
    return found if isinstance(found, Tensor) else found.scores


def _line(right: bool, name: str, text: str) -> str:
    return f"{'ok     ' if right else 'WRONG  '} {name}: {text}"
