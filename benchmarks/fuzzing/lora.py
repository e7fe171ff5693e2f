"""Damaged and odd LoRA files: whatever they hold, reading one is a LoRA or one line."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from flowtilt.errors import UserError
from flowtilt.lora import fingerprint
from flowtilt.lora.fit import check
from flowtilt.lora.read import read_lora

LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "joint_blocks.0.x_block.attn.qkv",
    "single_blocks.3.linear1",
    "joint_blocks_1_context_block_adaLN_modulation_1",
    "final_layer.adaLN_modulation.1",
    "transformer_blocks_0_attn_to_out_0",
    "down_blocks_0_attentions_0",
    "",
)
PREFIXES = ("", "transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "text_encoder.", "module._orig_mod.", "lora_te1_")
ENDS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_A.default.weight",
    ".lora_B.default.weight",
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora.down.weight",
    ".lora.up.weight",
    ".alpha",
    ".dora_scale",
    ".lokr_w1",
    ".bias",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
NUMBERS = st.sampled_from([0.0, 1.0, -2.5, 1e-30, 1e30, 3e38, *map(float, ("nan", "inf", "-inf"))])
VALUES = st.sampled_from([16, "16", 0, -1, 2, "2", 1e300, 10**400, True, None, [], {}, "x", "nan", "Infinity", "0" * 5000, "9" * 5000])
EXPRESSIONS = st.sampled_from(["to_q", "(", "a{9999999999}", "*", "(" * 200, "^.*$", ""])
PATTERNS = st.one_of(VALUES, st.dictionaries(EXPRESSIONS, VALUES, max_size=2))
KEYS = ("r", "lora_alpha", "transformer.r", "transformer.lora_alpha", "use_rslora", "bias", "peft_type", "init_lora_weights")
CONFIGS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
DEEP = "[" * 100_000


def inputs() -> st.SearchStrategy[Any]:
    """A file's name and bytes, and those of an adapter_config.json beside it, or none."""
    return st.tuples(st.one_of(_safetensors(), _pickles(), _noise()), st.one_of(st.none(), _configs()))


def read(payload: Any, folder: Path) -> None:
    """Raises nothing but UserError."""
    (name, data), config = payload
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(data)
    if config is not None:
        (folder / "adapter_config.json").write_bytes(config)
    for place in (folder / name, f"{folder / name}@8"):
        try:
            lora = read_lora(place)
            fingerprint(lora)
            assert all(bool(x.isfinite().all()) for pair in lora.layers.values() for x in pair), "not finite"
            check(lora, {"transformer_blocks.0.attn.to_q": (6, 6)})
        except UserError:
            pass


@st.composite
def _tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.sampled_from([(2, 6), (6, 2), (18, 2), (42, 2), (0, 6), (6, 0), (), (1,), (2, 6, 1, 1), (3, 6)]))
    value = torch.full(shape, draw(NUMBERS))
    dtype = draw(st.sampled_from((torch.float32, *DTYPES)))
    return value.to(dtype)


def _names() -> st.SearchStrategy[str]:
    made = st.builds("{}{}{}".format, st.sampled_from(PREFIXES), st.sampled_from(LAYERS), st.sampled_from(ENDS))
    return st.one_of(made, st.text(max_size=12))


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A whole pair more often than not, and whatever else."""
    found: dict[str, torch.Tensor] = {}
    if draw(st.booleans()):
        stem = draw(st.sampled_from(PREFIXES)) + draw(st.sampled_from(LAYERS))
        down, up = draw(st.sampled_from([(".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")]))
        rows = draw(st.sampled_from([6, 12, 18, 42]))
        found = {stem + down: torch.full((2, 6), draw(NUMBERS)), stem + up: torch.full((rows, 2), draw(NUMBERS))}
        if draw(st.booleans()):
            found[stem + ".alpha"] = draw(_tensor())
    return found | draw(st.dictionaries(_names(), _tensor(), max_size=3))


@st.composite
def _header(draw: st.DrawFn) -> dict[str, str] | None:
    config = draw(CONFIGS) | {key: draw(PATTERNS) for key in draw(st.sets(st.sampled_from(["rank_pattern", "alpha_pattern"])))}
    plain = {key: value if isinstance(value, str) else str(value)[:100] for key, value in draw(CONFIGS).items()}
    nested = draw(st.sampled_from(["lora_adapter_metadata", "config"]))
    text = draw(st.sampled_from([_json(config), DEEP, "{", "[1]", '{"lora_alpha": ' + DEEP]))
    return draw(st.sampled_from([None, {}, plain, {nested: text}, plain | {nested: text}, {"flowtilt.parents": text}]))


@st.composite
def _safetensors(draw: st.DrawFn) -> tuple[str, bytes]:
    data = save({name: value.contiguous() for name, value in draw(_tensors()).items()}, draw(_header()))
    return "x.safetensors", draw(_damaged(data))


@st.composite
def _damaged(draw: st.DrawFn, data: bytes) -> bytes:
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "flip", "length", "dtype"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "flip" and data:
        place = draw(st.integers(0, len(data) - 1))
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if how == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + data[8:]
    if how == "dtype":
        return data.replace(b'"F32"', draw(st.sampled_from([b'"F64"', b'"F99"', b'"U16"', b'"C64"', b'"F4" '])))
    return data


def _pickles() -> st.SearchStrategy[tuple[str, bytes]]:
    a, b = "transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_B.weight"
    whole = {a: torch.ones(2, 6), b: torch.ones(6, 2)}
    odd: list[Any] = [
        {**whole, a: nn.Parameter(torch.ones(2, 6))},
        {**whole, a: torch.ones(2, 6).to_sparse()},
        {**whole, a: torch.ones(2, 6, device="meta")},
        {**whole, a: torch.ones(1, 1).expand(10**9, 6)},
        {**whole, a: torch.ones(12).as_strided((2, 6), (1, 2))},
        {**whole, a: torch.quantize_per_tensor(torch.ones(2, 6), 0.1, 0, torch.quint8)},
        {**whole, a: torch.ones(6, 2).T},
        {**whole, 7: torch.ones(1)},
        {**whole, ("a",): torch.ones(1)},
        {**whole, "step": 7},
        {**whole, "inner": whole},
        [whole],
        torch.ones(3),
        {},
    ]
    made = [("x.pt", _saved(value)) for value in odd]
    return st.one_of(
        st.sampled_from(made),
        st.tuples(st.sampled_from(["x.pt", "x.bin"]), st.builds(_saved, _tensors())),
        st.tuples(st.just("x.pt"), _damaged(_saved(whole))),
    )


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _noise() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.tuples(st.sampled_from(["x.safetensors", "x.pt", "x.bin", "x"]), st.binary(max_size=64))


@st.composite
def _configs(draw: st.DrawFn) -> bytes:
    config = draw(CONFIGS) | {key: draw(PATTERNS) for key in draw(st.sets(st.sampled_from(["rank_pattern", "alpha_pattern"])))}
    return draw(st.sampled_from([_json(config).encode(), DEEP.encode(), b"\xff\xfe", b"", b"null", b'{"r": ' + b"9" * 5000 + b"}"]))


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config).replace('"' + "9" * 5000 + '"', "9" * 5000)
