"""The loop: draw prompts, sample with the old policy, score, learn, repeat. It knows no model, reward or objective.

What a step computes is a function of the recipe, the step's number and the weights before it, whatever
the micro-batch, the number of processes, or how often the run was interrupted.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowtilt import checkpoint, distributed, runs
from flowtilt.advantages import combine, flat_groups, group_advantages
from flowtilt.compiling import compile_blocks
from flowtilt.config import Recipe, to_toml
from flowtilt.display import Display
from flowtilt.environment import describe
from flowtilt.errors import UserError
from flowtilt.evaluate import evaluate
from flowtilt.export import write_lora
from flowtilt.files import append_line, clean, read_lines, write_atomic, write_json
from flowtilt.guards import Guards
from flowtilt.image_metrics import image_features, image_metrics
from flowtilt.learn import Learner, Scored
from flowtilt.memory import MicroBatch
from flowtilt.phases import Phases
from flowtilt.policy import ROLES
from flowtilt.prompts import Prompt, PromptWalk
from flowtilt.report import write_report
from flowtilt.rewards.trial import try_rewards
from flowtilt.rollout import decode, sampler_of
from flowtilt.scoring import Scoring
from flowtilt.seeding import noise
from flowtilt.setup import (
    build_objective,
    build_policy,
    check_prompts,
    evaluation_prompts,
    load_rewards,
    training_prompts,
)
from flowtilt.tracking import Sink, check_installed, open_sinks
from flowtilt.trajectory import Trajectory, collector


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
        images = recipe.rollout.prompts * recipe.rollout.images_per_prompt
        if images < self.world.size:
            raise UserError(f"rollout: {images} images for {self.world.size} processes; each needs one at least")
        self.rewards, self.judges = load_rewards(recipe, self.world.device)
        self.weights = {name: reward.weight for name, reward in recipe.reward_table().items()}
        self.prompts = training_prompts(recipe)
        self.walk = PromptWalk(self.prompts, recipe.seed, recipe.tags)
        check_prompts({name: reward for name, reward in self.rewards.items() if self.weights[name]}, self.prompts)
        self.test_prompts = evaluation_prompts(recipe, self.prompts)
        self.policy = build_policy(recipe, self.world)
        try_rewards(
            self.rewards | self.judges,
            [*self.prompts, *self.test_prompts],
            side=self.policy.model.latent_shape[-1] * self.policy.model.pipeline.vae_scale_factor,
            device=self.world.device,
            seed=recipe.seed,
        )
        self.objective = build_objective(recipe.objective)
        self.micro_batch = MicroBatch(recipe.micro_batch, self.world.device.type)
        self.learner = Learner(recipe, self.policy, self.objective, self.world, self.micro_batch)
        # after the learner, which may have turned recomputation on
        if recipe.model.compile and (why := compile_blocks(self.policy)) and self.world.rank == 0:
            print(f"model.compile: not compiled, going on without ({why})", file=sys.stderr, flush=True)
        self.clock, self.guards = Clock(), Guards(recipe)
        self.interrupted = False
        """Set from outside, by a signal say: the run saves after the step that is going on, and ends."""
        self.stopped_by: str | None = None
        """The guard's message that ended the run."""
        self.run_folder = self._open(resume)

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
            self._load(found)
        if self.clock.step > self.recipe.steps:
            raise UserError(f"{folder}: already at rollout {self.clock.step}, beyond steps = {self.recipe.steps}; raise it")
        if main and resume:
            runs.rewind(folder, self.clock.step or -1)
            write_atomic(folder / "recipe.toml", to_toml(self.recipe))
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
        drawn = self.walk.draw((step - 1) * self.recipe.rollout.prompts, self.recipe.rollout.prompts)
        rollout, metrics = self._rollout(step, drawn, phases)
        with phases("train"):
            metrics |= self.learner.learn(step, rollout, phases)
            self.objective.after_rollout(self.policy, self.learner.optimizer_step)
        evaluations = torch.tensor([float(self.policy.evaluations - before)], dtype=torch.float64, device=self.world.device)
        self.world.sum_([evaluations])
        total, seconds = phases.finish()
        self.clock.step = step
        self.clock.seconds += total
        self.clock.network_evaluations += int(evaluations)
        images = self.recipe.rollout.prompts * self.recipe.rollout.images_per_prompt
        return {
            **metrics,
            "optimizer_step": self.learner.optimizer_step,
            "network_evaluations": self.clock.network_evaluations,
            "images_per_second": images / total,
            "images_per_second_per_device": images / total / self.world.size,
            "seconds": self.clock.seconds,
            **{f"time/{name}": value for name, value in seconds.items()},
        }

    def _rollout(self, step: int, drawn: list[Prompt], phases: Phases) -> tuple[Scored, dict[str, float]]:
        """Samples with the old policy and scores; advantages compare images of all ranks."""
        r, policy = self.recipe.rollout, self.policy
        number = r.prompts * r.images_per_prompt
        mine = self.world.share(number)
        own = [drawn[i // r.images_per_prompt] for i in mine]
        groups = torch.arange(number) // r.images_per_prompt
        positions = [(step, i // r.images_per_prompt, i % r.images_per_prompt) for i in mine]
        with phases("sample"):
            conditioning = policy.model.encode([p.text for p in own])
        parts: list[tuple[Tensor, Trajectory | None]] = []
        features: list[Tensor] = []
        collect = collector(self.recipe, self.objective, step)
        with Scoring(self.rewards, self.world.device) as scoring:
            for rows in scoring.parts(len(own)):
                with phases("sample"):
                    where, given = [positions[k] for k in rows], conditioning.select(rows)
                    start = noise(self.recipe.seed, "rollout", where, policy.model.latent_shape).to(policy.model.device)
                    x0, path = self.micro_batch.fit(
                        "sample",
                        lambda size, start=start, given=given, where=where: collect(policy, start, given, where, size),
                        counter=policy,
                    )
                with phases("decode"):
                    images = self.micro_batch.fit("decode", lambda size, x0=x0: decode(policy, x0, size))
                    features.append(image_features(images))
                scoring.add(images, [own[k] for k in rows])
                parts.append((x0, path))
            with phases("reward"):
                scores, missing = scoring.finish()
        with phases("sync"):
            scores = self.world.gather_columns(scores, number)
            looks = self.world.gather(torch.cat(features).to(self.world.device), number).cpu()
            missing = self.world.gather_columns({name: value.float() for name, value in missing.items()}, number)
        try:
            total = combine(scores, self.weights, self.recipe.combine, groups)
        except ValueError as error:
            raise UserError(f"rewards: {error} (step {step})") from None
        advantages = group_advantages(total, groups, self.recipe.advantage)
        metrics = _reward_metrics(scores, total, groups) | {f"missing/{name}": float(value.sum()) for name, value in missing.items()}
        kept = ~advantages.isnan()
        if self.objective.drops_flat:
            kept &= ~flat_groups(total, groups)
        x0 = torch.cat([x0 for x0, _ in parts])
        paths = [path for _, path in parts if path]
        own_advantages = advantages[mine.start : mine.stop].to(x0.device)
        scored = Scored(x0, own_advantages, conditioning, Trajectory.join(paths) if paths else None, mine, kept)
        return scored, metrics | image_metrics(looks, groups) | {"prompts/unique": len({p.text for p in drawn})}

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
                "optimizer_step": self.learner.optimizer_step,
                "guards": self.guards.state,
                "micro_batch": self.micro_batch.sizes,
                "recompute": self.learner.recompute,
            }
            tensors = {role: self.policy.state(role) for role in ROLES} | {
                "optimizer": checkpoint.optimizer_tensors(self.learner.optimizer)
            }
            checkpoint.save(self.run_folder, checkpoint.Checkpoint(self.clock.step, state, tensors), self.recipe.checkpoint.keep)
            write_lora(self.policy, self.run_folder, self.recipe, self.clock.step)
        self.world.barrier()

    def _load(self, found: checkpoint.Checkpoint) -> None:
        self.clock = Clock(**found.state["clock"])
        self.learner.optimizer_step = found.state["optimizer_step"]
        self.guards = Guards(self.recipe, found.state["guards"])
        self.micro_batch.restore(found.state["micro_batch"])
        if self.recipe.model.recompute == "auto" and found.state["recompute"]:
            self.learner.recompute = True
        for role in ROLES:
            self.policy.load_state(role, found.tensors[role])
        checkpoint.load_optimizer(self.learner.optimizer, found.tensors["optimizer"])

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
            write_lora(self.policy, self.run_folder, self.recipe, self.clock.step)
            write_json(self.run_folder / "summary.json", summary)
            write_report(self.run_folder)
        self.world.barrier()
        return summary


def _reward_metrics(scores: dict[str, Tensor], total: Tensor, groups: Tensor) -> dict[str, float]:
    """What a rollout's rewards say: of each reward its mean and std, of the total also the tops of its groups."""
    found: dict[str, float] = {}
    for name, value in {**scores, "total": total}.items():
        known = value[~value.isnan()].double()
        found[f"reward/{name}"] = float(known.mean()) if len(known) else float("nan")
        found[f"reward/{name}_std"] = float(known.std(correction=0)) if len(known) else float("nan")
    by_group = total.double().nan_to_num(nan=-torch.inf).view(int(groups[-1]) + 1, -1)
    ordered = by_group.sort(1, descending=True).values
    ordered = ordered.where(ordered.isfinite(), torch.nan)
    for percent in (10, 25, 50, 75):
        top = max(1, ordered.shape[1] * percent // 100)
        found[f"reward/top_{percent}"] = float(ordered[:, :top].nanmean())
    flat = flat_groups(total, groups).view(len(ordered), -1).any(1)
    return {**found, "groups/without_variance": float(flat.double().mean())}
