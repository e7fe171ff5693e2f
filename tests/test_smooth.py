"""The smooth stand-in for the verifier: agrees with it, has an exact gradient, and through a decoder leads to what the verifier accepts."""

from itertools import product

import pytest
import torch

from flowtilt.playground import pipeline_path, smooth, verify, world
from flowtilt.seeding import generator, noise

BY_TAG = [[p for p in world.prompts("train") if p.tag == tag] for tag in world.TAGS]
PROMPTS = [prompt for found in BY_TAG for prompt in found[:: 1 + len(found) // 10]]
SOME = PROMPTS[::3]


def drawn(prompts, purpose="test"):
    return world.render([world.arrange(p, generator(0, purpose, i)) for i, p in enumerate(prompts)])


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(pipeline_path() / "vae", torch_dtype=torch.float32)
    return network.requires_grad_(False)


def test_true_scenes_score_high_and_the_verifiers_wrong_ones_low():
    images = drawn(PROMPTS)
    own = smooth.score(images, PROMPTS)
    assert own.min() > 0.75 and own.mean() > 0.9 and own.max() < 1
    strict, other = [], []
    for shift in (1, 7, 20):
        captions = PROMPTS[shift:] + PROMPTS[:shift]
        strict.append(verify.score(images, captions))
        other.append(smooth.score(images, captions))
    right, score = torch.cat(strict) == 1, torch.cat(other)
    assert score[~right].mean() < 0.15 and score[~right].max() < 0.75
    assert (score[right] > 0.75).all()


def test_what_is_no_scene_is_believed_to_show_nothing():
    four = world.parse("four circles"), world.parse("a red circle and a blue square")
    for image in (torch.ones(3, 32, 32), noise(0, "test", [(0,)], (3, 32, 32))[0].sigmoid()):
        assert smooth.score(image.expand(2, -1, -1, -1), four).max() < 0.05


def scene(*placed):
    """Objects (shape, colour, quadrant), each in the middle of its quadrant."""
    return world.render([[world.Object(shape, color, 8 + 16 * (q % 2), 8 + 16 * (q // 2), 4.95) for shape, color, q in placed]])


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_a_relation_holds_in_the_layouts_in_which_the_verifier_says_so(relation):
    prompt = world.parse(f"a red circle {relation} a blue square")
    for first, second in product(range(4), repeat=2):
        if first != second:
            image = scene(("circle", "red", first), ("square", "blue", second))
            assert (smooth.score(image, [prompt]) > 0.8) == (verify.score(image, [prompt]) == 1)


@pytest.mark.parametrize(("objects", "right"), [(1, False), (2, True), (3, False)])
def test_the_count_is_exact_and_any_quadrants_will_do(objects, right):
    for first in range(4):
        image = scene(*(("cross", "green", (first + k) % 4) for k in range(objects)))
        found = smooth.score(image, [world.parse("two green crosses")])
        assert (found > 0.8).item() is right
        assert (smooth.score(image, [world.parse("two crosses")]) > 0.8).item() is right
        assert smooth.score(image, [world.parse("two red crosses")]) < 0.6


def test_belief_in_all_counts_of_all_things_stays_below_one():
    """The layouts of a prompt exclude one another, and so do the prompts "one", "two", "three", "four circles"."""
    images = torch.cat([drawn(PROMPTS[::6]), drawn(PROMPTS[1::6]) * 0.5 + 0.08])
    counts = [world.parse(text) for text in ("a circle", "two circles", "three circles", "four circles")]
    total = sum(smooth.score(images, [prompt] * len(images)).double() ** 4 for prompt in counts)
    assert (total < 1).all() and (total > 0).all()


def half_right():
    """A scene of the one prompt faded into that of another, with noise."""
    images = 0.6 * drawn(PROMPTS) + 0.4 * drawn([*PROMPTS[5:], *PROMPTS[:5]], "other")
    return (images + 0.02 * noise(0, "test", [(k,) for k in range(len(images))], (3, 32, 32))).double()


def test_the_gradient_is_the_finite_difference():
    images = half_right()[::3].requires_grad_()
    assert {p.tag for p in SOME} == set(world.TAGS)
    (gradient,) = torch.autograd.grad(smooth.score(images, SOME).sum(), images)
    direction = noise(1, "test", [(k,) for k in range(len(images))], (3, 32, 32)).double()
    with torch.no_grad():
        h = 1e-5
        slope = (smooth.score(images + h * direction, SOME) - smooth.score(images - h * direction, SOME)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)


def test_no_image_is_left_without_a_slope():
    """Also where nothing is right, or all is: a hard maximum or a threshold would have none."""
    images = torch.cat([drawn(PROMPTS), drawn(PROMPTS[::-1]), torch.full((len(PROMPTS), 3, 32, 32), 0.16), half_right().float()])
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(smooth.score(images, PROMPTS * 4).sum(), images)
    assert gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 1e-5


def test_each_image_is_judged_by_itself():
    images = half_right().float()[:6]
    alone = torch.cat([smooth.score(images[k : k + 1], PROMPTS[k : k + 1]) for k in range(6)])
    torch.testing.assert_close(smooth.score(images, PROMPTS[:6]), alone)
    assert smooth.score(images[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="one a prompt"):
        smooth.score(images, PROMPTS[:5])


def test_ascent_on_latents_makes_what_the_verifier_accepts(vae):
    """The reason for all of it. The images begin half-way between a scene of the prompt and one of another prompt."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    def decode(latents):
        return (vae.decode(latents / scale + shift, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    with torch.no_grad():
        own, other = (
            (vae.encode(2 * drawn(p, purpose) - 1).latent_dist.mode() - shift) * scale
            for p, purpose in ((SOME, "own"), ([*SOME[5:], *SOME[:5]], "other"))
        )
    latents = (own + other) / 2
    scores, strict = [], []
    for step in range(21):
        images = decode(latents.requires_grad_())
        score = smooth.score(images, SOME)
        if step in (0, 20):
            scores.append(score.mean().item())
            strict.append(verify.score(images, SOME).mean().item())
        (gradient,) = torch.autograd.grad(score.sum(), latents)
        latents = latents.detach() + 0.03 * gradient / gradient.square().mean((1, 2, 3)).sqrt().mean()
    assert scores[1] > scores[0] + 0.4
    assert strict[0] < 0.1 and strict[1] > 0.6
