"""The one exception that users are meant to see, and what of foreign text may reach a terminal."""

import unicodedata


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do.

    The command line prints it after `flowtilt: ` and exits with status 2; `--debug` shows the traceback.
    """


def printable(text: str) -> str:
    """The text without what moves a terminal's cursor or changes its colours; line breaks and tabs stay.

    Control characters and those that reverse the direction of writing become "?". What others send (servers, files) passes
    through here before it is shown.
    """
    return "".join(c if c.isprintable() or c in " \n\t" or not _acts(c) else "?" for c in text)


def _acts(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Zl", "Zp")
        or character in "\u061c\u200e\u200f"
        or "\u202a" <= character <= "\u202e"
        or ("\u2066" <= character <= "\u2069")
    )
