"""The shell of a page: one file that loads nothing from anywhere."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources


def document(
    title: str, body: str, *, styles: Sequence[str] = ("page.css",), script: str = "", live: Mapping[str, str | int] | None = None
) -> str:
    """A whole HTML file.

    Args:
        title: plain text.
        body: HTML that stands in <main>.
        styles: files of this package, one after the other.
        script: a file of this package, "" for none.
        live: what the script needs to show the page anew, of a run that goes on; see `page.js`. With "version" a server has it,
            which the script may ask.
    """
    live = live or {}
    style, code = "".join(map(_asset, styles)), _asset(script) if script else ""
    # whatever a prompt or a recipe contains, nothing but this one script runs and nothing is fetched
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'" + ("; connect-src 'self'" if "version" in live else "")
    policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" if code else ""
    html = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main{_data(live)}>\n{body}\n</main>\n"
        + (f"<script>{code}</script>\n" if code else "")
        + "</body>\n</html>\n"
    )
    # half a surrogate pair, which JSON can hold, has no UTF-8
    return html.encode("utf-8", "replace").decode("utf-8")


def section(name: str, title: str, body: str) -> str:
    """A section with its heading; `title` is plain text."""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>\n{body}</section>'


def _data(live: Mapping[str, str | int]) -> str:
    return "".join(f' data-{name}="{escape(str(value))}"' for name, value in live.items())


def _asset(name: str) -> str:
    return resources.files("flowtilt.report").joinpath(name).read_text(encoding="utf-8")
