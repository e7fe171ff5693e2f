"""One request over HTTP, patiently: no redirect is followed, and an answer has a largest size and a deadline."""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any

from flowtilt.errors import UserError, printable
from flowtilt.io import threads

RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""
MOST = 2**20
"""Bytes of an answer that are read, unless the caller allows more."""
WORDS = 2000
"""Bytes that are read of a refusal."""


class Refused(UserError):
    """The server answered, and will answer the same again; `status` is its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Again(Exception):
    """An answer after which the same request may succeed."""


def post_json(
    url: str,
    body: Mapping[str, Any],
    *,
    key: str | None = None,
    timeout: float = 120,
    patience: float = 60,
    most: int = MOST,
    waiting: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """POSTs JSON and returns the JSON object that comes back.

    Connection errors, timeouts, cut-off answers and the statuses of `RETRY_STATUSES` are tried again after growing
    pauses, or the longer one that a Retry-After asks for, until `patience` seconds have passed since the first failure.

    Args:
        key: sent as a bearer token, to this address alone.
        timeout: seconds for one try, until the whole answer is here.
        patience: seconds; 0 tries once.
        most: bytes of an answer.
        waiting: gets a line that says why, once, when a first try has failed.

    Raises:
        Refused: any other status, a redirect among them, or a larger answer; a wrong key says so.
        UserError: patience has run out; names the last failure.
    """
    return _patiently(urllib.request.Request(url, json.dumps(body).encode(), _headers(url, key)), timeout, patience, most, waiting)


def get_json(url: str, *, key: str | None = None, timeout: float = 10, patience: float = 10, most: int = MOST) -> dict[str, Any]:
    """GETs the JSON object at an address; see `post_json`."""
    return _patiently(urllib.request.Request(url, headers=_headers(url, key)), timeout, patience, most, None)


def _headers(url: str, key: str | None) -> dict[str, str]:
    if key and not (key.isascii() and key.isprintable()):
        raise UserError(f"{url}: its key has a line break or a sign outside ASCII; set it again")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _patiently(
    request: urllib.request.Request, timeout: float, patience: float, most: int, waiting: Callable[[str], None] | None
) -> dict[str, Any]:
    url = request.full_url
    first: float | None = None
    pause = 0.25
    while True:
        asked = 0.0
        try:
            with threads.waiting():
                status, location, answer, later = _asked(request, timeout, most)
            asked = seconds_of(later)
            return understood(url, status, location, answer, most)
        except UserError:
            raise
        except (OSError, ValueError, EOFError) as error:  # URLError, timeouts, resets, JSON that was cut off
            failure = str(getattr(error, "reason", "") or error or type(error).__name__)
        except Again as error:
            failure = str(error) + (f" (asks to wait {asked:.0f} s)" if asked > patience else "")
        except Exception as error:  # http.client's own
            failure = f"{type(error).__name__} {error}".strip()
        failure = printable(failure)[:300]
        now = time.monotonic()
        if first is None:
            first = now
            if waiting and patience:
                waiting(f"{url}: {failure}; trying again for up to {patience:.0f} s")
        wait = max(pause, asked)
        if now - first + wait > patience:
            raise UserError(f"{url}: no answer in {patience:.0f} s of trying: {failure}")
        with threads.waiting():
            time.sleep(wait)
        pause = min(2 * pause, 10)


def seconds_of(later: str) -> float:
    """Seconds that a Retry-After header asks to wait, a number or a date; 0 where it says nothing that can be read."""
    try:
        asked = float(later) if later.replace(".", "", 1).isdigit() else parsedate_to_datetime(later).timestamp() - time.time()
        return max(0.0, asked)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def understood(url: str, status: int, location: str, answer: bytes, most: int = MOST) -> dict[str, Any]:
    """The JSON object of an answer of status 200, of whose bytes at least `most` + 1 are here if it has more.

    Args:
        location: where a redirect leads.

    Raises:
        Refused: another status that will come again, or a larger answer.
        Again: a status of `RETRY_STATUSES`.
        ValueError: no JSON object.
    """
    if 300 <= status < 400:
        where = f" to {printable(' '.join(location.split()))[:200]}" if location else ""
        raise Refused(status, f"{url}: redirects{where} ({status}), which is not followed; write the address of the server itself")
    reason = _reason(answer) if status != 200 else ""
    if status in (401, 403):
        raise Refused(status, f"{url}: the key was refused ({status}{reason})")
    if status in RETRY_STATUSES:
        raise Again(f"{status}{reason}")
    if status != 200:
        raise Refused(status, f"{url}: refused with {status}{reason}")
    if len(answer) > most:
        raise Refused(status, f"{url}: answers with more than {most} bytes, which is no answer to this request")
    try:
        found = json.loads(answer)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("the answer is not a JSON object")
    return found


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Returns answers of all statuses: urllib follows redirects from here."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def _asked(request: urllib.request.Request, timeout: float, most: int) -> tuple[int, str, bytes, str]:
    """Status, location, at most `most` + 1 bytes of an answer, and its Retry-After.

    In a thread of its own: a socket's timeout is one of each read, and a server that sends a byte now and then meets it forever.

    Raises:
        TimeoutError: it is not all here after `timeout` seconds.
    """
    done: SimpleQueue[tuple[int, str, bytes, str] | Exception] = SimpleQueue()
    late = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.build_opener(_AsItIs).open(request, timeout=timeout) as answer:
                limit = most + 1 if answer.status == 200 else WORDS
                body = bytearray()
                while len(body) < limit and not late.is_set() and (part := answer.read1(min(65536, limit - len(body)))):
                    body += part
                if len(body) < limit and answer.length:
                    raise EOFError("the answer was cut off")
                done.put((answer.status, answer.headers.get("Location", ""), bytes(body), answer.headers.get("Retry-After", "")))
        except Exception as error:
            done.put(error)

    threading.Thread(target=ask, name="request", daemon=True).start()
    try:
        found = done.get(timeout=timeout)
    except Empty:
        raise TimeoutError(f"no whole answer in {timeout:g} s") from None
    finally:
        late.set()
    if isinstance(found, Exception):
        raise found
    return found


def _reason(answer: bytes) -> str:
    """The server's own words, short."""
    text = answer[:WORDS].decode(errors="replace")
    try:
        found = json.loads(text)
        text = found.get("error", found.get("detail", text)) if isinstance(found, dict) else text
        text = text.get("message", text) if isinstance(text, dict) else text
    except (ValueError, RecursionError):
        pass
    text = printable(" ".join(str(text).split()))[:200]
    return f": {text}" if text else ""
