"""Captions: each distinct one is encoded once, by itself, and kept in memory and, where asked, on disk."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowtilt.device.placement import on_device
from flowtilt.errors import UserError
from flowtilt.io.files import cache_folder, write_atomic
from flowtilt.models.conditioning import Conditioning

IN_MEMORY = 2 * 2**30
"""Bytes of embeddings kept in the computer's memory; the least recently used go first."""
ON_DISK = 16 * 2**30
"""Bytes of embeddings kept on disk for each set of encoders; the oldest go first."""


class Captions:
    """Embeddings by caption.

    Args:
        encode: what the network reads of one caption: named tensors without a batch axis. One caption at a time, since in
            a batch roundings would depend on which captions happened to be new together.
        encoders: modules that `encode` needs on `device`; those that are elsewhere come while they work.
        folder: where embeddings stay between runs; none keeps them in memory alone.
        ragged: `encode` gives as many tokens as a caption has, along the first axis of every tensor.
    """

    def __init__(
        self,
        encode: Callable[[str], Mapping[str, Tensor]],
        encoders: Sequence[nn.Module],
        device: torch.device,
        folder: Path | None = None,
        ragged: bool = False,
    ):
        self._encode, self._encoders, self._device, self._folder, self._ragged = encode, encoders, device, folder, ragged
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of N captions."""
        distinct = list(dict.fromkeys(texts))
        found = self._find(distinct)
        place = {text: k for k, text in enumerate(distinct)}
        rows = torch.tensor([place[text] for text in texts], dtype=torch.long)
        if not self._ragged:
            return Conditioning({name: torch.stack([one[name] for one in found]).to(self._device) for name in found[0]}, rows)
        lengths = torch.tensor([len(next(iter(one.values()))) for one in found])
        padded = {name: pad_sequence([one[name] for one in found], batch_first=True).to(self._device) for name in found[0]}
        return Conditioning(padded, rows, lengths)

    def prepare(self, texts: Iterable[str]) -> None:
        """Encodes what is not known yet in one visit of the encoders, as far as memory or disk keep it."""
        self._find(list(dict.fromkeys(texts)))

    @torch.no_grad()
    def _find(self, texts: list[str]) -> list[dict[str, Tensor]]:
        found = {text: known for text in texts if (known := self._known(text)) is not None}
        new = [text for text in texts if text not in found]
        if new:
            with on_device(self._encoders, self._device):
                for text in new:
                    found[text] = {name: x.to("cpu") for name, x in self._encode(text).items()}
                    self._keep(text, found[text])
            if self._folder:
                self._store({text: found[text] for text in new})
        return [found[text] for text in texts]

    def _known(self, text: str) -> dict[str, Tensor] | None:
        if text not in self._kept and self._folder and (path := self._path(text)).is_file():
            try:
                self._keep(text, load_file(path))
            except (OSError, SafetensorError):
                return None  # cut short, or cleared away by another run: it is encoded anew
        if text in self._kept:
            self._kept.move_to_end(text)
        return self._kept.get(text)

    def _keep(self, text: str, one: dict[str, Tensor]) -> None:
        self._kept[text] = one
        while len(self._kept) > 1 and len(self._kept) * sum(x.nbytes for x in one.values()) > IN_MEMORY:
            self._kept.popitem(last=False)

    def _path(self, text: str) -> Path:
        assert self._folder
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _store(self, new: Mapping[str, dict[str, Tensor]]) -> None:
        assert self._folder
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for text, one in new.items():
                write_atomic(self._path(text), save(one))
            self._make_room(self._folder)
        except (OSError, UserError):
            self._folder = None  # no room, not ours to write to, or cleared away by another: a cache can be done without

    @staticmethod
    def _make_room(folder: Path) -> None:
        files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.safetensors"))
        beyond = sum(size for _, size, _ in files) - ON_DISK
        for _, size, file in files:
            if beyond <= 0:
                break
            file.unlink(missing_ok=True)
            beyond -= size


def captions_of(
    pipeline: Any,
    encode: Callable[[str], Mapping[str, Tensor]],
    device: torch.device,
    offload: bool,
    *said: object,
    ragged: bool = False,
) -> Captions:
    """The captions of a diffusers pipeline, whose encoders are called text_encoder, text_encoder_2, …

    Args:
        offload: keep embeddings on disk, since the encoders are not at hand.
        said: what else decides an embedding.
        ragged: see `Captions`.
    """
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder") and module is not None]
    if not offload:
        return Captions(encode, encoders, device, ragged=ragged)
    tokenizers = [_tokenizer(one) for name, one in pipeline.components.items() if name.startswith("tokenizer") and one is not None]
    name = _fingerprint(encoders, device.type, torch.__version__, *said, *tokenizers)
    return Captions(encode, encoders, device, cache_folder("FLOWTILT_CAPTIONS", "captions") / name, ragged)


def _tokenizer(tokenizer: Any) -> str:
    """What decides a caption's tokens: the vocabulary, rules and special tokens, not what the last call left set."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's own
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    else:
        model = getattr(tokenizer, "sp_model", None)
        rules = {"vocab": sorted(tokenizer.get_vocab().items()), "model": model.serialized_model_proto().hex() if model else ""}
    template = getattr(tokenizer, "chat_template", None)
    facts = [type(tokenizer).__name__, rules, tokenizer.model_max_length, str(tokenizer.special_tokens_map), template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _fingerprint(encoders: Iterable[nn.Module], *said: object) -> str:
    """A name for what decides an embedding: names, shapes and first values of all weights, and whatever else is said."""
    digest = hashlib.sha256(repr(said).encode())
    for module in encoders:
        for name, x in chain(module.named_parameters(), module.named_buffers()):
            digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
            digest.update(bytes(x.detach().flatten()[:64].float().cpu().view(torch.uint8).tolist()))
    return digest.hexdigest()[:24]
