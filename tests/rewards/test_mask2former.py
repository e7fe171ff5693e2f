"""OpenMMLab's file fills transformers' Mask2Former, every tensor of it, and the network says what mmdetection's says."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerModel

from flowtilt.errors import UserError
from flowtilt.rewards import keymap
from flowtilt.rewards.about import find_weights
from flowtilt.rewards.geneval import mask2former

GOLDEN = Path(__file__).parent / "golden" / "mask2former_tiny.safetensors"
"""A narrow random network's weights and what mmdetection 2.28.2 computes with them."""
FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
ALIAS = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
CLASSES = 5


published = mask2former.config


def tiny_config() -> Mask2FormerConfig:
    """The published architecture with other sizes."""
    config = published()
    for name, size in {"embed_dim": 24, "depths": [2, 2, 2, 2], "window_size": 4}.items():
        setattr(config.backbone_config, name, size)
    sizes = {"num_queries": 10, "encoder_layers": 2, "encoder_feedforward_dim": 64, "decoder_layers": 4, "dim_feedforward": 64}
    for name, size in (sizes | dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)).items():
        setattr(config, name, size)
    return config


def golden(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(prefix)}


def use_tiny(monkeypatch: pytest.MonkeyPatch, folder: Path, content: object = None, name: str = FILE) -> Path:
    """The golden weights as a file in FLOWTILT_WEIGHTS, and the architecture that they fit."""
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(folder))
    monkeypatch.setattr(mask2former, "config", tiny_config)
    monkeypatch.setattr(mask2former, "CLASSES", CLASSES)
    torch.save({"meta": {"epoch": 50}, "state_dict": golden("sd.")} if content is None else content, folder / name)
    return folder / name


def load(path: Path) -> mask2former.Mask2Former:
    return mask2former.network(path, torch.device("cpu"))


def layout(swin, config: Mask2FormerConfig, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mmdetection 2's state dict."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    window, wide = swin.window_size, config.hidden_dim
    found |= {
        "backbone.patch_embed.projection.weight": (swin.embed_dim, 3, 4, 4),
        "backbone.patch_embed.projection.bias": (swin.embed_dim,),
    }
    norm("backbone.patch_embed.norm", swin.embed_dim)
    widths = [swin.embed_dim * 2**i for i in range(4)]
    for i, (depth, heads, width) in enumerate(zip(swin.depths, swin.num_heads, widths, strict=True)):
        for b in range(depth):
            block = f"backbone.stages.{i}.blocks.{b}."
            norm(block + "norm1", width)
            norm(block + "norm2", width)
            linear(block + "attn.w_msa.qkv", 3 * width, width)
            linear(block + "attn.w_msa.proj", width, width)
            found[block + "attn.w_msa.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            found[block + "attn.w_msa.relative_position_index"] = (window**2, window**2)
            linear(block + "ffn.layers.0.0", 4 * width, width)
            linear(block + "ffn.layers.1", width, 4 * width)
        if i < 3:
            found[f"backbone.stages.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
            norm(f"backbone.stages.{i}.downsample.norm", 4 * width)
        norm(f"backbone.norm{i}", width)
    pixels = "panoptic_head.pixel_decoder."
    for i in range(3):
        found |= {f"{pixels}input_convs.{i}.conv.weight": (wide, widths[3 - i], 1, 1), f"{pixels}input_convs.{i}.conv.bias": (wide,)}
        norm(f"{pixels}input_convs.{i}.gn", wide)
    for i in range(config.encoder_layers):
        layer = f"{pixels}encoder.layers.{i}."
        points = config.num_attention_heads * 3 * 4
        for part, out in (("sampling_offsets", 2 * points), ("attention_weights", points), ("value_proj", wide), ("output_proj", wide)):
            linear(f"{layer}attentions.0.{part}", out, wide)
        norm(layer + "norms.0", wide)
        norm(layer + "norms.1", wide)
        linear(layer + "ffns.0.layers.0.0", config.encoder_feedforward_dim, wide)
        linear(layer + "ffns.0.layers.1", wide, config.encoder_feedforward_dim)
    found |= {f"{pixels}lateral_convs.0.conv.weight": (wide, widths[0], 1, 1), f"{pixels}output_convs.0.conv.weight": (wide, wide, 3, 3)}
    norm(f"{pixels}lateral_convs.0.gn", wide)
    norm(f"{pixels}output_convs.0.gn", wide)
    found |= {f"{pixels}mask_feature.weight": (wide, wide, 1, 1), f"{pixels}mask_feature.bias": (wide,)}
    found |= {f"{pixels}level_encoding.weight": (3, wide), "panoptic_head.level_embed.weight": (3, wide)}
    found |= {f"panoptic_head.query_{kind}.weight": (config.num_queries, wide) for kind in ("embed", "feat")}
    for i in range(config.decoder_layers - 1):
        layer = f"panoptic_head.transformer_decoder.layers.{i}."
        for a in range(2):
            found |= {
                f"{layer}attentions.{a}.attn.in_proj_weight": (3 * wide, wide),
                f"{layer}attentions.{a}.attn.in_proj_bias": (3 * wide,),
            }
            linear(f"{layer}attentions.{a}.attn.out_proj", wide, wide)
        for n in range(3):
            norm(f"{layer}norms.{n}", wide)
        linear(layer + "ffns.0.layers.0.0", config.dim_feedforward, wide)
        linear(layer + "ffns.0.layers.1", wide, config.dim_feedforward)
    norm("panoptic_head.transformer_decoder.post_norm", wide)
    linear("panoptic_head.cls_embed", classes + 1, wide)
    for i in (0, 2, 4):
        linear(f"panoptic_head.mask_embed.{i}", wide, wide)
    return found


# names -----------------------------------------------------------------------------------------------


def test_the_layout_that_these_tests_write_is_mmdetections():
    config = tiny_config()
    assert layout(config.backbone_config, config, CLASSES) == {name: tuple(tensor.shape) for name, tensor in golden("sd.").items()}


def test_the_published_files_names_fill_the_full_network_and_none_is_left_over():
    config = mask2former.config()
    shapes = layout(config.backbone_config, config, mask2former.CLASSES)
    assert len(shapes) == 649
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        network = mask2former.Mask2Former(config, mask2former.CLASSES)
        plain = Mask2FormerModel(config)
    tensors = mask2former.convert(state, Path(FILE))
    keymap.fill(network, tensors, Path(FILE))
    assert {name for name in shapes if not keymap.rename({name: state[name]}, mask2former.NAMES, Path(FILE))} == {
        name for name in shapes if name.endswith("relative_position_index")
    }
    beyond = {f"model.{name}" for name in plain.state_dict()} - tensors.keys()
    assert beyond == {f"model.pixel_level_module.encoder.swin.layernorm.{kind}" for kind in ("weight", "bias")}


def test_attention_heads_are_32_wide_as_in_swin_and_the_paper():
    """Only the backbone's are told by a tensor's shape."""
    config = published()
    swin = config.backbone_config
    assert [swin.embed_dim * 2**i // heads for i, heads in enumerate(swin.num_heads)] == [32] * 4
    assert config.hidden_dim // config.num_attention_heads == 32


def test_every_value_arrives_once():
    state = golden("sd.")
    arrived = mask2former.convert(state, GOLDEN)
    seen: set[str] = set()
    for name, tensor in state.items():
        parts = mask2former.convert({name: tensor}, GOLDEN)
        if name.endswith("relative_position_index"):
            assert not parts
            continue
        assert not seen & parts.keys()
        seen |= parts.keys()
        values = torch.cat([part.flatten() for part in parts.values()])
        assert torch.equal(values.sort().values, tensor.float().flatten().sort().values), name
    assert seen == arrived.keys()


def test_query_key_and_value_are_the_three_thirds_in_this_order():
    rows = torch.arange(12.0)
    parts = mask2former.convert({"backbone.stages.2.blocks.11.attn.w_msa.qkv.bias": rows}, GOLDEN)
    stem = "model.pixel_level_module.encoder.swin.encoder.layers.2.blocks.11.attention."
    assert {name: part.tolist() for name, part in parts.items()} == {
        stem + "q_proj.bias": [0, 1, 2, 3],
        stem + "k_proj.bias": [4, 5, 6, 7],
        stem + "v_proj.bias": [8, 9, 10, 11],
    }


def test_patch_merging_reads_the_same_pixels():
    """mmdetection unfolds 2 x 2 windows, channel by channel; transformers stacks the four pixels, column by column."""
    x = torch.randn(1, 3, 2, 2)
    theirs = torch.nn.functional.unfold(x, 2, stride=2)[0, :, 0]
    ours = torch.cat([x[0, :, row, column] for column in range(2) for row in range(2)])
    bias = mask2former.convert({"backbone.stages.0.downsample.norm.bias": theirs}, GOLDEN).popitem()[1]
    weight = mask2former.convert({"backbone.stages.0.downsample.reduction.weight": theirs[None]}, GOLDEN).popitem()[1]
    assert torch.equal(bias, ours) and torch.equal(weight, ours[None])


# numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FILE, ALIAS])
def test_a_file_under_either_name_gives_mmdetections_numbers(tmp_path, monkeypatch, name):
    use_tiny(monkeypatch, tmp_path, name=name)
    network, pixels, want = load(find_weights("mask2former")), golden("in.")["pixels"], golden("out.")
    with torch.no_grad():
        classes, masks = network(pixels)
        features = network.model.pixel_level_module.encoder(pixels).feature_maps
    for i, feature in enumerate(features):
        torch.testing.assert_close(feature, want[f"feat{i}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(classes, want["class_logits"], atol=1e-3, rtol=0)
    torch.testing.assert_close(masks, want["mask_logits"], atol=1e-3, rtol=0)


def test_the_network_is_frozen_in_fp32_and_read_once(tmp_path, monkeypatch):
    path = use_tiny(monkeypatch, tmp_path)
    network = load(path)
    assert not network.training and {p.dtype for p in network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in network.parameters()) and load(path) is network


def test_loading_leaves_the_random_state_alone(tmp_path, monkeypatch):
    path, before = use_tiny(monkeypatch, tmp_path), torch.get_rng_state()
    load(path)
    assert torch.equal(torch.get_rng_state(), before)


# files -----------------------------------------------------------------------------------------------


def meta() -> dict[str, object]:
    """What mmcv writes beside the weights, and numpy's numbers where it had them."""
    facts = {"mmcv_version": "1.5.0", "CLASSES": ("person", "bicycle"), "PALETTE": [(220, 20, 60)], "seed": 42, "epoch": 50}
    return facts | {"hook_msgs": {"best_score": np.float64(0.461), "steps": np.int64(3), "on": np.bool_(True), "lr": np.float32(0.5)}}


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_plain_facts_and_numpys_numbers_beside_the_weights_are_read(tmp_path, monkeypatch, module):
    """numpy 1 wrote the second name."""
    with monkeypatch.context() as patch:
        patch.setattr(np.float64(0).__reduce__()[0], "__module__", module)
        path = use_tiny(monkeypatch, tmp_path, {"meta": meta(), "state_dict": golden("sd.")})
    assert f"c{module}\nscalar".encode() in path.read_bytes()
    load(path)


class Surprise:
    def __reduce__(self):
        return (print, ("executed",))


def test_anything_that_could_execute_is_refused(tmp_path, monkeypatch, capsys):
    path = use_tiny(monkeypatch, tmp_path, {"meta": {"hook": Surprise()}, "state_dict": golden("sd.")})
    with pytest.raises(UserError, match="holds more than tensors") as caught:
        load(path)
    assert "\n" not in str(caught.value) and "executed" not in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(Surprise())) is None and "executed" in capsys.readouterr().out


def mmdetection_3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = "transformer_decoder.layers.0."
    return {name.replace(layer + "attentions.0.", layer + "cross_attn."): tensor for name, tensor in state.items()}


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


BIAS = "panoptic_head.cls_embed.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mmdetection_3, f"has mmdetection 3's names.*{FILE}"),
        (lambda state: without(state, BIAS), r"class_predictor\.bias missing for Mask2Former of transformers"),
        (lambda state: without(state, BIAS, "backbone.norm0.bias"), r"class_predictor\.bias, .*norms\.stage1\.bias missing"),
        (lambda state: state | {"visual.proj": state[BIAS]}, r"visual\.proj is not among their names"),
        (lambda state: state | {BIAS: state[BIAS][:-1]}, r"class_predictor\.bias of another shape"),
        (lambda state: state | {"backbone.norm0.scale": state[BIAS]}, r"norms\.stage1\.scale too many"),
    ],
)
def test_another_state_dict_is_refused_in_one_line_that_names_the_file(tmp_path, monkeypatch, change, message):
    path = use_tiny(monkeypatch, tmp_path, {"meta": {}, "state_dict": change(golden("sd."))})
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], {"state_dict": [1]}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, monkeypatch, content):
    path = use_tiny(monkeypatch, tmp_path, content)
    with pytest.raises(UserError, match=r"has no state_dict|holds a list"):
        load(path)


def test_a_file_cut_short_is_refused(tmp_path, monkeypatch):
    path = use_tiny(monkeypatch, tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="may be cut short"):
        load(path)
