"""What is installed, what it will run on, and what is missing for what."""

import importlib.util
import os
from collections.abc import Collection

from flowtilt.io.environment import PACKAGES, floors, is_older, processor, versions
from flowtilt.playground import pipeline_path
from flowtilt.rewards.about import BuiltIn, built_in, lacking
from flowtilt.runs.tracking import TRACKERS


def diagnose(but: Collection[str] = ()) -> list[str]:
    """Lines for a person, from the machine upward, without the rewards that are looked at more closely anyway."""
    import torch

    lines = [_package(package, found, floors().get(package)) for package, found in versions(PACKAGES).items()]
    lines.append(f"ok      cpu: {processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores used by torch")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            lines.append(f"ok      gpu {index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        lines.append("note    no GPU: the playground runs, Stable Diffusion 3.5 needs one")
    shipped = (pipeline_path() / "model_index.json").is_file()
    lines.append(
        "ok      playground weights"
        if shipped
        else "MISSING playground weights - reinstall flowtilt, or python -m flowtilt.playground.pretrain"
    )
    lines += [_reward(about) for name, about in built_in().items() if name not in but]
    lines += [_tracker(name) for name in TRACKERS]
    return lines


def _package(name: str, found: str | None, floor: str | None) -> str:
    """Whether a package is there, and new enough."""
    wanted = f"'{name}>={floor}'" if floor else name
    if found is None:
        return f"MISSING {name} - pip install {wanted}"
    if floor and is_older(found, floor):
        return f"OLD     {name} {found}, but flowtilt needs {floor} or newer - pip install {wanted}"
    return f"ok      {name} {found}" + (f" (needs {floor} or newer)" if floor else "")


def _tracker(name: str) -> str:
    """Whether what a recipe's `track` may name is there, and new enough."""
    found, floor = versions((name,))[name], floors().get(name)
    if importlib.util.find_spec(name) is None:
        return f"note    tracker {name}: not installed - pip install {name}"
    if found and floor and is_older(found, floor):
        return f"OLD     tracker {name}: {found}, but flowtilt needs {floor} or newer - pip install '{name}>={floor}'"
    return f"ok      tracker {name}"


def _reward(about: BuiltIn) -> str:
    """Whether a reward's weights, packages or server are there; nothing is loaded."""
    why = lacking(about)
    return f"note    reward {about.name}: {why}" if why else f"ok      reward {about.name}"
