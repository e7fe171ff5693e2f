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
from flowtilt.io.download import fetch
from flowtilt.io.images import read_image
from flowtilt.io.published import folder as weights_folder
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, RewardOutput, load_reward
from flowtilt.rewards.about import BuiltIn, PublishedScore, built_in

OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
CAT = "A cat with two horns on its head"


@dataclass(frozen=True)
class Reference:
    """A published image: where it is, its Git blob, and its caption."""

    url: str
    git_blob: str
    caption: str


_IMAGES = "https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/assets/images"
_DEMO = "https://raw.githubusercontent.com/tgxs002/HPSv2/866735ecaae999fa714bd9edfa05aa2672669ee3/hpsv2/assets/demo_image.jpg"
REFERENCES = (
    Reference(f"{_IMAGES}/1.webp", "dc4eb5ba76db95fe46265b71c2e224d0b8544683", OCEAN),
    Reference(f"{_IMAGES}/2.webp", "ce63393f897b523aef909978997c634eacbcfb31", OCEAN),
    Reference(f"{_IMAGES}/3.webp", "eb2c966cf5d605cbd2b7a704464373028e5a21e1", OCEAN),
    Reference(f"{_IMAGES}/4.webp", "73bda58054517ec4d21dfa36127e64be04a1a528", OCEAN),
    Reference(_DEMO, "edfe1e9b2d783765d0d94adc315dbdd9d251d629", CAT),
)


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
        about = built_in()[name]
        if not about.usual and not about.published:
            yield f"note    {name}: loads; there is no published score of an image to compare with"
            continue
        images = images or [read_image(path) for path in fetch_images()]
        yield from _check(about, reward, [image.to(device) for image in images])


def fetch_images() -> list[Path]:
    """The published images, in the folder of the weights; each is checked against its Git blob."""
    folder = weights_folder() / "reference"
    return [fetch(one.url, folder / f"{k}{Path(one.url).suffix}", git_blob=one.git_blob) for k, one in enumerate(REFERENCES)]


def _check(about: BuiltIn, reward: Reward, images: Sequence[Tensor]) -> Iterator[str]:
    for one in about.published:
        yield _published(about.name, reward, one, images)
    if not about.usual:
        return
    own = [_score(reward, image, Prompt(one.caption)) for image, one in zip(images, REFERENCES, strict=True)]
    low, high = about.usual
    right = all(low < score < high for score in own)
    yield _line(right, about.name, f"scores {', '.join(f'{s:.3f}' for s in own)}, expected in {low} to {high}")
    if about.reads_prompt:
        other = [_score(reward, images[k], Prompt(caption)) for k, caption in ((0, CAT), (4, OCEAN))]
        right = own[0] > other[0] and own[4] > other[1]
        yield _line(right, about.name, f"own captions {own[0]:.3f}, {own[4]:.3f}; exchanged {other[0]:.3f}, {other[1]:.3f}")


def _published(name: str, reward: Reward, want: PublishedScore, images: Sequence[Tensor]) -> str:
    place = next(k for k, one in enumerate(REFERENCES) if one.url.endswith(f"/{want.image}"))
    found = reward(images[place][None], [Prompt(want.caption or REFERENCES[place].caption, want.tag, dict(want.metadata))])
    score = float(_scores(found)[0])
    notes = "" if isinstance(found, Tensor) else "; ".join(filter(None, found.notes))
    text = f"{want.image}: {score:.4f}, expected {want.score:.4f}" + (f" ({notes})" if notes else "")
    return _line(abs(score - want.score) <= want.tolerance, name, text)


def _score(reward: Reward, image: Tensor, prompt: Prompt) -> float:
    return float(_scores(reward(image[None], [prompt]))[0])


def _scores(found: Tensor | RewardOutput) -> Tensor:
    return found if isinstance(found, Tensor) else found.scores


def _line(right: bool, name: str, text: str) -> str:
    return f"{'ok     ' if right else 'WRONG  '} {name}: {text}"
