"""All that `flowtilt download` knows by name: models, rewards' weights and prompt sets; a recipe's name stands for all that it needs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from flowtilt.config import Recipe, load_recipe, recipe_names
from flowtilt.errors import UserError
from flowtilt.io import hub
from flowtilt.io.published import Published, missing_size, total
from flowtilt.prompts import sets
from flowtilt.rewards.about import all_weights, built_in, download_weights, find_weights

AGAIN = "run the same command where there is a network: `flowtilt download {}`"
"""What to do where the hub can't be reached."""


@dataclass(frozen=True)
class Item:
    """One line of the list.

    Args:
        name: a name that is a reward's and a prompt set's is two items, and is downloaded as both.
        kind: "model", "weights" or "prompts".
        about: a model's id, the files that a reward reads, with their licences where known, or what a set holds.
        sources: addresses.
        there: all of it has been downloaded.
        size: bytes, as far as they are known.
        whole: nothing that is to come is of unknown size.
    """

    name: str
    kind: str
    about: str
    sources: Sequence[str]
    there: bool
    size: int
    whole: bool


@dataclass
class Needs:
    """What names stand for: models by id with their revisions, files of rewards, prompt sets."""

    models: dict[str, str | None] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)


def listing() -> list[Item]:
    """The recipes' models, every reward that reads weights, every prompt set. Nothing is checked here but that the files are there."""
    items = [_model(name, path) for path, name in _models().items()]
    for name, files in _weights().items():
        sizes = [_size(entry) for entry in files]
        about = " + ".join(entry.name + (f" ({entry.licence})" if entry.licence else "") for entry in files)
        items.append(Item(name, "weights", about, [entry.source for entry in files], all(map(_find, files)), *total(sizes)))
    for name, found in sets.SETS.items():
        places = [sets.folder() / file for _, file in found.files(name)]
        sizes = [place.stat().st_size if place.is_file() else source.size for place, source in zip(places, found.sources, strict=True)]
        there = all(place.is_file() for place in places)
        items.append(Item(name, "prompts", found.about, [source.url for source in found.sources], there, *total(sizes)))
    return items


def _models() -> dict[str, str]:
    """The shortest name of a recipe by its model's hub id."""
    found: dict[str, str] = {}
    for name in sorted(recipe_names(), key=lambda name: (len(name), name)):
        path = load_recipe(name).model.path
        if hub.is_hub_id(path):
            found.setdefault(path, name)
    return found


def _model(name: str, path: str) -> Item:
    try:
        place = hub.cached_pipeline(path)
    except UserError:
        place = None
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place else 0
    return Item(name, "model", path, [f"https://huggingface.co/{path}"], place is not None, size, place is not None)


def _weights() -> dict[str, tuple[Published, ...]]:
    """The files of each reward that reads any."""
    return {name: one.weights for name, one in built_in().items() if one.weights}


def _find(entry: Published) -> Path | None:
    try:
        return find_weights(entry.name)
    except UserError:
        return None


def _size(entry: Published) -> int | None:
    """Bytes of the files that are here, or as their publisher states."""
    place = _find(entry)
    if place is None:
        return entry.size
    files = [place] if place.is_file() else [place / file for file in entry.files]
    return sum(file.stat().st_size for file in files if file.is_file())


def needs(names: Sequence[str]) -> Needs:
    """What the names of rewards, prompt sets, recipes and models ("owner/name") stand for, each thing once.

    Raises:
        UserError: an unknown name.
    """
    found = Needs()
    for name in names:
        if name in _weights() or name in sets.SETS:
            _add_reward(found, name)
            _add_set(found, name)
        elif name in recipe_names():
            _add_recipe(found, load_recipe(name))
        elif hub.is_hub_id(name):
            found.models[name] = None
        else:
            known = list(dict.fromkeys([*_weights(), *sets.SETS, *recipe_names()]))
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "`flowtilt download --list` and `flowtilt recipes` list them"
            raise UserError(f"download {name!r}: no recipe, reward with weights, prompt set or model on the hub (owner/name); {hint}")
    return found


def _add_recipe(found: Needs, recipe: Recipe) -> None:
    if hub.is_hub_id(recipe.model.path):
        found.models[recipe.model.path] = recipe.model.revision
    judges = [column.partition("/")[0] for column in recipe.evaluate.rewards]
    table = recipe.reward_table()
    for source in (*(settings.source or name for name, settings in table.items()), *(name for name in judges if name not in table)):
        _add_reward(found, source)
    for name in (recipe.prompts, recipe.evaluate.prompts):
        _add_set(found, name)


def _add_reward(found: Needs, name: str) -> None:
    found.weights += [entry.name for entry in _weights().get(name, ()) if entry.name not in found.weights]


def _add_set(found: Needs, name: str | None) -> None:
    if name in sets.SETS and name not in found.sets:
        found.sets.append(name)


def get(names: Sequence[str], to: Path | None = None) -> list[Path]:
    """Downloads what each name stands for, and checks what is there already; returns files and folders.

    Args:
        to: a folder for all of it, to be named by FLOWTILT_WEIGHTS and FLOWTILT_PROMPTS, and of a model as `model.path`; None is the
            caches.

    Raises:
        UserError: an unknown name, before anything is fetched; too little space; or a download failed.
    """
    wanted = needs(names)
    models = [_look_up(path, revision) for path, revision in wanted.models.items()]
    _announce(models, wanted, to)
    paths = [_get_model(found, files, to) for found, files in models]
    paths += [download_weights(file, to) for file in wanted.weights]
    return paths + [path for name in wanted.sets for path in sets.download(name, to)]


def _look_up(path: str, revision: str | None) -> tuple[hub.Repository, list[str]]:
    try:
        return hub.pipeline(path, revision)
    except Exception as error:  # the hub's library raises those of several packages
        raise UserError(f"model {path} {hub.reason(path, error, AGAIN)}") from error


def _get_model(found: hub.Repository, files: Sequence[str], to: Path | None) -> Path:
    place = to / found.name if to else None
    try:
        paths = hub.fetch(found, files, to=place, check=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model {found.name} {hub.reason(found.name, error, AGAIN)}; the same command goes on where it stopped") from error
    return place or next(path for path in paths if path.name == hub.INDEX).parent


def _announce(models: Sequence[tuple[hub.Repository, Sequence[str]]], wanted: Needs, to: Path | None) -> None:
    """Says how much is to come where that is much, and whether there is room."""
    parts = {found.name: sum(file.size for file in found.missing(files)) for found, files in models if to is None}
    parts |= {name: size for name in wanted.weights if (size := missing_size(all_weights()[name]))}
    total = sum(parts.values())
    if total > 10**8 and len(parts) > 1:
        several = ", ".join(f"{name} {hub.megabytes(size)}" for name, size in parts.items() if size)
        print(f"to download: {hub.megabytes(total)} ({several})", file=sys.stderr, flush=True)
        hub.check_space(total, to)
