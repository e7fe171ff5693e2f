"""No greetings from libraries."""

import logging
import os
import warnings


def quieten() -> None:
    """Libraries that greet with warnings about what we do not use stay silent, unless the user asked otherwise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # torchao names the CUDA kernels that a machine without CUDA can't load, and torch says what it thinks of torchao's enumerations
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without widgets
