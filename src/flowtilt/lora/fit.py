"""Whether a LoRA belongs to a network."""

from collections.abc import Mapping, Sequence

from torch import nn

from flowtilt.errors import UserError
from flowtilt.lora import Lora


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by their own names, also where PEFT has put one into a layer of its own."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return {name.removesuffix(".base_layer"): module for name, module in found if ".lora_" not in name}


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """[out, in] of each linear layer by its own name."""
    return {name: tuple(layer.weight.shape) for name, layer in linear_layers(network).items()}


def check(lora: Lora, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises UserError unless every layer of the LoRA is among those of the network, with its shape."""
    unknown = [layer for layer in lora.layers if layer not in shapes]
    if unknown:
        known = next((layer for layer in shapes if layer.endswith("to_q")), min(shapes, default="none"))
        raise UserError(
            f"lora {lora.source}: {len(unknown)} of its {len(lora.layers)} layers are not in this model, {min(unknown)} first, whose own "
            f"have names such as {known} {list(shapes.get(known, ()))}; it belongs to another base"
        )
    for layer, (a, b) in lora.layers.items():
        if (len(b), a.shape[1]) != tuple(shapes[layer]):
            raise UserError(
                f"lora {lora.source}: {layer} is [{len(b)}, {a.shape[1]}], but this model's is {list(shapes[layer])}; "
                "it belongs to another base"
            )
