"""LoRAs in the models' original names: ComfyUI's file and the files of kohya and ai-toolkit apply our update, W + alpha / r B A."""

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file, save_file
from test_lora import random_lora, same

from flowtilt import UserError
from flowtilt.io import notices
from flowtilt.lora import Lora, baked
from flowtilt.lora.comfyui import originals, to_comfyui
from flowtilt.lora.find import COMFYUI
from flowtilt.lora.fit import check
from flowtilt.lora.names import naming_of
from flowtilt.lora.original import BY_NETWORK, FLUX, FLUX2, LUMINA2, SAME, SD3, Z_IMAGE
from flowtilt.lora.read import read_lora

WIDTH = 12
NAMINGS = {"sd3": SD3, "flux": FLUX, "flux2": FLUX2, "z-image": Z_IMAGE, "lumina2": LUMINA2, "qwen-image": SAME}
NETWORKS = {name: next(key for key, value in BY_NETWORK.items() if value is naming) for name, naming in NAMINGS.items()}
ROWS = {"proj_mlp": 4, "to_qkv_mlp_proj": 9, "linear_in": 6, "net.0.proj": 4, "norm1.linear": 6, "norm.linear": 3}


def shapes_of(naming):
    """[out, in] of two blocks of every kind and of what is elsewhere, as diffusers names them; only ratios are the published ones."""
    found = {}
    for own, table in naming.blocks.values():
        for number in (0, 1):
            for layer in (layer for layers in table.values() for layer in layers):
                wide = next((times for end, times in ROWS.items() if layer.endswith(end)), 1)
                rows = WIDTH // 3 if naming.grouped and layer.endswith(("to_k", "to_v")) else wide * WIDTH
                inner = {"attn.to_out": 4, "ff.linear_out": 3, "ff_context.linear_out": 3, "proj_out": 5}.get(layer, 1) * WIDTH
                found[f"{own}.{number}.{layer}"] = (rows, inner)
    for layer in naming.elsewhere.values():
        found[layer] = (2 * WIDTH if layer == "norm_out.linear" else WIDTH, WIDTH)
    return found


def update(lora, layer):
    a, b = lora.layers[layer]
    return lora.scale(layer) * b.double() @ a.double()


@pytest.fixture(params=NAMINGS)
def family(request):
    return request.param


def lora_of(family, **options):
    return random_lora(shapes_of(NAMINGS[family]), **{"ends": "", **options})


def exported(lora, family, folder):
    folder.mkdir(exist_ok=True)
    to_comfyui(lora, folder, NETWORKS[family], shapes_of(NAMINGS[family]))
    return folder


def test_an_export_for_comfyui_is_read_back_as_it_was(tmp_path, family):
    lora = lora_of(family)
    read = read_lora(exported(lora, family, tmp_path / "out"))
    same(lora, read)
    check(read, shapes_of(NAMINGS[family]))


@pytest.mark.parametrize("ends", [("to_q", "to_v", "add_k_proj", "linear_in"), ("to_k", "to_out.0", "img_mod.1")])
def test_layers_of_a_joint_one_that_are_not_trained_stay_so(tmp_path, family, ends):
    lora = lora_of(family, ends=ends)
    assert lora.layers
    same(lora, read_lora(exported(lora, family, tmp_path / "out")))


def test_other_ranks_in_one_joint_layer_leave_the_update(tmp_path, family):
    lora = lora_of(family, mixed=True)
    read = read_lora(exported(lora, family, tmp_path / "out"))
    assert read.layers.keys() == lora.layers.keys()
    for layer in lora.layers:
        torch.testing.assert_close(update(read, layer), update(lora, layer), rtol=1e-6, atol=3e-8)


def test_comfyui_reads_the_full_strength_with_alpha_and_without(tmp_path, family):
    """It adds alpha / r B A to the original weight, and takes 1 for alpha / r where a file has none."""
    file = exported(lora_of(family), family, tmp_path / "out") / COMFYUI
    tensors = load_file(file)
    layers = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    assert all(name.startswith("diffusion_model.") for name in layers) and len(tensors) == 3 * len(layers)
    for name in layers:
        assert float(tensors[f"{name}.alpha"]) == len(tensors[f"{name}.lora_A.weight"])


CONVERTERS = {
    "flux2": theirs._convert_non_diffusers_flux2_lora_to_diffusers,
    "qwen-image": theirs._convert_non_diffusers_qwen_lora_to_diffusers,
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_own_conversion_of_the_export_is_the_lora(tmp_path, family):
    """But for the last norm, whose halves diffusers swaps in FLUX.2's checkpoints and not in its LoRAs."""
    lora = lora_of(family)
    tensors = load_file(exported(lora, family, tmp_path / "out") / COMFYUI)
    converted = CONVERTERS[family]({name: x for name, x in tensors.items() if not name.endswith(".alpha")})
    assert {name.removeprefix("transformer.") for name in converted} == {f"{layer}.lora_{s}.weight" for layer in lora.layers for s in "AB"}
    for layer in lora.layers.keys() - {"norm_out.linear"}:
        a, b = (converted[f"transformer.{layer}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(b @ a, update(lora, layer), rtol=1e-6, atol=3e-8)


def as_tool(tool, name, a, b, alpha):
    """The tensors of one layer in a tool's file."""
    if tool == "kohya":
        key = f"lora_unet_{name.replace('.', '_')}"
        return {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
    key = f"diffusion_model.{name}"
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("tool", ["kohya", "ai-toolkit"])
def test_a_tools_file_of_known_b_and_a_applies_their_update(tmp_path, family, tool):
    """One A for a joint layer, as these tools train it: the original weight changes by alpha / r B A, ours by its rows."""
    lora = baked(lora_of(family))
    joint = originals(lora, NAMINGS[family], {})
    alpha, tensors = 3.0, {}
    rng = torch.Generator().manual_seed(9)
    changes = {}
    for name, (_, b) in joint.items():
        a, b = torch.randn(4, joint[name][0].shape[1], generator=rng), torch.randn(len(b), 4, generator=rng)
        tensors |= as_tool(tool, name, a, b, alpha)
        changes[name] = alpha / 4 * b.double() @ a.double()
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors")
    assert read.layers.keys() == lora.layers.keys() and read.scales() == [alpha / 4]
    # written again, each of the tool's layers is one of the same rank, and changes the weight by the same
    again = originals(baked(read), NAMINGS[family], {})
    assert again.keys() == changes.keys()
    for name, (a, b) in again.items():
        assert len(a) == 4
        torch.testing.assert_close(b.double() @ a.double(), changes[name], rtol=1e-5, atol=1e-6)


def test_a_family_is_known_by_its_names_and_shapes(family):
    joint = originals(baked(lora_of(family)), NAMINGS[family], {})
    assert naming_of(joint) is NAMINGS[family]
    assert naming_of({name.replace(".", "_"): pair for name, pair in joint.items()}) is NAMINGS[family]


def test_a_lora_of_another_family_is_refused_by_one_line(tmp_path):
    read = read_lora(exported(lora_of("flux2"), "flux2", tmp_path / "out"))
    with pytest.raises(UserError, match="it belongs to another base") as caught:
        check(read, shapes_of(SD3))
    assert "\n" not in str(caught.value)
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    save_file(as_tool("kohya", "down_blocks.0.attentions.0.to_q", a, b, 1.0), tmp_path / "sdxl.safetensors")
    with pytest.raises(UserError, match="it belongs to another base"):
        check(read_lora(tmp_path / "sdxl.safetensors"), shapes_of(SD3))
    with pytest.raises(UserError, match=r"ComfyUI's names for a SanaTransformer2DModel are not known"):
        to_comfyui(read, tmp_path, "SanaTransformer2DModel")
    strange = Lora({"transformer_blocks.0.other": (a, b)}, {"transformer_blocks.0.other": 2.0}, "x")
    with pytest.raises(UserError, match=r"transformer_blocks.0.other has no name in ComfyUI"):
        to_comfyui(strange, tmp_path, "SD3Transformer2DModel")


def test_text_encoders_are_left_out_and_said_once_with_how_many(tmp_path, monkeypatch):
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    tensors = as_tool("kohya", "joint_blocks.0.x_block.attn.proj", a, b, 1.0)
    for k in range(3):
        key = f"lora_te1_text_model_encoder_layers_{k}_mlp_fc1"
        tensors |= {f"{key}.lora_down.weight": a.clone(), f"{key}.lora_up.weight": b.clone(), f"{key}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    said = []
    monkeypatch.setattr(notices.log, "warning", lambda pattern, text: said.append(text))
    assert [list(read_lora(tmp_path / "x.safetensors").layers) for _ in range(2)] == [["transformer_blocks.0.attn.to_out.0"]] * 2
    assert len(said) == 1 and "its 3 layers of text encoders are left out" in said[0]
