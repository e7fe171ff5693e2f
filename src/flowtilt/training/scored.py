"""A rollout with its advantages, as far as one rank has it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowtilt.models.conditioning import Conditioning
from flowtilt.prompts import Prompt
from flowtilt.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class ScoredRollout:
    """This rank's share of a rollout of N images.

    Args:
        x0, advantages, conditioning: of its n images.
        path: their stochastic steps, for a method that trains those.
        indices: which of all images they are.
        kept: false where an image is not trained on, by any rank; [N] on the CPU.
        prompts: of its n images.
        groups: equal for the images of a prompt, counted from 0; [N] on the CPU.
        all_advantages: those of every rank; [N] on the CPU.
        by_reward: advantages of each of K rewards by itself, of every rank, [N, K] on the CPU; there where gradients weigh the rewards.
        rewards: the total reward of every rank's images, NaN where one is missing; [N] on the CPU.
    """

    x0: Tensor
    advantages: Tensor
    conditioning: Conditioning
    path: Trajectory | None
    indices: range
    kept: Tensor
    prompts: Sequence[Prompt]
    groups: Tensor
    all_advantages: Tensor
    rewards: Tensor | None = None
    by_reward: Tensor | None = None

    def own(self, images: Sequence[int]) -> list[int]:
        """Which of this rank's n images are among those."""
        return [i - self.indices.start for i in images if i in self.indices]
