"""What must be the same on every rank, in a form that `World.agree` compares."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowtilt.io.environment import versions

if TYPE_CHECKING:
    from flowtilt.config import Recipe
    from flowtilt.prompts import Prompt

PACKAGES = ("flowtilt", "torch", "diffusers", "transformers")
"""Their versions decide what a rank computes, or which messages it sends."""


def facts(recipe: "Recipe") -> dict[str, Any]:
    """Versions, and every key of a recipe with its value."""
    installed = {f"version of {name}": version for name, version in versions(PACKAGES).items()}
    return installed | dict(_leaves(recipe.model_dump(mode="json"), ""))


def digests(prompts: Mapping[str, "Sequence[Prompt]"]) -> dict[str, str]:
    """Of each of several prompt lists, by name: the first digits of a SHA-256 of captions, tags and metadata, in their order."""
    return {f"a digest of {name}": _digest(members) for name, members in prompts.items()}


def _digest(prompts: "Sequence[Prompt]") -> str:
    text = json.dumps([[prompt.text, prompt.tag, dict(prompt.metadata)] for prompt in prompts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
