"""A frozen base in 8 or 4 bits per weight, through torchao: the linear layers of the repeated blocks, each dequantised as it is used.

"int8" has a scale for each output channel, "nf4" (arXiv 2305.14314) one of 8 bits for each 64 weights. All else of the network keeps its
precision, and so do the LoRAs on it, which are fp32 as always.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.io.user_errors import first_line
from flowtilt.models.base import Model

BYTES = {"int8": 1.0, "nf4": 0.516}
"""Per weight of a quantised layer, scales included."""
BLOCK, SCALES = 64, 256
"""Weights of nf4 that share a scale, and scales that share theirs."""


def quantize(model: Model, kind: str, device: torch.device) -> None:
    """Quantises the network of a model, which may be elsewhere, layer by layer on `device`, where it then stays.

    Raises:
        UserError: torchao is missing, or this device can't.
    """
    _check(kind, device)
    for block in model.blocks:
        for layer in layers(block, kind):
            layer.to(device)
            _quantize(layer, kind)
    model.network.to(device)
    model.protocol = {**model.protocol, "quantize": kind}


@contextmanager
def unmerged() -> Iterator[None]:
    """Inside, PEFT does not warn that it can't merge what it puts on quantised layers: here nothing is merged into them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        yield


def is_quantized(model: Model) -> bool:
    """Whether its network's weights are quantised, so that none can be merged into them."""
    return "quantize" in model.protocol


def layers(block: nn.Module, kind: str) -> list[nn.Linear]:
    """Those of a block that are quantised; a few of odd sizes are not in nf4."""
    found = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return [layer for layer in found if kind == "int8" or layer.weight.numel() % (BLOCK * SCALES) == 0]


def _quantize(layer: nn.Linear, kind: str) -> None:
    # imported here: it is an extra, and takes seconds
    from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4  # pyright: ignore[reportMissingImports]

    if kind == "int8":
        quantize_(layer, Int8WeightOnlyConfig())
    else:
        layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), BLOCK, SCALES), requires_grad=False)


def _check(kind: str, device: torch.device) -> None:
    """Raises UserError where one small layer can't be quantised and passed forward and backward."""
    try:
        layer = nn.Linear(SCALES, BLOCK, device=device).requires_grad_(False)
        x = torch.ones(1, SCALES, device=device, requires_grad=True)
        _quantize(layer, kind)
        y: Tensor = layer(x)
        y.sum().backward()
    except ImportError as error:
        raise UserError(f"model.quantize: {first_line(error)}; install it with: pip install 'flowtilt[quantize]'") from None
    except Exception as error:  # whatever a kernel raises on a device that has none
        raise UserError(f"model.quantize: {kind!r} can't be used on {device.type} here: {first_line(error)}; leave it out") from None
