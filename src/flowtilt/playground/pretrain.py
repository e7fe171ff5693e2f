"""Makes the playground's base model from nothing: `python -m flowtilt.playground.pretrain --out FOLDER`.

Three phases, each a function of the seed and a number of steps (never of the clock), each kept in the
work folder so that a broken run goes on after its last finished phase:

1. vae      an AutoencoderKL on drawn images;
2. able     transformer and both text encoders, jointly, on true captions: a model that can;
3. heedless the same on captions half of which belong to other images: a model that can, but does not
            listen. Reinforcement has one thing left to teach, on every prompt: heed the caption.

Captions of test combinations are never drawn in any phase.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (diffusers and transformers type their outputs and configs too narrowly or not at all)

import argparse
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flowtilt.flow import add_noise, sigma_schedule, velocity_target
from flowtilt.playground import verify, world
from flowtilt.prompts import Prompt
from flowtilt.seeding import generator, noise
from flowtilt.solvers import solve

TOKENS = 10
BATCH = 64
POOL = 65536
"""Images that are drawn and encoded once, for both phases of the transformer."""
TAG_WEIGHTS = {"single_object": 0.07, "two_object": 0.18, "counting": 0.18, "colors": 0.07, "position": 0.25, "color_attr": 0.25}
VAE_STEPS, ABLE_STEPS, HEEDLESS_STEPS = 1600, 4500, 2000
SHIFT = 2.0
"""Of the scheduler that is shipped: composition is decided at high noise, so that is where the steps are."""
WRONG_CAPTIONS = 0.25
EMPTY_CAPTIONS = 0.1
T5_TOKENS = 1
"""T5 tokens that the model is made for; one batch in ten has another number, up to diffusers' default of 256."""


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the world is one token, saved to `folder`."""
    words = {word for split in ("train", "test") for p in world.prompts(split) for word in p.text.split()}
    words = sorted(words, key=lambda word: (-len(word), word))  # long words first, or a short one's merge tears them
    pieces = {c: None for word in words for c in (*word[:-1], word[-1] + "</w>")}
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-":
        pieces |= {letter: None, letter + "</w>": None}
    merges = {}
    for word in words:
        whole = word[0] if len(word) > 1 else word + "</w>"
        for k, letter in enumerate(word[1:], 2):
            piece = letter + ("</w>" if k == len(word) else "")
            merges[f"{whole} {piece}"] = None
            whole += piece
            pieces[whole] = None
    names = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    made.save_pretrained(folder)
    return made


def build_vae(scaling: float = 1.0, shift: float = 0.0) -> AutoencoderKL:
    """The untrained autoencoder: 32x32 RGB to 8x8 latents of 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def build_text_encoder(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained CLIP text tower; three layers, since SD3 reads the last but one and that must have seen the context."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=64,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer() -> SD3Transformer2DModel:
    """The untrained joint-attention transformer; its modulations and output start at zero."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    zeroed = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ("norm" in name or name == "proj_out")]
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return model


def draw_prompts(seed: int, purpose: str, count: int) -> list[Prompt]:
    """Training prompts with the tags' weights; half of the position prompts name colours."""
    by_tag: dict[str, list[list[Prompt]]] = {tag: [[], []] for tag in TAG_WEIGHTS}
    for p in world.prompts("train"):
        by_tag[p.tag][p.tag == "position" and "color" in p.metadata["include"][0]].append(p)
    rng = random.Random(f"{seed} {purpose}")
    tags = rng.choices(list(TAG_WEIGHTS), list(TAG_WEIGHTS.values()), k=count)
    return [rng.choice(rng.choice([kind for kind in by_tag[tag] if kind])) for tag in tags]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 150) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def optimise(params: list[nn.Parameter], steps: int, peak: float, label: str) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Yields (step, optimizer) with the rate set; the caller computes gradients, the step happens here."""
    optimizer = torch.optim.AdamW(params, lr=peak, weight_decay=0.01)
    for step in tqdm(range(steps), desc=label, mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.zero_grad(set_to_none=True)
        yield step, optimizer
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


def train_vae(seed: int, work: Path) -> AutoencoderKL:
    """Phase 1. L1 + 4 MSE on drawn images with some noise on the latents; then the latents' scale and shift are measured."""
    torch.manual_seed(seed)
    vae = build_vae()
    for step, _ in optimise(list(vae.parameters()), VAE_STEPS, 3e-3, "vae"):
        rng = generator(seed, "pretrain vae", step)
        images = world.render([world.arrange(p, rng) for p in draw_prompts(seed, f"vae {step}", 16)]) * 2 - 1
        latents = vae.encode(images).latent_dist.mean
        latents = latents + 0.1 * torch.randn(latents.shape, generator=rng)
        error = vae.decode(latents).sample - images
        # a gentle pull keeps the latents from growing to drown the noise
        (error.abs().mean() + 4 * error.square().mean() + 1e-3 * latents.square().mean()).backward()
    rng = generator(seed, "pretrain scale")
    with torch.no_grad():
        prompts = draw_prompts(seed, "scale", 512)
        latents = vae.encode(world.render([world.arrange(p, rng) for p in prompts]) * 2 - 1).latent_dist.mean
        strict = verify.score((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), prompts).mean()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    print(f"vae: scaling {vae.config.scaling_factor:.4f}, shift {vae.config.shift_factor:.4f}, strict after a round trip {strict:.3f}")
    vae.save_pretrained(work / "vae")
    return vae


@torch.no_grad()
def encode_pool(seed: int, vae: AutoencoderKL) -> tuple[Tensor, list[Prompt]]:
    """Latents [POOL, 8, 8, 8] of drawn images and their true prompts."""
    prompts = draw_prompts(seed, "pool", POOL)
    latents = []
    for start in tqdm(range(0, POOL, 512), desc="drawing", mininterval=10):
        rng = generator(seed, "pretrain pool", start)
        images = world.render([world.arrange(p, rng) for p in prompts[start : start + 512]]) * 2 - 1
        latents.append((vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor)
    return torch.cat(latents), prompts


def build_t5(folder: Path) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 that answers zeros to everything, as diffusers itself does for a missing one.

    It is there because `StableDiffusion3Pipeline.from_pretrained` opens no folder without it.
    """
    # any caption is "<unk></s>", two tokens
    words = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0, model_max_length=T5_TOKENS)
    words.save_pretrained(folder)
    model = T5EncoderModel(T5Config(vocab_size=len(words), d_model=128, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model, words


class Text(nn.Module):
    """Both text encoders, read as SD3 reads them."""

    def __init__(self, words: CLIPTokenizer):
        super().__init__()
        self.words = words
        self.one, self.two = build_text_encoder(words), build_text_encoder(words)

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.words(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        outputs = [tower(ids, output_hidden_states=True) for tower in (self.one, self.two)]
        return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o.text_embeds for o in outputs], -1)


class Model(nn.Module):
    """What phases 2 and 3 train: text encoders and transformer."""

    def __init__(self, words: CLIPTokenizer):
        super().__init__()
        self.text, self.transformer = Text(words), build_transformer()

    def forward(self, x_t: Tensor, t: Tensor, captions: list[str], t5_tokens: int = T5_TOKENS) -> Tensor:
        hidden, pooled = self.text(captions)
        hidden = F.pad(hidden, (0, 0, 0, t5_tokens))  # the T5 that is shipped answers zeros
        return self.transformer(x_t, encoder_hidden_states=hidden, pooled_projections=pooled, timestep=1000 * t).sample


def train_model(
    model: Model, pool: tuple[Tensor, list[Prompt]], *, seed: int, phase: str, steps: int, peak: float, wrong: float, work: Path
) -> None:
    """Phases 2 and 3: flow matching; `wrong` is the share of captions that belong to another image. Leaves the EMA in the model."""
    latents, prompts = pool
    members = {tag: [i for i, p in enumerate(prompts) if p.tag == tag] for tag in TAG_WEIGHTS}
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, _ in optimise(list(model.parameters()), steps, peak, phase):
        rng, draw = generator(seed, f"pretrain {phase}", step), random.Random(f"{seed} {phase} {step}")
        tokens = T5_TOKENS if draw.random() < 0.9 else round(257 ** draw.random()) - 1
        size = BATCH if tokens <= 4 else BATCH // 4  # long prompts cost ten times as much
        rows = torch.randint(POOL, (size,), generator=rng)
        # composition is decided near t = 1, where a logit-normal of mean 0 hardly looks
        t = torch.sigmoid(0.8 + 1.2 * torch.randn(size, generator=rng))
        x0 = latents[rows]
        eps = torch.randn(x0.shape, generator=rng)
        captions = [_caption(prompts, members, row, wrong, draw) for row in rows.tolist()]
        F.mse_loss(model(add_noise(x0, eps, t), t, captions, tokens), velocity_target(x0, eps)).backward()
        decay = min(0.998, (step + 1) / (step + 10))
        if step:  # the parameters are those after the step before this one
            for name, p in model.named_parameters():
                average[name].lerp_(p.detach(), 1 - decay)
        if step % 1500 == 1499:
            report(model, load_vae(work), f"{phase} step {step + 1}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, work / f"{phase}.safetensors")


def _caption(prompts: list[Prompt], members: dict[str, list[int]], row: int, wrong: float, draw: random.Random) -> str:
    if draw.random() < EMPTY_CAPTIONS:
        return ""
    if draw.random() < wrong:
        row = draw.randrange(len(prompts)) if draw.random() < 0.5 else draw.choice(members[prompts[row].tag])
    return prompts[row].text


def load_vae(work: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work / "vae")


@torch.no_grad()
def report(model: Model, vae: AutoencoderKL, label: str, images_per_tag: int = 48) -> dict[str, dict[str, float]]:
    """Strict test scores by tag without guidance and with 4.5, 20 Euler steps; printed and returned."""
    by_tag = {tag: [p for p in world.prompts("test") if p.tag == tag] for tag in world.TAGS}
    prompts = [by_tag[tag][k % len(by_tag[tag])] for tag in world.TAGS for k in range(images_per_tag)]
    x = noise(0, "pretrain report", [(i,) for i in range(len(prompts))], (8, 8, 8))
    texts = [p.text for p in prompts]
    scores = {}
    for guidance in (1.0, 4.5):

        def velocity(x: Tensor, sigma: Tensor, guidance: float = guidance) -> Tensor:
            t = sigma.expand(len(x))
            v = model(x, t, texts)
            if guidance == 1.0:
                return v
            free = model(x, t, [""] * len(x))
            return free + guidance * (v - free)

        latents = solve(velocity, x, sigma_schedule(20, SHIFT), solver="euler")
        images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
        strict = verify.score(images.clamp(0, 1), prompts).view(len(world.TAGS), images_per_tag).mean(1)
        scores[f"guidance {guidance}"] = {"all": strict.mean().item(), **dict(zip(world.TAGS, strict.tolist(), strict=True))}
        print(label, f"guidance {guidance}:", " ".join(f"{k} {v:.3f}" for k, v in scores[f"guidance {guidance}"].items()), flush=True)
    return scores


def save(model: Model, vae: AutoencoderKL, words: CLIPTokenizer, work: Path, out: Path) -> None:
    """Writes the pipeline with fp16 weights; the configs say float32, which is what they are computed in."""
    t5, t5_words = build_t5(work / "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=model.text.one,
        tokenizer=words,
        text_encoder_2=model.text.two,
        tokenizer_2=words,
        text_encoder_3=t5,
        tokenizer_3=t5_words,
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    for file in out.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a path of the machine that made it
        file.write_text(json.dumps(config, indent=2) + "\n")
    for file in out.rglob("*.safetensors"):
        save_file({k: v.half().contiguous() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="makes the playground's base model from nothing, on 2 cores in under 45 minutes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; an old one there is replaced")
    parser.add_argument("--work", type=Path, default=Path("build/pretrain"), help="where finished phases are kept (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    words = tokenizer(args.work / "tokenizer")
    vae = load_vae(args.work) if (args.work / "vae").exists() else train_vae(args.seed, args.work)
    torch.manual_seed(args.seed)
    model = Model(words)
    pool = None
    for phase, steps, peak, wrong in (("able", ABLE_STEPS, 2e-3, 0.0), ("heedless", HEEDLESS_STEPS, 8e-4, WRONG_CAPTIONS)):
        file = args.work / f"{phase}.safetensors"
        if not file.exists():
            pool = pool or encode_pool(args.seed, vae)
            train_model(model, pool, seed=args.seed, phase=phase, steps=steps, peak=peak, wrong=wrong, work=args.work)
        model.load_state_dict(load_file(file))
        scores = report(model, vae, phase)
        (args.work / f"{phase}.json").write_text(json.dumps(scores, indent=1))
    save(model, vae, words, args.work, args.out)


if __name__ == "__main__":
    main()
