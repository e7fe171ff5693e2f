"""A prompt: the caption, and what judging its images may need."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Edit:
    """What an editing model reads of a prompt: the instruction and the source image.

    Args:
        text: the instruction.
        image: the file of the source image; "" is a grey one, for passes whose result nobody sees.
        where: file and line of the prompt, for messages.
    """

    text: str
    image: str
    where: str = field(default="", compare=False)


Caption = str | Edit
"""What a model reads of a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A caption and what a reward may need to judge it.

    Args:
        text: the caption that the model reads.
        tag: the kind of prompt ("counting", "position", …); "" where the source names none.
        metadata: everything else of the source's line; GenEval's `include`, `exclude`.
        where: file and line that it came from, for messages.
        image: the file of the source image of an edit; "" where there is none.
    """

    text: str
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)
    image: str = ""

    @property
    def caption(self) -> Caption:
        """What a model reads of it."""
        return Edit(self.text, self.image, self.where) if self.image else self.text

    @property
    def key(self) -> str:
        """What tells it from other prompts, on any machine: the caption, and of an edit the image's name in its file."""
        return f"{self.text}\0{self.metadata.get('image', self.image)}" if self.image else self.text

    def copy(self) -> "Prompt":
        """An equal one that shares nothing with it that can be changed."""
        return replace(self, metadata=deepcopy(dict(self.metadata)))
