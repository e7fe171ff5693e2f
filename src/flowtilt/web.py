"""One request over HTTP, patiently."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from flowtilt import threads
from flowtilt.errors import UserError

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""


class Refused(UserError):
    """The server answered, and will answer the same again; `status` is its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def post_json(
    url: str,
    body: Mapping[str, Any],
    *,
    key: str | None = None,
    timeout: float = 120,
    patience: float = 60,
    waiting: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """POSTs JSON and returns the JSON object that comes back.

    Connection errors, timeouts, cut-off answers and the statuses of `AGAIN` are tried again after growing
    pauses, until `patience` seconds have passed since the first failure.

    Args:
        key: sent as a bearer token.
        timeout: seconds for one try.
        patience: seconds; 0 tries once.
        waiting: told once why, when a first try has failed.

    Raises:
        Refused: any other status; a wrong key says so.
        UserError: patience has run out; names the last failure.
    """
    if key and not (key.isascii() and key.isprintable()):
        raise UserError(f"{url}: its key has a line break or a sign outside ASCII; set it again")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    first: float | None = None
    pause = 0.25
    while True:
        try:
            with threads.waiting(), urllib.request.urlopen(request, timeout=timeout) as answer:
                found = json.loads(answer.read())
            if not isinstance(found, dict):
                raise ValueError("the answer is not a JSON object")
            return found
        except urllib.error.HTTPError as error:
            told = _told(error)
            if error.code in (401, 403):
                raise Refused(error.code, f"{url}: the key was refused ({error.code}{told})") from None
            if error.code not in AGAIN:
                raise Refused(error.code, f"{url}: refused with {error.code}{told}") from None
            failure = f"{error.code}{told}"
        except (OSError, ValueError, EOFError) as error:  # URLError, timeouts, resets, JSON that was cut off
            failure = str(getattr(error, "reason", "") or error or type(error).__name__)
        except Exception as error:  # http.client's own
            failure = f"{type(error).__name__} {error}".strip()
        now = time.monotonic()
        if first is None:
            first = now
            if waiting and patience:
                waiting(f"{url}: {failure}; trying again for up to {patience:.0f} s")
        if now - first + pause > patience:
            raise UserError(f"{url}: no answer in {patience:.0f} s of trying: {failure}")
        with threads.waiting():
            time.sleep(pause)
        pause = min(2 * pause, 10)


def _told(error: urllib.error.HTTPError) -> str:
    """The server's own words, short."""
    try:
        text = error.read(2000).decode(errors="replace")
    except (OSError, HTTPException):
        return ""
    try:
        found = json.loads(text)
        text = found.get("error", text) if isinstance(found, dict) else text
        text = text.get("message", text) if isinstance(text, dict) else text
    except json.JSONDecodeError:
        pass
    text = " ".join(str(text).split())[:200]
    return f": {text}" if text else ""
