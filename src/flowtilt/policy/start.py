"""Starting a policy from a LoRA."""

import torch

from flowtilt.errors import UserError
from flowtilt.lora import Lora, baked
from flowtilt.lora.fit import check, shapes_of
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import ROLES


def load_lora(policy: LoraPolicy, lora: Lora) -> None:
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
