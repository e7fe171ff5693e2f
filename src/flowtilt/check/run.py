"""The steps in their order."""

from collections.abc import Callable

from flowtilt.check import here, hours
from flowtilt.check.checklist import Checklist
from flowtilt.check.trial import Trial, small
from flowtilt.config import Recipe
from flowtilt.distributed import world as distributed
from flowtilt.errors import UserError
from flowtilt.prompts import Prompt


def check(recipe: Recipe, say: Callable[[str], None], price: float | None = None) -> list[str]:
    """Tries a recipe on this machine, one line per step; returns the names of the steps that failed. Nothing is left behind.

    Args:
        say: takes each line.
        price: of an hour of this machine, for the cost.

    Raises:
        UserError: under torchrun.
    """
    world = distributed.start()
    if world.size > 1:
        raise UserError("check: tries one process; start it without torchrun")
    found = Checklist(say)
    found.step("packages", here.packages)
    found.step("machine", lambda: here.machine(world.device))
    plan, why = here.planned(recipe, world.device)
    if plan:
        found.step("memory", lambda: here.memory(plan))
    else:
        found.note("memory", why)
    found.step("disk", lambda: here.disk(recipe))
    found.step("model", lambda: here.model(recipe))
    found.step("reward files", lambda: here.rewards(recipe))
    prompts: list[list[Prompt]] = []

    def read() -> str:
        train, test, said = here.prompts(recipe)
        prompts.extend((train, test))
        return said

    found.step("prompts", read)
    before = ["model"]
    if recipe.lora.on or recipe.lora.init:
        found.step("LoRAs", lambda: here.loras(recipe.lora.on, recipe.lora.init))
        before.append("LoRAs")
    trial = Trial(recipe, world, *(prompts or ([], [])))
    found.step("load rewards", trial.load_rewards, ["reward files"])
    found.step("load model", trial.load_model, before)
    found.step("sample", trial.sample, ["prompts", "load model"])
    found.step("score", trial.score, ["sample", "load rewards"])
    found.step("train", trial.train, ["prompts", "load model", "load rewards"])
    found.step("LoRA in diffusers", trial.round_trip, ["load model", "train"])
    hour = here.known(world.device) and plan and plan.hours
    found.step(
        "time",
        lambda: hours.said(hours.hours_of(recipe, small(recipe), trial.seconds), hour or None, price),
        ["sample", "score", "train"],
    )
    return found.failed
