"""Captions: each distinct one is encoded once, by itself, and kept in memory and, where asked, on disk."""

import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
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
from flowtilt.io.files import cache_folder, digest, write_atomic
from flowtilt.models.conditioning import Conditioning
from flowtilt.prompts import Caption, Edit

IN_MEMORY = 2 * 2**30
"""Bytes of embeddings kept in the computer's memory; the least recently used go first."""
ON_DISK = 16 * 2**30
"""Bytes of embeddings kept on disk for each set of encoders; the oldest go first."""
SOURCE = "source"
"""The name, among what is read of an edit, of the source image's latents."""
Read = Callable[[Any], Mapping[str, Tensor]]
"""What the network reads of one caption, a text or an `Edit`: named tensors without a batch axis."""


class Captions:
    """Embeddings by caption.

    Args:
        encode: what the network reads of one caption: named tensors without a batch axis. One caption at a time, since in
            a batch roundings would depend on which captions happened to be new together.
        encoders: modules that `encode` needs on `device`; those that are elsewhere come while they work.
        folder: where embeddings stay between runs; none keeps them in memory alone.
        ragged: `encode` gives as many tokens as a caption has, along the first axis of every tensor but `SOURCE`.
        negative: captions are edits, and guidance leads away from this text with their source image; none has captions of text.
    """

    def __init__(
        self,
        encode: Read,
        encoders: Sequence[nn.Module],
        device: torch.device,
        folder: Path | None = None,
        ragged: bool = False,
        negative: str | None = None,
    ):
        self._encode, self._encoders, self._device, self._folder, self._ragged = encode, encoders, device, folder, ragged
        self._negative = negative
        self._kept: OrderedDict[Caption, dict[str, Tensor]] = OrderedDict()

    @property
    def blank(self) -> Caption:
        """One that says nothing, for a pass whose result nobody sees."""
        return "" if self._negative is None else Edit("", "")

    def __call__(self, captions: Sequence[Caption]) -> Conditioning:
        """Conditioning of N captions.

        Raises:
            UserError: an edit for a model that takes no source image, or a caption without one for a model that edits.
        """
        found = self._conditioning(captions)
        return found if self._negative is None else replace(found, away=self._conditioning(self._negatives(captions)))

    def prepare(self, captions: Iterable[Caption]) -> None:
        """Encodes what is not known yet in one visit of the encoders, as far as memory or disk keep it."""
        distinct = list(dict.fromkeys(captions))
        self._find(list(dict.fromkeys([*distinct, *self._negatives(distinct)])))

    def _negatives(self, captions: Iterable[Caption]) -> list[Caption]:
        return [replace(one, text=self._negative) for one in captions if isinstance(one, Edit) and self._negative is not None]

    def _conditioning(self, captions: Sequence[Caption]) -> Conditioning:
        distinct = list(dict.fromkeys(captions))
        found = self._find(distinct)
        place = {caption: k for k, caption in enumerate(distinct)}
        rows = torch.tensor([place[caption] for caption in captions], dtype=torch.long)
        read = [{name: x for name, x in one.items() if name != SOURCE} for one in found]
        sources = torch.stack([one[SOURCE] for one in found]).to(self._device) if SOURCE in found[0] else None
        if not self._ragged:
            stacked = {name: torch.stack([one[name] for one in read]).to(self._device) for name in read[0]}
            return Conditioning(stacked, rows, None, sources)
        lengths = torch.tensor([len(next(iter(one.values()))) for one in read])
        padded = {name: pad_sequence([one[name] for one in read], batch_first=True).to(self._device) for name in read[0]}
        return Conditioning(padded, rows, lengths, sources)

    def _check(self, captions: Iterable[Caption]) -> None:
        for one in captions:
            if isinstance(one, Edit) and self._negative is None:
                raise UserError(f'prompts {one.where or "given"}: "{one.text}" has a source image, but this model takes none')
            if isinstance(one, str) and self._negative is not None:
                raise UserError(f'prompts: "{one}" has no source image, which this model edits; give a prompt with an image')

    @torch.no_grad()
    def _find(self, texts: list[Caption]) -> list[dict[str, Tensor]]:
        self._check(texts)
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

    def _known(self, text: Caption) -> dict[str, Tensor] | None:
        if text not in self._kept and self._folder and (path := self._path(text)).is_file():
            try:
                self._keep(text, load_file(path))
            except (OSError, SafetensorError):
                return None  # cut short, or cleared away by another run: it is encoded anew
        if text in self._kept:
            self._kept.move_to_end(text)
        return self._kept.get(text)

    def _keep(self, text: Caption, one: dict[str, Tensor]) -> None:
        self._kept[text] = one
        while len(self._kept) > 1 and len(self._kept) * sum(x.nbytes for x in one.values()) > IN_MEMORY:
            self._kept.popitem(last=False)

    def _path(self, text: Caption) -> Path:
        assert self._folder
        said = text if isinstance(text, str) else f"{text.text}\0{digest(Path(text.image)) if text.image else ''}"
        return self._folder / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.safetensors"

    def _store(self, new: Mapping[Caption, dict[str, Tensor]]) -> None:
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
    encode: Read,
    device: torch.device,
    offload: bool,
    *said: object,
    ragged: bool = False,
    negative: str | None = None,
) -> Captions:
    """The captions of a diffusers pipeline, whose encoders are called text_encoder, text_encoder_2, …

    Args:
        offload: keep embeddings on disk, since the encoders are not at hand.
        said: what else decides an embedding.
        ragged, negative: see `Captions`.
    """
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder") and module is not None]
    if not offload:
        return Captions(encode, encoders, device, ragged=ragged, negative=negative)
    readers = [one for name, one in pipeline.components.items() if name.startswith(("tokenizer", "processor")) and one is not None]
    eyes = [] if negative is None else [pipeline.vae]  # which encodes the source images
    settings = [*map(_tokenizer, readers), *map(_image_processor, readers)]
    name = _fingerprint([*encoders, *eyes], device.type, torch.__version__, *said, *settings, _code(encode))
    return Captions(encode, encoders, device, cache_folder("FLOWTILT_CAPTIONS", "captions") / name, ragged, negative)


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


def _image_processor(processor: Any) -> str:
    """How a processor prepares source images; "" of one that prepares none."""
    own = getattr(processor, "image_processor", None)
    return json.dumps(own.to_dict(), sort_keys=True, default=str) if own is not None else ""


def _code(encode: Read) -> str:
    """What reads a caption: the files of the function, or of all classes of its family, and the libraries' versions."""
    places: Sequence[Any] = [encode] if inspect.isfunction(encode) else inspect.getmro(type(getattr(encode, "__self__", encode)))
    found = [f"diffusers {version('diffusers')}, transformers {version('transformers')}"]
    for place in places:
        try:
            found.append(digest(Path(inspect.getfile(place))))
        except (TypeError, OSError):
            continue  # built in, or typed into a notebook
    return " ".join(found)


def _fingerprint(encoders: Iterable[nn.Module], *said: object) -> str:
    """A name for what decides an embedding: names, shapes and first values of all weights, and whatever else is said."""
    found = hashlib.sha256(repr(said).encode())
    for module in encoders:
        for name, x in chain(module.named_parameters(), module.named_buffers()):
            found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
            found.update(bytes(x.detach().flatten()[:64].float().cpu().view(torch.uint8).tolist()))
    return found.hexdigest()[:24]
