"""A prompt: the caption, and what judging its images may need."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A caption and what a reward may need to judge it.

    Args:
        text: the caption that the model reads.
        tag: the kind of prompt ("counting", "position", …); "" where the source names none.
        metadata: everything else of the source's line; GenEval's `include`, `exclude`.
        where: file and line that it came from, for messages.
    """

    text: str
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)

    def copy(self) -> "Prompt":
        """An equal one that shares nothing with it that can be changed."""
        return replace(self, metadata=deepcopy(dict(self.metadata)))
