"""The pages that are generated from the code: keys of a recipe, recipes, command line, Python API."""

import argparse
import re
from collections.abc import Iterator
from textwrap import fill
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flowtilt.cli import parser
from flowtilt.config import recipe_names
from flowtilt.config.files import chain
from flowtilt.config.keys import tables, variants
from flowtilt.config.settings import Recipe

PAGES = ("reference/recipe.md", "reference/recipes.md", "reference/cli.md", "reference/api.md")
"""The generated pages. Pages of the repository do not link to them: there they are not files."""
INHERITED = {"Trainer": ["run", "rollout", "close", "done"], "Policy": ["save_lora"], "Samples": ["show", "save"]}
"""What users call of a class that one of its bases defines."""
API = {
    "Train": ("flowtilt.training.trainer.Trainer",),
    "Call by call": tuple(
        f"flowtilt.library.{name}" for name in ("load_policy", "load_prompts", "Policy", "FullPolicy", "Samples", "score", "Learner")
    ),
    "Rewards and advantages": ("flowtilt.rewards.RewardOutput", "flowtilt.prompts.Prompt", "flowtilt.advantages.group_advantages"),
    "Losses": tuple(
        f"flowtilt.objectives.{name}"
        for name in (
            "nft.nft_loss",
            "grpo.grpo_loss",
            "grpo.guard_loss",
            "grpo.trust_loss",
            "awm.awm_loss",
            "elbo.epg_loss",
            "elbo.pepg_loss",
            "elbo.par_loss",
            "ram.ram_loss",
            "awr.awr_loss",
            "groups.crd_loss",
            "groups.dgpo_loss",
            "dpo.dpo_loss",
        )
    ),
    "Methods of your own": ("flowtilt.methods.base.Method", "flowtilt.objectives.ForwardProcess", "flowtilt.objectives.StepProcess"),
    "Model families": ("flowtilt.models.family.Family",),
    "Recipes": ("flowtilt.config.load_recipe",),
    "diffusers": ("flowtilt.schedulers.CPSScheduler",),
    "Maths": ("flowtilt.flow", "flowtilt.solvers"),
}


def pages() -> dict[str, str]:
    """Markdown by the page's path in docs/."""
    return dict(zip(PAGES, (_keys(), _recipes(), _commands(), _api()), strict=True))


def _keys() -> str:
    parts = [
        "# Keys of a recipe",
        "Every key that a recipe may have, generated from the code. Set one in the file or on the command line:\n\n"
        "```bash\nflowtilt train playground seed=1 rollout.prompts=6\n```\n\n"
        "`flowtilt keys PATTERN` searches this list. An unknown key is an error that names the nearest one.",
    ]
    plain = [(name, field) for name, field in Recipe.model_fields.items() if not _table_of(field) and not variants(field.annotation)]
    parts += ["## The run", _table(plain, Recipe)]
    for name, field in Recipe.model_fields.items():
        about = _meaning(field)
        if kinds := variants(field.annotation):
            parts += ["## [objective]", f"{about} Each method has its own keys."]
            for kind, table in kinds.items():
                parts += [f'### objective.type = "{kind}"', _table(table.model_fields.items(), table)]
        elif table := _table_of(field):
            parts += [f"## [{name}]", about, _table(table.model_fields.items(), table)]
    (reward,) = (table for table in tables(Recipe.model_fields["rewards"].annotation))
    parts += ["## [rewards.NAME]", "A reward as a table.", _table(reward.model_fields.items(), reward)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) and not variants(kind) else None


def _table(fields: Any, model: type[BaseModel]) -> str:
    schema = model.model_json_schema(mode="validation") if model is not Recipe else {"properties": {}}
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in fields:
        own = schema.get("properties", {}).get(name) or _schema(model, name)
        lines.append(f"| `{name}` | {_default(field)} | {_cell(_values(own, schema.get('$defs', {})))} | {_cell(_meaning(field))} |")
    return "\n".join(lines)


def _schema(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The JSON schema of one field of a model that as a whole has none."""
    field = model.model_fields[name]
    annotation: Any = field.annotation
    for extra in field.metadata:
        annotation = Annotated[annotation, extra]
    return TypeAdapter(annotation).json_schema()


def _values(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a value may be: its type, range or choices, in words."""
    defs = {**defs, **schema.get("$defs", {})}
    if "$ref" in schema:
        return "table"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(one, defs) for one in schema["anyOf"] if one.get("type") != "null"))
    if "const" in schema or "enum" in schema:
        return ", ".join(f'"{one}"' for one in schema.get("enum", [schema.get("const")]))
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "array": "list", "object": "table"}
    word = names.get(schema.get("type", ""), "any")
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    bounds = [f"≥ {_number(low)}" if low is not None else "", f"> {_number(above)}" if above is not None else ""]
    bounds += [f"≤ {_number(high)}" if high is not None and high < 1e6 else "", f"< {_number(below)}" if below is not None else ""]
    return " ".join([word, *[bound for bound in bounds if bound]])


def _number(value: float) -> str:
    return f"{value:g}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is PydanticUndefined:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, tuple):
        default = list(default)
    text = {True: "true", False: "false"}[default] if isinstance(default, bool) else f'"{default}"' if isinstance(default, str) else default
    return f"`{text}`"


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _cell(text: str) -> str:
    """Text in a table, in which bars and what looks like HTML is written as it is."""
    text = re.sub(r"<(?=[\w/])", "&lt;", text.replace("|", "\\|"))
    return re.sub(r"docs/([\w/-]+)\.md", lambda match: f"[{match[1].rpartition('/')[2]}](../{match[1]}.md)", text)


def _recipes() -> str:
    parts = [
        "# Recipes\n\nThe recipes that come with flowtilt, as they are. `base` names the recipe that a file starts from.\n\n"
        "```bash\nflowtilt recipes\nflowtilt recipes sd35m-geneval\n```"
    ]
    for name in recipe_names():
        text = chain(name)[0][1]
        parts.append(f"## {name}\n\n```toml\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    top = parser()
    parts = [
        "# Command line\n\nEvery command and option, generated from the program. Exit status: 0 success, 2 bad input, 3 a guard that"
        " stopped the run, 130 an interrupt.\n\nOptions before the command: `--version`, `--debug` (show the traceback of an error)."
    ]
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    about = {choice.dest: choice.help for choice in commands._choices_actions}
    for name, command in commands.choices.items():
        parts.append(f"## flowtilt {name}\n\n{_sentence(command.description or about.get(name) or '')}")
        command.prog = f"flowtilt {name}"
        usage = " ".join(command.format_usage().split()).removeprefix("usage: ")
        whole = re.sub(r"\[[^\]]*\]", lambda option: option[0].replace(" ", "\0"), usage)  # an option stays on its line
        usage = fill(whole, 78, subsequent_indent="    ", break_on_hyphens=False).replace("\0", " ")
        rows = [row for action in command._actions for row in _option(action)]
        parts.append(f"```text\n{usage}\n```\n\n| argument | meaning |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _option(action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
        return
    shown = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
        shown += f" {action.metavar or choices or action.dest.upper()}"
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    yield f"| `{_cell(shown)}` | {_cell(_sentence(text))} |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")", "…")) or not text else ".")


def _inherited(name: str) -> str:
    return f"\n    options:\n      inherited_members: {INHERITED[name]}" if name in INHERITED else ""


def _api() -> str:
    parts = [
        "# Python API\n\n`import flowtilt as ft`. Names of the first three sections are `ft.NAME`, and so is each method with its loss "
        "(`ft.NFT`, `ft.GRPO`, …). How to use them: [the library](../guides/library.md)."
    ]
    for title, names in API.items():
        parts.append(f"## {title}")
        parts += [f"::: {name}" + _inherited(name.rpartition(".")[2]) for name in names]
    return "\n\n".join(parts) + "\n"
