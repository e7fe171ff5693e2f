"""Few stochastic steps in plain diffusers: a scheduler that samples as `rollout.Sampler` does with "cps"."""

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowtilt.flow import sigma_schedule
from flowtilt.seeding import noise
from flowtilt.solvers import sde_step

# a saved pipeline names this module, and diffusers looks among its names for the kind of thing that it is to load
__all__ = ["CPSScheduler", "SchedulerMixin"]


class CPSScheduler(FlowMatchEulerDiscreteScheduler):
    """Coefficient-preserving stochastic steps (arXiv 2509.05952) at the noise levels of `flow.sigma_schedule`.

        x' = (1 - s') x0_hat + s' cos(eta pi / 2) eps_hat + s' sin(eta pi / 2) z,    z ~ N(0, I)

    computed in fp32. The last step gives x0_hat. `pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)`.

    Attributes:
        generator: the source of z: one for the batch, or a list with one per image, which makes an image independent
            of its batch. None, the default, derives z from the image's first latents. A pipeline uses its own
            `generator` for these latents only, so equal generators give equal images, in any batch.

    Args:
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len,
        max_image_seq_len, time_shift_type: as diffusers' own.
        invert_sigmas, shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, stochastic_sampling:
            other levels or steps than these; only here to be refused.
        use_flow_sigmas: always; tells pipelines, FLUX.1's, that levels are the scheduler's own.
        eta: how much of the noise is new, in [0, 1]; 0 is Euler, 1 noises x0_hat anew.

    Raises:
        ValueError: an eta outside [0, 1], or one of the settings that are refused.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        use_flow_sigmas: bool = True,
        eta: float = 0.9,
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"CPSScheduler: eta must be within 0 and 1, not {eta}")
        refused = {
            "invert_sigmas": invert_sigmas,
            "shift_terminal": shift_terminal,
            "use_karras_sigmas": use_karras_sigmas,
            "use_exponential_sigmas": use_exponential_sigmas,
            "use_beta_sigmas": use_beta_sigmas,
            "stochastic_sampling": stochastic_sampling,
        }
        if odd := [f"{name} = {value}" for name, value in refused.items() if value]:
            raise ValueError(f"CPSScheduler: does not go with {', '.join(odd)}; its levels are shifted evenly and its noise is eta's")
        if not use_flow_sigmas:
            raise ValueError("CPSScheduler: use_flow_sigmas = False would have pipelines give levels that are not shifted")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            time_shift_type=time_shift_type,
            **refused,
        )
        self.eta = eta
        self.num_inference_steps: int | None = None
        self.generator: torch.Generator | Sequence[torch.Generator] | None = None
        self._seeds: list[int] | None = None

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        # diffusers looks up names in its own module, where this class is not
        return [cls, FlowMatchEulerDiscreteScheduler]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Sets the noise levels.

        Args:
            num_inference_steps: how many, at the shifted levels of our own evaluations.
            sigmas: instead, the levels themselves, falling from at most 1, without the last 0. They are not shifted again.
            mu: with dynamic shifting, which depends on the resolution: the shift is e^mu, or mu itself if it is "linear".
            timesteps: instead, the levels times `num_train_timesteps`; beside `sigmas`, what the network is given for them.

        Raises:
            ValueError: no levels or numbers that disagree, levels that do not fall, or no mu where one is needed.
        """
        scale = self.config["num_train_timesteps"]
        given = sigmas if sigmas is not None else None if timesteps is None else [float(t) / scale for t in timesteps]
        if given is None:
            if num_inference_steps is None:
                raise ValueError("CPSScheduler: give num_inference_steps, sigmas or timesteps")
            levels = sigma_schedule(num_inference_steps, self._shift_of(mu))
        else:
            kind = "timesteps" if sigmas is None else "sigmas"
            levels = torch.tensor([*map(float, given), 0.0], dtype=torch.float32)
            if num_inference_steps not in (None, len(given)):
                raise ValueError(f"CPSScheduler: {len(given)} {kind} for num_inference_steps = {num_inference_steps}")
            if timesteps is not None and len(timesteps) != len(given):
                raise ValueError(f"CPSScheduler: {len(given)} sigmas for {len(timesteps)} timesteps")
            if len(levels) < 2 or not all(a > b for a, b in pairwise(levels.tolist())) or levels[0] > 1:
                most = f"(0, {scale}]" if sigmas is None else "(0, 1]"
                raise ValueError(f"CPSScheduler: {kind} must fall within {most}, without the last 0, not {list(sigmas or timesteps or [])}")
        self.num_inference_steps = len(levels) - 1
        self.sigmas = levels  # on the CPU, where reading one waits for no device
        chosen = levels[:-1] * scale if timesteps is None else torch.tensor([*map(float, timesteps)], dtype=torch.float32)
        self.timesteps = chosen.to(device)
        self._step_index = None
        self._begin_index = None
        self._seeds = None

    def _shift_of(self, mu: float | None) -> float:
        """The k of k t / (1 + (k - 1) t)."""
        if not self.config["use_dynamic_shifting"]:
            return self.shift
        if mu is None:
            raise ValueError("CPSScheduler: use_dynamic_shifting needs mu")
        return mu if self.config["time_shift_type"] == "linear" else math.exp(mu)

    # without the parent's options that are refused here or do nothing
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step; which one is counted, from `begin_index`, never looked up.

        Args:
            model_output: v [N, ...].
            timestep: not read.
            sample: x [N, ...].
            generator: as the attribute, which it overrides.

        Returns:
            x' [N, ...] in the dtype of v, alone in a tuple or as `.prev_sample`.

        Raises:
            ValueError: more steps than were set, or not one generator per image.
        """
        j = (self._begin_index or 0) if self._step_index is None else self._step_index
        if self.num_inference_steps is None or j >= self.num_inference_steps:
            raise ValueError("CPSScheduler: no step is left; call set_timesteps first")
        s, s_next = self.sigmas[j : j + 2].tolist()
        x, v = sample.float(), model_output.float()
        certain = s_next == 0 or self.eta == 0
        z = torch.zeros_like(x) if certain else self._noise(x, j, self.generator if generator is None else generator)
        x_next: Any = sde_step(x, v, s, s_next, z, "cps", self.eta)[0].to(model_output.dtype)  # diffusers says FloatTensor
        self._step_index = j + 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def _noise(self, x: Tensor, j: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        """Standard normal noise [N, ...] fp32 of step j."""
        if generator is None:
            self._seeds = self._seeds or [_digest(latents) for latents in x]
        elif isinstance(generator, torch.Generator):
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        sources, what = (self._seeds or [], "first latents") if generator is None else (generator, "generators")
        if len(sources) != len(x):
            raise ValueError(f"CPSScheduler: {len(sources)} {what} for {len(x)} images")
        if generator is None:
            return torch.cat([noise(seed, "cps", [(j,)], x.shape[1:]) for seed in self._seeds or []]).to(x.device)
        return randn_tensor(x.shape, generator=list(generator), device=x.device, dtype=torch.float32)


def _digest(latents: Tensor) -> int:
    """A number that depends on every bit of these values, whatever their device."""
    return int.from_bytes(hashlib.sha256(latents.detach().float().cpu().contiguous().numpy().tobytes()).digest()[:8], "big")
