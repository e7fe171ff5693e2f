import math

import torch

from flowtilt.flow import per_sample, predict_eps, predict_x0
from flowtilt.seeding import generator


def renoise(x_s, s, t, noise):
    s_, t_ = per_sample(s, x_s), per_sample(t, x_s)
    a = (1 - t_) / (1 - s_)
    r = (t_**2 - a**2 * s_**2).sqrt()
    u = -x_s / (1 - s_) + (t_ + (1 - t_) * s_**2 / (1 - s_) ** 2) / r * noise
    return a * x_s + r * noise, u, (10 * r.flatten() ** 2).clamp_max(1)


def fake_score_loss(v, target, weight):
    return weight * (v - target).square().flatten(1).mean(1)


def consistency_loss(h, h1, h2):
    return ((h1 - h) * (h2 - h)).flatten(1).mean(1)


def kappa(sigma, sigma_next, eta):
    return sigma * (1 - sigma_next) - sigma_next * (1 - sigma) * math.cos(eta * math.pi / 2)


def distribution_matching_gradient(x_s, x_t, v_teacher, v_fake, s, t, noise, eta=0.9):
    c = math.cos(eta * math.pi / 2)
    s_, t_ = per_sample(s, x_s), per_sample(t, x_s)
    y = (1 - s_) * predict_x0(x_t, v_teacher, t) + s_ * c * predict_eps(x_t, v_teacher, t)
    if noise is not None:
        y = y + s_ * math.sin(eta * math.pi / 2) * noise
    num = (s_ * c * (1 - t_) - t_ * (1 - s_)) * (v_fake - v_teacher)
    den = per_sample((x_s - y).abs().flatten(1).mean(1), x_s)
    return (num / den).nan_to_num(0, 0, 0)


def draw_renoise_times(s, u):
    low = (s + 0.01).clamp_min(0.02)
    return low + (0.98 - low) * u


def surrogate(v, cotangent):
    return (v * cotangent.detach()).flatten(1).sum(1)


def subgrpo_steps(rollout, steps, number=2, seed=0):
    return tuple(sorted(torch.randperm(steps - 1, generator=generator(seed, "subgrpo", rollout))[:number].tolist()))
