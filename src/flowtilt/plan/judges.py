"""The reward models on the meta device: their weights, and what an image costs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.plan.meter import Work, added, measure, scaled
from flowtilt.plan.network import Weights, weights_of
from flowtilt.rewards import find_reward
from flowtilt.rewards.about import BuiltIn, Facts, built_in
from flowtilt.rewards.facts import facts_of
from flowtilt.rewards.named import Named
from flowtilt.rewards.networks import Network


@dataclass(frozen=True)
class Model:
    """A reward's network, fp32.

    Args:
        chunk: images in one forward pass.
        image, prompt: operations for an image, and for a prompt of as many tokens as are read.
        activations: bytes for each image of a chunk.
        crop: bytes of an image as the network reads it.
        whole: all images are made ready at once, not a chunk.
    """

    weights: Weights
    chunk: int
    image: Mapping[str, float]
    prompt: Mapping[str, float]
    activations: float
    crop: int
    whole: bool

    def working(self, images: int, size: int) -> float:
        """Bytes at most while `images` of `size` bytes are judged."""
        part = min(images, self.chunk)
        # resized, less the mean, divided by the deviation: three copies; before that, rounded to 8 bits with two copies
        return max(part * self.activations + 3 * (images if self.whole else part) * self.crop, 2 * images * size)


@dataclass(frozen=True)
class Judging:
    """What the rewards of a rollout or an evaluation ask of a machine.

    Args:
        models: those that work on the device, by name.
        readers: the models of a reward, by its name; the first reads every image.
        sources: of each model, "module:function".
        beside: what is not counted, by the reward's name.
        off_device: whether a reward works elsewhere while images are drawn, so that they are drawn in parts.
    """

    models: Mapping[str, Model]
    readers: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, str]
    beside: Mapping[str, str]
    off_device: bool

    def flops(self, images: int, prompts: int) -> dict[str, float]:
        """Operations for `images` of `prompts` distinct captions."""
        models = [self.models[names[0]] for names in self.readers.values()]
        return added(*(scaled(model.image, images) for model in models), *(scaled(model.prompt, prompts) for model in models))


def judging(rewards: Sequence[Named], resolution: int) -> Judging:
    """The models of rewards for images of `resolution` pixels."""
    models: dict[str, Model] = {}
    readers: dict[str, tuple[str, ...]] = {}
    sources: dict[str, str] = {}
    beside: dict[str, str] = {}
    off_device = False
    for one in rewards:
        facts = _facts(one)
        if isinstance(facts, BuiltIn) and facts.networks:
            models |= {name: _model(source, resolution) for name, source in facts.networks.items()}
            readers[one.name] = tuple(facts.networks)
            sources |= facts.networks
        if isinstance(facts, str):
            beside[one.name] = facts
            continue
        if cost := facts.plan_note_for(one.options):
            beside[one.name] = cost
        off_device |= facts.off_device
    return Judging(models, readers, sources, beside, off_device)


def _facts(one: Named) -> Facts | str:
    """What a reward says of itself, or why that is not known."""
    if "://" in one.source:
        return Facts(off_device=True, plan_note="on its server while images are sampled")
    if one.source in built_in():
        return built_in()[one.source]
    try:
        found = facts_of(one.name, find_reward(one.name, one.source))
    except UserError as error:
        return str(error)
    return found if found.plan_note else replace(found, plan_note="your own: neither its time nor its memory is known")


@cache
def gradient_of(source: str, resolution: int) -> Work:
    """The network that "module:function" returns, through one chunk of images and back to them, divided by their number."""
    place, _, function = source.partition(":")
    with torch.device("meta"):
        network: Network = getattr(import_module(place), function)(resolution)
        network.module.requires_grad_(False)
        images = torch.empty(network.chunk, *network.shape, requires_grad=True)
        work = measure(lambda: _summed(network.judge(images)))
    each = 1 / network.chunk
    return Work(scaled(work.flops, each), work.alive * each, work.saved * each)


def _summed(found: object) -> Tensor:
    """A scalar that depends on all that a network gives."""
    values = found.values() if isinstance(found, Mapping) else [found]
    return torch.stack([x.float().sum() for x in values if isinstance(x, Tensor)]).sum()


@cache
def _model(source: str, resolution: int) -> Model:
    """The network that "module:function" returns, measured."""
    place, _, function = source.partition(":")
    with torch.device("meta"), torch.no_grad():
        network: Network = getattr(import_module(place), function)(resolution)
        prompt = measure(network.read).flops if network.read else {}
        images = torch.empty(network.chunk, *network.shape)
        work = measure(lambda: network.judge(images))
    return Model(
        weights=weights_of(network.module),
        chunk=network.chunk,
        image=scaled(work.flops, 1 / network.chunk),
        prompt=prompt,
        activations=work.peak / network.chunk,
        crop=images[0].nbytes,
        whole=network.whole,
    )
