"""The recipe's model on the meta device, and what each of its passes costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flowtilt.config import ModelSettings
from flowtilt.models.captions import SOURCE
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.encoding import encode_images
from flowtilt.models.opening import adapted
from flowtilt.objectives.batches import TrainingBatch
from flowtilt.objectives.nft import NFT
from flowtilt.plan.components import build_pipeline, encoders_of
from flowtilt.plan.geometry import find_geometry
from flowtilt.plan.meter import Line, Work, measure, measure_few, measure_rows
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import Policy
from flowtilt.policy.whole import WholePolicy

CAPTION = 128
"""Tokens of a caption, an assumption for families whose captions keep their own lengths."""


@dataclass(frozen=True)
class Weights:
    """Parameters, and what is saved beside them, by number and bytes."""

    number: int
    bytes: int


def weights_of(*modules: nn.Module | None) -> Weights:
    """Of modules; a table that is saved with the weights and not trained, as of positions, is among them."""
    tensors = [x for module in modules if module is not None for x in module.state_dict().values()]
    once = {x.untyped_storage()._cdata: x for x in tensors}.values()  # a T5 names its table of words twice
    return Weights(sum(x.numel() for x in once), sum(x.nbytes for x in once))


@dataclass(frozen=True)
class Costs:
    """What a recipe's passes cost.

    Args:
        source: where the shapes are known from.
        dtype: of the frozen base.
        network, encoders, vae: weights of the frozen parts.
        trained: of one role, fp32: a LoRA, or all weights.
        brought: bytes of what a role brings along to its forwards: merged weights, A and B or all weights in the base's half precision;
            0 where the role's own weights are taken as they are.
        bringing: operations that make it.
        latent, caption, image: bytes of one image's latents, of what the network reads of a caption, of one decoded image. Of an edit,
            the source image's latents are among the caption, and so is what guidance leads away from.
        caption_tokens: tokens of a caption where captions keep their own lengths, an assumption; none where all are padded alike.
        resolution: in pixels.
        source_resolution: of source images, for a family that edits.
        shards: bytes of the weights that FSDP2 gathers together: of each of the network's blocks, then of what is outside of them; tables
            that are not trained stay whole.
        encode: one caption.
        forward: rows through a role's network, without a gradient.
        reference: rows through the network without an adapter.
        train: rows through the objective and back, the old policy's pass among them; told whether the reference's is too, and whether
            activations are recomputed.
        update: rows through a loss of so many passes of one role, and back, without the old policy's; told whether activations are
            recomputed.
        decode: latents to images.
        decode_back: the same and the images' gradient back to the latents.
    """

    source: str
    dtype: str
    network: Weights
    encoders: Weights
    vae: Weights
    trained: Weights
    injected_weights: int
    bringing: Mapping[str, float]
    latent: int
    caption: int
    caption_tokens: int | None
    image: int
    resolution: int
    source_resolution: int | None
    shards: tuple[int, ...]
    encode: Work
    forward: Line
    reference: Callable[[], Line]
    train: Callable[[bool, bool], Line]
    update: Callable[[int, bool], Line]
    decode: Line
    decode_back: Callable[[], Line]


def costs_of(model: ModelSettings, rank: int, alpha: float, whole: bool = False) -> Costs:
    """The costs of a recipe's model; measured once a process for what they depend on.

    Args:
        whole: all weights are trained, instead of a LoRA.

    Raises:
        UserError: the model's shapes are not known, or its settings do not fit them.
    """
    # a plan is for GPUs, where "auto" is bfloat16
    given = model.model_copy(update={"dtype": "bfloat16"}) if model.dtype == "auto" else model
    kept = given.model_dump_json(include={"path", "revision", "dtype", "t5_length", "resolution", "adapter", "options"})
    return _costs(kept, rank, alpha, whole)


@cache
def _costs(settings: str, rank: int, alpha: float, whole: bool) -> Costs:
    model_settings = ModelSettings.model_validate_json(settings)
    geometry = find_geometry(model_settings.path, model_settings.revision)
    pipeline = build_pipeline(geometry, model_settings.dtype)
    model: Any = adapted(model_settings, pipeline, offload=False)
    # before adapters are on it
    network, shards = weights_of(model.network), _shards(model)
    with torch.device("meta"):
        policy = WholePolicy(model) if whole else LoraPolicy(model, rank=rank, alpha=alpha, seed=0)
    policy.changed()  # so that the old policy is not the current one, and has its own pass
    given = conditioning(model)
    with torch.no_grad():
        bringing = measure(lambda: policy._weights_for("old"))  # once, and kept: no row's work
    rows = measure_few if model.row_by_row else measure_rows

    @cache
    def train(reference: bool, recompute: bool) -> Line:
        policy.recompute(recompute)
        return rows(lambda number: training(policy, batch(model, given, number), reference))

    @cache
    def update(passes: int, recompute: bool) -> Line:
        policy.recompute(recompute)
        return rows(lambda number: matching(policy, batch(model, given, number), passes))

    one = batch(model, given, 1)
    encoders = encoders_of(pipeline)
    side = model.side * model.scale
    return Costs(
        source=geometry.source,
        dtype=model_settings.dtype,
        network=network,
        encoders=weights_of(*encoders.values()),
        vae=weights_of(pipeline.vae),
        trained=Weights(sum(p.numel() for p in policy.parameters), sum(p.nbytes for p in policy.parameters)),
        injected_weights=_injected_weights(policy),
        bringing=bringing.flops,
        latent=one.x0[0].nbytes,
        caption=(2 if model.edits else 1) * sum(x.nbytes for x in _read(given)),
        caption_tokens=tokens_of(model) if model.ragged else None,
        image=3 * side * side * 4,
        resolution=side,
        source_resolution=model.source_resolution if model.edits else None,
        shards=shards,
        encode=_encode(model, encoders, given),
        forward=_forward(policy, "old", model, given, rows),
        reference=cache(lambda: _forward(policy, "reference", model, given, rows)),
        train=train,
        update=update,
        decode=_decode(model),
        decode_back=lambda: _decode_back(model),
    )


def _shards(model: Any) -> tuple[int, ...]:
    blocks = [sum(weight.nbytes for weight in block.parameters()) for block in model.blocks]
    return (*blocks, sum(weight.nbytes for weight in model.network.parameters()) - sum(blocks))


def _injected_weights(policy: Policy) -> int:
    """Bytes of what "old" brings along and does not hold anyway."""
    held = {weight.untyped_storage()._cdata for weight in policy._weights["old"].values()}
    return sum(weight.nbytes for weight in policy._weights_for("old").values() if weight.untyped_storage()._cdata not in held)


def tokens_of(model: Any) -> int:
    """Tokens of a caption: all that the network can be given, or `CAPTION` where captions keep their own lengths."""
    return min(model.text_length, CAPTION) if model.ragged else model.text_length


def conditioning(model: Any) -> Conditioning:
    """What the network reads of one caption, and of its source image in a family that edits."""
    rows = torch.zeros(1, dtype=torch.long, device="cpu" if model.row_by_row else "meta")
    read = {name: x[None] for name, x in model.blank(tokens_of(model)).items()}
    sources = read.pop(SOURCE, None)
    lengths = torch.tensor([next(iter(read.values())).shape[1]]) if model.ragged else None
    return Conditioning(read, rows, lengths, sources)


def _read(given: Conditioning) -> list[Tensor]:
    return [*given.distinct.values(), *([] if given.sources is None else [given.sources])]


def batch(model: Any, given: Conditioning, rows: int) -> TrainingBatch:
    """A batch to train on, of shapes alone."""
    x0, eps = (torch.empty(rows, *model.latent_shape, device="meta") for _ in range(2))
    t, advantages = (torch.empty(rows, device="meta") for _ in range(2))
    return TrainingBatch(x0, eps, t, advantages, given.select(torch.zeros(rows, dtype=torch.long, device=given.rows.device)))


def training(policy: Policy, rows: TrainingBatch, reference: bool) -> Callable[[], Tensor]:
    """The loss of one micro-batch, as `Learner` makes them; DiffusionNFT's stands for every method on the forward process."""
    objective = NFT(beta=1.0, advantage_clip=5.0, kl=float(reference), old_policy="linear")
    _with_gradients(policy)
    return lambda: objective.loss(policy, rows)[0].sum()


def matching(policy: Policy, rows: TrainingBatch, passes: int) -> Callable[[], Tensor]:
    """A loss of so many passes of the current policy, all of them in one graph and without another role's."""
    _with_gradients(policy)

    def loss() -> Tensor:
        parts = [policy.velocity("current", rows.x0, rows.t, rows.conditioning).square().mean() for _ in range(passes)]
        return sum(parts[1:], parts[0])

    return loss


def _with_gradients(policy: Policy) -> None:
    for parameter in policy.parameters:
        parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def _forward(
    policy: Policy, role: str, model: Any, given: Conditioning, rows: Callable[[Callable[[int], Callable[[], object]]], Line]
) -> Line:
    def work(number: int) -> Callable[[], object]:
        one = batch(model, given, number)
        return lambda: policy.velocity(role, one.x0, one.t, one.conditioning)

    return rows(work)


@torch.no_grad()
def _decode(model: Any) -> Line:
    def work(number: int) -> Callable[[], object]:
        latents = torch.empty(number, *model.latent_shape, device="meta")
        return lambda: model.decode(latents)

    return measure_rows(work)


def _decode_back(model: Any) -> Line:
    def work(number: int) -> Callable[[], object]:
        latents = torch.empty(number, *model.latent_shape, device="meta", requires_grad=True)
        return lambda: model.decode(latents).sum()

    return measure_rows(work)


@torch.no_grad()
def _encode(model: Any, encoders: Mapping[str, Any], given: Conditioning) -> Work:
    """One caption through every text encoder; of an edit with what guidance leads away from, and the source image through the VAE.

    Not counted: a chat's template, instructions before the caption, what a language model says after it, and a text encoder's own
    network for images.
    """
    length = tokens_of(model) if given.lengths is None else int(given.lengths[0])

    def encode() -> None:
        if model.edits:
            side = model.source_resolution
            encode_images(model, torch.empty(1, 3, side, side, device="meta"), checked=False)
        for encoder in encoders.values():
            if "CLIP" in type(encoder).__name__:
                encoder(_ids(model.pipeline.tokenizer_max_length), output_hidden_states=True)
            elif encoder.config.model_type in ("t5", "umt5"):
                encoder(_ids(length))
            else:
                inner = getattr(encoder, "model", encoder)
                words = getattr(inner, "language_model", inner)
                seen = torch.zeros(1, 1, length, length, dtype=encoder.dtype, device="meta")  # or it would look for one in the numbers
                words(_ids(length), attention_mask=seen, output_hidden_states=True, use_cache=False)

    def twice() -> None:
        encode()
        encode()

    return measure(twice if model.edits else encode)


def _ids(length: int) -> Tensor:
    return torch.zeros(1, length, dtype=torch.long, device="meta")
