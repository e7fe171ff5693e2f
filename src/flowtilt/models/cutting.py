"""Captions that are longer than a model's text encoders read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowtilt.io.notices import notice
from flowtilt.models.base import Model
from flowtilt.prompts import Prompt


@dataclass(frozen=True)
class Reader:
    """A text encoder's tokenizer and how many tokens the encoder reads, begin and end included."""

    name: str
    tokenizer: Any
    tokens: int

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each caption, begin and end included. A token is at least a character, which spares most from being counted."""
        counts = {text: 0 if text.isascii() and len(text) + 3 <= self.tokens else -1 for text in texts}
        asked = [text for text, number in counts.items() if number < 0]
        if asked:
            ids = self.tokenizer(asked, truncation=False, verbose=False).input_ids
            counts |= {text: len(one) for text, one in zip(asked, ids, strict=True)}
        return [counts[text] for text in texts]

    def lost(self, text: str) -> str:
        """What of a caption the encoder does not read."""
        ids = self.tokenizer([text], truncation=False, verbose=False).input_ids[0]
        return self.tokenizer.decode(ids[self.tokens - 1 : -1], skip_special_tokens=True).strip()


def readers_of(model: Model) -> list[Reader]:
    """The text encoders of a model, the one that reads most tokens first."""
    parts = model.pipeline.components
    found = []
    for name, encoder in parts.items():
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and encoder is not None and tokenizer is not None:
            kind = next((kind for kind in ("T5", "CLIP") if kind in type(encoder).__name__), type(encoder).__name__)
            length = model.protocol.get("t5_length" if kind == "T5" else "text_length")
            found.append(Reader(kind, tokenizer, length if isinstance(length, int) else tokenizer.model_max_length))
    return sorted(found, key=lambda reader: -reader.tokens)


def notice_cut(model: Model, prompts: Sequence[Prompt]) -> None:
    """Logs how many captions are cut by every text encoder, the first of them and what it loses.

    Where a T5 reads further than CLIP, a caption between the two limits loses nothing that the T5 does not read.
    """
    readers = readers_of(model)
    cut = list({prompt.text: prompt for prompt in reversed(prompts)}.values())[::-1]
    number = len(cut)
    for reader in readers:
        counts = reader.count([prompt.text for prompt in cut])
        cut = [prompt for prompt, tokens in zip(cut, counts, strict=True) if tokens > reader.tokens]
    if not readers or not cut:
        return
    furthest, first = readers[0], cut[0]
    lost = furthest.lost(first.text)
    lost = lost if len(lost) <= 80 else f"{lost[:79]}…"
    limit = f"{furthest.name}: {furthest.tokens} tokens"
    notice(
        f"prompts: {len(cut)} of {number} captions are longer than the text encoders read ({limit}) and are cut; "
        f'{first.where or "the first"} loses its end "{lost}"'
    )
