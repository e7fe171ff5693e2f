"""Where a measurement was made, as the files of results say it."""

import platform

import torch

from flowtilt.io.environment import processor


def machine(threads: int | None = None) -> str:
    """Processor, threads of torch (by default those of this process), versions."""
    number = threads or torch.get_num_threads()
    return f"{processor()}, {number} thread{'' if number == 1 else 's'}, torch {torch.__version__}, Python {platform.python_version()}"
