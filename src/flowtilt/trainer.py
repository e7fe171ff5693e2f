"""The loop: draw prompts, sample with the old policy, score, learn, repeat. It knows no model, reward or objective.

What a step computes is a function of the recipe, the step's number and the weights before it, whatever
the micro-batch, the number of processes, or how often the run was interrupted.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flowtilt import checkpoint, distributed, runs
from flowtilt.compiling import compile_blocks
from flowtilt.config import Recipe, recipe_names
from flowtilt.config.objectives import ACDMDSettings, RTDMDSettings
from flowtilt.display import Display
from flowtilt.distil import Distillation
from flowtilt.environment import describe
from flowtilt.errors import UserError
from flowtilt.evaluate import evaluate
from flowtilt.export import write_fake, write_lora
from flowtilt.files import append_line, clean, read_lines, write_json
from flowtilt.guards import Guards
from flowtilt.hybrid import Hybrid
from flowtilt.learn import Learner
from flowtilt.lora import Lora, are_named, fingerprint
from flowtilt.lora.fit import check, shapes_of
from flowtilt.lora.stacked import BENEATH, keep, kept, read_stack
from flowtilt.memory import MicroBatch
from flowtilt.phases import Phases
from flowtilt.prompts import PromptWalk
from flowtilt.reinforce import Reinforcement
from flowtilt.report import write_report
from flowtilt.rewards.trial import try_rewards
from flowtilt.rollout import sampler_of
from flowtilt.setup import build_objective, build_policy, check_prompts, evaluation_prompts, fake_beneath, load_rewards, training_prompts
from flowtilt.tracking import Sink, check_installed, open_sinks


@dataclass
class Clock:
    """How far a run is. `seconds` counts training alone, without evaluations, checkpoints and loading."""

    step: int = 0
    seconds: float = 0.0
    network_evaluations: int = 0


class Trainer:
    """A run from its recipe.

    Args:
        recipe: what to do.
        resume: the folder of a run to go on with; none starts a new one.
        world: the processes; none asks torchrun's environment.

    Raises:
        UserError: anything of the recipe that can't be loaded or used, before anything is written.
    """

    def __init__(self, recipe: Recipe, resume: Path | None = None, world: distributed.World | None = None):
        check_installed(recipe.track)
        self.recipe = recipe
        self.world = world or distributed.start()
        images = recipe.rollout.images()
        if images < self.world.size:
            raise UserError(f"rollout: {images} images for {self.world.size} processes; each needs one at least")
        self.rewards, self.judges = load_rewards(recipe, self.world.device)
        self.prompts = training_prompts(recipe)
        self.walk = PromptWalk(self.prompts, recipe.seed, recipe.tags)
        weights = {name: reward.weight for name, reward in recipe.reward_table().items()}
        # a distillation only measures
        check_prompts({name: reward for name, reward in self.rewards.items() if weights[name]} or self.rewards, self.prompts)
        self.test_prompts = evaluation_prompts(recipe, self.prompts)
        self.below = self._beneath(resume)
        self.fake_below = fake_beneath(recipe, resume)
        self.parents = list(map(fingerprint, self.below))  # each reads through all of its weights
        self.fake_parents = [fingerprint(self.fake_below)] if self.fake_below else []
        self.policy = build_policy(recipe, self.world, self.below)
        if self.fake_below:
            check(self.fake_below, shapes_of(self.policy.model.network))
        try_rewards(
            self.rewards | self.judges,
            [*self.prompts, *self.test_prompts],
            side=self.policy.model.latent_shape[-1] * self.policy.model.pipeline.vae_scale_factor,
            device=self.world.device,
            seed=recipe.seed,
        )
        if recipe.model.recompute is True:
            self.policy.recompute()
        self.micro_batch = MicroBatch(recipe.micro_batch, self.world.device.type)
        self.method = self._method()
        # after recomputation, which it would not see
        if recipe.model.compile:
            self._compile()
        self.clock, self.guards = Clock(), Guards(recipe)
        self.interrupted = False
        """Set from outside, by a signal say: the run saves after the step that is going on, and ends."""
        self.stopped_by: str | None = None
        """The guard's message that ended the run."""
        self.run_folder = self._open(resume)

    def _method(self) -> Reinforcement | Distillation:
        o = self.recipe.objective
        if isinstance(o, ACDMDSettings):
            return Distillation(self.recipe, o, self.policy, self.walk, self.world, self.micro_batch)
        if isinstance(o, RTDMDSettings):
            learner = Hybrid(self.recipe, o, self.policy, self.rewards, self.fake_below, self.world, self.micro_batch)
        else:
            learner = Learner(self.recipe, self.policy, build_objective(o), self.world, self.micro_batch)
        return Reinforcement(self.recipe, self.policy, self.walk, self.rewards, learner, self.world, self.micro_batch)

    def _compile(self) -> None:
        def say(text: str) -> None:
            if self.world.rank == 0:
                print(f"model.compile: {text}", file=sys.stderr, flush=True)

        say("compiling the network's blocks takes a minute or two, the next time less")
        if why := compile_blocks(self.policy):
            say(f"not compiled, going on without ({why})")

    def _beneath(self, resume: Path | None) -> list[Lora]:
        """The LoRAs beneath the trained one; a run has copies of its own."""
        places = (kept(resume) if resume else []) or self.recipe.lora.on
        for place in places:
            if (name := Path(place).name) in recipe_names() and not Path(place).exists():
                raise UserError(f"lora.on: there is no {place}; make it with `flowtilt train {name}`, or name another")
        try:
            return read_stack(places)
        except UserError as error:
            raise UserError(f"lora.on: {error}") from None

    def _open(self, resume: Path | None) -> Path:
        """Makes or finds the folder; the first rank's answer holds for all."""
        main, folder = self.world.rank == 0, resume
        if folder is None:
            folder = Path(self.world.first(lambda: str(runs.create(self.recipe))))
        elif main:
            clean(folder / "checkpoints")
        self.world.barrier()
        found = checkpoint.newest(folder) if resume else None
        if found:
            if not are_named(self.below, found.state["parents"]):
                raise UserError(f"{folder}: was trained on top of other LoRAs than those now in its {BENEATH}/ or in lora.on")
            self._load(found)
        if self.clock.step > self.recipe.steps:
            raise UserError(f"{folder}: already at rollout {self.clock.step}, beyond steps = {self.recipe.steps}; raise it")
        if main and resume:
            runs.rewind(folder, self.clock.step or -1)
            runs.write_recipe(folder, self.recipe)
        # a kill may have come before there were any
        if main and (self.below or self.fake_below) and not (folder / BENEATH).is_dir():
            keep(self.below, folder, **({"fake": self.fake_below} if self.fake_below else {}))
        if main:
            write_json(folder / "environment.json", describe(self.world.size))
        self.world.barrier()
        return folder

    def run(self) -> dict[str, object] | None:
        """Trains to the recipe's last step; returns the summary, or none when interrupted or stopped by a guard.

        Raises:
            UserError: a reward fails or the disk is full; the last checkpoint stands.
        """
        main = self.world.rank == 0
        display = Display(self.recipe.steps, self.clock.step, quiet=not main)
        sinks = open_sinks(self.recipe.track, self.run_folder, self.recipe.model_dump(mode="json")) if main else []
        try:
            if self.clock.step == 0:
                self._evaluate(display)
                self.save()
            elif self.clock.step == self.recipe.steps and self._evaluated() != self.clock.step:
                self._evaluate(display)
            while self.clock.step < self.recipe.steps and not self.stopped_by:
                self._log(self._step(), display, sinks)
                every = self.recipe.evaluate.every
                last = self.clock.step == self.recipe.steps
                if last or (every and self.clock.step % every == 0):
                    self._evaluate(display)
                self.interrupted = self.world.any(self.interrupted)
                if last or self.interrupted or self.stopped_by or self.clock.step % self.recipe.checkpoint.every == 0:
                    self.save()
                if self.interrupted:
                    break
        finally:
            display.close()
            for sink in sinks:
                sink.close()
        return self._finish() if self.clock.step == self.recipe.steps else None

    # one step ---------------------------------------------------------------------------------------

    def _step(self) -> dict[str, float]:
        phases, step = Phases(self.world.device), self.clock.step + 1
        before = self.policy.evaluations
        metrics = self.method.step(step, phases)
        evaluations = torch.tensor([float(self.policy.evaluations - before)], dtype=torch.float64, device=self.world.device)
        self.world.sum_([evaluations])
        total, seconds = phases.finish()
        self.clock.step = step
        self.clock.seconds += total
        self.clock.network_evaluations += int(evaluations)
        return {
            **metrics,
            "optimizer_step": self.method.updates["current"].count,
            "network_evaluations": self.clock.network_evaluations,
            "images_per_second": self.method.images / total,
            "images_per_second_per_device": self.method.images / total / self.world.size,
            "seconds": self.clock.seconds,
            **{f"time/{name}": value for name, value in seconds.items()},
        }

    # what a run leaves behind --------------------------------------------------------------------------

    def _log(self, metrics: dict[str, float], display: Display, sinks: Sequence[Sink]) -> None:
        """One line of metrics.jsonl, the trackers, the display, and the guards."""
        if self.world.rank == 0:
            append_line(self.run_folder / "metrics.jsonl", {"step": self.clock.step, **metrics})
            for sink in sinks:
                sink.log(self.clock.step, metrics)
            display.step(self.clock.step, metrics)
        if self.recipe.guards != "off":
            self._warn(self.guards.check(metrics), display)

    def _warn(self, fired: Mapping[str, str], display: Display) -> None:
        """What guards say, on every rank alike; they may end the run."""
        if self.recipe.guards == "stop" and fired:
            self.stopped_by = next(iter(fired.values()))
        for name, message in fired.items() if self.world.rank == 0 else ():
            append_line(self.run_folder / "guards.jsonl", {"step": self.clock.step, "guard": name, "message": message})
            display.say(f"guard {name}, rollout {self.clock.step}: {message}")

    def _evaluate(self, display: Display) -> None:
        e = self.recipe.evaluate
        before = self.policy.evaluations
        found = evaluate(
            self.policy,
            "ema",
            self.test_prompts,
            self.judges,
            sampler_of(e),
            images=e.images,
            column=e.rewards[0] if e.rewards else next(iter(self.judges)),
            seed=self.recipe.seed,
            samples=min(e.samples, e.images),
            micro_batch=self.micro_batch,
            world=self.world,
        )
        self.policy.evaluations = before  # what a run cost is what it trained
        if self.recipe.guards != "off":
            self._warn(self.guards.check_evaluation(found.rewards, found.stds, found.images), display)
        if self.world.rank == 0:
            runs.save_evaluation(self.run_folder, self.clock.step, self.clock.seconds, found)
            write_report(self.run_folder)
            display.evaluation(self.clock.step, found.score, found.by_tag)

    def save(self) -> None:
        """Writes a checkpoint and the newest EMA as a LoRA that diffusers loads."""
        if self.world.rank == 0:
            state = {
                "clock": asdict(self.clock),
                "optimizer_steps": {role: update.count for role, update in self.method.updates.items()},
                "guards": self.guards.state,
                "parents": self.parents,
                "micro_batch": self.micro_batch.sizes,
                "recompute": self.policy.recomputes,
            }
            tensors = {role: self.policy.state(role) for role in self.policy.roles} | {
                _optimizer_of(role): update.tensors() for role, update in self.method.updates.items()
            }
            checkpoint.save(self.run_folder, checkpoint.Checkpoint(self.clock.step, state, tensors), self.recipe.checkpoint.keep)
            self._write_loras()
        self.world.barrier()

    def _write_loras(self) -> None:
        write_lora(self.policy, self.run_folder, self.recipe, self.clock.step, self.parents)
        if "fake" in self.policy.roles:
            write_fake(self.policy, self.run_folder, self.fake_parents)

    def _load(self, found: checkpoint.Checkpoint) -> None:
        self.clock = Clock(**found.state["clock"])
        self.guards = Guards(self.recipe, found.state["guards"])
        self.micro_batch.restore(found.state["micro_batch"])
        if self.recipe.model.recompute == "auto" and found.state["recompute"]:
            self.policy.recompute()
        for role in self.policy.roles:
            self.policy.load_state(role, found.tensors[role])
        for role, update in self.method.updates.items():
            update.load(found.state["optimizer_steps"][role], found.tensors[_optimizer_of(role)])

    def _evaluated(self) -> int:
        """The rollout after which the newest evaluation was made."""
        return max((record["step"] for record in read_lines(self.run_folder / "evaluations.jsonl")), default=-1)

    def _finish(self) -> dict[str, object]:
        """summary.json, and the report once more with it."""
        evaluations = read_lines(self.run_folder / "evaluations.jsonl")
        summary = {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "steps": self.clock.step,
            "seconds": round(self.clock.seconds, 2),
            "score": {"before": evaluations[0]["score"], "after": evaluations[-1]["score"]},
            "protocol": self.recipe.protocol(),
        }
        if self.world.rank == 0:
            # once more: a kill may have come between the last checkpoint and its LoRA
            self._write_loras()
            write_json(self.run_folder / "summary.json", summary)
            write_report(self.run_folder)
        self.world.barrier()
        return summary


def _optimizer_of(role: str) -> str:
    """The checkpoint's file of what AdamW remembers."""
    return "optimizer" if role == "current" else f"optimizer_{role}"
