"""One NFT step of the playground: flowtilt against a plain loop of the reference's structure.

    python benchmarks/step.py --rounds 5

The plain loop does what DiffusionNFT's public training script does, on the same network, noise and
numbers: a micro-batch of images goes through sampling, decoding and training together; each caption is
encoded once an image; adapters stay unmerged; old, current and reference velocities are three passes;
training times are a loop around backward. Both take turns in one process. The LoRA weights after the
first step are compared, so that a difference in speed is not one in maths.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from flowtilt import Trainer, load_recipe
from flowtilt.advantages import combine, group_advantages
from flowtilt.environment import processor
from flowtilt.flow import sigma_schedule
from flowtilt.objectives import ema_decay
from flowtilt.objectives.nft import old_policy_decay, optimality
from flowtilt.playground import pipeline_path
from flowtilt.prompts import PromptWalk
from flowtilt.rewards import score
from flowtilt.rollout import draw_times
from flowtilt.seeding import generator, noise

OVERRIDES = ["objective.kl=1e-4", "evaluate.every=0", "evaluate.images=1"]


class PlainLoop:
    """The reference's structure with `size` images a micro-batch."""

    def __init__(self, trainer: Trainer, size: int):
        self.recipe, self.size, self.trainer = trainer.recipe, size, trainer
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
        self.network = self.pipeline.transformer.requires_grad_(False)
        config = LoraConfig(
            r=self.recipe.lora.rank, lora_alpha=self.recipe.lora.alpha, target_modules=list(trainer.policy.model.lora_targets)
        )
        for name in ("default", "old"):
            self.network.add_adapter(config, adapter_name=name)
        state = trainer.policy.state("current")
        named = dict(self.network.named_parameters())
        with torch.no_grad():
            for adapter in ("default", "old"):
                for name, value in state.items():
                    named[name.removesuffix(".weight") + f".{adapter}.weight"].copy_(value)
        self.network.set_adapter("default")
        self.current = [named[name.removesuffix(".weight") + ".default.weight"] for name in state]
        self.old = [named[name.removesuffix(".weight") + ".old.weight"] for name in state]
        self.ema = [p.detach().clone() for p in self.current]
        o = self.recipe.optimizer
        self.optimizer = torch.optim.AdamW(self.current, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps)
        self.step_number = self.updates = 0
        self.shift = self.pipeline.scheduler.config.shift

    def velocity(self, x, t, embeds, pooled):
        return self.network(
            hidden_states=x, timestep=(1000 * t).expand(len(x)), encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
        )[0]

    def encode(self, prompts):
        texts = [p.text for p in prompts]
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=1
            )
        return embeds, pooled

    def step(self):
        r, recipe = self.recipe.rollout, self.recipe
        self.step_number += 1
        step = self.step_number
        number = r.prompts * r.images_per_prompt
        drawn = PromptWalk(self.trainer.prompts, recipe.seed).draw((step - 1) * r.prompts, r.prompts)
        prompts = [drawn[i // r.images_per_prompt] for i in range(number)]
        sigmas = sigma_schedule(r.steps, self.shift)
        kept = []
        self.network.set_adapter("old")
        for start in range(0, number, self.size):
            rows = range(start, min(start + self.size, number))
            own = [prompts[i] for i in rows]
            embeds, pooled = self.encode(own)
            x = noise(recipe.seed, "rollout", [(step, i // r.images_per_prompt, i % r.images_per_prompt) for i in rows], (8, 8, 8))
            with torch.no_grad():
                for s, s_next in itertools.pairwise(sigmas):
                    x = x + (s_next - s) * self.velocity(x, s, embeds, pooled)
                vae = self.pipeline.vae
                images = (vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5).clamp(0, 1)
            scores, _ = score(self.trainer.rewards, images, own)
            kept.append((x, embeds, pooled, scores))
        x0, embeds, pooled = (torch.cat([part[k] for part in kept]) for k in range(3))
        rewards = combine({n: torch.cat([part[3][n] for part in kept]) for n in self.trainer.rewards}, self.trainer.weights)
        advantages = group_advantages(rewards, torch.arange(number) // r.images_per_prompt, recipe.advantage)
        self.network.set_adapter("default")
        order = torch.randperm(number, generator=generator(recipe.seed, "order", step)).tolist()
        per = recipe.optimizer.steps_per_rollout
        for k in range(per):
            self.update(step, order[number * k // per : number * (k + 1) // per], x0, embeds, pooled, advantages, sigmas)
        decay = old_policy_decay(recipe.objective.old_policy, self.updates)
        with torch.no_grad():
            for old, current in zip(self.old, self.current, strict=True):
                old.copy_(decay * old + (1 - decay) * current)

    def update(self, step, chunk, x0, embeds, pooled, advantages, sigmas):
        settings = self.recipe.objective
        self.optimizer.zero_grad()
        for start in range(0, len(chunk), self.size):
            rows = chunk[start : start + self.size]
            times, eps = [], []
            for i in rows:
                rng = generator(self.recipe.seed, "train", step, i)
                times.append(draw_times(settings.times, settings.times_per_image, sigmas, self.shift, rng))
                eps.append(torch.randn(settings.times_per_image, 8, 8, 8, generator=rng))
            for j in range(settings.times_per_image):
                t = torch.stack([one[j] for one in times])
                loss = self.loss(x0[rows], torch.stack([one[j] for one in eps]), t, embeds[rows], pooled[rows], advantages[rows])
                (loss * len(rows) / (len(chunk) * settings.times_per_image)).backward()
        torch.nn.utils.clip_grad_norm_(self.current, self.recipe.optimizer.clip)
        self.optimizer.step()
        with torch.no_grad():
            decay = ema_decay(self.updates, self.recipe.ema)
            for ema, current in zip(self.ema, self.current, strict=True):
                ema.copy_(decay * ema + (1 - decay) * current)
        self.updates += 1

    def loss(self, x0, eps, t, embeds, pooled, advantages):
        o, at = self.recipe.objective, t.view(-1, 1, 1, 1)
        x_t = (1 - at) * x0 + at * eps
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
        total = 0.0
        for share, mixed in ((r, (1 - o.beta) * v_old + o.beta * v), (1 - r, (1 + o.beta) * v_old - o.beta * v)):
            off = x_t - at * mixed - x0
            weight = off.detach().double().abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
            total = total + share * off.square() / weight
        return o.advantage_clip * total.mean() / o.beta + o.kl * (v - v_ref).square().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[9, 18, 36, 72, 144], help="micro-batches of the plain loop; 9 is the reference's"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_recipe("playground", [*OVERRIDES, f"run={folder}/run"]))
        begun = [p.detach().clone() for p in trainer.policy.parameters]
        plain = {size: PlainLoop(trainer, size) for size in args.sizes}
        seconds, phases, differences = {"flowtilt": [], **{f"plain {size}": [] for size in args.sizes}}, [], {}
        for round_number in range(args.rounds + 1):
            begin = time.perf_counter()
            metrics = trainer._step()
            took = {"flowtilt": time.perf_counter() - begin}
            for size, loop in plain.items():
                begin = time.perf_counter()
                loop.step()
                took[f"plain {size}"] = time.perf_counter() - begin
                if round_number == 0:
                    pairs = zip(loop.current, trainer.policy.parameters, strict=True)
                    apart = [
                        (float((a - b).detach().norm()), float((b - c).detach().norm())) for (a, b), c in zip(pairs, begun, strict=True)
                    ]
                    differences[size] = math.hypot(*(d for d, _ in apart)) / math.hypot(*(m for _, m in apart))
            if round_number:  # the first round warms up
                phases.append({name: value for name, value in metrics.items() if name.startswith("time/")})
                for name, value in took.items():
                    seconds[name].append(value)
            print(f"round {round_number}:", "  ".join(f"{name} {value:.2f} s" for name, value in took.items()), flush=True)
    print(f"difference of the LoRA weights after one step, relative to how far they moved: {max(differences.values()):.1e}")
    entries = []
    for name, values in seconds.items():
        ratios = sorted(v / f for v, f in zip(values, seconds["flowtilt"], strict=True))
        entry = {"method": name, "seed": 0, "seconds": values, "median": statistics.median(values), "ratio": statistics.median(ratios)}
        entries.append(entry | {"ratio_range": [ratios[0], ratios[-1]]})
        print(f"{name:12} median {entry['median']:.2f} s   {entry['ratio']:.2f} x flowtilt ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    shares = {name: statistics.median(p[name] / sum(p.values()) for p in phases) for name in phases[0]}
    print("share of a step:", ", ".join(f"{name.removeprefix('time/')} {share:.1%}" for name, share in shares.items()))
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    common = {"command": "python " + " ".join(["benchmarks/step.py", *sys.argv[1:]]), "machine": machine}
    entries[0] |= {"phases": shares, "relative_weight_difference_after_one_step": differences}
    args.output.write_text(json.dumps([entry | common for entry in entries], indent=1) + "\n")


if __name__ == "__main__":
    main()
