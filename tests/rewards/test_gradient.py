"""Rewards back-propagated through a decoder, chunk by chunk."""

import weakref
from functools import partial

import pytest
import torch

from flowtilt import RewardOutput, UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward
from flowtilt.rewards.gradient import differentiable, reward_gradient, reward_values
from flowtilt.seeding import noise

PROMPTS = [Prompt(f"picture {n}") for n in range(6)]
LATENTS = noise(0, "test", [(n,) for n in range(6)], (2, 3, 3))
MIX = noise(1, "test", [(0,)], (3, 2))[0]


def decode(latents):
    """Latents [N, 2, 3, 3] to images [N, 3, 3, 3], smooth and not linear."""
    return torch.einsum("nchw,kc->nkhw", latents, MIX).sigmoid()


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def contrast(images, prompts):
    return images.square().mean((1, 2, 3)) * torch.tensor([float(p.text[-1]) for p in prompts])


REWARDS = {"brightness": brightness, "contrast": contrast}
WEIGHTS = {"brightness": 2.0, "contrast": -0.5}


def gradient(rewards=REWARDS, weights=None, latents=LATENTS, prompts=PROMPTS, *, through=decode, margin=None, chunk=6):
    weights = WEIGHTS if weights is None else weights
    return reward_gradient(rewards, weights, through, latents, prompts, margin=margin, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_chunks_give_the_gradient_of_the_whole(chunk, margin):
    leaf = LATENTS.clone().requires_grad_()
    images = decode(leaf)
    total = sum(weight * REWARDS[name](images, PROMPTS) for name, weight in WEIGHTS.items())
    loss = total.sum() if margin is None else -(margin - total).relu().sum()
    (want,) = torch.autograd.grad(loss, leaf)
    value, found = gradient(margin=margin, chunk=chunk)
    torch.testing.assert_close(value, total.detach())
    torch.testing.assert_close(found, want)
    assert not value.requires_grad and not found.requires_grad and found.abs().sum() > 0
    assert not LATENTS.requires_grad and LATENTS.grad is None


@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_values_without_a_gradient_are_the_same(chunk):
    value, _ = gradient(chunk=chunk)
    assert torch.equal(reward_values(REWARDS, WEIGHTS, decode, LATENTS, PROMPTS, chunk=chunk), value)
    with pytest.raises(UserError, match=r"reward bad: score of the image .* is not finite"):
        reward_values({"bad": lambda images, prompts: images.sum((1, 2, 3)) / 0}, {"bad": 1.0}, decode, LATENTS, PROMPTS, chunk=chunk)


def test_of_a_linear_reward_and_decoder_it_is_the_transposed_map():
    def through(latents):
        return torch.einsum("nchw,kc->nkhw", latents, MIX)

    value, found = gradient({"bright": brightness}, {"bright": 3.0}, through=through)
    torch.testing.assert_close(found, (3.0 * MIX.sum(0) / 27)[None, :, None, None].expand_as(LATENTS))
    torch.testing.assert_close(value, (found * LATENTS).sum((1, 2, 3)))


def test_the_hinge_lets_go_of_images_at_the_margin_and_of_no_others():
    value, free = gradient(chunk=3)
    margin = value.sort().values[2].item()
    _, held = gradient(margin=margin, chunk=3)
    below = value < margin
    assert below.sum() == 2 and torch.equal(held[below], free[below])
    assert not held[~below].any() and free[~below].flatten(1).any(1).all()


def test_memory_is_that_of_one_chunk():
    """Tensors that a graph holds for its backward: how many bytes of them live at once, at most."""

    def enlarged(latents):
        return decode(latents).repeat_interleave(8, 2).repeat_interleave(8, 3).square().sigmoid()

    alive: dict[int, int] = {}
    most = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal most
            self.tensor = tensor
            alive[id(self)] = tensor.nbytes
            weakref.finalize(self, alive.pop, id(self))
            most = max(most, sum(alive.values()))

    def peak(chunk):
        nonlocal most
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradient(through=enlarged, chunk=chunk)
        assert not alive
        return most

    whole = peak(6)
    assert whole > 3 * LATENTS.numel() / 2 * 64 * 4  # more than two sets of images
    assert peak(1) < whole / 6 + 200 and peak(2) < whole / 3 + 200


def test_one_rewards_graph_is_gone_before_the_next_begins():
    kept = []

    def first(images, prompts):
        scores = (images * images).mean((1, 2, 3))
        kept.append(weakref.ref(scores))
        return scores

    def second(images, prompts):
        assert kept[-1]() is None or kept[-1]().grad_fn is None
        return images.mean((1, 2, 3))

    gradient({"first": first, "second": second}, {"first": 1.0, "second": 1.0}, chunk=2)
    assert len(kept) == 3


class Odd:
    """Applies to odd pictures; of others it must not be asked."""

    def applies(self, prompt):
        return "" if int(prompt.text[-1]) % 2 else "even"

    def __call__(self, images, prompts):
        raise AssertionError("the other form is asked")

    def differentiable(self, images, prompts):
        assert not any(map(self.applies, prompts))
        return brightness(images, prompts)


def test_a_reward_that_does_not_apply_adds_nothing():
    value, found = gradient({"odd": differentiable("odd", Odd())}, {"odd": 1.0}, chunk=1)
    want, free = gradient({"b": brightness}, {"b": 1.0})
    assert not value[::2].any() and not found[::2].any()
    torch.testing.assert_close(value[1::2], want[1::2])
    torch.testing.assert_close(found[1::2], free[1::2])


def test_no_latents_have_no_gradient():
    value, found = gradient(latents=LATENTS[:0], prompts=[])
    assert value.shape == (0,) and found.shape == (0, 2, 3, 3)


def broken(images, prompts):
    raise RuntimeError("the lamp is off\nand more")


def changes(images, prompts):
    return images.mul_(2).mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda i, p: i.mean(), r"returned \[\] where a gradient is asked for, want a tensor of shape \[6\]"),
        (lambda i, p: RewardOutput(i.mean((1, 2, 3))), "returned RewardOutput where"),
        (lambda i, p: i.detach().mean((1, 2, 3)), "no gradient to the images"),
        (lambda i, p: torch.ones(6, requires_grad=True), "no gradient to the images"),
        (lambda i, p: i.mean((1, 2, 3)) / torch.tensor([1.0, 0, 1, 1, 1, 1]), 'score of the image of "picture 1" is not finite'),
        (lambda i, p: i.mean((1, 2, 3)) * torch.tensor([1, 1, torch.nan, 1, 1, 1]), 'score of the image of "picture 2" is not finite'),
        (lambda i, p: (i - i.detach()).sum((1, 2, 3)).sqrt(), 'gradient of the image of "picture 0" is not finite'),
        (broken, r'failed: RuntimeError: the lamp is off and more.*prompts from "picture 0" on; --debug'),
        (changes, "failed: RuntimeError"),
    ],
)
def test_what_cannot_be_back_propagated_is_named_in_a_line(reward, said):
    with pytest.raises(UserError, match=f"^reward mine.*{said}") as found:
        gradient({"mine": reward}, {"mine": 1.0})
    assert "\n" not in str(found.value)


def test_an_image_that_is_not_finite_is_no_rewards_fault():
    latents = LATENTS.clone()
    latents[4] = torch.nan
    with pytest.raises(UserError, match=r'^rewards: the image of "picture 4" is not finite'):
        gradient(latents=latents, chunk=4)


def test_memory_that_runs_out_is_the_callers_to_deal_with():
    def large(images, prompts):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        gradient({"large": large}, {"large": 1.0})


@pytest.mark.parametrize(("chunk", "prompts"), [(0, PROMPTS), (2, PROMPTS[:5])])
def test_chunks_and_prompts_are_checked(chunk, prompts):
    with pytest.raises(ValueError, match="chunk"):
        gradient(prompts=prompts, chunk=chunk)


# which rewards have a gradient --------------------------------------------------------------------------


def test_a_function_declares_itself_a_class_has_a_method(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts, *, gain=1.0):\n    return gain * images.mean((1, 2, 3))\nbright.differentiable = True\n"
    )
    for options in ({}, {"gain": 2.0}):
        found = differentiable("mine", load_reward("mine", f"{tmp_path}/mine.py:bright", options=options))
        value, _ = gradient({"mine": found}, {"mine": 1.0})
        want, _ = gradient({"b": brightness}, {"b": options.get("gain", 1.0)})
        torch.testing.assert_close(value, want)
    smooth = load_reward("playground_smooth", "playground_smooth")
    assert differentiable("playground_smooth", smooth) == smooth.differentiable


@pytest.mark.parametrize("reward", [brightness, partial(brightness), load_reward("p", "playground_strict")])
def test_one_without_a_gradient_is_told_how_to_declare_it(reward):
    with pytest.raises(UserError, match=r"^reward mine: .*playground_smooth.*`function.differentiable = True`") as found:
        differentiable("mine", reward)
    assert "\n" not in str(found.value)
