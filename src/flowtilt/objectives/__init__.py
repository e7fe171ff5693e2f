"""What a method optimises: one paper, one file. Here is only what they share."""


def ema_decay(optimizer_step: int, maximum: float = 0.9) -> float:
    """Decay of the evaluated average: min((1 + s) / (10 + s), maximum), s counting optimizer steps from 0."""
    return min((1 + optimizer_step) / (10 + optimizer_step), maximum)
