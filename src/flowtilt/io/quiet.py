"""No greetings from libraries."""

import os
import warnings


def quieten() -> None:
    """Libraries that greet with warnings about what we do not use stay silent, unless the user asked otherwise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without widgets
