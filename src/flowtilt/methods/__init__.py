"""Methods: what each is, without torch. A built-in method is found by its name, a user's own by "file.py:Class"."""

import hashlib
import importlib
import inspect
import json
import pkgutil
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import SerializeAsAny, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from flowtilt.errors import UserError
from flowtilt.io.user_code import absolute, from_file, is_ours
from flowtilt.methods.base import MOST_LAG, Method

DEFAULT = "nft"
"""A table without a type is DiffusionNFT's."""
LOGGED = ("loss", "kl", "norm_ratio", "guide")
"""Metrics that every method may log, which no own one may be called."""
_own: dict[tuple[str, str], type[Method]] = {}
"""Users' methods by source and the file's digest: one class for one file, however often recipes are read."""


class Stored(Method, extra="allow"):
    """A user's method in a recipe that is only read, such as that of a finished run: plain values, no code."""

    most_lag: ClassVar[int] = MOST_LAG

    def check(self, recipe: Any) -> None:
        """Nothing: what it can't do, its own class knows."""


def loaded(method: Method) -> Method:
    """A method that can train: a stored one by its file, any other as it is.

    Raises:
        UserError: the file is gone or fails, or its class no longer takes the stored values.
    """
    if not isinstance(method, Stored):
        return method
    try:
        return own_method(method.type).model_validate(method.model_dump())
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, ("objective", *wrong["loc"])))
        raise UserError(f"{where}: {wrong['msg']}; {method.type} has changed since the run began") from None


@cache
def built_in() -> dict[str, type[Method]]:
    """The built-in methods by name: those classes of this folder's files that have a name."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        file = importlib.import_module(f"{__name__}.{module.name}")
        for one in vars(file).values():
            if inspect.isclass(one) and issubclass(one, Method) and one.__module__ == file.__name__ and one.model_fields["type"].default:
                found[one.model_fields["type"].default] = one
    return dict(sorted(found.items(), key=lambda item: (item[0] != DEFAULT, item[0])))


def is_own(kind: Any) -> bool:
    """Whether a type names a user's file."""
    return isinstance(kind, str) and ".py" in kind


def variants(kind: Any = None) -> dict[str, type[Method]]:
    """Tables that may be `[objective]`, by type: the built-in ones, and the user's own `kind` where it was loaded."""
    own = [method for (source, _), method in _own.items() if is_own(kind) and source == absolute(kind)]
    return built_in() | ({kind: own[-1]} if own else {})


def own_method(source: str) -> type[Method]:
    """A user's method, from "file.py:Class".

    Raises:
        UserError: no such file or class, the file fails, or the class is no method.
    """
    source = absolute(source)
    file = Path(source.rpartition(":")[0] or source)
    key = source, hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    if key not in _own:
        _own[key] = _checked(source, from_file("objective.type", source, "class"))
    return _own[key]


def _checked(source: str, found: Any) -> type[Method]:
    how = "subclass flowtilt.objectives.ForwardProcess or flowtilt.objectives.StepProcess (docs/guides/add-an-objective.md)"
    if not inspect.isclass(found) or not issubclass(found, Method):
        raise UserError(f"objective.type: {source} is not a method; {how}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if not missing and not found.objective:
        missing = [name for name in ("loss", "metrics", "after_rollout", "keeps") if not hasattr(found, name)]
    if missing:
        raise UserError(f"objective.type: {source} has no {', '.join(missing)}; {how}")
    own: Any = getattr(found, "own_metrics", ())
    if not isinstance(own, tuple | list) or not all(isinstance(name, str) for name in own) or len({*own, *LOGGED}) < len(own) + len(LOGGED):
        taken = ", ".join(LOGGED)
        raise UserError(f"objective.type: {source}: own_metrics = {own!r:.80} must be a tuple of different names, none of them {taken}")
    beneath = next(one for one in found.__mro__ if issubclass(one, Method) and is_ours(one))
    for name, field in found.model_fields.items():
        theirs = beneath.model_fields.get(name)
        if theirs and name != "type" and field.annotation != theirs.annotation:
            raise UserError(
                f"objective.type: {source}: its key {name!r} is one that {beneath.__name__} has with another meaning; rename it"
            )
    return found


def _chosen(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Method:
    """The table of the method that its `type` names."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict):
        return handler(value)
    kind = value.get("type", DEFAULT)
    if is_own(kind):
        if (info.context or {}).get("stored"):
            return Stored.model_validate(value)
        try:
            method = own_method(kind)
        except UserError as error:
            raise PydanticCustomError("own_method", "{text}", {"text": str(error)}) from None
        value = {**value, "type": absolute(kind)}
    elif not isinstance(kind, str) or (method := built_in().get(kind)) is None:
        near = get_close_matches(str(kind), built_in(), 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        if isinstance(kind, str) and ":" in kind:
            hint = f" (did you mean {kind.replace(':', '.py:', 1)!r}?)"
        known = ", ".join(map(repr, built_in()))
        raise PydanticCustomError("unknown_method", "{text}", {"text": f'must be one of {known}, or "file.py:Class", not {kind!r}{hint}'})
    return method.model_validate_json(json.dumps({"type": kind, **value}), strict=True, context=info.context)


Objective = Annotated[SerializeAsAny[Method], WrapValidator(_chosen)]
"""The `[objective]` table of any method."""
