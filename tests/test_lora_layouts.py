"""LoRAs in other tools' layouts: the same update as in diffusers' names, at the scale that the file tells; what is broken is one line."""

import json

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import nn

from flowtilt import UserError
from flowtilt.lora.names import to_diffusers
from flowtilt.lora.original import FLUX, FLUX2, LUMINA2, SAME, SD3, Z_IMAGE
from flowtilt.lora.read import read_lora

WIDTH, RANK = 8, 2
Q = "transformer_blocks.0.attn.to_q"


def pair(rows=WIDTH, seed=0, width=WIDTH):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, width, generator=rng), torch.randn(rows, RANK, generator=rng)


def named(layer, ends=("lora_A.weight", "lora_B.weight"), rows=WIDTH, seed=0):
    return {f"{layer}.{end}": x for end, x in zip(ends, pair(rows, seed), strict=True)}


def written(folder, tensors, **header):
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "x.safetensors", header or None)
    return folder / "x.safetensors"


def refused(place):
    with pytest.raises(UserError) as caught:
        read_lora(place)
    assert "\n" not in str(caught.value) and str(place).partition("@")[0] in str(caught.value)
    return str(caught.value)


# layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "ends"),
    [
        (f"diffusion_model.{Q}", ("lora_A.weight", "lora_B.weight")),
        (f"model.diffusion_model.{Q}", ("lora_down.weight", "lora_up.weight")),
        (f"transformer.{Q}", ("lora_down.weight", "lora_up.weight")),
        (Q, ("lora_down.weight", "lora_up.weight")),
        ("lora_transformer_transformer_blocks_0_attn_to_q", ("lora_down.weight", "lora_up.weight")),
        ("lora_unet_transformer_blocks_0_attn_to_q", ("lora_down.weight", "lora_up.weight")),
    ],
)
def test_diffusers_layers_under_other_tools_names(tmp_path, layer, ends):
    a, b = pair()
    read = read_lora(written(tmp_path, named(layer, ends)))
    assert list(read.layers) == [Q] and read.scales() == [1.0]
    assert torch.equal(read.layers[Q][0], a) and torch.equal(read.layers[Q][1], b)
    told = named(layer, ends) | {f"{layer}.alpha": torch.tensor(8.0)}
    assert read_lora(written(tmp_path, told)).scales() == [4.0]


@pytest.mark.parametrize("underscored", [False, True])
def test_sd3s_original_names_mean_what_diffusers_conversion_of_a_checkpoint_says(tmp_path, underscored):
    """The merged update, put into an original checkpoint and converted by diffusers, is the update of the LoRA as it is read."""
    last = {"x_block.attn.qkv", "x_block.attn.proj", "x_block.mlp.fc1", "x_block.mlp.fc2", "x_block.adaLN_modulation.1"}
    last |= {"context_block.attn.qkv", "context_block.adaLN_modulation.1"}
    rows = {"qkv": 3 * WIDTH, "fc1": 4 * WIDTH, "1": 6 * WIDTH}
    tensors, checkpoint = {}, {}
    names = [
        f"joint_blocks.{k}.{name}"
        for k in (0, 1)
        for name in SD3.blocks["joint_blocks"][1]
        if "attn2" not in name and (k == 0 or name in last)
    ]
    for number, name in enumerate(["final_layer.linear", "final_layer.adaLN_modulation.1", "context_embedder", "t_embedder.mlp.0", *names]):
        out = 2 * WIDTH if name in ("final_layer.adaLN_modulation.1", "joint_blocks.1.context_block.adaLN_modulation.1") else None
        a, b = pair(out or rows.get(name.rpartition(".")[2], WIDTH), number)
        key = f"lora_unet_{name.replace('.', '_')}" if underscored else f"diffusion_model.{name}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        checkpoint[f"{name}.weight"] = b @ a
    read = read_lora(written(tmp_path, tensors))

    class Anything(dict):
        def pop(self, key, *default):
            return super().pop(key, torch.zeros(6, 1))

        def __missing__(self, key):
            return torch.zeros(6, 1)

    converted = convert_sd3_transformer_checkpoint_to_diffusers(Anything(checkpoint))
    changed = {name.removesuffix(".weight"): weight for name, weight in converted.items() if name.endswith(".weight") and weight.any()}
    assert read.layers.keys() == changed.keys()
    for layer, (a, b) in read.layers.items():
        torch.testing.assert_close(b @ a, changed[layer])


def test_flux_names_mean_what_diffusers_conversion_says(tmp_path):
    width = 3072  # which diffusers' conversion takes for granted
    rows = {"qkv": 3 * width, "linear1": 7 * width}
    tensors = {}
    for kind in ("double_blocks", "single_blocks"):
        for number, name in enumerate(FLUX.blocks[kind][1]):
            key = f"lora_unet_{kind}_0_{name.replace('.', '_')}"
            a, b = pair(rows.get(name.rpartition(".")[2], width), number, width)
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}
    read = read_lora(written(tmp_path, tensors))
    theirs = {name.removeprefix("transformer."): x for name, x in _convert_kohya_flux_lora_to_diffusers(dict(tensors)).items()}
    assert {f"{layer}.lora_{side}.weight" for layer in read.layers for side in "AB"} == theirs.keys()
    assert read.scales() == [0.5]
    for layer, (a, b) in read.layers.items():
        x = torch.randn(width, generator=torch.Generator().manual_seed(0))
        ours = 0.5 * (b @ (a @ x))
        torch.testing.assert_close(ours, theirs[f"{layer}.lora_B.weight"] @ (theirs[f"{layer}.lora_A.weight"] @ x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("naming", [SD3, FLUX, FLUX2, Z_IMAGE, LUMINA2, SAME])
def test_every_original_layer_is_found_dotted_and_underscored(naming):
    for kind, (own, table) in naming.blocks.items():
        for name, layers in table.items():
            a, b = pair({1: WIDTH, 3: 3 * WIDTH, 4: 7 * WIDTH}[len(layers)])
            for text in (f"{kind}.7.{name}", f"{kind}.7.{name}".replace(".", "_")):
                found = to_diffusers(text, a, b, naming)
                assert found and list(found) == [f"{own}.7.{layer}" for layer in layers]
                assert sum(len(part) for _, part in found.values()) == len(b)
            for layer in layers:
                assert list(to_diffusers(f"{own}.7.{layer}".replace(".", "_"), *pair(), naming) or {}) == [f"{own}.7.{layer}"]
    for name, layer in naming.elsewhere.items():
        assert list(to_diffusers(name.replace(".", "_"), *pair(), naming) or {}) == [layer]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (named("lora_unet_joint_blocks_0_x_block_attn_qkv", rows=7), "named as another tool names layers"),
        (named("diffusion_model.joint_blocks.0.x_block.mystery"), "named as another tool names layers"),
        (named("lora_te1_text_model_encoder_layers_0_mlp_fc1", ("lora_down.weight", "lora_up.weight")), "only text encoders"),
        ({"diffusion_model.x.lokr_w1": torch.ones(2, 2)}, "LoKr of LyCORIS"),
        ({"x.hada_w1_a": torch.ones(2, 2)}, "LoHa of LyCORIS"),
        (named(f"diffusion_model.{Q}") | {f"diffusion_model.{Q}.dora_scale": torch.ones(1)}, "DoRA"),
        (named(f"diffusion_model.{Q}") | named(f"lora_unet_{Q.replace('.', '_')}"), "twice"),
        (named(f"diffusion_model.{Q}") | named(f"transformer.{Q}"), "twice"),
    ],
)
def test_a_layout_that_means_nothing_here_is_said_to_be_one(tmp_path, tensors, said):
    assert said in refused(written(tmp_path, tensors))


# alpha -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        {"lora_alpha": "8", "r": "2"},
        {"lora_alpha": "8"},
        {"transformer.lora_alpha": "8.0", "transformer.r": "2"},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})},
        {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})},
        {"config": json.dumps({"r": 2, "lora_alpha": 8})},
        {"peft": json.dumps({"base_model.model.lora_alpha": 8, "alpha_pattern": {}})},
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model.", ""])
def test_what_a_header_says_of_alpha_holds_however_it_is_put(tmp_path, header, prefix):
    assert read_lora(written(tmp_path, named(prefix + Q), **header)).scales() == [4.0]


def test_a_header_that_contradicts_itself_or_the_tensors_is_refused(tmp_path):
    layer = f"transformer.{Q}"
    assert "rank" in refused(written(tmp_path, named(layer), lora_alpha="8", r="16"))
    beside = named(layer) | {f"{layer}.alpha": torch.tensor(4.0)}
    assert "8" in refused(written(tmp_path, beside, lora_alpha="8"))
    assert read_lora(f"{written(tmp_path, beside, lora_alpha='8')}@4").scales() == [2.0]
    assert read_lora(written(tmp_path, beside, lora_alpha="4")).scales() == [2.0]


def test_rs_lora_in_a_header(tmp_path):
    found = read_lora(written(tmp_path, named(f"transformer.{Q}"), lora_alpha="8", r="2", use_rslora="True"))
    assert found.scales() == pytest.approx([8 / 2**0.5])


def test_a_bare_file_still_asks_for_its_alpha(tmp_path):
    """Flat names are RTDMD's as well, whose alpha is twice the rank: taking the rank could be wrong."""
    assert "does not tell alpha" in refused(written(tmp_path, named(Q)))


# broken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_numbers_that_are_not_finite_are_refused_by_their_tensor(tmp_path, value, side):
    tensors = named(f"transformer.{Q}")
    tensors[f"transformer.{Q}.lora_{side}.weight"][1, 1] = float(value)
    assert f"lora_{side} of {Q} has 1 of 16 values NaN or infinite" in refused(written(tmp_path, tensors))
    torch.save(tensors, tmp_path / "x.pt")
    assert "NaN or infinite" in refused(f"{tmp_path / 'x.pt'}@8")


def test_an_update_that_overflows_is_refused(tmp_path):
    tensors = {name: x * 1e25 for name, x in named(f"transformer.{Q}").items()}
    assert "overflows" in refused(written(tmp_path, tensors))
    assert "overflows" in refused(f"{written(tmp_path, named(f'transformer.{Q}'))}@1e300")


A, B = pair()
ODD = {
    "rank 0": (torch.ones(0, WIDTH), torch.ones(WIDTH, 0), "no [r, in] and [out, r]"),
    "sparse": (A.to_sparse(), B, "sparse"),
    "meta": (A.to("meta"), B, "on no device"),
    "complex": (A.to(torch.complex64), B, "complex"),
    "whole numbers": (A.to(torch.int32), B, "int32"),
    "expanded": (torch.ones(1, 1).expand(RANK, 10**9), B, "larger than its storage"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights_are_refused(tmp_path, kind):
    a, b, said = ODD[kind]
    torch.save({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}, tmp_path / "x.pt")
    assert said in refused(f"{tmp_path / 'x.pt'}@8")


def test_a_parameter_is_a_tensor_and_a_name_is_text(tmp_path):
    torch.save({f"{Q}.lora_A.weight": nn.Parameter(A), f"{Q}.lora_B.weight": nn.Parameter(B)}, tmp_path / "x.pt")
    read = read_lora(f"{tmp_path / 'x.pt'}@8")
    assert torch.equal(read.layers[Q][0], A) and not read.layers[Q][0].requires_grad
    torch.save({7: A, f"{Q}.lora_B.weight": B}, tmp_path / "x.pt")
    assert "holds 7 instead of a tensor's name" in refused(f"{tmp_path / 'x.pt'}@8")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rank_pattern": [1]}, "rank_pattern is [1]"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"alpha_pattern": {"(" * 5000: 2}}, "no regular expression"),
        ({"alpha_pattern": {"to_q": "x"}}, "must be a number"),
        ({"lora_alpha": 10**400}, "must be a number"),
        ({"lora_alpha": [1]}, "must be a number"),
        ({"r": "2"}, "they don't belong together"),
    ],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, config, said):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8, **config}))
    save_file(named(f"base_model.model.{Q}"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        read_lora(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\udcff", "[]", ""])
def test_json_that_is_damaged_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    save_file(named(f"base_model.model.{Q}"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="its configuration is"):
        read_lora(tmp_path)
    if text.isprintable():
        refused(written(tmp_path, named(f"transformer.{Q}"), lora_adapter_metadata=text))


@pytest.mark.parametrize("alpha", [torch.tensor(1j), torch.tensor(float("nan")), torch.tensor(True)])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, alpha):
    torch.save(named(f"transformer.{Q}") | {f"transformer.{Q}.alpha": alpha}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


def test_a_folder_of_several_says_where_they_are(tmp_path):
    for name in ("cold_start", "rtdmd"):
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "generator_ema.pt")
    assert "cold_start and" in refused(tmp_path) and "rtdmd have one" in refused(tmp_path)
    (tmp_path / "cold_start" / "generator_ema.pt").unlink()
    (tmp_path / "rtdmd" / "step-100").mkdir()
    (tmp_path / "rtdmd" / "generator_ema.pt").rename(tmp_path / "rtdmd" / "step-100" / "generator_ema.pt")
    assert "step-100 has one" in refused(tmp_path)
