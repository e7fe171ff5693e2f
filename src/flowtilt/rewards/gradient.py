import torch


def differentiable(name, reward):
    return reward.differentiable


def reward_gradient(rewards, weights, decode, latents, prompts, *, margin, chunk):
    vs, gs = [], []
    for k in range(0, len(latents), chunk):
        x = latents[k : k + chunk].detach().requires_grad_()
        im = decode(x)
        R = sum(w * rewards[n](im, prompts[k : k + chunk]) for n, w in weights.items())
        on = torch.ones_like(R) if margin is None else (margin > R).float()
        (g,) = torch.autograd.grad((R * on).sum(), x)
        vs.append(R.detach())
        gs.append(g)
    return torch.cat(vs), torch.cat(gs)
