"""torch.compile for the network's repeated blocks, and without it where that fails."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowtilt.io.user_errors import first_line
from flowtilt.policy.roles import Policy
from flowtilt.seeding import generator

VARIANTS = 64
"""Compilations of one block's code: kinds of blocks, times with and without a gradient, LoRA, or a batch of one."""


def compile_blocks(policy: Policy, backend: str = "inductor") -> str:
    """Compiles block by block, and tries it; returns why it is done without, or "" where it works.

    One block stands for all of its kind, so this takes a minute or two where the whole network would take many.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    blocks: list[nn.Module] = list(policy.model.blocks)
    before = policy.evaluations
    try:
        for block in blocks:
            block._compiled_call_impl = _for_any_batch(torch.compile(block._call_impl, backend=backend))  # as nn.Module.compile does
        _try(policy)
    except Exception as error:  # a missing compiler, a driver, an operation that it does not know, …
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        return first_line(error)
    finally:
        policy.evaluations = before
        for parameter in policy.parameters:
            parameter.grad = None
    return ""


def _for_any_batch(call: Callable[..., Any]) -> Callable[..., Any]:
    """The number of images is left open, and nothing else: with lengths and widths open too, compiling takes a third longer."""

    def block(*args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return call(*args, **kwargs)

    return block


def _try(policy: Policy) -> None:
    """Every kind of pass that training makes, on two images of noise."""
    model = policy.model
    x = torch.randn(2, *model.latent_shape, generator=generator(0, "compile")).to(model.device)
    t = torch.full((2,), 0.5, device=model.device)
    given = model.encode([model.encode.blank] * 2)
    policy.velocity("current", x, t, given).square().mean().backward()
    with torch.no_grad():
        for role in ("old", "reference", "teacher"):
            policy.velocity(role, x, t, given)
