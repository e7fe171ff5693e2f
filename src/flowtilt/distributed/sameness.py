"""What must be the same on every rank, in a form that `World.agree` compares."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from flowtilt.io.environment import versions

PACKAGES = ("flowtilt", "torch", "diffusers", "transformers")
"""Their versions decide what a rank computes, or which messages it sends."""


def facts(recipe: BaseModel) -> dict[str, Any]:
    """Versions, and every key of a recipe with its value."""
    installed = {f"version of {name}": version for name, version in versions(PACKAGES).items()}
    return installed | leaves(recipe.model_dump(mode="json"))


def digests(prompts: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Of each of several prompt lists, by name: the first digits of a SHA-256 of captions, tags and metadata, in their order."""
    return {f"a digest of {name}": _digest(members) for name, members in prompts.items()}


def _digest(prompts: Sequence[Any]) -> str:
    text = json.dumps([[prompt.text, prompt.tag, dict(prompt.metadata)] for prompt in prompts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found
