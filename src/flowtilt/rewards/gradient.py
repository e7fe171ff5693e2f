"""Rewards back-propagated through the decoder, which sees no more of them than their gradient to the images."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io import user_code as sources
from flowtilt.io.containment import contained
from flowtilt.io.user_errors import describe_error, hint, is_fault
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, applies
from flowtilt.rewards.about import built_in
from flowtilt.rewards.serving.answers import seed_of

Differentiable = Callable[[Tensor, list[Prompt]], Tensor]
"""Scores [N] of images [N, 3, H, W] in [0, 1] with their prompts; each score has a gradient to its own image."""


def differentiable(name: str, reward: Reward) -> Differentiable:
    """The form of a reward that has a gradient: its method `differentiable`, or itself where its attribute of that name is True.

    Raises:
        UserError: it has neither.
    """
    plain = reward.func if isinstance(reward, partial) else reward
    found: Any = getattr(plain, "differentiable", None)
    if found is True:
        return cast(Differentiable, reward)  # what it returns is checked where it is called
    if callable(found):
        return cast(Differentiable, found)
    known = ", ".join(one.name for one in built_in().values() if one.differentiable)
    raise UserError(
        f"reward {name}: has no gradient to the images; built in are {known}; "
        "a function of your own says so by `function.differentiable = True`, a class has a method `differentiable(images, prompts)`"
    )


def reward_gradient(
    rewards: Mapping[str, Differentiable],
    weights: Mapping[str, float],
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    prompts: Sequence[Prompt],
    *,
    margin: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """R = Σ w_k r_k(decode(latents)) and the gradient of -relu(margin - R) to each latent: RTDMD's hinge, arXiv 2605.26108.

    The graph of one chunk's decoder and of one reward is all that lives at a time; of each only the cotangent is kept.

    Args:
        rewards: as `differentiable` gives them. One that has no `applies` applies to every prompt; elsewhere it adds 0 to R.
        weights: w_k by the rewards' names.
        decode: latents [M, ...] to images [M, 3, H, W] in [0, 1], image by image.
        latents: [N, ...].
        prompts: one a latent.
        margin: where R is at least this, the gradient is 0. None is no hinge: the gradient of R everywhere.
        chunk: latents that are decoded at once.

    Returns:
        R [N] fp32 and the gradient [N, ...], an ascent direction, both on the latents' device and detached.

    Raises:
        ValueError: chunk is below 1, or there is not one prompt a latent.
        UserError: an image is not finite, or a reward fails, has no gradient, or returns another shape or what is not finite.
    """
    if chunk < 1 or len(prompts) != len(latents):
        raise ValueError(f"want chunks of at least 1 and a prompt a latent, got chunk {chunk}, {len(prompts)} for {len(latents)} latents")
    values, gradients = [latents.new_zeros(0, dtype=torch.float32)], [latents.detach()[:0]]
    for start in range(0, len(latents), chunk):
        leaf = latents[start : start + chunk].detach().requires_grad_()
        part = list(prompts[start : start + chunk])
        with torch.enable_grad():
            images = decode(leaf)
        value, cotangent = _to_images(rewards, weights, images.detach(), part)
        if margin is not None:
            cotangent = cotangent * (value < margin).view(-1, 1, 1, 1)
        (gradient,) = torch.autograd.grad(images, leaf, cotangent)
        values.append(value.to(latents.device))
        gradients.append(gradient)
    return torch.cat(values), torch.cat(gradients)


@torch.no_grad()
def reward_values(
    rewards: Mapping[str, Differentiable],
    weights: Mapping[str, float],
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    prompts: Sequence[Prompt],
    *,
    chunk: int,
) -> Tensor:
    """R [N] fp32 of `reward_gradient` without the gradient, on the latents' device."""
    values = [latents.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(latents), chunk):
        part = list(prompts[start : start + chunk])
        values.append(_to_images(rewards, weights, decode(latents[start : start + chunk]), part, follow=False)[0].to(latents.device))
    return torch.cat(values)


def _to_images(
    rewards: Mapping[str, Differentiable], weights: Mapping[str, float], images: Tensor, prompts: list[Prompt], follow: bool = True
) -> tuple[Tensor, Tensor]:
    """R [N] fp32 of images and its gradient to them, 0 where it is not asked for."""
    finite = images.flatten(1).isfinite().all(1)
    if not finite.all():
        raise UserError(f'rewards: the image of "{prompts[int((~finite).nonzero()[0])].text}" is not finite, so no gradient comes from it')
    value = images.new_zeros(len(images), dtype=torch.float32)
    total = torch.zeros_like(images)
    for name, reward in rewards.items():
        owner: Any = getattr(reward, "__self__", reward)
        rows = [n for n, prompt in enumerate(prompts) if not applies(owner, prompt)]
        if rows:
            scores, gradient = _of_one(name, reward, images[rows], [prompts[n] for n in rows], follow)
            value[rows] += weights[name] * scores.to(value)
            total[rows] += weights[name] * gradient
    return value, total


def _of_one(name: str, reward: Differentiable, images: Tensor, prompts: list[Prompt], follow: bool) -> tuple[Tensor, Tensor]:
    """Scores [N] of one reward and their gradient to the images, 0 where it is not asked for."""
    ours = sources.is_ours(reward)
    given = images.detach() if ours else images.detach().clone()
    leaf = given.requires_grad_(follow)
    seed = seed_of(name, prompts, images.detach().flatten(1).sum(1).cpu())
    try:
        with (
            torch.set_grad_enabled(follow),
            contained(f"reward {name}", seed=seed, path=sources.search_path(reward), slow=f"reward {name}"),
        ):
            scores: Any = reward(leaf, prompts if ours else [prompt.copy() for prompt in prompts])
        found = None if follow else torch.zeros_like(leaf)
        if follow and isinstance(scores, Tensor) and scores.requires_grad:
            (found,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
    except torch.OutOfMemoryError:
        raise  # what does not fit may be tried with a smaller chunk
    except BaseException as error:
        if not is_fault(error):
            raise
        more = "; ".join(part for part in (f'prompts from "{prompts[0].text}" on', hint(error)) if part)
        raise UserError(f"reward {name} failed: {describe_error(error)} ({more})") from error
    if not ours and not torch.equal(leaf.detach(), images.detach()):
        raise UserError(f"reward {name}: changes the images in place, so its gradient belongs to other images; work on a copy")
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"reward {name}: returned {got} where a gradient is asked for, want a tensor of shape [{len(prompts)}]")
    if found is None:
        raise UserError(f"reward {name}: its scores have no gradient to the images; does it detach them, or round, or leave torch?")
    bad = ~(scores.isfinite() & found.flatten(1).isfinite().all(1))
    if bad.any():
        which = int(bad.nonzero()[0])
        what = "score" if not scores[which].isfinite() else "gradient"
        raise UserError(f'reward {name}: {what} of the image of "{prompts[which].text}" is not finite; it can\'t be back-propagated')
    return scores.detach(), found
