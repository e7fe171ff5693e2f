"""The loop: draw prompts, sample with the old policy, score, learn, repeat. It knows no model, reward or objective.

What a step computes is a function of the recipe, the step's number and the weights before it, whatever
the micro-batch, the number of processes, or how often the run was interrupted.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowtilt.build import (
    build_policy,
    check_prompts,
    evaluation_prompts,
    inputs,
    load_rewards,
    loras_beneath,
    named,
    sampler_of,
    training_prompts,
)
from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed import world as distributed
from flowtilt.distributed.sameness import digests
from flowtilt.errors import UserError
from flowtilt.evaluate import evaluate
from flowtilt.evaluate.record import save_evaluation
from flowtilt.io.environment import describe
from flowtilt.io.files import append_line, write_json
from flowtilt.io.run_folder import RunFolder
from flowtilt.lora import Lora, are_named, fingerprint
from flowtilt.lora.stacked import keep, kept
from flowtilt.models.cutting import notice_cut
from flowtilt.models.editing import check_sources
from flowtilt.policy.compiling import compile_blocks
from flowtilt.policy.roles import ROLES
from flowtilt.prompts import PromptWalk
from flowtilt.rewards.comparing import refuse_comparing
from flowtilt.rewards.judge.ledger import keep_answers, spending
from flowtilt.rewards.trial import preflight
from flowtilt.runs import checkpoint, tracking
from flowtilt.runs import folder as runs
from flowtilt.runs.export import write_result, write_role
from flowtilt.runs.given import note_objects, recipe_for
from flowtilt.training.display import Display
from flowtilt.training.driving import Driver, OnRollout
from flowtilt.training.guards import Guards
from flowtilt.training.pace import Pace
from flowtilt.training.parts import Parts, Training
from flowtilt.training.preview import Preview
from flowtilt.training.rollout_log import RolloutLog
from flowtilt.training.state import Clock, checkpoint_of, restore
from flowtilt.training.threads import Threads, recorded_threads
from flowtilt.training.timing import Phases


class Trainer(Driver):
    """A run from its recipe, all at once with `run`, or rollout by rollout: `for metrics in trainer`, or `step`.

    It holds the run's folder, so that nobody else writes there, until `run` has ended or `close`.

    Args:
        recipe: what to do: a recipe, its name, a .toml file, or its keys as a dict; may be left out with `resume`.
        resume: the folder of a run to go on with; none starts a new one.
        world: the processes; none asks torchrun's environment.
        changed: go on although prompt files, reward files or the model have changed since the run began.
        rewards: in place of the recipe's rewards and those that its evaluation reports: name -> callable, weight, built-in name,
            "file.py:function" or {"source": ..., "weight": ...}. A run with a callable that is not in a file resumes only in Python,
            with the callable given again.
        on_rollout: called after each rollout, on the first process, with its metrics and a `Preview` of its first images (None for a
            method that samples none). What it raises ends the run after a checkpoint.
        keys: further keys of the recipe: rollouts=20, rollout={"prompts": 6}, run="runs/mine".

    Raises:
        UserError: anything of the recipe that can't be loaded or used, before anything is written; another process
            holds the run.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        resume: Path | str | None = None,
        world: distributed.World | None = None,
        changed: bool = False,
        *,
        rewards: Any = None,
        on_rollout: OnRollout | None = None,
        **keys: Any,
    ):
        found, self._objects = recipe_for(recipe, resume, rewards, keys)
        super().__init__(world or distributed.start(), on_rollout)
        tracking.check(found.track, quiet=self.world.rank > 0)
        self._threads = Threads() if self.world.size == 1 and self.world.device.type == "cpu" else None
        folder = None if resume is None else Path(resume)
        try:
            if folder:
                self._folder.resume(folder)
            self._prepare(inputs.found_again(found, folder) if folder else inputs.whole(found), folder, changed)
        except BaseException:
            self.close()
            raise

    def _prepare(self, recipe: Recipe, resume: Path | None, changed: bool) -> None:
        """Loads all that the recipe names, and makes or finds the folder."""
        self.recipe = recipe
        self._accepted = self._folder.compare(recipe, changed) if resume else []
        images = recipe.rollout.images()
        if images < self.world.size:
            raise UserError(f"rollout: {images} images for {self.world.size} processes; each needs one at least")
        self.rewards, self.eval_rewards = load_rewards(recipe, self.world.device, self._objects)
        refuse_comparing(self.eval_rewards, "evaluate.rewards")
        # a checkpoint has the weights, whatever has become of what they began with
        opened = inputs.pinned(recipe, resume) if resume else recipe
        self.prompts = training_prompts(opened)
        self.walk = PromptWalk(self.prompts, recipe.seed, {} if recipe.tags == "auto" else recipe.tags)
        weights = {name: reward.weight for name, reward in recipe.reward_table().items()}
        # a distillation only measures
        check_prompts({name: reward for name, reward in self.rewards.items() if weights[name]} or self.rewards, self.prompts)
        self.test_prompts = evaluation_prompts(opened, self.prompts)
        # after a resume the run has copies of what it read once
        files = {} if resume else inputs.contents(recipe)
        self.world.agree(digests({"prompts": self.prompts, "evaluate.prompts": self.test_prompts}) | files)
        self.base_loras = self._read_base_loras(resume)
        self.parents = list(map(fingerprint, self.base_loras))  # each reads through all of its weights
        self.policy = build_policy(opened, self.world, self.base_loras, start=not (resume and self._folder.begun()))
        check_sources(self.policy.model, [*self.prompts, *self.test_prompts])
        notice_cut(self.policy.model, [*self.prompts, *self.test_prompts])
        preflight(
            self.rewards | self.eval_rewards,
            [*self.prompts, *self.test_prompts],
            side=self.policy.model.resolution,
            device=self.world.device,
            seed=recipe.seed,
        )
        if recipe.model.recompute is True:
            self.policy.recompute()
        self.micro_batch = MicroBatch(recipe.micro_batch, self.world.device.type)
        parts = Parts(
            recipe,
            self.policy,
            self.walk,
            self.rewards,
            self.world,
            self.micro_batch,
            resume,
            show=self._keep_preview if self._on_rollout else None,
            log=RolloutLog(lambda: self._folder.path, recipe.seed, self.world) if recipe.log.rollouts else None,
        )
        self.method: Training = named(recipe.objective.learner)(parts)
        # after recomputation, which it would not see
        if recipe.model.compile:
            self._compile()
        self.clock, self.guards = Clock(), Guards(recipe)
        self.pace = Pace()
        self._choose_threads(resume)
        self.run_folder = self._open(resume)
        keep_answers([*self.rewards.values(), *self.eval_rewards.values()], RunFolder(self.run_folder).judges, self.world)

    def _choose_threads(self, resume: Path | None) -> None:
        if self._threads and (line := self._threads.choose(recorded_threads(resume) if resume else None)):
            print(line, file=sys.stderr, flush=True)

    def _keep_preview(self, found: Preview) -> None:
        self._preview = found

    def _compile(self) -> None:
        def say(text: str) -> None:
            if self.world.rank == 0:
                print(f"model.compile: {text}", file=sys.stderr, flush=True)

        say("compiling the network's blocks takes a minute or two, the next time less")
        if why := compile_blocks(self.policy):
            say(f"not compiled, going on without ({why})")

    def _read_base_loras(self, resume: Path | None) -> list[Lora]:
        """The LoRAs beneath the trained one; a run has copies of its own."""
        return loras_beneath((kept(resume) if resume else []) or self.recipe.lora.on)

    def _open(self, resume: Path | None) -> Path:
        """Makes or finds the folder; the first rank's answer holds for all."""
        if resume is None:
            self._folder.create(self.recipe)
        main, folder = self.world.rank == 0, self._folder.path
        if found := self._folder.newest() if resume else None:
            if not are_named(self.base_loras, found.state["parents"]):
                raise UserError(f"{folder}: was trained on top of other LoRAs than those now in its {RunFolder.base_loras}/ or in lora.on")
            self.clock, self.guards = restore(found, self.recipe, self.micro_batch, self.policy, self.method)
        if self.clock.step > self.recipe.rollouts:
            raise UserError(f"{folder}: already at rollout {self.clock.step}, beyond rollouts = {self.recipe.rollouts}; raise it")
        if main and resume:
            runs.rewind(folder, self.clock.step or -1)
            checkpoint.prune(folder, self.recipe.checkpoint.keep)
            runs.write_recipe(folder, self.recipe)
        # a kill may have come before there were any
        if main and (self.base_loras or self.method.base_loras) and not RunFolder(folder).base_loras.is_dir():
            keep(self.base_loras, folder, **self.method.base_loras)
        if main:
            inputs.save(self.recipe, folder, self.clock.step if found else None, self._accepted)
            write_json(RunFolder(folder).environment, describe(self.world.size))
            if not resume:
                note_objects(folder, self.recipe)
        self.world.barrier()
        return folder

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
            **spending([*self.rewards.values(), *self.eval_rewards.values()], self.world),
        }

    # what a run leaves behind --------------------------------------------------------------------------

    def _log(self, metrics: dict[str, float], display: Display) -> None:
        """One line of metrics.jsonl, the trackers, the display, and the guards."""
        if self.world.rank == 0:
            append_line(RunFolder(self.run_folder).metrics, {"rollout": self.clock.step, **metrics})
            self.trackers.log(self.clock.step, metrics)
            display.step(self.clock.step, metrics)
            if slow := self.pace.remark(metrics):
                display.say(slow)
        if self.recipe.guards != "off":
            self._warn(self.guards.check(metrics), display)

    def _warn(self, fired: Mapping[str, str], display: Display) -> None:
        """What guards say, on every rank alike; they may end the run."""
        if self.recipe.guards == "stop" and fired:
            self.stopped_by = next(iter(fired.values()))
        self.trackers.guards(self.clock.step, fired)
        stops = {"stops": True} if self.recipe.guards == "stop" else {}
        for name, message in fired.items() if self.world.rank == 0 else ():
            append_line(RunFolder(self.run_folder).guards, {"rollout": self.clock.step, "guard": name, "message": message, **stops})
            display.say(f"guard {name}, rollout {self.clock.step}: {message}")

    def _evaluate(self, display: Display) -> None:
        e = self.recipe.evaluate
        before = self.policy.evaluations
        found = evaluate(
            self.policy,
            "ema",
            self.test_prompts,
            self.eval_rewards,
            sampler_of(e),
            images=e.images,
            column=e.rewards[0] if e.rewards else next(iter(self.eval_rewards)),
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
            if self._page:
                self._page.write()
            display.evaluation(self.clock.step, found.score, found.by_tag)

    def _remember(self, record: Mapping[str, Any]) -> None:
        """Guards learn of an evaluation that was made after the checkpoint from which the run goes on."""
        if self.recipe.guards != "off" and "stds" in record:
            self.guards.check_evaluation(record["rewards"], record["stds"], record["images"])

    def _let_go(self) -> None:
        if method := getattr(self, "method", None):  # none where opening failed
            method.close()
        if self._threads:
            self._threads.back()

    def save(self) -> None:
        """Writes a checkpoint and the newest EMA as diffusers loads it."""
        found = None
        if self.world.rank == 0 or self.policy.in_parts:
            found = checkpoint_of(self.clock, self.guards, self.parents, self.micro_batch, self.policy, self.method)
        if self.world.rank == 0 and found:
            checkpoint.save(self.run_folder, found, self.recipe.checkpoint.keep)
            self._write_results()
        self.world.barrier()
        self.unsaved = False

    def _write_results(self) -> None:
        write_result(self.policy, self.run_folder, self.recipe, self.clock.step, self.parents)
        for role in self.method.updates:
            if role not in ROLES:
                base = self.method.base_loras.get(role)
                write_role(self.policy, role, self.run_folder, [fingerprint(base)] if base else [])

    def _evaluation_due(self) -> bool:
        """Whether an evaluation belongs to the rollouts done so far: to none, to all, or to every so many."""
        step, every = self.clock.step, self.recipe.evaluate.every
        return step in (0, self.recipe.rollouts) or bool(every and step % every == 0)

    def _evaluated(self) -> dict[str, Any] | None:
        """The line of the evaluation after the rollouts done so far; none where it was not made."""
        records = runs.read_log(RunFolder(self.run_folder).evaluations)
        return next((record for record in records if record["rollout"] == self.clock.step), None)

    def _finish(self) -> dict[str, object]:
        """summary.json, and the report once more with it."""
        before, after = runs.scores(self.run_folder)
        summary = {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "rollouts": self.clock.step,
            "seconds": round(self.clock.seconds, 2),
            "score": {"before": before, "after": after},
            "protocol": self.recipe.protocol(),
        }
        self.policy.collect("ema")
        if self.world.rank == 0:
            # once more: a kill may have come between the last checkpoint and its LoRA
            self._write_results()
            write_json(RunFolder(self.run_folder).summary, summary)
            self.trackers.summary(self.clock.step, summary)
            self._end_page()
        self.world.barrier()
        return summary
