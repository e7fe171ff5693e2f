"""Lines for a person about what was left out or cut, once per process and on the first rank."""

import logging
import os
from functools import cache

log = logging.getLogger("flowtilt")


@cache
def notice(text: str) -> None:
    """Logs a warning, unless this process has logged the same text before or is not the first rank."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", text)
