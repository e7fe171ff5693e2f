"""What Python gives a trainer: a recipe in any form, a run to resume, rewards as objects."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.config import Recipe
from flowtilt.config.given import Objects, for_run, given_recipe, held_by_python, overrides
from flowtilt.config.trust import check, of_recipe
from flowtilt.errors import UserError
from flowtilt.io.files import shown
from flowtilt.runs.folder import open_run


def recipe_for(
    recipe: Recipe | str | Path | Mapping[str, Any] | None, resume: Path | str | None, rewards: Any, keys: Mapping[str, Any]
) -> tuple[Recipe, Objects]:
    """The recipe to train by, and those of its rewards that are Python objects.

    Args:
        recipe: none takes the recipe of the run to resume.
        rewards, keys: see `given_recipe`.

    Raises:
        UserError: neither recipe nor run, a run of another recipe, or an object is missing.
    """
    if recipe is not None:
        found, objects = given_recipe(recipe, rewards, keys)
        if resume is not None and not isinstance(recipe, Recipe):
            open_run(resume, [], found)
    elif resume is None:
        raise UserError('Trainer: which recipe? give a name such as "playground", a .toml file, a dict, or resume=RUN')
    else:
        found = open_run(resume, overrides(keys), before_code=lambda stored: check(Path(resume), of_recipe(stored), False))
        objects = for_run(found, rewards)
    for name in held_by_python(found):
        if name not in objects:
            again = f"Trainer(resume={str(resume)!r}, rewards={{{name!r}: ...}})" if resume else f"rewards={{{name!r}: ...}}"
            raise UserError(f"rewards.{name}: is a Python object, which no file holds; give it again: {again}")
    return found, objects


def note_objects(run: Path, recipe: Recipe) -> None:
    """Prints how a run can be resumed, where the command line can't."""
    if names := held_by_python(recipe):
        again = ", ".join(f"{name!r}: ..." for name in names)
        print(
            f"{shown(run)}: rewards.{', '.join(names)} in no file, so the run resumes only in Python: "
            f"Trainer(resume={str(run)!r}, rewards={{{again}}}); whether the function is the same is not checked",
            file=sys.stderr,
            flush=True,
        )
