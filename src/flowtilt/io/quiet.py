"""No greetings from libraries."""

import os
import warnings


def quieten(progress: bool = False) -> None:
    """Libraries that greet with warnings about what we do not use stay silent, unless the user asked otherwise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without widgets
