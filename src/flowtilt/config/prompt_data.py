"""Prompts from a data set of the Hugging Face hub, or from a folder laid out like one.

In a recipe they are a table, `prompts = {dataset = "user/name", column = "caption", split = "train"}`. Everywhere else they are one
text, "dataset:user/name?column=caption&split=train", as file names and sets' names are.
"""

import os
from typing import Any
from urllib.parse import parse_qsl, urlencode

from pydantic import Field, ValidationError

from flowtilt.methods.base import Table

SCHEME = "dataset:"


class PromptData(Table):
    """Where prompts are in a data set."""

    dataset: str = Field(min_length=1, max_length=4096)
    """A hub id, "user/name", or a folder with the same files."""
    column: str | None = Field(default=None, min_length=1)
    """The column with the captions; none takes prompt, caption, prompts or text, the first that there is."""
    split: str = Field(default="train", min_length=1)
    """Its split."""
    tag: str | None = Field(default=None, min_length=1)
    """The column with the tags; none takes "tag" where there is one."""
    config: str | None = Field(default=None, min_length=1)
    """Its configuration, of a data set with several."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit or tag; none takes the newest. A run goes on with the commit that it began with."""

    def source(self) -> str:
        """As one text."""
        rest = {key: value for key, value in self if key != "dataset" and value is not None and (key, value) != ("split", "train")}
        return f"{SCHEME}{self.dataset}" + (f"?{urlencode(rest)}" if rest else "")

    def moved(self, dataset: str) -> "PromptData":
        """The same of another place."""
        return self.model_copy(update={"dataset": dataset})


def parse(source: Any) -> PromptData | None:
    """What a source of prompts says of a data set; none where it is a file's or a set's name.

    Raises:
        ValueError: it begins as one and is none.
    """
    if not isinstance(source, str) or not source.startswith(SCHEME):
        return None
    dataset, _, rest = source.removeprefix(SCHEME).partition("?")
    return _checked({"dataset": dataset, **dict(parse_qsl(rest))})


def as_source(value: Any) -> Any:
    """A table as one text; anything else as it is. A local folder gets its whole path."""
    found = _checked(value) if isinstance(value, dict) else parse(value)
    if found is None:
        return value
    return (found.moved(os.path.abspath(found.dataset)) if os.path.isdir(found.dataset) else found).source()


def shown(source: str) -> str:
    """The name of prompts in a sentence."""
    found = parse(source)
    return f"{os.path.basename(found.dataset)} ({found.split})" if found else os.path.basename(source)


def _checked(table: dict[str, Any]) -> PromptData:
    try:
        return PromptData.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "dataset"
        known = ", ".join(PromptData.model_fields)
        what = f"there is no such key; there are {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise ValueError(f"prompts.{key}: {what}") from None
