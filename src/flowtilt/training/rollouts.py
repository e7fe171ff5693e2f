"""Rollouts: images of the collecting policy, their scores and advantages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowtilt.advantages import advantages_by_reward, combine, flat_groups, group_advantages, widest
from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.editing import sources_beside
from flowtilt.objectives import RolloutSpec
from flowtilt.policy.roles import Policy
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward
from flowtilt.rewards.comparing import Shares, check_groups
from flowtilt.rewards.overlapped import Scoring
from flowtilt.sampling.sampler import decode
from flowtilt.sampling.trajectory import Trajectory
from flowtilt.seeding import noise
from flowtilt.training.collector import collector
from flowtilt.training.image_metrics import image_features, image_metrics
from flowtilt.training.preview import IMAGES, Preview
from flowtilt.training.rollout_log import RolloutLog
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases


@dataclass
class SampledRollout:
    """This rank's share of a rollout whose images were sampled and whose scores are still to come.

    Args:
        prompts: of the whole rollout.
        own: of each of this rank's images.
        mine: which of all images those are.
    """

    step: int
    prompts: list[Prompt]
    own: list[Prompt]
    mine: range
    conditioning: Conditioning
    scoring: Scoring
    parts: list[tuple[Tensor, Trajectory | None]] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    evaluations: int = 0
    """Network evaluations that sampling took."""


class Rollouts:
    """Samples with the old policy and scores; advantages compare images of all ranks.

    Args:
        objective: what the rollouts are for.
        show: takes this rank's first images of each rollout.
        log: writes each rollout; none does not.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: RolloutSpec,
        rewards: Mapping[str, Reward],
        world: World,
        micro_batch: MicroBatch,
        show: Callable[[Preview], None] | None = None,
        log: RolloutLog | None = None,
    ):
        self.recipe, self.policy, self.objective, self.rewards = recipe, policy, objective, rewards
        self.world, self.micro_batch, self.show, self.log = world, micro_batch, show, log
        self.weights = {name: reward.weight for name, reward in recipe.reward_table().items()}
        check_groups(rewards, recipe.rollout.images_per_prompt)

    def sample(self, step: int, prompts: list[Prompt], phases: Phases) -> tuple[ScoredRollout, dict[str, float]]:
        """`begin` and `score` at once."""
        return self.score(self.begin(step, prompts, phases), phases)

    def begin(self, step: int, prompts: list[Prompt], phases: Phases, role: str = "old") -> SampledRollout:
        """Rollout number `step`, from 1, of `prompts`, sampled with the policy's `role`; its images are on their way to the rewards.

        Raises:
            UserError: a reward of this process fails.
        """
        r, policy = self.recipe.rollout, self.policy
        before = policy.evaluations
        mine = self.world.share(r.images())
        own = [prompts[i // r.images_per_prompt] for i in mine]
        positions = [(step, i // r.images_per_prompt, i % r.images_per_prompt) for i in mine]
        with phases("encode"):
            conditioning = policy.model.encode([p.caption for p in own])
        collect = collector(r, self.recipe.seed, step, self.objective, role)
        scoring = Scoring(self.rewards, self.world.device, Shares(self.world, r.images(), r.images_per_prompt))
        found = SampledRollout(step, prompts, own, mine, conditioning, scoring)
        try:
            for rows in found.scoring.parts(len(own)):
                with phases("sample"):
                    where, given = [positions[k] for k in rows], conditioning.select(rows)
                    start = noise(self.recipe.seed, "rollout", where, policy.model.latent_shape).to(policy.model.device)
                    x0, path = self.micro_batch.run_with_backoff(
                        "sample",
                        lambda size, start=start, given=given, where=where: collect(policy, start, given, where, size),
                        counter=policy,
                    )
                with phases("decode"):
                    images = self.micro_batch.run_with_backoff("decode", lambda size, x0=x0: decode(policy, x0, size))
                    found.features.append(image_features(images))
                    if self.show and sum(map(len, found.first)) < IMAGES:
                        found.first.append(images[:IMAGES].float().cpu())
                if self.log:
                    self.log.images(step, [mine[k] for k in rows.tolist()], images)
                found.scoring.add(images, [own[k] for k in rows])
                found.parts.append((x0, path))
            if r.lag:
                with phases("reward"):
                    found.scoring.here()
        except BaseException:
            found.scoring.close()
            raise
        # they belong to the step that trains on the rollout, however early it was sampled
        found.evaluations, policy.evaluations = policy.evaluations - before, before
        return found

    def score(self, found: SampledRollout, phases: Phases) -> tuple[ScoredRollout, dict[str, float]]:
        """A rollout with its advantages, and what there is to say of it.

        Raises:
            UserError: a reward fails, or leaves nothing to compare.
        """
        step, own, mine, scoring = found.step, found.own, found.mine, found.scoring
        r, number = self.recipe.rollout, self.recipe.rollout.images()
        groups = torch.arange(number) // r.images_per_prompt
        self.policy.evaluations += found.evaluations
        with phases("reward"), scoring:
            scores, missing = scoring.finish()
        if self.show and found.first:
            shown = torch.cat(found.first)[:IMAGES]
            few = {name: value[: len(shown)].cpu() for name, value in scores.items()}
            beside = own[: len(shown)]
            self.show(Preview(step, shown, [prompt.text for prompt in beside], few, sources_beside(shown, beside)))
        with phases("sync"):
            scores = self.world.gather_columns(scores, number)
            looks = self.world.gather(torch.cat(found.features).to(self.world.device), number).cpu()
            missing = self.world.gather_columns({name: value.float() for name, value in missing.items()}, number)
        for name in (name for name, weight in self.weights.items() if weight):
            if missing[name].any() and scores[name].isnan().all():
                raise UserError(
                    f"reward {name}: has no score (NaN) for any of the {int(missing[name].sum())} images of rollout {step}; "
                    f"mend it, or give rewards.{name} the weight 0"
                )
        try:
            total = combine(scores, self.weights, self.recipe.combine, groups)
        except ValueError as error:
            raise UserError(f"rewards: {error} (step {step})") from None
        compared = group_advantages(total, groups, self.recipe.advantage)
        advantages = self.objective.prepare(compared, groups)
        metrics = _reward_metrics(scores, total, groups) | {f"missing/{name}": float(value.sum()) for name, value in missing.items()}
        kept = ~advantages.isnan()
        if self.objective.drops_flat:
            kept &= ~flat_groups(total, groups)
        if r.train_per_prompt:
            kept &= widest(total, groups, r.train_per_prompt)
        if self.log:
            columns = {f"reward/{name}": values for name, values in {**scores, "total": total}.items()}
            self.log.table(step, found.prompts, columns | {"advantage": compared}, kept)
        x0 = torch.cat([x0 for x0, _ in found.parts])
        paths = [path for _, path in found.parts if path]
        own_advantages = advantages[mine.start : mine.stop].to(x0.device)
        path = Trajectory.join(paths) if paths else None
        by_reward = None
        if self.recipe.combine == "marble":
            each = advantages_by_reward(scores, self.weights, total, groups, self.recipe.advantage)
            by_reward = torch.stack([self.objective.prepare(one, groups) for one in each.T], 1)
        scored = ScoredRollout(x0, own_advantages, found.conditioning, path, mine, kept, own, groups, advantages, total, by_reward)
        return scored, metrics | image_metrics(looks, groups) | {"prompts/unique": len({p.key for p in found.prompts})}


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
