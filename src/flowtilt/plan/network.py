"""The recipe's model on the meta device, and what each of its passes costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flowtilt.config import ModelSettings
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.opening import DTYPES
from flowtilt.models.sd3 import SD3
from flowtilt.objectives.batches import TrainingBatch
from flowtilt.objectives.nft import NFT
from flowtilt.plan.geometry import Config, Geometry, find_geometry
from flowtilt.plan.meter import ROWS, Line, Work, measure, measure_rows
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import Policy
from flowtilt.policy.whole import WholePolicy


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
        latent, caption, image: bytes of one image's latents, of what the network reads of a caption, of one decoded image.
        resolution: in pixels.
        encode: one caption.
        forward: rows through a role's network, without a gradient.
        train: rows through the objective and back, the old policy's pass among them; told whether the reference's is too, and whether
            activations are recomputed.
        decode: latents to images.
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
    image: int
    resolution: int
    encode: Work
    forward: Line
    train: Callable[[bool, bool], Line]
    decode: Line


def build_pipeline(geometry: Geometry, dtype: str) -> Any:
    """What `SD3` reads of a pipeline, its modules on the meta device in the precisions that `load_pipeline` gives them."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.device("meta"):
        transformer: Any = SD3Transformer2DModel.from_config(dict(geometry.transformer))
        vae: Any = AutoencoderKL.from_config(dict(geometry.vae))
        encoders = [None if config is None else _encoder(config, dtype) for config in geometry.text_encoders]
    modules = {"transformer": transformer.to(DTYPES[dtype]), "vae": vae}
    modules |= {name: encoder for name, encoder in zip(("text_encoder", "text_encoder_2", "text_encoder_3"), encoders, strict=True)}
    for module in modules.values():
        if module is not None:
            module.requires_grad_(False)
    return SimpleNamespace(
        **modules,
        components=modules,
        tokenizer_3=SimpleNamespace(model_max_length=geometry.tokens[1]),
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        scheduler=SimpleNamespace(config=SimpleNamespace(shift=geometry.shift)),
    )


def _encoder(config: Config, dtype: str) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if config["model_type"] == "t5":
        encoder: Any = T5EncoderModel(T5Config.from_dict(dict(config)))
    else:
        encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))
    encoder = encoder.to(DTYPES[dtype])
    if dtype == "float16":
        for name, parameter in encoder.named_parameters():
            # transformers keeps these in fp32 where it is told fp16
            if any(kept in name.split(".") for kept in encoder._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
    return encoder


def costs_of(model: ModelSettings, rank: int, alpha: float, whole: bool = False) -> Costs:
    """The costs of a recipe's model; measured once a process for what they depend on.

    Args:
        whole: all weights are trained, instead of a LoRA.

    Raises:
        UserError: the model's shapes are not known, or its settings do not fit them.
    """
    # a plan is for GPUs, where "auto" is bfloat16
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    return _costs(model.path, model.revision, dtype, model.t5_length, model.resolution, rank, alpha, whole)


@cache
def _costs(
    path: str, revision: str | None, dtype: str, t5_length: int | None, resolution: int | None, rank: int, alpha: float, whole: bool
) -> Costs:
    geometry = find_geometry(path, revision)
    pipeline = build_pipeline(geometry, dtype)
    model = SD3(pipeline, t5_length=t5_length, resolution=resolution)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    network = weights_of(model.network)  # before adapters are on it
    with torch.device("meta"):
        policy = WholePolicy(model) if whole else LoraPolicy(model, rank=rank, alpha=alpha, seed=0)
    policy.changed()  # so that the old policy is not the current one, and has its own pass
    given = conditioning(geometry, model)
    many = batch(model, given, ROWS)
    with torch.no_grad():
        bringing = measure(lambda: policy._weights_for("old"))  # once, and kept: no row's work

    @cache
    def train(reference: bool, recompute: bool) -> Line:
        policy.recompute(recompute)
        return measure_rows(training(policy, many, reference))

    side = model.latent_shape[1] * pipeline.vae_scale_factor
    return Costs(
        source=geometry.source,
        dtype=dtype,
        network=network,
        encoders=weights_of(*encoders),
        vae=weights_of(pipeline.vae),
        trained=Weights(sum(p.numel() for p in policy.parameters), sum(p.nbytes for p in policy.parameters)),
        injected_weights=_injected_weights(policy),
        bringing=bringing.flops,
        latent=many.x0[0].nbytes,
        caption=sum(x.nbytes for x in given.distinct.values()),
        image=3 * side * side * 4,
        resolution=side,
        encode=_encode(geometry, model, encoders),
        forward=_forward(policy, many),
        train=train,
        decode=_decode(model),
    )


def _injected_weights(policy: Policy) -> int:
    """Bytes of what "old" brings along and does not hold anyway."""
    held = {weight.untyped_storage()._cdata for weight in policy._weights["old"].values()}
    return sum(weight.nbytes for weight in policy._weights_for("old").values() if weight.untyped_storage()._cdata not in held)


def conditioning(geometry: Geometry, model: SD3) -> Conditioning:
    """What the network reads of one caption, as the pipeline's `encode_prompt` makes it."""
    config: Any = model.network.config
    dtype = model.network.dtype
    length = geometry.tokens[0] + model.t5_length
    return Conditioning(
        {
            "encoder_hidden_states": torch.empty(1, length, config.joint_attention_dim, dtype=dtype, device="meta"),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim, dtype=dtype, device="meta"),
        },
        torch.zeros(1, dtype=torch.long, device="meta"),
    )


def batch(model: SD3, given: Conditioning, rows: int) -> TrainingBatch:
    """A batch to train on, of shapes alone."""
    x0, eps = (torch.empty(rows, *model.latent_shape, device="meta") for _ in range(2))
    t, advantages = (torch.empty(rows, device="meta") for _ in range(2))
    return TrainingBatch(x0, eps, t, advantages, given.select(torch.zeros(rows, dtype=torch.long, device="meta")))


def training(policy: Policy, rows: TrainingBatch, reference: bool) -> Callable[[], Tensor]:
    """The loss of one micro-batch, as `Learner` makes them; DiffusionNFT's stands for every method on the forward process."""
    objective = NFT(beta=1.0, advantage_clip=5.0, kl=float(reference), old_policy="linear")
    for parameter in policy.parameters:
        parameter.grad = torch.zeros_like(parameter)
    return lambda: objective.loss(policy, rows)[0].sum()


@torch.no_grad()
def _forward(policy: Policy, rows: TrainingBatch) -> Line:
    return measure_rows(lambda: policy.velocity("old", rows.x0, rows.t, rows.conditioning))


@torch.no_grad()
def _decode(model: SD3) -> Line:
    latents = torch.empty(ROWS, *model.latent_shape, device="meta")
    return measure_rows(lambda: model.decode(latents))


@torch.no_grad()
def _encode(geometry: Geometry, model: SD3, encoders: tuple[Any, ...]) -> Work:
    def ids(length: int) -> Tensor:
        return torch.zeros(1, length, dtype=torch.long, device="meta")

    def encode() -> None:
        for encoder in (encoder for encoder in encoders[:2] if encoder is not None):
            encoder(ids(geometry.tokens[0]), output_hidden_states=True)
        if encoders[2] is not None:
            encoders[2](ids(model.t5_length))

    return measure(encode)
