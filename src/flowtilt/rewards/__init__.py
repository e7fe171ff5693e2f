"""Rewards: functions of images and prompts.

    def reward(images: Tensor[N, 3, H, W] in [0, 1], prompts: list[Prompt]) -> Tensor[N] | RewardOutput

`about/` has what each built-in reward says of itself, without torch; its function or class is in a file here. What any reward
may say of itself: `rewards.facts`. A class is built once, as `Class(device=..., **options)`, and its instance is called like a
function. It may have `applies(prompt) -> str`, why a prompt can't be judged, or "" where it can. A class whose models may leave
the device between two calls names them in `modules`, a tuple of torch.nn.Module; each call computes where they are at that moment.
A reward with a parameter `sources` is also given the source images [N, 3, H, W] of edits, cut to a square of the images' size.
NaN means "has no score for this image". An exception is an error of the run, never a score of 0.
A reward that is not flowtilt's own gets copies of the images and prompts, and `io.containment.contained` runs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowtilt.rewards.loading import find_reward, load_reward
    from flowtilt.rewards.scoring import Reward, RewardOutput, applicable, applies, modules_of, score

__all__ = ["Reward", "RewardOutput", "applicable", "applies", "find_reward", "load_reward", "modules_of", "score"]

_HOMES = {
    **dict.fromkeys(("find_reward", "load_reward"), "loading"),
    **dict.fromkeys(("Reward", "RewardOutput", "applicable", "applies", "modules_of", "score"), "scoring"),
}


def __getattr__(name: str) -> Any:
    # `about/` is read without torch
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
