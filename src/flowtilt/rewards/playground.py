"""The playground's verifier as rewards, and a smooth stand-in with a gradient."""

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.playground import smooth, verify, world
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput


class Playground:
    """Mean of the strict and the partial score, in [0, 1]: the strict one alone says too little about a bad image.

    A prompt that is not in the playground's grammar has no score.

    Args:
        device: not used.
    """

    def __init__(self, *, device: torch.device | str = "cpu"):
        pass

    @staticmethod
    def applies(prompt: Prompt) -> str:
        """Why a prompt can't be judged; "" where it can."""
        try:
            world.parse(prompt.text)
        except UserError:
            return "not in the playground's grammar"
        return ""

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, 32, 32] in [0, 1], with what is wrong in each."""
        notes = [self.applies(prompt) for prompt in prompts]
        rows = [n for n, why in enumerate(notes) if not why]
        scores = torch.full((len(prompts),), torch.nan)
        verdicts = verify.judge(images[rows], [prompts[n] for n in rows]) if rows else []
        for n, verdict in zip(rows, verdicts, strict=True):
            scores[n], notes[n] = self.value(verdict), "; ".join(verdict.reasons)
        return RewardOutput(scores, notes)

    def value(self, verdict: verify.Verdict) -> float:
        return (verdict.strict + verdict.partial) / 2


class PlaygroundStrict(Playground):
    """1 where everything in the image is as the prompt says, else 0."""

    def value(self, verdict: verify.Verdict) -> float:
        return float(verdict.strict)


class PlaygroundPartial(Playground):
    """The share of the prompt's parts that are right, in [0, 1]."""

    def value(self, verdict: verify.Verdict) -> float:
        return verdict.partial


class PlaygroundSmooth:
    """How probably an image shows its prompt, in (0, 1) and smooth in the pixels: to be back-propagated, not to be reported.

    It stands in for the verifier, whose "playground_strict" is the score that counts: see `playground.smooth`.

    Args:
        device: not used; it computes where the images are.
    """

    def __init__(self, *, device: torch.device | str = "cpu"):
        pass

    applies = staticmethod(Playground.applies)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, 32, 32] in [0, 1]."""
        return RewardOutput(self.differentiable(images, prompts), [self.applies(prompt) for prompt in prompts])

    def differentiable(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """The same scores [N] with a gradient to the images; a prompt that is not in the playground's grammar has no score."""
        rows = [n for n, prompt in enumerate(prompts) if not self.applies(prompt)]
        scores = torch.full((len(prompts),), torch.nan, device=images.device)
        if not rows:
            return scores
        at = torch.tensor(rows, device=images.device)
        return scores.index_put((at,), smooth.score(images[at], [prompts[n] for n in rows]).float())
