"""The playground's pipeline, read once a process and by those that it forks."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from flowtilt.models import opening
from flowtilt.playground import pipeline_path

_LIBRARY = opening.DiffusionPipeline
_read: dict[Any, Any] = {}


def _from_pretrained(place: str, **how: Any) -> Any:
    """Who opens it has a network of its own, beside text encoders and a VAE that nobody trains."""
    if place != str(pipeline_path()):
        return _LIBRARY.from_pretrained(place, **how)
    key = tuple(sorted(how.items(), key=str))
    if key not in _read:
        _read[key] = _LIBRARY.from_pretrained(place, **how)
    pipeline = copy.copy(_read[key])
    pipeline.register_modules(**{name: copy.deepcopy(getattr(pipeline, name)) for name in ("transformer", "scheduler")})
    return pipeline


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, whoever opens the playground does not read its files again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "DiffusionPipeline", SimpleNamespace(load_config=_LIBRARY.load_config, from_pretrained=_from_pretrained))
        yield
