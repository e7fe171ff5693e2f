"""Pieces of HTML that several sections share."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any


def none_yet(why: str) -> str:
    """The one sentence of a section that has nothing to show; `why` is plain text."""
    return f'<p class="none">{escape(why)}</p>'


def scrolling(label: str, inner: str) -> str:
    """A box that scrolls sideways by itself, so that the page never does, and that the keyboard reaches."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}">{inner}</div>'


def folded(summary: str, inner: str) -> str:
    """What is there for those who look for it."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def flat_table(label: str, tree: Mapping[str, Any]) -> str:
    """A table of keys and values of any JSON; what lies deeper has its path for a key: versions.torch."""
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in flat(tree))
    return scrolling(label, f"<table>{rows}</table>")


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of any JSON, (path, text), a path being versions.torch."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            value = {str(place): part for place, part in enumerate(value)}
        found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", _plain(value))]
    return found


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
