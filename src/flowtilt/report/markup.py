"""Pieces of HTML that several sections share."""

from html import escape


def none_yet(why: str) -> str:
    """The one sentence of a section that has nothing to show; `why` is plain text."""
    return f'<p class="none">{escape(why)}</p>'


def scrolling(label: str, inner: str) -> str:
    """A box that scrolls sideways by itself, so that the page never does, and that the keyboard reaches."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}">{inner}</div>'


def folded(summary: str, inner: str) -> str:
    """What is there for those who look for it."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"
