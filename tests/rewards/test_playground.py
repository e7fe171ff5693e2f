"""The playground's verifier and its smooth stand-in as rewards, also of prompts that are none of the playground's."""

import pytest
import torch

from flowtilt.playground import smooth, verify, world
from flowtilt.prompts import Prompt
from flowtilt.rewards import applicable, load_reward, score
from flowtilt.seeding import generator

NAMES = ("playground", "playground_strict", "playground_partial")
PROMPTS = world.prompts("test")[::8]


def drawn(prompts):
    return world.render([world.arrange(p, generator(0, "test", i)) for i, p in enumerate(prompts)])


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_the_verdicts(name):
    images = drawn([*PROMPTS[:3], *PROMPTS[4:], PROMPTS[3]])  # all but three of another prompt
    of = {
        "playground": lambda v: (v.strict + v.partial) / 2,
        "playground_strict": lambda v: v.strict,
        "playground_partial": lambda v: v.partial,
    }
    want = [float(of[name](verdict)) for verdict in verify.judge(images, PROMPTS)]
    found, notes = score({name: load_reward(name, name)}, images, PROMPTS)
    assert found[name].tolist() == pytest.approx(want) and len(set(want)) > 1
    assert notes == ["; ".join(verdict.reasons) for verdict in verify.judge(images, PROMPTS)]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_another_world_has_no_score_and_does_not_spoil_the_others(name):
    reward = load_reward(name, name)
    mixed = [Prompt("a castle at dawn"), *PROMPTS[:2]]
    found, notes = score({name: reward}, drawn([PROMPTS[0], *PROMPTS[:2]]), mixed)
    assert found[name].isnan().tolist() == [True, False, False] and found[name][1:].tolist() == [1, 1]
    assert notes == ["not in the playground's grammar", "", ""]
    found, _ = score({name: reward}, torch.rand(1, 3, 512, 512), mixed[:1])  # of any size
    assert found[name].isnan().all()


def test_a_reward_that_can_judge_none_of_the_prompts_is_told_apart():
    able, why = applicable(
        [Prompt("a castle"), Prompt("a moat")], {name: load_reward(name, name) for name in ("playground", "jpeg_compressibility")}
    )
    assert list(able) == ["jpeg_compressibility"] and why == {"playground": "not in the playground's grammar"}
    assert list(applicable([Prompt("a castle"), PROMPTS[0]], {"playground": load_reward("p", "playground")})[0]) == ["playground"]


def test_the_smooth_reward_has_a_gradient_to_images_of_its_own_world_alone():
    reward = load_reward("playground_smooth", "playground_smooth")
    mixed = [Prompt("a castle at dawn"), *PROMPTS[:2]]
    images = drawn([PROMPTS[0], *PROMPTS[:2]]).requires_grad_()
    found, notes = score({"smooth": reward}, images, mixed)
    torch.testing.assert_close(found["smooth"][1:], smooth.score(images[1:].detach(), PROMPTS[:2]))
    assert found["smooth"].isnan().tolist() == [True, False, False] and notes == ["not in the playground's grammar", "", ""]
    assert not reward(images, mixed).scores.requires_grad
    scores = reward.differentiable(images, mixed)
    torch.testing.assert_close(scores.detach(), found["smooth"], equal_nan=True)
    (gradient,) = torch.autograd.grad(scores[1:].sum(), images)
    assert gradient.flatten(1).any(1).tolist() == [False, True, True]
    assert reward.differentiable(torch.rand(1, 3, 512, 512), mixed[:1]).isnan().all()  # of any size
