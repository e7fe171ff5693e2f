"""Whether a LoRA belongs to a network, and putting one into a policy that is about to be trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from flowtilt.errors import UserError
from flowtilt.lora import Lora, baked
from flowtilt.policy.roles import ROLES, Policy


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


def load_lora(policy: Policy, lora: Lora) -> None:
    """Every role of the policy starts as this LoRA; layers that it lacks start as they would without it, from B = 0.

    Another scale than the policy's goes into B: bit for bit the same update where their ratio is a power of two.

    Raises:
        UserError: another rank than the policy's, a layer that the policy does not train, or another base.
    """
    check(lora, shapes_of(policy.model.network))
    rank, alpha = policy.config.r, float(policy.config.lora_alpha)
    ranks = lora.ranks()
    if ranks != [rank]:
        theirs = ", ".join(map(str, ranks))
        raise UserError(f"lora {lora.source}: rank {theirs}, but lora.rank is {rank}; set it to the file's own")
    lora = baked(lora, alpha / rank)
    state = policy.state("current")
    trained = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    beyond = lora.layers.keys() - trained
    if beyond:
        ends = ", ".join(policy.model.lora_targets)
        raise UserError(
            f"lora {lora.source}: changes {len(beyond)} layers that are not trained, {min(beyond)} first; those that are end in {ends}"
        )
    for layer in trained:
        a, b = lora.layers.get(layer, (state[f"{layer}.lora_A.weight"], torch.zeros_like(state[f"{layer}.lora_B.weight"])))
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = a, b
    for role in ROLES:
        policy.load_state(role, state)
