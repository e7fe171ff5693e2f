"""PickScore, ClipScore, HPSv2 and Aesthetic: each image with its own prompt, whatever stands beside them."""

import narrow_clip
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowtilt.errors import UserError
from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, RewardOutput, clip, load_reward, openclip, pixels, score
from flowtilt.rewards.aesthetic import Aesthetic, fold
from flowtilt.rewards.clipscore import ClipScore
from flowtilt.rewards.hpsv2 import HPSv2
from flowtilt.rewards.pickscore import PickScore
from flowtilt.seeding import generator

REWARDS = ("pickscore", "clipscore", "hpsv2", "aesthetic")
DIFFERENTIABLE = {"pickscore": PickScore, "clipscore": ClipScore, "hpsv2": HPSv2}
PROMPTS = [Prompt("a cat"), Prompt("two red dogs"), Prompt("“a cat” &amp; a dog"), Prompt("a cat")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    narrow_clip.write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def _narrow_weights(folder, monkeypatch):
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(folder))
    monkeypatch.setattr(openclip, "config", lambda name: narrow_clip.config())
    clip.load.cache_clear()
    yield
    clip.load.cache_clear()


def pictures(count: int = 4, height: int = 260, width: int = 300, seed: int = 0) -> Tensor:
    """Smooth patches within [0.1, 0.9]: nothing clamps, and neighbouring pixels are alike as in a photograph."""
    coarse = torch.rand(count, 3, 9, 9, generator=generator(seed, "pictures"))
    return 0.1 + 0.8 * nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def scores(reward: Reward, images: Tensor, prompts: list[Prompt]) -> Tensor:
    output = reward(images, prompts)
    return output.scores if isinstance(output, RewardOutput) else output


# against transformers ---------------------------------------------------------------------------------


def reference(folder, name: str, images: Tensor, pixel_values: Tensor) -> Tensor:
    """The diagonal of CLIPModel's own logits, of every image with every prompt, texts padded to 77."""
    model = CLIPModel.from_pretrained(folder / name)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "openai/clip-vit-large-patch14")
    ids = tokenizer([p.text for p in PROMPTS], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixel_values, **ids).logits_per_image.diagonal()


def test_pickscore_is_transformers_logit_over_26(folder):
    images = pictures()
    inputs = CLIPImageProcessorPil()(to_pil(images), return_tensors="pt")["pixel_values"]
    logits = reference(folder, "yuvalkirstain/PickScore_v1", images, inputs)
    output = PickScore(device="cpu")(images, PROMPTS)
    torch.testing.assert_close(output.scores, logits / 26, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.details["raw"], logits, atol=26e-5, rtol=0)


def test_clipscore_is_transformers_logit_over_100(folder):
    images = pictures()
    resized = nn.functional.interpolate(images, (224, 258), mode="bilinear", antialias=True)[..., 17:241]
    logits = reference(folder, "openai/clip-vit-large-patch14", images, pixels.normalize(resized))
    torch.testing.assert_close(ClipScore(device="cpu")(images, PROMPTS), logits / 100, atol=1e-6, rtol=0)


def test_hpsv2_is_the_cosine_with_the_cleaned_prompt():
    reward, images = HPSv2(device="cpu"), pictures()
    texts = reward.clip.text_features(["a cat", "two red dogs", '"a cat" & a dog', "a cat"])
    images224 = pixels.fit_longest(images)
    assert torch.equal(reward(images, PROMPTS), (reward.clip.image_features(images224) * texts).sum(1))


# invariants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_a_batch_scores_as_one_by_one_and_permutes_with_its_images(name):
    reward, images = load_reward(name, name), pictures()
    whole = scores(reward, images, PROMPTS)
    alone = torch.cat([scores(reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    order = [2, 0, 3, 1]
    assert whole.shape == (4,) and whole.dtype == torch.float32 and not whole.requires_grad
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(reward, images[order], [PROMPTS[i] for i in order]), whole[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_prompt_of_an_image_counts_and_no_other(name):
    reward, images = load_reward(name, name), pictures(2)
    first = scores(reward, images, [Prompt("a cat"), Prompt("a dog")])
    second = scores(reward, images, [Prompt("a cat"), Prompt("red")])
    assert (first[0] - second[0]).abs() < 1e-6 and (first[1] - second[1]).abs() > 1e-4


@pytest.mark.parametrize("name", REWARDS)
def test_8_bits_score_as_floats(name):
    reward, images = load_reward(name, name), pictures()
    rounded = (images * 255).round() / 255
    torch.testing.assert_close(scores(reward, rounded, PROMPTS), scores(reward, images, PROMPTS), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", REWARDS)
def test_an_image_with_a_missing_value_has_no_score(name):
    images = pictures()
    images[1, 2, 130, 150] = torch.nan
    found, _ = score({name: load_reward(name, name)}, images, PROMPTS)
    assert found[name].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (700, 3)])
def test_every_shape_of_image_has_a_score(name, size):
    assert scores(load_reward(name, name), torch.rand(1, 3, *size, generator=generator(0, "odd")), PROMPTS[:1]).isfinite().all()


# gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_that_of_finite_differences(name):
    """In float64 along random directions: a central difference of step h errs by h^2 f''' / 6 and by 1e-16 / h of rounding."""
    reward = DIFFERENTIABLE[name](device="cpu")
    reward.clip.model.double()
    images = pictures().double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.differentiable(images, PROMPTS).sum(), images)
    h = 1e-5
    for seed in range(3):
        direction = torch.randn(images.shape, generator=generator(seed, "direction"), dtype=torch.float64)
        with torch.no_grad():
            up, down = (reward.differentiable(images + sign * h * direction, PROMPTS).sum() for sign in (1, -1))
        along = (gradient * direction).sum()
        torch.testing.assert_close((up - down) / (2 * h), along, atol=1e-8 * float(gradient.norm()), rtol=1e-6)


@pytest.mark.parametrize("name", ["clipscore", "hpsv2"])
def test_the_differentiable_score_is_the_score(name):
    reward, images = DIFFERENTIABLE[name](device="cpu"), pictures()
    with_gradient = reward.differentiable(images.requires_grad_(), PROMPTS)
    assert with_gradient.requires_grad and torch.equal(with_gradient.detach(), reward(images, PROMPTS))


def test_pickscores_differentiable_score_is_its_score_where_nothing_is_resized():
    reward = PickScore(device="cpu")
    images = (pictures(height=224, width=224) * 255).round() / 255
    assert torch.equal(reward.differentiable(images, PROMPTS), reward(images, PROMPTS).scores)


def test_elsewhere_it_differs_by_the_effect_of_the_rounding():
    """To first order: a grey level is so small that what is left is far less."""
    reward, images = PickScore(device="cpu"), pictures()
    crops = pixels.bicubic_crop_tensor(images).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.differentiable(crops, PROMPTS).sum(), crops)
    effect = (gradient * (pixels.bicubic_crop(images) - crops.detach())).flatten(1).sum(1)
    apart = reward(images, PROMPTS).scores - reward.differentiable(images, PROMPTS)
    assert effect.abs().max() > 1e-4
    torch.testing.assert_close(apart, effect, atol=1e-5, rtol=0.05)


def test_a_step_up_pickscores_gradient_raises_the_score_of_8_bits_as_it_foretells():
    """By five grey levels, of which the rounding takes and gives one at random."""
    reward, images = PickScore(device="cpu"), pictures(1).requires_grad_()
    before = reward.differentiable(images, PROMPTS[:1])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    step = 0.02 * gradient.sign()
    images = images.detach()
    rise = reward(images + step, PROMPTS[:1]).scores - reward(images, PROMPTS[:1]).scores
    assert rise > 0
    torch.testing.assert_close(rise, reward.differentiable(images + step, PROMPTS[:1]) - before.detach(), atol=0, rtol=0.01)


def test_pickscore_through_a_bilinear_resize_is_another_score():
    reward, images = PickScore(device="cpu"), pictures()
    bilinear = reward.differentiable(images, PROMPTS, resize="bilinear")
    texts = reward.clip.text_features([p.text for p in PROMPTS])
    by_hand = (reward.clip.image_features(pixels.bilinear_crop(images)) * texts).sum(1) * reward.clip.logit_scale / 26
    torch.testing.assert_close(bilinear, by_hand, atol=1e-6, rtol=0)
    assert not torch.equal(bilinear, reward.differentiable(images, PROMPTS))


@pytest.mark.parametrize("name, sees_all", [("pickscore", False), ("clipscore", False), ("hpsv2", True)])
def test_only_hpsv2_sees_the_ends_of_a_long_image(name, sees_all):
    images = pictures(1, 224, 500).requires_grad_()
    (gradient,) = torch.autograd.grad(DIFFERENTIABLE[name](device="cpu").differentiable(images, PROMPTS[:1]).sum(), images)
    assert (gradient[..., :100].abs().max() > 0) == sees_all and gradient[..., 200:300].abs().max() > 0


# aesthetic --------------------------------------------------------------------------------------------


def test_the_folded_head_is_the_five_layers(folder):
    state = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    drop = nn.Dropout
    linear = [nn.Linear(a, b) for a, b in ((16, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))]
    head = nn.Sequential(linear[0], drop(0.2), linear[1], drop(0.2), linear[2], drop(0.1), linear[3], linear[4]).eval()
    head.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
    images = pictures()
    features = clip.load("clip-l", "cpu").image_features(pixels.bicubic_crop(images))
    with torch.no_grad():
        exact = head.double()(features.double())[:, 0]
        vector, bias = fold(state, 16, folder)
    reach = float(vector.abs().sum() + abs(bias))  # fp32 keeps each product to 6e-8 of it
    torch.testing.assert_close(features @ vector + bias, exact.float(), atol=5e-7 * reach, rtol=0)
    torch.testing.assert_close(Aesthetic(device="cpu")(images, PROMPTS), exact.float(), atol=5e-7 * reach, rtol=0)


def test_the_aesthetic_score_does_not_read_the_prompt():
    reward, images = Aesthetic(device="cpu"), pictures()
    assert torch.equal(reward(images, PROMPTS), reward(images, [Prompt("x")] * 4))


def test_clipscore_and_aesthetic_share_one_model():
    assert ClipScore(device="cpu").clip is Aesthetic(device="cpu").clip


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s | {"layers.8.weight": torch.zeros(1, 1)}, "layers.8.weight"),
        (lambda s: {key: s[key] for key in s if key != "layers.4.bias"}, "layers.4.bias is missing"),
        (lambda s: s | {"layers.0.weight": torch.zeros(1024, 768)}, "layers.0.weight"),
        (lambda s: {key.replace("layers", "mlp"): s[key] for key in s}, "layers.0.bias is missing"),
    ],
)
def test_another_head_is_refused(folder, change, told):
    state = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    with pytest.raises(UserError, match=told) as caught:
        fold(change(state), 16, folder / "head.pth")
    assert "head.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_short_files_of_the_head_are_told(folder, tmp_path, monkeypatch):
    path = folder / "sac+logos+ava1-l14-linearMSE.pth"
    for name in ("openai", "yuvalkirstain"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="is missing: `flowtilt download aesthetic`"):
        Aesthetic(device="cpu")
    (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut short"):
        Aesthetic(device="cpu")
