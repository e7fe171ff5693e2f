"""Images of a stock diffusers pipeline from given noise, to compare with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


@torch.no_grad()
def stock_images(
    pipeline: Any, captions: Sequence[str], noise: Tensor, steps: int, shift: float, options: Mapping[str, object], *, stock: bool = False
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], fp32 on the CPU, of the pipeline's own call with Euler steps.

    Args:
        noise: as the pipeline takes `latents`.
        shift: of the noise levels, for a pipeline whose scheduler is another one.
        options: further arguments of the call; see `Model.call_options`.
        stock: leave `sigmas` to the pipeline; else its rule for the levels is applied once.
    """
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    given = dict(options)
    if isinstance(given.get("negative_prompt"), str):
        given["negative_prompt"] = [given["negative_prompt"]] * len(captions)
    if not stock:
        given["sigmas"] = [1 - k / steps for k in range(steps)]
    return pipeline(prompt=list(captions), num_inference_steps=steps, latents=noise, output_type="pt", **given).images.float().cpu()
