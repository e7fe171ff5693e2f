"""What one GPU holds in each phase of a rollout and in an evaluation, and what its process holds beside it.

Bytes of weights and of tensors that the loops hold follow from shapes and are exact. Activations are exact for
torch's own kernels taken one by one; what kernels and libraries take beside is `CONTEXT` and the spare tenth.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.device.placement import SMALL
from flowtilt.errors import UserError
from flowtilt.evaluate import BLOCK
from flowtilt.models.captions import IN_MEMORY
from flowtilt.plan.judges import Judging, gradient_of
from flowtilt.plan.machine import Machine
from flowtilt.plan.network import Costs
from flowtilt.rewards.judging import PART
from flowtilt.rewards.overlapped import PARTS

GIB = 2**30
CONTEXT = 0.5 * GIB
"""Bytes of a CUDA context with its libraries, an assumption."""
PROCESS = 2 * GIB
"""Bytes of the computer's memory for Python, torch and the libraries, an assumption."""
SPARE = 0.1
"""Share of a GPU's memory that is left to what is not modelled."""
STATES = 4
"""Latents that a solver has at hand: x, the velocity, and two predictions of x0."""

Held = Mapping[str, float]
"""Bytes by what they are."""


@dataclass(frozen=True)
class Phase:
    """Bytes on one GPU.

    Args:
        held: what flowtilt's loops keep meanwhile, models that visit the GPU among it.
        activations: what passes through a network, at most.
        total: with all resident weights and the context.
    """

    name: str
    held: Held
    activations: float
    total: float


@dataclass(frozen=True)
class Fitted:
    """How a run settles into a GPU.

    Args:
        micro_batches: rows through a network at once, of "sample", "decode" and "train".
        recompute: whether activations are computed anew in the backward pass.
        fits: whether all phases leave the spare.
    """

    micro_batches: Mapping[str, int]
    recompute: bool
    phases: list[Phase]
    fits: bool


@dataclass(frozen=True, eq=False)
class Memory:
    """A recipe's bytes on a machine.

    Args:
        train, judge: rewards of the rollouts and of the evaluations.
    """

    recipe: Recipe
    costs: Costs
    train: Judging
    judge: Judging
    machine: Machine

    @property
    def offload(self) -> bool:
        """Whether text encoders and reward models come to the GPU only while they work; see `placement.should_offload`."""
        offload = self.recipe.model.offload
        return offload if isinstance(offload, bool) else self.machine.gib * GIB < SMALL

    @cached_property
    def resident(self) -> dict[str, float]:
        """Bytes that stay on a GPU from the first optimizer step on."""
        costs, models, lag = self.costs, {**self.train.models, **self.judge.models}, self.recipe.rollout.lag
        beside = {"text encoders": costs.encoders.bytes, **{name: model.weights.bytes for name, model in models.items()}}
        sharded = self.recipe.shard == "base" and self.machine.gpus > 1
        roles, (*blocks, outside) = self.recipe.objective.other_roles, costs.shards
        sharded_bytes = sum(costs.shards)
        # one block works and the next one is on its way; what is outside the blocks is whole during a pass, tables always
        parts = {
            "this GPU's part of the network": sharded_bytes / self.machine.gpus + costs.network.bytes - sharded_bytes,
            "gathered blocks": 2 * max(blocks) + outside,
        }
        found = {
            **(parts if sharded else {"network": costs.network.bytes}),
            "vae": costs.vae.bytes,
            **({} if self.offload else beside),
            f"{'weights' if self.recipe.train == 'full' else 'lora'} (current, old, ema{', fake' * roles})": (3 + roles)
            * costs.trained.bytes,
            "policies of rollouts under way": (lag + 1 if lag else 0) * costs.trained.bytes,
            "rollouts under way": lag * (self.captions + self.images * costs.latent),
            "gradient and AdamW": 3 * (1 + roles) * costs.trained.bytes,
            # of the roles that draw, kept until they change
            f"as the network takes it (old, ema{', fake' * roles})": (2 + roles + lag) * costs.injected_weights,
            "CUDA context": CONTEXT,
        }
        return _there(found)

    @property
    def images(self) -> int:
        """The most images of a rollout that one GPU gets."""
        return self.machine.share(self.recipe.rollout.images())

    @property
    def part(self) -> int:
        """Of those, the ones that are drawn before any is judged."""
        return -(-self.images // PARTS) if self.train.off_device else self.images

    @property
    def pairs(self) -> int:
        """Rows that a GPU trains in an update: pairs of image and time, or steps of images."""
        r, updates = self.recipe.rollout, self.recipe.optimizer.steps_per_rollout
        return self.machine.share(-(-r.images() // updates)) * self.recipe.rows_per_image()

    @property
    def captions(self) -> float:
        """Bytes of the captions of one GPU's share of a rollout, each of which is there once."""
        r = self.recipe.rollout
        return self.machine.groups(r.prompts, r.images_per_prompt) * self.costs.caption

    def fit(self) -> Fitted:
        """The micro-batches that a run finds by running out of memory, where the spare counts as taken."""
        micro, recompute = MicroBatch(self.recipe.micro_batch, "cuda"), self.recipe.model.recompute is True

        def save_memory() -> bool:
            nonlocal recompute
            possible = not recompute and self.recipe.model.recompute == "auto"
            recompute |= possible
            return possible

        def tried(kind: str, size: int) -> list[Phase]:
            match kind:
                case "sample":
                    return [self.sample(size), self.evaluate("sample", size)]
                case "decode":
                    return [self.decode(size), self.evaluate("decode", size)]
            return [self.learn(size, recompute)]

        def work(kind: str, size: int) -> None:
            if not self.fits(*tried(kind, size)):
                raise torch.OutOfMemoryError

        for kind in ("sample", "decode", "train"):
            with suppress(UserError):  # the phase says by how much it does not fit
                micro.run_with_backoff(kind, lambda size, kind=kind: work(kind, size), save_memory if kind == "train" else lambda: False)
        sizes = {kind: min(micro.size(kind), rows) for kind, rows in (("sample", self.part), ("decode", self.part), ("train", self.pairs))}
        phases = [
            self.encode(),
            self.sample(micro.size("sample")),
            *([self.decode(micro.size("decode")), self.reward()] if self.recipe.objective.decodes else []),
            *([self.follow(1)] if self.recipe.objective.followed else []),
            self.learn(micro.size("train"), recompute),
            max((self.evaluate(of, micro.size(of)) for of in ("encode", "sample", "decode", "reward")), key=lambda phase: phase.total),
        ]
        return Fitted(sizes, recompute, phases, self.fits(*phases))

    def fits(self, *phases: Phase) -> bool:
        """Whether each leaves the spare."""
        return max(phase.total for phase in phases) <= (1 - SPARE) * self.machine.gib * GIB

    def encode(self) -> Phase:
        """Captions go to the computer's memory one by one."""
        return self._phase("encode", {"text encoders": self.costs.encoders.bytes if self.offload else 0}, self.costs.encode.peak)

    def sample(self, size: int) -> Phase:
        return self._phase("sample", self._drawn, self._drawing(min(size, self.part), self.recipe.rollout.guidance, self.captions))

    def decode(self, size: int) -> Phase:
        """Images go to the computer's memory micro-batch by micro-batch."""
        return self._phase("decode", self._drawn, self.costs.decode.at(min(size, self.part)).peak)

    def reward(self) -> Phase:
        return self._judged("reward", self._drawn, self.train, self.images)

    def learn(self, size: int, recompute: bool) -> Phase:
        """A micro-batch is put together on the GPU: x0, eps, t and advantages of its rows, then the network's own tensors."""
        rows, guidance = min(size, self.pairs), self.recipe.rollout.guidance
        held = {
            "captions": self.captions,
            "latents": self.images * self.costs.latent,
            "micro-batch": rows * (2 * self.costs.latent + 8),
        }
        if self.recipe.objective.guided_training and guidance != 1:
            rows, held = 2 * rows, {**held, "captions with the empty one": self._joined(self.captions)}
        passes = self.recipe.objective.graph_passes
        train = self.costs.update(passes, recompute) if passes else self.costs.train(self.recipe.objective.reference, recompute)
        # AdamW's step has another copy of the weights at hand, when the activations are gone
        peak = max(train.at(rows).peak, self.costs.trained.bytes)
        return self._phase("train", held, peak)

    def follow(self, size: int) -> Phase:
        """The gradient of rewards through the decoder, `size` images at once: first one reward's graph, then the decoder's."""
        names = self.recipe.objective.followed
        models = {name: self.train.readers[name][0] for name in names if name in self.train.readers}
        weights = sum(self.train.models[model].weights.bytes for model in set(models.values()))
        graphs = [gradient_of(self.train.sources[model], self.costs.resolution).peak for model in models.values()]
        held = {**self._drawn, "rewards that are followed": weights if self.offload else 0, "images": 3 * size * self.costs.image}
        return self._phase("rewards' gradient", held, size * max(graphs, default=0) + self.costs.decode_back().at(size).peak)

    def evaluate(self, of: str, size: int) -> Phase:
        """The work "encode", "sample", "decode" or "reward" of an evaluation, which goes block by block."""
        e, costs = self.recipe.evaluate, self.costs
        images = min(BLOCK, e.images)
        captions = images * costs.caption
        held = {"captions": captions, "noise and latents": 2 * images * costs.latent}
        match of:
            case "encode":  # all captions are encoded before the first block
                return self._phase("evaluate", self.encode().held, costs.encode.peak)
            case "sample":
                return self._phase("evaluate", held, self._drawing(min(size, images), e.guidance, captions))
            case "decode":
                return self._phase("evaluate", held, costs.decode.at(min(size, images)).peak)
        return self._judged("evaluate", held, self.judge, images)

    @property
    def host(self) -> dict[str, float]:
        """Bytes of the computer's memory that each GPU's process takes at most."""
        r, costs = self.recipe.rollout, self.costs
        models = {**self.train.models, **self.judge.models}.values()
        stay = {"process": PROCESS, "captions": min(IN_MEMORY, self.recipe.rollouts * r.prompts * costs.caption)}
        if self.offload:
            stay |= {"text encoders": costs.encoders.bytes, "reward models": sum(model.weights.bytes for model in models)}
        loaded = costs.network.bytes + costs.vae.bytes + (0 if self.offload else costs.encoders.bytes)
        # parts pile up until they are joined, and then are there twice; an update's noise goes when the next one's is there
        updates = min(2, self.recipe.optimizer.steps_per_rollout)
        moments = {"the pipeline while it is loaded": loaded, "images": 2 * self.images * costs.image}
        moments["a checkpoint"] = (5 + r.lag) * costs.trained.bytes  # three roles, AdamW's two averages, the kept policies
        if r.lag and self.train.off_device:
            stay["images that wait for their scores"] = r.lag * self.images * costs.image
        if steps := self.recipe.objective.kept_steps(self.recipe.rollout.steps):
            moments["steps that are trained"] = (2 + r.lag) * self.images * (2 * steps + 1) * costs.latent
        else:
            moments["noise of the training pairs"] = updates * self.pairs * costs.latent
        most = max(moments, key=lambda name: moments[name])
        return _there({**stay, most: moments[most]})

    @property
    def _drawn(self) -> Held:
        return {"captions": self.captions, "noise": self.part * self.costs.latent, "latents": self.images * self.costs.latent}

    def _judged(self, name: str, held: Held, judging: Judging, images: int) -> Phase:
        """The fullest reward; with offload its models are the only ones on the GPU."""
        part = min(images, PART)
        seen = {**held, "images": part * self.costs.image if judging.models else 0}
        found = [
            self._phase(
                name,
                {**seen, f"reward {reward}": sum(judging.models[model].weights.bytes for model in models) if self.offload else 0},
                judging.models[models[0]].working(part, self.costs.image),
            )
            for reward, models in judging.readers.items()
        ]
        return max(found, key=lambda phase: phase.total, default=self._phase(name, held, 0))

    def _drawing(self, rows: int, guidance: float, captions: float) -> float:
        """Bytes of `rows` images on their way through the solver."""
        if guidance == 1:
            return self.costs.forward.at(rows).peak + rows * STATES * self.costs.latent
        # guidance doubles x
        return self.costs.forward.at(2 * rows).peak + self._joined(captions) + rows * (STATES + 2) * self.costs.latent

    def _joined(self, captions: float) -> float:
        """Bytes of the empty caption, and of all captions with it."""
        return captions + 2 * self.costs.caption

    def _phase(self, name: str, held: Held, activations: float) -> Phase:
        return Phase(name, _there(held), activations, sum(self.resident.values()) + sum(held.values()) + activations)


def _there(held: Held) -> dict[str, float]:
    return {what: count for what, count in held.items() if count}
