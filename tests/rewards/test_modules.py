"""A reward computes where its models are when it is called: they may leave the device between two calls.

No GPU here: models go to "meta", where operations have shapes and devices but no values, and mixing devices fails.
"""

from contextlib import nullcontext

import narrow_clip
import pytest
import test_imagereward
import test_mask2former
import torch
from torch import nn

from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput, clip, imagereward, load_reward, openclip
from flowtilt.rewards.geneval import colors, mask2former
from flowtilt.rewards.geneval.detect import Detector
from flowtilt.seeding import generator

CLIPS = ("pickscore", "clipscore", "hpsv2", "aesthetic")
PROMPTS = [Prompt("a cat"), Prompt("two red dogs")]


@pytest.fixture(autouse=True)
def _small_weights(tmp_path, monkeypatch):
    narrow_clip.write_all(tmp_path)
    test_mask2former.use_tiny(monkeypatch, tmp_path)
    test_imagereward.use_tiny(monkeypatch, tmp_path)
    monkeypatch.setattr(openclip, "config", lambda name: narrow_clip.config())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know "meta"
    caches = (clip.load, imagereward.network, mask2former.network)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 240, 250, generator=generator(0, "pictures"))


def held(thing: object) -> list[nn.Module]:
    """Every model in an object of flowtilt's and in those that it holds."""
    if isinstance(thing, nn.Module):
        return [thing]
    ours = type(thing).__module__.startswith("flowtilt")
    return [module for value in vars(thing).values() for module in held(value)] if ours else []


@pytest.mark.parametrize("name", [*CLIPS, "imagereward", "geneval"])
def test_every_model_that_a_reward_holds_is_named_and_nothing_else(name):
    reward = load_reward(name, name)
    found = held(reward)
    assert found and {id(module) for module in reward.modules} == {id(module) for module in found}
    with pytest.raises(AttributeError):
        reward.modules = ()


@pytest.mark.parametrize("name", CLIPS)
def test_a_reward_computes_where_its_models_have_gone(name):
    reward = load_reward(name, name)
    reward(pictures(), PROMPTS)  # what is kept from call to call is kept now
    for module in reward.modules:
        module.to("meta")
    output = reward(pictures(), PROMPTS)
    scores = output.scores if isinstance(output, RewardOutput) else output
    assert scores.device.type == "meta" and scores.shape == (2,)


class Recorder(nn.Module):
    """A network that only tells where its input is."""

    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.seen = answer, []

    def forward(self, pixels, *more):
        self.seen.append({part.device.type for part in (pixels, *more)})
        return self.answer(len(pixels))


def test_the_detector_asks_its_network_where_that_is():
    detector = Detector("cpu")
    network = detector.network = Recorder(lambda n: (torch.zeros(n, 2, 3), torch.zeros(n, 2, 8, 8)))
    detector(pictures(), [0.9, 0.9])
    network.to("meta")
    detector(pictures(), [0.9, 0.9])
    assert network.seen == [{"cpu"}, {"meta"}]


def test_imagereward_asks_its_network_where_that_is():
    reward = load_reward("imagereward", "imagereward")
    network = reward.network = Recorder(torch.zeros)
    reward(pictures(), PROMPTS)
    network.to("meta")
    reward(pictures(), PROMPTS)
    assert network.seen == [{"cpu"}, {"meta"}]


def test_a_classs_kept_descriptions_follow_the_features_of_the_images(monkeypatch):
    classifier = colors.ColorClassifier("cpu")
    compared = []
    monkeypatch.setattr(colors.torch, "einsum", lambda _, images, kept: compared.append((images, kept)) or torch.zeros(2, 10))
    crops = torch.rand(2, 3, 224, 224, generator=generator(0, "crops"))
    classifier(crops, ["dog", "car"])
    classifier.clip.model.to("meta")
    classifier(crops, ["dog", "car"])
    assert [(a.device.type, b.device.type) for a, b in compared] == [("cpu", "cpu"), ("meta", "meta")]
