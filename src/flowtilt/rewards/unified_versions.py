"""UnifiedReward's versions: what each is asked, and how its answer is read.

| version | models | asks for | points |
|---|---|---|---|
| 1.5 | UnifiedReward-7b-v1.5, of LLaVA | a final score | that score |
| qwen | UnifiedReward-qwen-3b, -7b, -32b | elements of the caption, then a final score | that score |
| 2.0 | UnifiedReward-2.0-qwen-… and -qwen3vl-… | scores of alignment, coherence and style | their mean |

-Think and -Flex compare two images and give no points.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flowtilt.errors import UserError

Answer = tuple[float, Mapping[str, float]]
"""Points of 1 to 5, NaN where there are none, and what else an answer says by name."""

# Word for word as the models were trained with them.
_CRITERIA = """You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of depicted objects, \
their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall \
aesthetic appeal.
"""
_TASK = "Your task is provided as follows:\nText Caption: [{prompt}]"
QUESTION = f"<image>\n{_CRITERIA}Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n{_TASK}"
QUESTION_QWEN = (
    f"{_CRITERIA}Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: "
    "'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to 5 after "
    f"'Final Score:'.\n{_TASK}"
)
QUESTION_2 = f"""You are presented with a generated image and its associated text caption. Your task is to analyze the image across \
multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

{_TASK}"""
AXES = ("alignment", "coherence", "style")
POINTS = re.compile(r"final score[\s*]*:[\s*]*([1-5](?:\.\d+)?)(?!\d)", re.IGNORECASE)
POINTS_COMPAT = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
_AXIS = r"{}(?: score)?[\s*]*(?:\(1\s*-\s*5\))?[\s*]*:[\s*]*([1-5](?:\.\d+)?)(?!\d)"


def points(answer: str, *, compat: bool = False) -> float:
    """The final score in an answer, 1 to 5, the first where there are several; NaN where there is none.

    Args:
        compat: as flow_grpo reads it: 0 where there is none, "10" is 1, above 5 as it is, and "**Final Score:** 4" is none.
    """
    found = (POINTS_COMPAT if compat else POINTS).search(answer)
    if compat:
        return float(found[1]) if found else 0.0
    return min(float(found[1]), 5.0) if found else math.nan


def mean_of_axes(answer: str) -> Answer:
    """The mean of the three scores of version 2.0, and each of them; NaN where one is missing."""
    matches = {axis: re.search(_AXIS.format(axis), answer, re.IGNORECASE) for axis in AXES}
    found = {axis: min(float(match[1]), 5.0) if match else math.nan for axis, match in matches.items()}
    return sum(found.values()) / len(AXES), found


@dataclass(frozen=True)
class Version:
    """One version.

    Args:
        question: what is asked, the caption standing for {prompt}.
        read: what an answer says.
        details: names of what `read` gives beside the points.
        wants: what an answer should have, for an error.
    """

    question: str
    read: Callable[[str], Answer]
    details: tuple[str, ...] = ()
    wants: str = '"Final Score:" of 1 to 5'


def _final(answer: str) -> Answer:
    return points(answer), {}


VERSIONS = {
    "1.5": Version(QUESTION, _final),
    "qwen": Version(QUESTION_QWEN, _final),
    "2.0": Version(QUESTION_2, mean_of_axes, AXES, "scores of alignment, coherence and style"),
}


def version_of(model: str) -> str:
    """The version of a model by its name; what tells nothing is 1.5.

    Raises:
        UserError: a model that compares two images.
    """
    name = model.lower()
    if "think" in name or "flex" in name:
        raise UserError(f"the reward unifiedreward: {model} compares two images and gives no points; use UnifiedReward-2.0 or 7b-v1.5")
    return "2.0" if re.search(r"(?<!\d)2\.0", name) else "qwen" if "qwen" in name else "1.5"
