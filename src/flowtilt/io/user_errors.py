"""Errors of code that users bring, in one line."""

import re
import signal
import sysconfig
import traceback
from pathlib import Path

import flowtilt
from flowtilt.errors import UserError, printable
from flowtilt.io.files import shown

HINT = "--debug shows the traceback"

NOT_ANNOTATED = re.compile(r"non-annotated attribute was detected: `(\w+)")
"""pydantic's word for it, which goes on for three lines."""
_OTHERS = [Path(flowtilt.__file__).parent, *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))]


def is_fault(error: BaseException) -> bool:
    """Whether the code itself failed, by whatever it raised; not where a signal ends the program while the code runs."""
    if isinstance(error, KeyboardInterrupt):
        return False
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    return not any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def first_line(error: BaseException) -> str:
    """What a library's error says first; its kind where it says nothing."""
    return (_words(error) or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    """What a library's error says, in one line of at most 200 letters; its kind where it says nothing."""
    return " ".join(_words(error).split())[:200] or type(error).__name__


def _words(error: BaseException) -> str:
    try:
        return printable(str(error)).strip()
    except Exception:  # an error of the user's own may fail here, too
        return ""


def describe_error(error: BaseException) -> str:
    """`ValueError: too dark, at mine.py:12`; a UserError's own words alone."""
    words = " ".join(_words(error).split())
    if isinstance(error, UserError):
        return words
    if bare := NOT_ANNOTATED.search(words):
        words = f"{bare[1]!r} has no annotation; write `{bare[1]}: float = …` for a setting, `{bare[1]}: ClassVar = …` for anything else"
    at = place(error)
    return ": ".join(part for part in (type(error).__name__, words) if part) + (f", at {at}" if at else "")


def place(error: BaseException) -> str:
    """File and line of the innermost call that is the user's, not a library's; "" where there is none."""
    calls = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [call for call in calls if call[0].is_file() and not any(call[0].is_relative_to(other) for other in _OTHERS)]
    return f"{shown(own[-1][0])}:{own[-1][1]}" if own else ""


def hint(error: BaseException) -> str:
    """How to see more of an error that was not meant for users."""
    return "" if isinstance(error, UserError) else HINT
