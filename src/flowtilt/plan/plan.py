"""The plan of a recipe on a machine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flowtilt.config import Recipe
from flowtilt.plan import memory
from flowtilt.plan.judges import Judging, judging
from flowtilt.plan.machine import Machine
from flowtilt.plan.memory import GIB, Phase
from flowtilt.plan.meter import added, scaled
from flowtilt.plan.network import Costs, Weights, costs_of
from flowtilt.plan.passes import evaluations_in_all, evaluations_per_image, passes_in_all
from flowtilt.setup import judges_of, rewards_of


@dataclass(frozen=True)
class Effort:
    """What one kind of work takes of a whole run, over all GPUs.

    Args:
        evaluations: network evaluations, a backward counting as two.
        flops: operations by precision.
        hours: on the machine.
    """

    evaluations: int
    flops: Mapping[str, float]
    hours: float


@dataclass(frozen=True)
class Plan:
    """Every figure is computed, none is measured.

    Args:
        resident: bytes that stay on a GPU, by what they are.
        phases: bytes on a GPU in each phase of a rollout and in an evaluation.
        micro_batch: rows through the network at once.
        fits: whether all phases leave the spare.
        work: of the whole run, by phase; "evaluate" is all evaluations.
        beside: rewards of which not everything is counted, and why.
        weights: numbers and bytes of weights by part.
    """

    recipe: Recipe
    machine: Machine
    costs: Costs
    weights: Mapping[str, Weights]
    resident: Mapping[str, float]
    phases: list[Phase]
    micro_batch: int
    fits: bool
    work: Mapping[str, Effort]
    evaluations: int
    beside: Mapping[str, str]

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(effort.hours for effort in self.work.values())

    @property
    def peak(self) -> Phase:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    def as_json(self) -> dict[str, Any]:
        """Plain values: bytes, operations, hours."""
        return {
            "figures": "computed, not measured",
            "recipe": self.recipe.name,
            "model": {
                "path": self.recipe.model.path,
                "shapes": self.costs.source,
                "resolution": self.costs.resolution,
                "dtype": self.costs.dtype,
            },
            "machine": {**asdict(self.machine), "memory": self.machine.gib * GIB},
            "parameters": {name: {"number": found.number, "bytes": found.bytes} for name, found in self.weights.items()},
            "memory": {
                "micro_batch": self.micro_batch,
                "fits": self.fits,
                "spare": memory.SPARE,
                "saved_for_backward": {"once": self.costs.train.fixed.saved, "a_row": self.costs.train.each.saved},
                "resident": dict(self.resident),
                "phases": {
                    phase.name: {"held": dict(phase.held), "activations": phase.activations, "total": phase.total} for phase in self.phases
                },
            },
            "rollouts": self.recipe.steps,
            "evaluations": self.evaluations,
            "work": {
                name: {"network_evaluations": effort.evaluations, "flops": dict(effort.flops), "hours": effort.hours}
                for name, effort in self.work.items()
            },
            "hours": self.hours,
            "gpu_hours": self.hours * self.machine.gpus,
            "not_counted": dict(self.beside),
        }


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """The plan of a recipe on a machine, without weights and without a GPU.

    Raises:
        UserError: the model's shapes are not known, or its settings do not fit them.
    """
    costs = costs_of(recipe.model, recipe.lora.rank, recipe.lora.alpha, recipe.objective)
    train, judge = (judging(rewards, costs.resolution) for rewards in (rewards_of(recipe), judges_of(recipe)))
    both = Judging({**train.models, **judge.models}, {}, {**judge.beside, **train.beside}, False)
    kept = memory.resident(recipe, costs, both)
    size, phases = _fitted(recipe, costs, train, judge, machine, kept)
    weights = {
        "network": costs.network,
        "text encoders": costs.encoders,
        "vae": costs.vae,
        **{f"reward model {name}": model.weights for name, model in both.models.items()},
        f"lora, rank {recipe.lora.rank}": costs.lora,
    }
    return Plan(
        recipe=recipe,
        machine=machine,
        costs=costs,
        weights=weights,
        resident={name: count for name, count in kept.items() if count},
        phases=phases,
        micro_batch=size,
        fits=memory.fits(phases, machine),
        work={
            name: Effort(evaluations, flops, machine.hours(flops))
            for name, (evaluations, flops) in _work(recipe, costs, train, judge, machine, size).items()
        },
        evaluations=evaluations_in_all(recipe),
        beside=both.beside,
    )


def _fitted(
    recipe: Recipe, costs: Costs, train: Judging, judge: Judging, machine: Machine, kept: Mapping[str, float]
) -> tuple[int, list[Phase]]:
    """The first micro-batch that fits, else the last that is tried, and the phases with it."""
    *larger, smallest = memory.sizes(recipe)
    for size in larger:
        found = memory.phases(recipe, costs, train, judge, machine, kept, size)
        if memory.fits(found, machine):
            return size, found
    return smallest, memory.phases(recipe, costs, train, judge, machine, kept, smallest)


def _work(
    recipe: Recipe, costs: Costs, train: Judging, judge: Judging, machine: Machine, size: int
) -> dict[str, tuple[int, dict[str, float]]]:
    """Network evaluations and operations of a whole run by phase."""
    r, e, steps = recipe.rollout, recipe.evaluate, recipe.steps
    images = r.prompts * r.images_per_prompt
    passes, times = passes_in_all(recipe), evaluations_in_all(recipe)
    drawn = times * e.images * evaluations_per_image(e.solver, e.steps, e.guidance)
    forward, through = costs.forward.each.flops, costs.train
    # each GPU has its own micro-batches, and where weights are merged each of them pays for that once
    updates = recipe.optimizer.steps_per_rollout
    pairs = machine.share(images // updates * recipe.rows_per_image())
    micro = steps * updates * machine.gpus * -(-pairs // size)
    equal = passes.pairs - passes.old
    evaluation = added(
        scaled(costs.encode.flops, times * e.images),
        scaled(forward, drawn),
        scaled(costs.merging, times * machine.gpus),
        scaled(costs.decode.each.flops, times * e.images),
        scaled(judge.flops(e.images, e.images), times),
    )
    return {
        "encode": (0, scaled(costs.encode.flops, steps * r.prompts)),
        "sample": (passes.sample, added(scaled(forward, passes.sample), scaled(costs.merging, steps * machine.gpus))),
        "decode": (0, scaled(costs.decode.each.flops, steps * images)),
        "reward": (0, scaled(train.flops(images, r.prompts), steps)),
        "train": (
            passes.evaluations - passes.sample,
            added(scaled(through.each.flops, passes.pairs), scaled(through.fixed.flops, micro), scaled(forward, -equal)),
        ),
        "evaluate": (drawn, evaluation),
    }
