"""The plan of a recipe on a machine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flowtilt.build import judges_of, rewards_of
from flowtilt.config import Recipe
from flowtilt.methods.base import Method
from flowtilt.plan import memory
from flowtilt.plan.judges import gradient_of, judging
from flowtilt.plan.machine import Machine
from flowtilt.plan.memory import GIB, Fitted, Memory, Phase
from flowtilt.plan.meter import Line, added, scaled
from flowtilt.plan.network import Costs, Weights, costs_of
from flowtilt.plan.passes import evaluations_in_all, evaluations_per_image, passes_in_all
from flowtilt.plan.requests import Requests, requests_of
from flowtilt.plan.wire import Message, hours, messages_of


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
        host: bytes of the computer's memory for each GPU's process at most, by what they are.
        micro_batches: rows through a network at once, by kind of work.
        offload: whether text encoders and reward models visit the GPU.
        recompute: whether activations are computed anew in the backward pass.
        fits: whether all phases leave the spare.
        work: of the whole run, by phase; "evaluate" is all evaluations, "network" the messages between GPUs.
        messages: what one GPU sends to others in a rollout, by kind.
        utilisation: share of each precision's peak that the run is assumed to reach.
        beside: rewards of which not everything is counted, and why.
        requests: what rewards ask of servers that may cost money, by name.
        weights: numbers and bytes of weights by part.
    """

    recipe: Recipe
    machine: Machine
    costs: Costs
    weights: Mapping[str, Weights]
    resident: Mapping[str, float]
    phases: list[Phase]
    host: Mapping[str, float]
    micro_batches: Mapping[str, int]
    offload: bool
    recompute: bool
    fits: bool
    work: Mapping[str, Effort]
    messages: Mapping[str, Message]
    utilisation: float
    evaluations: int
    beside: Mapping[str, str]
    requests: Mapping[str, Requests]

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(effort.hours for effort in self.work.values())

    @property
    def efficiency(self) -> float:
        """Share of the GPUs' time that one GPU alone would need as well: what is lost goes to messages and uneven shares."""
        flops = added(*(effort.flops for effort in self.work.values()))
        return self.machine.hours(flops, self.utilisation) / self.hours

    @property
    def images_per_gpu_second(self) -> float:
        """Of rollouts and their training, without evaluations."""
        images = self.recipe.rollouts * self.recipe.rollout.images()
        hours = sum(effort.hours for name, effort in self.work.items() if name != "evaluate")
        return images / (3600 * hours * self.machine.gpus)

    @property
    def peak(self) -> Phase:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def training(self) -> Line:
        """Rows through the objective and back, as the run makes them."""
        passes = self.recipe.objective.graph_passes
        return self.costs.update(passes, self.recompute) if passes else self.costs.train(self.recipe.objective.reference, self.recompute)

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
            "machine": {**asdict(self.machine), "memory": self.machine.gib * GIB, "utilisation": self.utilisation},
            "parameters": {name: {"number": found.number, "bytes": found.bytes} for name, found in self.weights.items()},
            "memory": {
                "micro_batches": dict(self.micro_batches),
                "offload": self.offload,
                "recompute": self.recompute,
                "fits": self.fits,
                "spare": memory.SPARE,
                "saved_for_backward": {"once": self.training.fixed.saved, "a_row": self.training.each.saved},
                "resident": dict(self.resident),
                "phases": {
                    phase.name: {"held": dict(phase.held), "activations": phase.activations, "total": phase.total} for phase in self.phases
                },
                "host": dict(self.host),
            },
            "rollouts": self.recipe.rollouts,
            "evaluations": self.evaluations,
            "work": {
                name: {"network_evaluations": effort.evaluations, "flops": dict(effort.flops), "hours": effort.hours}
                for name, effort in self.work.items()
            },
            "sent_per_rollout": {name: {"messages": one.number, "bytes": one.sent} for name, one in self.messages.items()},
            "efficiency": self.efficiency,
            "images_per_gpu_second": self.images_per_gpu_second,
            "hours": self.hours,
            "gpu_hours": self.hours * self.machine.gpus,
            "not_counted": dict(self.beside),
            "requests": {name: asdict(found) for name, found in self.requests.items()},
        }


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """The plan of a recipe on a machine, without weights and without a GPU.

    Raises:
        UserError: the model's shapes are not known, or its settings do not fit them.
    """
    costs = costs_of(recipe.model, recipe.lora.rank, recipe.lora.alpha, recipe.train == "full")
    train, judge = (judging(rewards, costs.resolution) for rewards in (rewards_of(recipe), judges_of(recipe)))
    models = {**train.models, **judge.models}
    needed = Memory(recipe, costs, train, judge, machine)
    found = needed.fit()
    utilisation = machine.reached(recipe.model.compile)
    weights = {
        "network": costs.network,
        "text encoders": costs.encoders,
        "vae": costs.vae,
        **{f"reward model {name}": model.weights for name, model in models.items()},
        "all weights, fp32" if recipe.train == "full" else f"lora, rank {recipe.lora.rank}": costs.trained,
    }
    return Plan(
        recipe=recipe,
        machine=machine,
        costs=costs,
        weights=weights,
        resident=needed.resident,
        phases=found.phases,
        host=needed.host,
        micro_batches=found.micro_batches,
        offload=needed.offload,
        recompute=found.recompute,
        fits=found.fits,
        work=work_of(needed, found, utilisation),
        messages=messages_of(recipe, needed, found),
        utilisation=utilisation,
        evaluations=evaluations_in_all(recipe),
        beside={**judge.beside, **train.beside},
        requests=requests_of(recipe, rewards_of(recipe), judges_of(recipe), costs.resolution),
    )


def work_of(needed: Memory, found: Fitted, utilisation: float) -> dict[str, Effort]:
    """What a whole run takes, by phase."""
    recipe, machine = needed.recipe, needed.machine
    images = recipe.rollout.images()
    # the GPU with the largest share is waited for
    uneven = machine.share(images) * machine.gpus / images
    work = {
        name: Effort(evaluations, flops, machine.hours(flops, utilisation) * (1 if name == "evaluate" else uneven))
        for name, (evaluations, flops) in _work(needed, found).items()
    }
    if machine.gpus > 1:
        work["network"] = Effort(0, {}, recipe.rollouts * hours(messages_of(recipe, needed, found), machine))
    return work


def _work(needed: Memory, found: Fitted) -> dict[str, tuple[int, dict[str, float]]]:
    """Network evaluations and operations of a whole run by phase."""
    recipe, costs, machine = needed.recipe, needed.costs, needed.machine
    r, e, o, steps = recipe.rollout, recipe.evaluate, recipe.objective, recipe.rollouts
    images, captions = (r.images(), r.prompts) if o.samples else (0, 0)
    passes, times = passes_in_all(recipe), evaluations_in_all(recipe)
    drawn = times * e.images * evaluations_per_image(e.solver, e.steps, e.guidance)
    forward = costs.forward.each.flops
    reference = costs.reference().each.flops if passes.reference else {}
    through, once = _update(costs, o, found.recompute)
    # each GPU has its own micro-batches, and where weights are merged each of them pays for that once
    micro = steps * recipe.optimizer.steps_per_rollout * machine.gpus * -(-needed.pairs // found.micro_batches["train"])
    train = added(
        scaled(through, passes.pairs),
        scaled(once, micro),
        scaled(forward, passes.old),
        scaled(reference, passes.reference),
        *(scaled(costs.decode_back().each.flops, steps * images) for _ in o.followed[:1]),
        scaled(costs.decode.each.flops, steps * images * o.trials),
        # without its gradient, a score costs a third
        *(scaled(flops, steps * images * (1 + o.trials / 3)) for flops in _gradients(needed)),
    )
    evaluation = added(
        scaled(costs.encode.flops, times * e.images),
        scaled(forward, drawn),
        scaled(costs.bringing, times * machine.gpus),
        scaled(costs.decode.each.flops, times * e.images),
        scaled(needed.judge.flops(e.images, e.images), times),
    )
    work = {
        "encode": (0, scaled(costs.encode.flops, steps * r.prompts)),
        "sample": (passes.sample, added(scaled(forward, passes.sample), scaled(costs.bringing, steps * machine.gpus))),
    }
    if o.decodes:
        work["decode"] = 0, scaled(costs.decode.each.flops, steps * images)
        work["reward"] = 0, scaled(needed.train.flops(images, captions), steps)
    return {**work, "train": (passes.evaluations - passes.sample, train), "evaluate": (drawn, evaluation)}


def _update(costs: Costs, objective: Method, recompute: bool) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Operations of one trained row without other roles' passes, and of a micro-batch whatever its rows."""
    if objective.graph_passes:
        line = costs.update(1, recompute)
        return line.each.flops, line.fixed.flops
    line = costs.train(objective.reference, recompute)
    others = [costs.forward.each.flops, *([costs.reference().each.flops] if objective.reference else [])]
    return added(line.each.flops, *(scaled(flops, -1) for flops in others)), line.fixed.flops


def _gradients(needed: Memory) -> list[Mapping[str, float]]:
    """Operations of an image's scores and of their gradient to it, of each reward that is followed."""
    readers, resolution = needed.train.readers, needed.costs.resolution
    models = [readers[name][0] for name in needed.recipe.objective.followed if name in readers]
    return [gradient_of(needed.train.sources[model], resolution).flops for model in models]
