"""A tiny, genuine SD3 pipeline in a drawn world with a verifiable reward."""

from pathlib import Path


def pipeline_path() -> Path:
    """The folder that `StableDiffusion3Pipeline.from_pretrained` opens; call it with `max_sequence_length=1`, since its T5 says nothing."""
    return Path(__file__).parent / "weights"
