"""Spreads a network over all ranks by FSDP2."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flowtilt.models.base import Model


def shard(model: Model, device: torch.device) -> None:
    """Spreads a network over all ranks, wherever it lies before: block by block, so that it never lies whole on `device`.

    Afterwards each rank holds 1 / size of every weight on `device`. Adapters come later and stay whole.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # of gradients, where weights are trained
    for module in (*model.blocks, model.network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
