"""What a reward is called that is given by its source alone."""

from urllib.parse import urlsplit

from flowtilt.errors import UserError


def reward_name(source: str) -> str:
    """A built-in reward's own name, the function's of "file.py:function", the last part of the path of an address.

    Raises:
        UserError: there is no such part.
    """
    name = urlsplit(source).path.rpartition("/")[2] if "://" in source else source.rpartition(":")[2]
    if not name or "/" in name:
        raise UserError(f"rewards: {source!r:.200} needs a name, as in geneval={source:.200}")
    return name
