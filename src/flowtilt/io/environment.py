"""What a run ran on: versions, machine, command."""

import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import flowtilt

PACKAGES = ("flowtilt", "torch", "diffusers", "transformers", "peft", "huggingface_hub", "safetensors", "numpy", "pydantic", "pillow")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions; none where a package is missing."""
    return {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str | None:
    if package == "flowtilt":
        return flowtilt.__version__  # an editable install keeps the metadata of the day it was made
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def floors() -> dict[str, str]:
    """The lowest version that flowtilt and its extras ask for of each package; {} where flowtilt is not installed."""
    try:
        stated = requires("flowtilt") or []
    except PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", text) for text in stated)
    return {match[1].lower().replace("-", "_"): match[2] for match in found if match}


def is_older(installed: str, floor: str) -> bool:
    """Whether a version is below another, by their numbers alone."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"[\d.]*", text)
        return [int(part) for part in (release[0] if release else "").split(".") if part]

    ours, least = numbers(installed), numbers(floor)
    return ours + [0] * (len(least) - len(ours)) < least


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(processes: int) -> dict[str, Any]:
    """Everything that another person would need to know to repeat a run."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": processes,
        "packages": versions(),
        "commit": _commit(),
        "command": " ".join(["flowtilt", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit of the checkout that flowtilt runs from, none outside of one."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
