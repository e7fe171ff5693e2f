"""A tiny, genuine SD3 pipeline in a drawn world with a verifiable reward."""

from pathlib import Path

PROMPTS = {
    "playground": "the playground's own: prompts to train on, and others with unseen combinations to test on",
    "playground-search": "the same for a search of settings: other prompts to train on, and a validation set apart from the test",
}
"""Prompt sets that bring prompts to train on and others to judge by, with what to say of them in a list."""


def pipeline_path() -> Path:
    """The folder that `StableDiffusion3Pipeline.from_pretrained` opens; call it with `max_sequence_length=1`, since its T5 says nothing."""
    return Path(__file__).parent / "weights"
