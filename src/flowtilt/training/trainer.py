"""The loop: draw prompts, sample with the old policy, score, learn, repeat. It knows no model, reward or objective.

What a step computes is a function of the recipe, the step's number and the weights before it, whatever
the micro-batch, the number of processes, or how often the run was interrupted.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowtilt.build import (
    build_policy,
    check_prompts,
    evaluation_prompts,
    inputs,
    load_rewards,
    named,
    sampler_of,
    training_prompts,
)
from flowtilt.config import Recipe, recipe_names
from flowtilt.config.held_out import score_name_of
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed import signals
from flowtilt.distributed import world as distributed
from flowtilt.distributed.sameness import digests
from flowtilt.errors import UserError
from flowtilt.evaluate import evaluate
from flowtilt.evaluate.record import save_evaluation
from flowtilt.io.environment import describe
from flowtilt.io.files import append_line, write_json
from flowtilt.lora import Lora, are_named, fingerprint
from flowtilt.lora.stacked import BENEATH, keep, kept, read_stack
from flowtilt.models.cutting import notice_cut
from flowtilt.policy.compiling import compile_blocks
from flowtilt.policy.roles import ROLES
from flowtilt.prompts import PromptWalk
from flowtilt.report import write_report
from flowtilt.rewards.trial import try_rewards
from flowtilt.runs import checkpoint, tracking
from flowtilt.runs import folder as runs
from flowtilt.runs.export import write_lora, write_role
from flowtilt.runs.shared import RunFolder
from flowtilt.training.display import Display
from flowtilt.training.guards import Guards
from flowtilt.training.pace import Pace
from flowtilt.training.parts import Parts, Training
from flowtilt.training.timing import Phases


@dataclass
class Clock:
    """How far a run is. `seconds` counts training alone, without evaluations, checkpoints and loading."""

    step: int = 0
    seconds: float = 0.0
    network_evaluations: int = 0


class Trainer:
    """A run from its recipe. It holds the run's folder, so that nobody else writes there, until `run` has ended or `close`.

    Args:
        recipe: what to do.
        resume: the folder of a run to go on with; none starts a new one.
        world: the processes; none asks torchrun's environment.
        changed: go on although prompt files, reward files or the model have changed since the run began.

    Raises:
        UserError: anything of the recipe that can't be loaded or used, before anything is written; another process
            holds the run.
    """

    def __init__(self, recipe: Recipe, resume: Path | str | None = None, world: distributed.World | None = None, changed: bool = False):
        self.world = world or distributed.start()
        tracking.check(recipe.track, quiet=self.world.rank > 0)
        self.trackers = tracking.Trackers()
        self._folder, self._failed = RunFolder(self.world), False
        folder = None if resume is None else Path(resume)
        try:
            if folder:
                self._folder.resume(folder)
            self._prepare(inputs.found_again(recipe, folder) if folder else inputs.whole(recipe), folder, changed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets others write to the run's folder. `run` does so when it ends."""
        self._folder.close()

    def _prepare(self, recipe: Recipe, resume: Path | None, changed: bool) -> None:
        """Loads all that the recipe names, and makes or finds the folder."""
        self.recipe = recipe
        self._accepted = self._folder.compare(recipe, changed) if resume else []
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
        self.world.agree(digests({"prompts": self.prompts, "evaluate.prompts": self.test_prompts}))
        self.below = self._beneath(resume)
        self.parents = list(map(fingerprint, self.below))  # each reads through all of its weights
        # a checkpoint has the weights, whatever has become of what they began with
        opened = inputs.pinned(recipe, resume) if resume else recipe
        self.policy = build_policy(opened, self.world, self.below, start=not (resume and self._folder.begun()))
        notice_cut(self.policy.model, [*self.prompts, *self.test_prompts])
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
        parts = Parts(recipe, self.policy, self.walk, self.rewards, self.world, self.micro_batch, resume)
        self.method: Training = named(recipe.objective.learner)(parts)
        # after recomputation, which it would not see
        if recipe.model.compile:
            self._compile()
        self.clock, self.guards = Clock(), Guards(recipe)
        self.interrupted = False
        """Set from outside, by a signal say: the run saves after the step that is going on, and ends."""
        self.unsaved = False
        """Whether there is more than the newest checkpoint has; where not, the run may be ended at any instant and loses nothing."""
        self.pace = Pace()
        self.stopped_by: str | None = None
        """The guard's message that ended the run."""
        self.run_folder = self._open(resume)

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
        if resume is None:
            self._folder.create(self.recipe)
        main, folder = self.world.rank == 0, self._folder.path
        if found := self._folder.newest() if resume else None:
            if not are_named(self.below, found.state["parents"]):
                raise UserError(f"{folder}: was trained on top of other LoRAs than those now in its {BENEATH}/ or in lora.on")
            self._load(found)
        if self.clock.step > self.recipe.steps:
            raise UserError(f"{folder}: already at rollout {self.clock.step}, beyond steps = {self.recipe.steps}; raise it")
        if main and resume:
            runs.rewind(folder, self.clock.step or -1)
            checkpoint.prune(folder, self.recipe.checkpoint.keep)
            runs.write_recipe(folder, self.recipe)
        # a kill may have come before there were any
        if main and (self.below or self.method.base_loras) and not (folder / BENEATH).is_dir():
            keep(self.below, folder, **self.method.base_loras)
        if main:
            inputs.save(self.recipe, folder, self.clock.step if found else None, self._accepted)
            write_json(folder / "environment.json", describe(self.world.size))
        self.world.barrier()
        return folder

    def run(self) -> dict[str, object] | None:
        """Trains to the recipe's last step; returns the summary, or none when interrupted or stopped by a guard.

        Ctrl-C and SIGTERM end it after the rollout that is going on, and save. It may be called again to go on from there.

        Raises:
            UserError: a reward fails or the disk is full; the last checkpoint stands.
        """
        if self._folder.closed:
            if self._failed:
                raise UserError(f"{self.run_folder}: its run was stopped in the middle; {self._folder.again()}")
            self._folder.resume_at(self.clock.step)
            self.interrupted = False
        try:
            # the command line has its own handlers, which may end a process that hangs
            with signals.handled(force=False) as ending:
                ending.protect(self, tell=self.world.rank == 0)
                return self._train()
        except BaseException:
            self._failed = True
            raise
        finally:
            self.close()

    def _train(self) -> dict[str, object] | None:
        main = self.world.rank == 0
        display = Display(self.recipe.steps, self.clock.step, self.recipe.objective.progress, not main, score_name_of(self.recipe))
        if main:
            self.trackers = tracking.open_trackers(self.recipe, self.run_folder, self.clock.step, display.say)
        try:
            if self.clock.step == 0:
                self.save()
            # checkpoints come before the evaluation that is due with them, which a kill may have kept from being made
            if self._evaluation_due():
                if record := self.world.first(self._evaluated):
                    self._remember(record)
                else:
                    self._evaluate(display)
            stopping = False
            while self.clock.step < self.recipe.steps and not self.stopped_by and not stopping:
                self.unsaved = True
                self._log(self._step(), display)
                stopping = self.world.any(self.interrupted)
                due = self._evaluation_due()
                if due or stopping or self.stopped_by or self.clock.step % self.recipe.checkpoint.every == 0:
                    self.save()
                    self.unsaved = False
                    stopping = self.world.any(self.interrupted)
                if due and not stopping:
                    self._evaluate(display)
            return self._finish() if self.clock.step == self.recipe.steps and not stopping else None
        finally:
            display.close()
            self.trackers.close()

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

    def _log(self, metrics: dict[str, float], display: Display) -> None:
        """One line of metrics.jsonl, the trackers, the display, and the guards."""
        if self.world.rank == 0:
            append_line(self.run_folder / "metrics.jsonl", {"step": self.clock.step, **metrics})
            self.trackers.log(self.clock.step, metrics)
            display.step(self.clock.step, metrics)
            if slower := self.pace.slower(metrics):
                display.say(slower)
        if self.recipe.guards != "off":
            self._warn(self.guards.check(metrics), display)

    def _warn(self, fired: Mapping[str, str], display: Display) -> None:
        """What guards say, on every rank alike; they may end the run."""
        if self.recipe.guards == "stop" and fired:
            self.stopped_by = next(iter(fired.values()))
        self.trackers.guards(self.clock.step, fired)
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
            save_evaluation(self.run_folder, self.clock.step, self.clock.seconds, found)
            self.trackers.evaluation(self.clock.step, found)
            write_report(self.run_folder)
            display.evaluation(self.clock.step, found.score, found.by_tag)

    def _remember(self, record: Mapping[str, Any]) -> None:
        """Guards learn of an evaluation that was made after the checkpoint from which the run goes on."""
        if self.recipe.guards != "off" and "stds" in record:
            self.guards.check_evaluation(record["rewards"], record["stds"], record["images"])

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
        for role in self.policy.roles:
            if role not in ROLES:
                base = self.method.base_loras.get(role)
                write_role(self.policy, role, self.run_folder, [fingerprint(base)] if base else [])

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

    def _evaluation_due(self) -> bool:
        """Whether an evaluation belongs to the rollouts done so far: to none, to all, or to every so many."""
        step, every = self.clock.step, self.recipe.evaluate.every
        return step in (0, self.recipe.steps) or bool(every and step % every == 0)

    def _evaluated(self) -> dict[str, Any] | None:
        """The line of the evaluation after the rollouts done so far; none where it was not made."""
        records = runs.read_log(self.run_folder / "evaluations.jsonl")
        return next((record for record in records if record["step"] == self.clock.step), None)

    def _finish(self) -> dict[str, object]:
        """summary.json, and the report once more with it."""
        before, after = runs.scores(self.run_folder)
        summary = {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "steps": self.clock.step,
            "seconds": round(self.clock.seconds, 2),
            "score": {"before": before, "after": after},
            "protocol": self.recipe.protocol(),
        }
        if self.world.rank == 0:
            # once more: a kill may have come between the last checkpoint and its LoRA
            self._write_loras()
            write_json(self.run_folder / "summary.json", summary)
            self.trackers.summary(self.clock.step, summary)
            write_report(self.run_folder)
        self.world.barrier()
        return summary


def _optimizer_of(role: str) -> str:
    """The checkpoint's file of what AdamW remembers."""
    return "optimizer" if role == "current" else f"optimizer_{role}"
