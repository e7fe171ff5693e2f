"""What a reward is called that is given by its source alone."""

from urllib.parse import urlsplit

from flowtilt.errors import UserError


def reward_name(source: str) -> str:
    """A built-in reward's own name, the function's of "file.py:function", the last part of the path of an address.

    Raises:
        UserError: there is no such part.
    """
    name = urlsplit(source).path.rpartition("/")[2] if "://" in source else source.rpartition(":")[2]
    return checked_name(name, source, source)


def checked_name(name: str, word: str, source: str) -> str:
    """The name of a reward that was given as `word`.

    Raises:
        UserError: it is none.
    """
    if not name or "/" in name:
        raise UserError(f"rewards: {word!r:.200} needs a name, as in geneval={source:.200}")
    return name
