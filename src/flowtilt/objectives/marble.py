"""MARBLE, arXiv 2605.06507: the direction in weight space that no reward's gradient opposes.

Shapes   K rewards.
    paper                                                    here
    alpha = argmin over the simplex of |sum alpha_k g_k|^2    common_descent(products g_i . g_j)
    g_k = G_k / |G_k|, the reward's own gradient              training/balance.py
"""

from itertools import combinations

import torch
from torch import Tensor

ROUNDING = 1e-9


def common_descent(products: Tensor) -> Tensor:
    """alpha on the simplex with the least |sum_k alpha_k g_k|^2, [K] fp64; exact, by trying all 2^K - 1 sets of rewards.

    At the optimum g_k . g >= |g|^2 for every k, with equality where alpha_k > 0, for g = sum alpha_k g_k: a step along g
    improves every reward to first order, unless g is 0. For K = 2 and unit vectors alpha is always 1/2, 1/2.

    Args:
        products: [K, K], g_i . g_j.
    """
    products = products.double()
    number = len(products)
    least, alpha = float("inf"), torch.full((number,), 1 / number, dtype=torch.float64)
    for size in range(1, number + 1):
        for chosen in combinations(range(number), size):
            found = _stationary(products, list(chosen))
            value = float(found @ products @ found)
            # of equals the smaller set counts, which comes first
            if found.min() >= -ROUNDING and value < least - ROUNDING:
                least, alpha = value, found.clamp_min(0) / found.clamp_min(0).sum()
    return alpha


def _stationary(products: Tensor, chosen: list[int]) -> Tensor:
    """Weights [K] of sum 1, 0 outside of `chosen`, with the least norm of their sum; some may be negative."""
    size = len(chosen)
    # P w = lambda 1 and 1 . w = 1; least squares, since vectors that are equal or cancel make P singular
    system = torch.ones(size + 1, size + 1, dtype=torch.float64)
    system[:size, :size], system[size, size] = products[chosen][:, chosen], 0.0
    target = torch.zeros(size + 1, 1, dtype=torch.float64)
    target[size] = 1.0
    weights = torch.zeros(len(products), dtype=torch.float64)
    weights[chosen] = torch.linalg.lstsq(system, target, driver="gelsd").solution[:size, 0]
    return weights
