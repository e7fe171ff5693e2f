"""One random generator per (seed, purpose, step, index), never the global state.

An image's noise depends on which image it is, not on the batch, process or device that draws it, so a
run is the same for every micro-batch and world size, and a resumed run needs no saved generator state.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for ("rollout", "train", …): purposes never share a stream.
        position: where in the run: step, then index, then whatever is finer.
    """
    key = repr((int(seed), purpose, *map(int, position))).encode()
    state = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") & (2**63 - 1)
    return torch.Generator().manual_seed(state)


def noise(seed: int, purpose: str, positions: Iterable[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [N, *shape], fp32 on the CPU; row i is drawn from `positions[i]` alone."""
    rows = [torch.randn(tuple(shape), generator=generator(seed, purpose, *p)) for p in positions]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def step_noise(seed: int, purpose: str, positions: Sequence[Sequence[int]], shape: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
    """The noise of a sampler's steps: [n, *shape] of the rows [n] at step j, row k of them drawn from `(*positions[k], j)` alone."""
    return lambda rows, j: noise(seed, purpose, [(*positions[k], j) for k in rows.tolist()], shape)
