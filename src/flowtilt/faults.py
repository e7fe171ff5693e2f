"""Errors of code that users bring, told in a line."""

import sysconfig
import traceback
from pathlib import Path

import flowtilt
from flowtilt.errors import UserError
from flowtilt.files import shown

FAULTS = (Exception, SystemExit)
"""What such code may raise. What ends the program has failed like any other."""
HINT = "--debug shows the traceback"

_OTHERS = [Path(flowtilt.__file__).parent, *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))]


def first_line(error: BaseException) -> str:
    """What a library's error says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def told(error: BaseException) -> str:
    """`ValueError: too dark, at mine.py:12`; a UserError's own words alone."""
    words = " ".join(str(error).split())
    if isinstance(error, UserError):
        return words
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
