"""All weights of a network in roles: fp32 master weights for each, beside the base's own, which are the reference.

On a half-precision base a forward brings its role's weights rounded to the base's precision, layer by layer as the base has it;
the gradient reaches the fp32 weights, and so do AdamW's steps, which half precision would round away.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowtilt.errors import UserError
from flowtilt.io.tensors import save_file
from flowtilt.models.base import Model
from flowtilt.policy.roles import ROLES, Policy

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""What diffusers calls the weights of a network in its folder."""
BARE = ("reference", "teacher")
"""The roles that are the base."""


class WholePolicy(Policy):
    """A network all of whose weights are trained; tables that it computes, as of positions, stay.

    Args:
        model: its network keeps the base's weights.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        own = {name: held(weight) for name, weight in model.network.named_parameters() if weight.is_floating_point()}
        self._dtypes: dict[str, torch.dtype] = {name: weight.dtype for name, weight in own.items()}
        for role in ROLES:
            self._weights[role] = {
                name: nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=role == "current")
                for name, weight in own.items()
            }
        self.parameters = list(self._weights["current"].values())

    def knows(self) -> tuple[str, ...]:
        """Every role that has a velocity."""
        return (*self._weights, *BARE)

    def _is_bare(self, role: str) -> bool:
        return role in BARE

    def _made(self, role: str) -> dict[str, Tensor]:
        return {name: weight.to(self._dtypes[name]) for name, weight in self._weights[role].items()}

    def whole(self, role: str) -> dict[str, Tensor]:
        """A role's weights in the base's precision, by name."""
        return self._made(role)

    def save(self, folder: str, role: str = "ema") -> None:
        """Writes a network's folder, as `from_pretrained` of its class reads it: config.json and the weights in the base's precision."""
        place, network = Path(folder), self.model.network
        place.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in json.loads(network.to_json_string()).items() if key != "_name_or_path"}
        (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        with torch.no_grad():
            tensors = network.state_dict() | self.whole(role)
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, place / WEIGHTS, {"format": "pt"})


def held(weight: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def read_weights(file: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file, on the CPU; tables that a network computes may be left out.

    Args:
        own: those of the network that they are for.

    Raises:
        UserError: the file can't be read, or has other names or shapes.
    """
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None
    shapes = {name: x.shape for name, x in own.items()}
    wrong = [name for name, x in weights.items() if shapes.get(name) != x.shape]
    if wrong:
        raise UserError(
            f"{file}: {len(wrong)} of its {len(weights)} tensors are not in this model, or of another shape, {min(wrong)} first; "
            "they belong to another base"
        )
    return weights
