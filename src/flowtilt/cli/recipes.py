"""`flowtilt recipes`, `keys` and `init`."""

import argparse
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flowtilt.config import known_keys, load_recipe, recipe_names
from flowtilt.config.files import chain
from flowtilt.config.settings import Recipe
from flowtilt.errors import UserError
from flowtilt.io.files import write_atomic


def add(commands: Any) -> None:
    """The commands and their options."""
    recipes = commands.add_parser("recipes", help="list the recipes, or show one with the recipes that it is based on")
    recipes.add_argument("recipe", nargs="?", metavar="NAME", help="show this one: a name or a .toml file")
    recipes.set_defaults(call=_recipes)

    keys = commands.add_parser("keys", help="list the keys of a recipe with defaults and meanings")
    keys.add_argument("pattern", nargs="?", metavar="PATTERN", help="only keys whose name or meaning matches, a regular expression")
    keys.set_defaults(call=_keys)

    init = commands.add_parser("init", help="write a recipe to edit, every key with its meaning")
    init.add_argument("file", type=Path, metavar="FILE.toml", help="a new file")
    init.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="set a key")
    init.add_argument(
        "--from", dest="source", default="playground", metavar="RECIPE", help="name or .toml file to start from (%(default)s)"
    )
    init.set_defaults(call=_init)


def _recipes(args: argparse.Namespace) -> int:
    if args.recipe:
        load_recipe(args.recipe, stored=True)  # one that is wrong is refused
        print("\n".join(f"# --- {where}\n{text.rstrip()}\n" for where, text in chain(args.recipe)))
        return 0
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        recipe = load_recipe(name)
        rewards = ", ".join(recipe.rewards)
        r = recipe.rollout
        print(f"{name:{width}}  {recipe.model.path}: {rewards}; {recipe.rollouts} rollouts of {r.prompts} x {r.images_per_prompt} images")
    return 0


def _keys(args: argparse.Namespace) -> int:
    try:
        wanted = re.compile((args.pattern or "").replace("_", "[_ ]"), re.IGNORECASE)  # learning_rate is a "learning rate"
    except re.error as error:
        raise UserError(f"keys: {args.pattern!r} is not a regular expression: {error}") from None
    found = [key for key in known_keys() if wanted.search(key.name) or wanted.search(key.field.description or "")]
    if not found:
        names = [key.name for key in known_keys()]
        parts = {part: name for name in names for part in (name.rpartition(".")[2], name)}
        near = get_close_matches(args.pattern, parts, 1, 0.5)
        raise UserError(f"keys: nothing matches {args.pattern!r}" + (f"; did you mean {parts[near[0]]!r}?" if near else ""))
    for key in found:
        default = "required" if key.field.is_required() else repr(key.field.get_default(call_default_factory=True))
        of = f"{', '.join(key.types)}: " if key.types else ""
        print(f"{key.name:32} {default:12} {of}{key.field.description or ''}")
    return 0


def _init(args: argparse.Namespace) -> int:
    from flowtilt.config.annotated import annotated

    if args.file.suffix != ".toml":
        raise UserError(f"init: {args.file} must end in .toml")
    if args.file.exists():
        raise UserError(f"init: {args.file} is there already; choose another name")
    name = re.sub(r"[^\w.-]+", "-", args.file.stem)
    recipe = load_recipe(args.source, [f"name={name}", *args.overrides])
    write_atomic(args.file, annotated(recipe, _about(args.source, args.file, recipe)))
    print(f"{args.file}\nedit it, then: flowtilt train {args.file}")
    return 0


def _about(source: str, file: Path, recipe: Recipe) -> str:
    return f"Made by flowtilt init from {source}. Train: flowtilt train {file}. Memory and hours: flowtilt plan {file}."
