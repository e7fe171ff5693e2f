"""GenEval (arXiv 2310.11513) as a reward: objects are detected, their colours named, and rules compare them with the prompt."""

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.prompts.geneval_objects import CLASSES
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.geneval.metadata import parse
from flowtilt.rewards.geneval.rules import Verdict, judge, kept, need_color, threshold

if TYPE_CHECKING:
    from flowtilt.rewards.geneval.detect import Detection

__all__ = ["GenEval", "Verdict", "judge", "kept"]

IMAGES = 64
CROPS = 64
"""Objects whose colours are named at once."""

Detect = Callable[[Tensor, Sequence[float]], Sequence[Sequence["Detection"]]]
Classify = Callable[[Tensor, Sequence[str]], Sequence[str]]


class GenEval:
    """Partial credit in [0, 1], with the training rule's ("strict") and the benchmark's ("correct") 0 or 1 as details.

    Published accuracies are means over the six tags of each tag's mean.

    Args:
        compat: what the training code of Flow-GRPO and DiffusionNFT computes, faults included: its score
            (see `judge`), and a detector that sees red and blue swapped.

    Raises:
        UserError: the detector's or CLIP's weights are missing.
    """

    def __init__(self, *, device: torch.device | str, compat: bool = False):
        from flowtilt.rewards.geneval.colors import ColorClassifier
        from flowtilt.rewards.geneval.detect import Detector

        self.compat = compat
        self.detector = Detector(device, channel_order="upstream_bgr" if compat else "rgb")
        self.classifier = ColorClassifier(device)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may leave the device between two calls."""
        return (self.detector.network, self.classifier.clip.model)

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """Scores images [N, 3, H, W] in [0, 1]; see `score_batch`."""
        # in parts: every object's mask is kept until its part is judged
        parts = [
            score_batch(images[k : k + IMAGES], prompts[k : k + IMAGES], self.detector, self.classifier, compat=self.compat)
            for k in range(0, len(prompts), IMAGES)
        ]
        notes = [note for part in parts for note in part.notes]
        details = {name: torch.cat([part.details[name] for part in parts]) for name in parts[0].details}
        return RewardOutput(torch.cat([part.scores for part in parts]), notes, details)

    @staticmethod
    def applies(prompt: Prompt) -> str:
        """Why a prompt can't be judged; "" where it can.

        Raises:
            UserError: it has GenEval's metadata, with a fault in it.
        """
        if not prompt.tag or not prompt.metadata.get("include"):
            return "no GenEval metadata (tag, include)"
        try:
            parse(_metadata(prompt))
        except UserError as error:
            place = f"prompts {prompt.where}" if prompt.where else f"prompt {json.dumps(prompt.text, ensure_ascii=False)}"
            raise UserError(f"{place}: GenEval metadata: {error}") from None
        return ""


@torch.no_grad()
def score_batch(images: Tensor, prompts: Sequence[Prompt], detector: Detect, classifier: Classify, *, compat: bool = False) -> RewardOutput:
    """Detects, names colours where a verdict depends on them, and judges.

    A prompt without GenEval's metadata has no score, NaN; the note says so.

    Args:
        images: [N, 3, H, W] in [0, 1].
        detector: images and a threshold for each -> each one's objects.
        classifier: crops [M, 3, 224, 224] in [0, 1] and their classes -> colours.

    Raises:
        UserError: a prompt's metadata has a fault; names its line.
    """
    why_not = [GenEval.applies(prompt) for prompt in prompts]
    rows = [n for n, why in enumerate(why_not) if not why]
    found: dict[int, list[dict[str, Any]]] = {}
    if rows:
        objects = detector(images[rows], [threshold(prompts[n].tag) for n in rows])
        found = {
            n: [{"class": CLASSES[o.label], "score": o.score, "box": o.box, "color": None, "mask": o.mask} for o in seen]
            for n, seen in zip(rows, objects, strict=True)
        }
    _name_colors([(images[n], detection) for n in rows for detection in need_color(found[n], _metadata(prompts[n]))], classifier)
    verdicts = {n: judge(found[n], _metadata(prompts[n]), compat) for n in rows}

    def column(value: Callable[[Verdict], float]) -> Tensor:
        return torch.tensor([value(verdicts[n]) if n in verdicts else math.nan for n in range(len(prompts))], dtype=torch.float32)

    notes = ["; ".join(verdicts[n].reasons) if n in verdicts else why for n, why in enumerate(why_not)]
    details = {"strict": column(lambda v: float(v.strict)), "correct": column(lambda v: float(v.correct))}
    return RewardOutput(column(lambda v: v.score), notes, details)


def _name_colors(wanted: Sequence[tuple[Tensor, Any]], classifier: Classify) -> None:
    """Sets "color" of detections, each given with its image; where a box holds no pixel it stays None."""
    from flowtilt.rewards.geneval.colors import crop

    for start in range(0, len(wanted), CROPS):
        cut = [(crop(image, d["mask"], d["box"]), d) for image, d in wanted[start : start + CROPS]]
        crops = [(pixels, detection) for pixels, detection in cut if pixels is not None]
        if crops:
            colors = classifier(torch.stack([pixels for pixels, _ in crops]), [detection["class"] for _, detection in crops])
            for (_, detection), color in zip(crops, colors, strict=True):
                detection["color"] = color


def _metadata(prompt: Prompt) -> dict[str, Any]:
    return {**prompt.metadata, "tag": prompt.tag}
