"""A plain loop of the structure that DiffusionNFT's public training script has, on flowtilt's model, prompts and numbers.

A micro-batch of images goes through captions, sampling, decoding, rewards and training together; each caption is encoded
once an image; adapters stay unmerged; old, current and reference velocities are three passes; training times are a loop
around backward. The network is fp32; in half precision it runs under autocast, as sampling and decoding do, with text encoders in
half precision and the VAE in fp32. Left out: its all-reduce in every backward pass, since this is one process.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor

from flowtilt import Trainer
from flowtilt.advantages import combine, group_advantages
from flowtilt.objectives import ema_decay
from flowtilt.objectives.batches import draw_times
from flowtilt.objectives.forward import old_policy_decay
from flowtilt.objectives.nft import optimality
from flowtilt.prompts import Prompt, PromptWalk
from flowtilt.rewards import score
from flowtilt.seeding import generator, noise
from flowtilt.solvers import solve


class PlainLoop:
    """The loop's own network, beside the text encoders, VAE and rewards of `trainer`.

    Args:
        trainer: where everything begins, the LoRA weights among it.
        folder: of the pipeline.
    """

    def __init__(self, trainer: Trainer, folder: str):
        self.recipe, self.trainer, self.model = trainer.recipe, trainer, trainer.policy.model
        self.device, self.pipeline = self.model.device, self.model.pipeline
        self.half = self.model.network.dtype != torch.float32
        network: Any = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
        self.network = network.to(self.device).requires_grad_(False).eval()
        lora = self.recipe.lora
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(self.model.lora_targets))
        for name in ("default", "old"):
            self.network.add_adapter(config, adapter_name=name)
        state, named = trainer.policy.state("current"), dict(self.network.named_parameters())
        self.current, self.old = ([named[n.removesuffix(".weight") + f".{a}.weight"] for n in state] for a in ("default", "old"))
        with torch.no_grad():
            for adapter in (self.current, self.old):
                for weight, value in zip(adapter, state.values(), strict=True):
                    weight.copy_(value)
        self.ema = [p.detach().clone() for p in self.current]
        o = self.recipe.optimizer
        self.optimizer = torch.optim.AdamW(self.current, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps)
        self.updates = 0

    def step(self, number: int, size: int, same_noise: bool = False) -> None:
        """Rollout `number`, counted from 1, `size` images at a time.

        Args:
            same_noise: flowtilt's, image by image on the CPU, for comparing; else drawn at once and where it is needed.
        """
        r, recipe, rewards = self.recipe.rollout, self.recipe, self.trainer.rewards
        images = r.images()
        drawn = PromptWalk(self.trainer.prompts, recipe.seed, recipe.tags).take((number - 1) * r.prompts, r.prompts)
        prompts = [drawn[i // r.images_per_prompt] for i in range(images)]
        self.network.enable_adapters()  # a step that ran out of memory may have left them off
        self.network.set_adapter("old")
        parts = [range(start, min(start + size, images)) for start in range(0, images, size)]
        kept = [self.rollout(number, rows, [prompts[i] for i in rows], same_noise) for rows in parts]
        x0, embeds, pooled = (torch.cat([part[k] for part in kept]) for k in range(3))
        total = combine({name: torch.cat([part[3][name] for part in kept]) for name in rewards}, self.trainer.method.rollouts.weights)
        groups = torch.arange(images) // r.images_per_prompt
        advantages = group_advantages(total, groups, recipe.advantage).to(self.device)
        self.network.set_adapter("default")
        order = torch.randperm(images, generator=generator(recipe.seed, "order", number)).tolist()
        for k in range(per := recipe.optimizer.steps_per_rollout):
            chunk = order[images * k // per : images * (k + 1) // per]
            micro = [chunk[start : start + size] for start in range(0, len(chunk), size)]
            self.update(number, micro, x0, embeds, pooled, advantages, same_noise)
        decay = old_policy_decay(recipe.objective.old_policy, self.updates)
        with torch.no_grad():
            for old, current in zip(self.old, self.current, strict=True):
                old.copy_(decay * old + (1 - decay) * current)

    @torch.no_grad()
    def rollout(self, step: int, rows: range, prompts: list[Prompt], same_noise: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Latents, embeddings and scores of one micro-batch."""
        r, vae = self.recipe.rollout, self.pipeline.vae
        texts = [p.text for p in prompts]
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.model.t5_length
        )
        if same_noise:
            positions = [(step, i // r.images_per_prompt, i % r.images_per_prompt) for i in rows]
            x = noise(self.recipe.seed, "rollout", positions, self.model.latent_shape).to(self.device)
        else:
            x = torch.randn(len(rows), *self.model.latent_shape, device=self.device)
        with self.autocast():
            sigmas = self.model.levels(r.steps)
            x = solve(lambda x, s: self.velocity(x, s, embeds, pooled), x, sigmas, r.solver)
            images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        return x, embeds, pooled, score(self.trainer.rewards, (images.float() / 2 + 0.5).clamp(0, 1), prompts)[0]

    def update(
        self,
        step: int,
        micro: Sequence[list[int]],
        x0: Tensor,
        embeds: Tensor,
        pooled: Tensor,
        advantages: Tensor,
        same_noise: bool,
    ) -> None:
        """One optimizer step on micro-batches of images."""
        times, images = self.recipe.objective.times_per_image, sum(map(len, micro))
        self.optimizer.zero_grad()
        for rows in micro:
            t, eps = self.draw(step, rows, same_noise)
            for j in range(times):
                loss = self.loss(x0[rows], eps[:, j], t[:, j], embeds[rows], pooled[rows], advantages[rows])
                (loss * len(rows) / (images * times)).backward()
        torch.nn.utils.clip_grad_norm_(self.current, self.recipe.optimizer.clip)
        self.optimizer.step()
        with torch.no_grad():
            decay = ema_decay(self.updates, self.recipe.ema)
            for ema, current in zip(self.ema, self.current, strict=True):
                ema.copy_(decay * ema + (1 - decay) * current)
        self.updates += 1

    def draw(self, step: int, rows: list[int], same_noise: bool) -> tuple[Tensor, Tensor]:
        """Times [n, times] and noise [n, times, ...] of images."""
        o, seed = self.recipe.objective, self.recipe.seed
        sigmas = self.model.levels(self.recipe.rollout.steps)
        between = partial(self.model.levels.at, steps=self.recipe.rollout.steps)
        times, eps = [], []
        for i in rows:
            rng = generator(seed, "train", step, i)
            times.append(draw_times(o.times, o.times_per_image, sigmas, between, rng))
            if same_noise:
                eps.append(torch.randn(o.times_per_image, *self.model.latent_shape, generator=rng))
        t = torch.stack(times).to(self.device)
        if same_noise:
            return t, torch.stack(eps).to(self.device)
        return t, torch.randn(len(rows), o.times_per_image, *self.model.latent_shape, device=self.device)

    def loss(self, x0: Tensor, eps: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor, advantages: Tensor) -> Tensor:
        """The loss of images at one time each, by three passes."""
        o, at = self.recipe.objective, t.view(-1, 1, 1, 1)
        x_t = (1 - at) * x0 + at * eps
        with self.autocast():
            self.network.set_adapter("old")
            with torch.no_grad():
                v_old = self.velocity(x_t, t, embeds, pooled)
            self.network.set_adapter("default")
            v = self.velocity(x_t, t, embeds, pooled)
            self.network.disable_adapters()
            with torch.no_grad():
                v_ref = self.velocity(x_t, t, embeds, pooled)
            self.network.enable_adapters()
        r = optimality(advantages + o.consistency, o.advantage_clip).view(-1, 1, 1, 1)
        total = torch.zeros((), device=x0.device)
        for share, mixed in ((r, (1 - o.beta) * v_old + o.beta * v), (1 - r, (1 + o.beta) * v_old - o.beta * v)):
            off = x_t - at * mixed - x0
            weight = off.detach().double().abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
            total = total + (share * off.square() / weight).mean()
        return o.advantage_clip * total / o.beta + o.kl * (v - v_ref).square().mean()

    def velocity(self, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """v at x [n, ...] and t [] or [n]."""
        return self.network(
            hidden_states=x, timestep=(1000 * t).expand(len(x)), encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
        )[0].float()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.model.network.dtype, enabled=self.half)
