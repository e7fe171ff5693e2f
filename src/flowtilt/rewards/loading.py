"""From what names a reward, or is one, to something that can be called."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from flowtilt.config.given import OBJECT
from flowtilt.errors import UserError
from flowtilt.io import user_code as sources
from flowtilt.io.containment import contained
from flowtilt.io.user_errors import HINT, describe_error, is_fault
from flowtilt.rewards.about import built_in
from flowtilt.rewards.scoring import Reward, sees_sources

CALL = "want a function of images and prompts, as in `def mine(images, prompts)`, or a class whose instances are called so"


def load_reward(
    name: str,
    source: str | Reward | type,
    *,
    device: torch.device | str = "cpu",
    storage_device: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Reward:
    """A reward that can be called, from its name or from itself.

    Args:
        name: what the recipe calls it; a server is asked for the reward of this name.
        source: a built-in reward's name, "path/to/file.py:function", a server's "http://host:port", or a callable: a
            function, a lambda, an instance, or a class, which is built.
        device: where its models go.
        home: where they wait instead, for a class that names them in `modules`.
        options: keywords for it.

    Raises:
        UserError: there is no such reward, file, function or option, importing the file fails, weights are missing, or it
            can't be called with images and prompts.
    """
    found: Any = find_reward(name, source) if isinstance(source, str) else source
    options = dict(options or {})
    if not callable(found):
        raise UserError(f"rewards.{name}: {_shown(found)} is not a reward; {CALL}")
    function: Any = found
    _check_options(name, found, options)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return function(url=source, reward=name, **options)
    built: Reward
    if inspect.isclass(found):
        built = _built(
            name,
            source if isinstance(source, str) else found.__name__,
            found,
            device if storage_device is None else storage_device,
            device,
            options,
        )
    else:
        built = partial(function, **options) if options else function
    _check_call(name, built)
    return built


def _built(
    name: str, what: str, found: type, storage_device: torch.device | str, device: torch.device | str, options: Mapping[str, Any]
) -> Reward:
    """An instance of a class; it is given the device where it takes one."""
    build = cast(Callable[..., Reward], found)
    place: dict[str, Any] = {"device": torch.device(storage_device if _names_modules(found) else device)} if _takes_device(found) else {}
    if sources.is_ours(found) and "name" in (_parameters(found) or {}):
        place["name"] = name
    try:
        with contained(f"rewards.{name}", path=sources.search_path(found), slow=f"rewards.{name} to be built"):
            return build(**place, **options)
    except UserError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f"rewards.{name}: building {what} failed: {describe_error(error)} ({HINT})") from error


def _takes_device(found: type) -> bool:
    if found.__init__ is nn.Module.__init__:  # its **kwargs are refused
        return False
    parameters = _parameters(found)
    return parameters is None or "device" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _names_modules(found: type) -> bool:
    """Whether a class says which models may leave the device; `nn.Module.modules` says something else."""
    return hasattr(found, "modules") and not issubclass(found, nn.Module)


def _parameters(found: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a callable; none where Python can't tell."""
    try:
        return inspect.signature(found).parameters
    except (TypeError, ValueError):
        return None


def _check_call(name: str, reward: Any) -> None:
    """Raises UserError where a reward can't be called with images and prompts."""
    if not callable(reward):
        raise UserError(f"rewards.{name}: {type(reward).__name__} has no __call__(self, images, prompts); {CALL}")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **({"sources": None} if sees_sources(reward) else {}))
    except TypeError:
        raise UserError(f"rewards.{name}: takes {signature}, but is called with images and prompts; {CALL}") from None


def _shown(thing: Any) -> str:
    text = repr(thing)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(thing).__name__})"


def find_reward(name: str, source: str) -> Any:
    """The function or class behind `source`, not yet built; see `load_reward`."""
    if source.startswith(OBJECT):
        raise UserError(
            f"rewards.{name}: this run was trained with a Python object, which no file holds; give it again in Python: "
            f"Trainer(resume=RUN, rewards={{{name!r}: ...}}), or name other rewards"
        )
    if source.startswith(("http://", "https://")):
        from flowtilt.rewards.serving.client import RemoteReward

        return RemoteReward
    if source in built_in():
        place, _, function = built_in()[source].source.partition(":")
        return getattr(import_module(place), function)
    if ":" not in source:
        if sources.is_file(source):
            raise UserError(f"rewards.{name}: {sources.without_function(Path(source))}")
        near = get_close_matches(source, built_in(), 1)
        rather = f"did you mean {near[0]!r}?" if near else f'built in are {", ".join(built_in())}; your own is "file.py:function"'
        raise UserError(f"rewards.{name}: no reward {source!r}; {rather}")
    return sources.from_file(f"rewards.{name}", source)


def _check_options(name: str, found: Any, options: Mapping[str, Any]) -> None:
    parameters = _parameters(found)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    # what it is given anyway: one of a server has its address and what that calls it
    given = {"device", "sources", *(("url", "reward") if "reward" in parameters else ()), *(("name",) if sources.is_ours(found) else ())}
    known = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in given]
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, 1)
            rather = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}" if known else "it has no options"
            raise UserError(f"rewards.{name}: unknown option {key!r}; {rather}")
