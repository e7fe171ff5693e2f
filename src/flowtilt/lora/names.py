"""The layers of other tools' files as diffusers' networks have them.

kohya's sd-scripts, ComfyUI and ai-toolkit name layers as the models' original code does (`original`), kohya with underscores in
the place of dots.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from flowtilt.lora.original import BY_NETWORK, FLUX, FLUX2, LUMINA2, SAME, SD3, Z_IMAGE, Naming

PREFIXES = ("module.", "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
"""Of DDP, PEFT, diffusers, and the models' original code."""
UNDERSCORED = ("lora_unet_", "lora_transformer_")
"""Of kohya's sd-scripts and of OneTrainer, after which dots are underscores."""
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch's wrappers put into names."""
Pair = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r]."""


def _underscored(names: Iterable[str]) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in names}


_ALL = tuple(BY_NETWORK.values())
_OWN_BLOCKS = {own for naming in _ALL for own, _ in naming.blocks.values()}
_OWN = re.compile(rf"({'|'.join(_OWN_BLOCKS)})_(\d+)_(.+)")
_INSIDE = _underscored(new for naming in _ALL for _, table in naming.blocks.values() for layers in table.values() for new in layers)
_OUTSIDE = _underscored(new for naming in _ALL for new in naming.elsewhere.values())


def own_name(key: str) -> str:
    """A tensor's name without what wrappers, PEFT, diffusers and other tools put in front of it."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while prefix := next((prefix for prefix in (*PREFIXES, *UNDERSCORED) if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def naming_of(layers: Mapping[str, Pair]) -> Naming:
    """Whose original names a file has: the blocks' names tell it, or the shapes of layers that two families call alike."""
    if any(name.startswith("joint_blocks") for name in layers):
        return SD3
    if any(name.startswith(("double_blocks", "single_blocks")) for name in layers):
        return FLUX2 if any(_is_flux2(name.replace(".", "_"), *pair) for name, pair in layers.items()) else FLUX
    if any(name.startswith(tuple(Z_IMAGE.blocks)) for name in layers):
        grouped = any(name.endswith("qkv") and len(b) != 3 * a.shape[1] for name, (a, b) in layers.items())
        return LUMINA2 if grouped else Z_IMAGE
    return SAME


def _is_flux2(name: str, a: Tensor, b: Tensor) -> bool:
    """FLUX.2 has one modulation for all blocks, and feed-forward layers of two gated thirds instead of FLUX.1's fourfold width."""
    rows, width = len(b), a.shape[1]
    return (
        "_stream_modulation" in name
        or (name.endswith(("img_mlp_0", "txt_mlp_0")) and rows == 6 * width)
        or (name.endswith(("img_mlp_2", "txt_mlp_2")) and width == 3 * rows)
        or (name.startswith("single_blocks") and name.endswith("linear1") and rows == 9 * width)
        or (name.startswith("single_blocks") and name.endswith("linear2") and width == 4 * rows)
    )


def to_diffusers(layer: str, a: Tensor, b: Tensor, naming: Naming) -> dict[str, Pair] | None:
    """A [r, in] and B [out, r] of a layer by diffusers' names: one layer, or those that it holds one after the other.

    A name of diffusers' own, dotted or underscored, is one layer. Nothing is rounded: B's rows are parted, and each part has all
    of A, or the rows of A that it alone uses. B A of each part is its part of B A.

    Returns:
        None where the name is another tool's and means nothing known, or the shape is not that layer's.
    """
    for kind, (own, table) in naming.blocks.items():
        if block := re.fullmatch(rf"{kind}[._](\d+)[._](.+)", layer):
            old = _underscored(table).get(block[2].replace(".", "_"))
            if old is None:
                break
            parts = _parts(a, b, table[old], naming.grouped)
            return parts and {f"{own}.{block[1]}.{new}": pair for new, pair in parts.items()}
    if own := _OWN.fullmatch(layer):
        return {f"{own[1]}.{own[2]}.{_INSIDE[own[3]]}": (a, b)} if own[3] in _INSIDE else None
    if old := _underscored(naming.elsewhere).get(layer.replace(".", "_")):
        return {naming.elsewhere[old]: (a, swapped(naming.elsewhere[old], a, b))}
    if layer in _OUTSIDE:
        return {_OUTSIDE[layer]: (a, b)}
    original = any(layer.startswith(kind) for each in _ALL for kind, (own, _) in each.blocks.items() if kind != own)
    return None if original else {layer: (a, b)}


def swapped(own: str, a: Tensor, b: Tensor) -> Tensor:
    """B where diffusers has scale and shift of a norm of two parts, and the original shift and scale; else B as it is. Its own inverse."""
    two = own.endswith(("norm1_context.linear", "norm_out.linear")) and len(b) == 2 * a.shape[1]
    return b.roll(len(b) // 2, 0) if two else b


def _parts(a: Tensor, b: Tensor, names: Sequence[str], grouped: bool) -> dict[str, Pair] | None:
    """The layers that are one in the original."""
    if len(names) == 1:
        return {names[0]: (a, swapped(names[0], a, b))}
    rows, width = len(b), a.shape[1]
    # four: FLUX.1's single blocks, where what follows queries, keys and values takes the rest
    sizes = [width] * 3 + [rows - 3 * width] if len(names) == 4 else [width, (rows - width) // 2, (rows - width) // 2]
    if min(sizes) <= 0 or sum(sizes) != rows or (len(names) == 3 and not grouped and rows != 3 * width):
        return None
    parts = b.split(sizes)
    share = len(a) // len(names)
    columns = [slice(k * share, (k + 1) * share) for k in range(len(names))]
    apart = share * len(names) == len(a) and bool(b.any())
    if apart and all(part.count_nonzero() == part[:, own].count_nonzero() for part, own in zip(parts, columns, strict=True)):
        # LoRAs that were trained one by one and joined; one that is zero was not trained
        found = zip(names, columns, parts, strict=True)
        return {name: (a[own].clone(), part[:, own].clone()) for name, own, part in found if part.any()}
    # copies: safetensors writes no tensor that shares its memory with another
    return {name: (a.clone(), part.clone()) for name, part in zip(names, parts, strict=True)}
