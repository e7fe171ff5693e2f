"""Whether a model family is right: it samples the stock pipeline's images, and its LoRAs load there and back.

The checks need no published weights. A pipeline with random ones shows each of them, and so does a real one.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from flowtilt.config import ModelSettings
from flowtilt.errors import UserError
from flowtilt.io.images import to_pil
from flowtilt.io.user_errors import describe_error
from flowtilt.lora import Lora
from flowtilt.lora.read import read_lora
from flowtilt.models.base import Model
from flowtilt.models.editing import Editing
from flowtilt.models.opening import open_model
from flowtilt.models.pipeline import on_white
from flowtilt.models.stock import stock_images
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.prompts import Caption, Edit
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.seeding import generator

CAPTIONS = ("a red cat", "two dogs on a wooden bench in the rain")
"""Of unlike length, so that a family has to pad."""
PICTURE = 64
"""Height and width of the source images of a family that edits."""
IMAGE = 1e-4
"""Largest difference of two images in [0, 1] that is rounding in fp32."""
VELOCITY = 1e-4
"""Largest difference of velocities that is rounding in fp32, relative to the largest velocity."""
HALF = 0.1
"""The same for a bfloat16 base against an fp32 one."""
SEEN = 10 * IMAGE
"""A caption, guidance or LoRA that changes an image by less shows nothing."""


@dataclass(frozen=True)
class Check:
    """One check: what was compared, what came out, and whether that is right."""

    name: str
    found: str
    right: bool

    def __str__(self) -> str:
        return f"{'ok' if self.right else 'WRONG':6}{self.name}: {self.found}"


@dataclass(frozen=True)
class Conformance:
    """The checks of one model.

    Args:
        settings: the pipeline, and the class where the family is the user's own.
        sizes: two resolutions in pixels.
        steps: two numbers of steps.
    """

    settings: ModelSettings
    device: torch.device
    sizes: tuple[int, int] = (256, 512)
    steps: tuple[int, int] = (3, 4)
    guidance: float = 3.0
    pictures: list[str] = field(default_factory=list, init=False, repr=False)
    """Files of source images, while checks are made."""

    def checks(self) -> Iterator[Check]:
        """One after another; an error is a check's result.

        Raises:
            UserError: the model can't be opened at all.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.pictures.extend(_written(Path(folder)))
            yield from self._checks()
            self.pictures.clear()

    def _checks(self) -> Iterator[Check]:
        self._open()
        small, large = self.sizes
        few, many = self.steps
        for size, steps, guidance in ((small, few, 1.0), (small, many, self.guidance), (large, few, self.guidance), (large, many, 1.0)):
            how = f"{size} px, {steps} steps, {'no guidance' if guidance == 1 else f'guidance {guidance:g}'}"
            yield _done(f"image of {how}, as the stock pipeline's", partial(self._image, size, steps, guidance))
        yield _done("captions and guidance change the image", self._seen)
        yield _done("velocities in one batch, as one by one", self._batch)
        yield _done("every block has a LoRA", self._targets)
        yield _done("a LoRA saved by flowtilt, in the stock pipeline", self._ours)
        yield _done("a LoRA saved by diffusers, in flowtilt", self._theirs)
        yield _done("gradient checkpointing changes no bit", self._recomputed)
        yield _done("offloaded text encoders change no bit", self._offloaded)
        yield _done("a bfloat16 base, as an fp32 one", self._half)

    # images -----------------------------------------------------------------------------------------------

    def _image(self, size: int, steps: int, guidance: float) -> tuple[str, bool]:
        model = self._open(resolution=size)
        if guidance != 1 and not getattr(model, "guidable", True):
            return "the stock pipeline has no classifier-free guidance to compare with", True
        ours, theirs = self._sampled(model, steps, guidance), self._stock(model, steps, guidance)
        levels, own = model.levels(steps), model.pipeline.scheduler.sigmas.cpu()
        if (difference := float((own - levels).abs().max())) > 1e-5:
            return f"its noise levels {_few(levels)} differ from the scheduler's {_few(own)} by {difference:.2g}", False
        return _alike(ours, theirs, IMAGE)

    def _seen(self) -> tuple[str, bool]:
        model, steps = self._open(), self.steps[0]
        plain = self._sampled(model, steps, 1.0)
        changed = {
            "caption": self._sampled(model, steps, 1.0, captions=self._captions(model, CAPTIONS[::-1])),
            "guidance": self._sampled(model, steps, self.guidance),
        }
        if edits := [one for one in self._captions(model) if isinstance(one, Edit)]:
            exchanged = [replace(one, image=other.image) for one, other in zip(edits, edits[::-1], strict=True)]
            changed["source image"] = self._sampled(model, steps, 1.0, captions=exchanged)
        by = {name: float((image - plain).abs().max()) for name, image in changed.items()}
        return ", ".join(f"{name} by {value:.2g}" for name, value in by.items()), min(by.values()) > SEEN

    def _captions(self, model: Model, texts: Sequence[str] = CAPTIONS) -> list[Caption]:
        """What the model reads: those texts, of a family that edits with a source image each."""
        edits = getattr(model, "edits", False)
        return [Edit(text, file) if edits else text for text, file in zip(texts, self.pictures, strict=True)]

    def _sampled(
        self, model: Model, steps: int, guidance: float, loras: Sequence[Lora] = (), captions: Sequence[Caption] | None = None
    ) -> Tensor:
        stack = TunedModel(model, loras)
        given = model.encode(captions or self._captions(model))
        latents = Sampler("euler", steps, guidance)(stack, "tuned", _noise(model).to(model.device), given, len(given))
        return decode(stack, latents, len(given))

    def _stock(self, model: Model, steps: int, guidance: float) -> Tensor:
        """The stock pipeline's images from the same noise, its rule for the levels applied once."""
        noise = model.pipeline_latents(_noise(model).to(model.device))
        captions, found = self._captions(model), []
        size = 1 if getattr(model, "one_by_one", False) else len(captions)
        for start in range(0, len(captions), size):
            part = captions[start : start + size]
            sources = {"image": cast(Editing, model).source_pictures(part)[0]} if getattr(model, "edits", False) else {}
            texts = [one.text if isinstance(one, Edit) else one for one in part]
            options = {**model.call_options(guidance), **sources}
            own = noise[start : start + size]
            found.append(on_white(stock_images(model.pipeline, texts, own, steps, model.levels.shift(steps), options)))
        return torch.cat(found)

    # velocities -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _batch(self) -> tuple[str, bool]:
        model = self._open()
        x, t = _noise(model).to(model.device), torch.tensor([0.3, 0.8], device=model.device)
        together = model.velocity(x, t, model.encode(self._captions(model)))
        alone = torch.cat([model.velocity(x[k, None], t[k, None], model.encode([one])) for k, one in enumerate(self._captions(model))])
        return _alike(together, alone, VELOCITY, float(alone.abs().max()))

    @torch.no_grad()
    def _half(self) -> tuple[str, bool]:
        found = []
        for dtype in ("float32", "bfloat16"):
            model = self._open(dtype=dtype)
            x = _noise(model).to(model.device)
            v = model.velocity(x, torch.tensor(0.6, device=model.device), model.encode(self._captions(model)))
            image = model.decode(x)
            if v.dtype != torch.float32 or image.dtype != torch.float32 or not (v.isfinite().all() and image.isfinite().all()):
                return f"its velocity is {_kind(v)}, its image {_kind(image)}; both must be finite fp32", False
            found.append(v.cpu())
        return _alike(found[1], found[0], HALF, float(found[0].abs().max()))

    def _offloaded(self) -> tuple[str, bool]:
        with tempfile.TemporaryDirectory() as folder, _captions_in(folder):
            plain, *others = (self._read(self._open(offload=offload)) for offload in (False, True, True))
        wrong = sorted({name for other in others for name, x in other.items() if not torch.equal(x, plain[name])})
        return (f"{', '.join(wrong)} differs" if wrong else "the same embeddings, encoded and read back"), not wrong

    def _read(self, model: Model) -> dict[str, Tensor]:
        given = model.encode(self._captions(model))
        return given.tensors() | ({} if given.sources is None else {"source": given.source()})

    # training ---------------------------------------------------------------------------------------------

    def _targets(self) -> tuple[str, bool]:
        policy = self._policy(self._open())
        blocks = {id(block) for block in policy.model.blocks}
        names = [name for name, module in policy.model.network.named_modules() if id(module) in blocks]
        without = [name for name in names if not any(layer.startswith(f"{name}.") for layer in policy.state("current"))]
        if without:
            return f"{len(without)} of {len(names)} blocks have none, {without[0]} first; see lora_targets", False
        return f"{len(policy.parameters) // 2} layers in {len(names)} blocks", True

    def _recomputed(self) -> tuple[str, bool]:
        policy = self._policy(self._open())
        if not policy.can_recompute:
            return "this network has no gradient checkpointing", True
        model, found = policy.model, []
        x, t, given = _noise(model).to(model.device), torch.tensor([0.3, 0.8], device=model.device), model.encode(self._captions(model))
        for on in (False, True):
            policy.recompute(on)
            for weight in policy.parameters:
                weight.grad = torch.zeros_like(weight)
            v = policy.velocity("current", x, t, given)
            v.square().mean().backward()
            found.append([v.detach(), *(weight.grad for weight in policy.parameters)])
        differ = sum(not torch.equal(a, b) for a, b in zip(*found, strict=True))
        idle = sum(not gradient.any() for gradient in found[0][1:])
        return f"{differ or 'none'} of {len(found[0])} tensors differ, {idle} get no gradient", not differ and idle < len(found[0]) / 4

    @staticmethod
    def _policy(model: Model) -> LoraPolicy:
        """With LoRAs that change the image."""
        policy = LoraPolicy(model, rank=4, alpha=6.0, seed=0)
        with torch.no_grad():
            for k, weight in enumerate(policy.parameters):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator(0, "conformance", k)))
        policy.changed()
        return policy

    # LoRAs ------------------------------------------------------------------------------------------------

    def _ours(self) -> tuple[str, bool]:
        with tempfile.TemporaryDirectory() as folder:
            self._policy(self._open()).save_lora(folder, "current")
            stock = self._open()
            stock.pipeline.load_lora_weights(folder)
            return self._with_lora(folder, self._stock(stock, self.steps[0], 1.0))

    def _theirs(self) -> tuple[str, bool]:
        with tempfile.TemporaryDirectory() as folder:
            stock = self._open()
            network: Any = stock.network
            network.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=list(stock.lora_targets)))
            with torch.no_grad():
                for k, (name, parameter) in enumerate((n, p) for n, p in network.named_parameters() if ".lora_" in n):
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator(0, name, k)))
            layers: dict[str, Tensor] = get_peft_model_state_dict(network)
            stock.pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **_collate_lora_metadata({"transformer": network}))
            return self._with_lora(folder, self._stock(stock, self.steps[0], 1.0))

    def _with_lora(self, folder: str, theirs: Tensor) -> tuple[str, bool]:
        """Our image with the LoRA of a folder against theirs."""
        model = self._open()
        plain = self._sampled(model, self.steps[0], 1.0)
        ours = self._sampled(model, self.steps[0], 1.0, [read_lora(Path(folder))])
        seen = float((ours - plain).abs().max())
        if seen < SEEN:
            return f"it changes the image by {seen:.2g} alone", False
        return _alike(ours, theirs, IMAGE)

    def _open(self, **other: Any) -> Model:
        """The model anew, in fp32 and at the smaller size unless told otherwise."""
        plain = {"resolution": self.sizes[0], "dtype": "float32", "offload": False}
        return open_model(self.settings.model_copy(update=plain | other), self.device)


def _done(name: str, check: Callable[[], tuple[str, bool]]) -> Check:
    try:
        return Check(name, *check())
    except UserError as error:
        return Check(name, str(error), False)
    except Exception as error:  # a family's own code, or diffusers'
        return Check(name, describe_error(error), False)


def _written(folder: Path) -> list[str]:
    """Files of one source image for each caption: coarse noise."""
    files = [folder / f"{k}.png" for k in range(len(CAPTIONS))]
    for k, file in enumerate(files):
        coarse = torch.rand(1, 3, 8, 8, generator=generator(0, "picture", k))
        to_pil(torch.nn.functional.interpolate(coarse, size=(PICTURE, PICTURE)))[0].save(file)
    return [str(file) for file in files]


def _noise(model: Model) -> Tensor:
    return torch.randn(len(CAPTIONS), *model.latent_shape, generator=generator(0, "conformance"))


def _alike(ours: Tensor, theirs: Tensor, most: float, scale: float = 1.0) -> tuple[str, bool]:
    if ours.shape != theirs.shape:
        return f"{list(ours.shape)} instead of {list(theirs.shape)}", False
    difference = float((ours.cpu() - theirs.cpu()).abs().max()) / scale
    return f"greatest difference {difference:.1e}, at most {most:g} allowed", difference <= most


def _kind(x: Tensor) -> str:
    return f"{'' if x.isfinite().all() else 'not finite '}{str(x.dtype).removeprefix('torch.')}"


def _few(levels: Tensor) -> str:
    return "[" + ", ".join(f"{float(level):.4f}" for level in levels) + "]"


@contextmanager
def _captions_in(folder: str) -> Iterator[None]:
    """Embeddings are kept there, not in the user's cache."""
    before = os.environ.get("FLOWTILT_CAPTIONS")
    os.environ["FLOWTILT_CAPTIONS"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLOWTILT_CAPTIONS"]
        else:
            os.environ["FLOWTILT_CAPTIONS"] = before
