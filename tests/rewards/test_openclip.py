"""open_clip's checkpoints give the same features under transformers, at full size and in numbers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from narrow_clip import open_clip_shapes
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel

from flowtilt.errors import UserError
from flowtilt.rewards import keymap
from flowtilt.rewards.openclip import clean, config, to_transformers

GOLDEN = Path(__file__).parent / "golden"
VIT_H = (
    1024,
    {"width": 1280, "layers": 32, "mlp": 5120, "patch_size": 14, "image_size": 224},
    {"width": 1024, "layers": 24, "mlp": 4096, "vocab_size": 49408, "context_length": 77},
)
VIT_L = (
    768,
    {"width": 1024, "layers": 24, "mlp": 4096, "patch_size": 14, "image_size": 224},
    {"width": 768, "layers": 12, "mlp": 3072, "vocab_size": 49408, "context_length": 77},
)


def golden(act: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """State dict in open_clip's layout, inputs and open_clip 3's outputs, and the architecture."""
    with safe_open(GOLDEN / f"openclip_tiny_{act}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(file.metadata()["info"])
    state = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    return state, tensors, info


def tiny_config(info: dict, act: str) -> CLIPConfig:
    def tower(given: dict, heads: int) -> dict:
        width = given["width"]
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": given["layers"], "num_attention_heads": heads}

    vision, text = info["vision"], info["text"]
    sizes = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    words = {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"], "bos_token_id": 126, "eos_token_id": 127}
    return CLIPConfig(
        projection_dim=info["embed_dim"],
        vision_config=tower(vision, vision["width"] // vision["head_width"]) | sizes | {"hidden_act": act},
        text_config=tower(text, text["heads"]) | words | {"hidden_act": act},
    )


def outputs(act: str, computed_with: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Our outputs and open_clip's, of the golden file `act`."""
    state, tensors, info = golden(act)
    model = keymap.fill(keymap.build(lambda: CLIPModel(tiny_config(info, computed_with))), to_transformers(state), GOLDEN)
    with torch.no_grad():
        image = F.normalize(model.get_image_features(pixel_values=tensors["in.pixels"]).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(input_ids=tensors["in.ids"]).pooler_output, dim=-1)
        cosine = (image * text).sum(1)
    scale = tensors["sd.logit_scale"].exp()  # a logit is so many cosines, and so is its error
    theirs = {name: tensors[f"out.{name}"] / (scale if name == "logit" else 1) for name in ("image", "text", "cos", "logit")}
    ours = {"image": image, "text": text, "cos": cosine, "logit": model.logit_scale.exp() * cosine / scale}
    return {name: (ours[name], theirs[name]) for name in ours}


@pytest.mark.parametrize("act", ["gelu", "quickgelu"])
def test_features_and_scores_are_open_clips(act):
    for name, (ours, theirs) in outputs(act, {"gelu": "gelu", "quickgelu": "quick_gelu"}[act]).items():
        assert (ours - theirs).abs().max() <= 1e-6, name


@pytest.mark.parametrize("act, other", [("gelu", "quick_gelu"), ("quickgelu", "gelu")])
def test_the_other_activation_is_another_model(act, other):
    found = outputs(act, other)
    for name in ("image", "cos"):
        ours, theirs = found[name]
        assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("act", ["gelu", "quickgelu"])
def test_the_layout_of_these_tests_is_open_clips_own(act):
    """The full-size layouts below are made by the function that gives the golden file's names and shapes."""
    state, _, info = golden(act)
    vision, text = ({**info[tower], "mlp": 4 * info[tower]["width"]} for tower in ("vision", "text"))
    assert open_clip_shapes(info["embed_dim"], vision, text) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "name, layout, source, target, parameters", [("ViT-H-14", VIT_H, 686, 910, 986_109_441), ("ViT-L-14", VIT_L, 446, 590, 427_616_513)]
)
def test_every_key_of_the_full_size_has_its_place(name, layout, source, target, parameters):
    """Counts: 3 tensors more a layer than the 12 of open_clip for q, k, v apart, weight and bias."""
    with torch.device("meta"):
        state = {key: torch.empty(shape, dtype=torch.float16) for key, shape in open_clip_shapes(*layout).items()}
        wanted = keymap.build(lambda: CLIPModel(config(name))).state_dict()
    found = to_transformers(state)
    assert len(state) == source and sum(tensor.numel() for tensor in state.values()) == parameters
    assert len(found) == target and {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in wanted.items()}
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_the_activation_goes_with_the_name():
    for name, act in (("ViT-H-14", "gelu"), ("ViT-L-14", "quick_gelu")):
        assert config(name).vision_config.hidden_act == config(name).text_config.hidden_act == act
        assert config(name).vision_config.layer_norm_eps == config(name).text_config.layer_norm_eps == 1e-5


def test_what_training_left_in_a_file_is_dropped():
    state, _, _ = golden("gelu")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()} | {"module.attn_mask": torch.zeros(77, 77)}
    plain, found = to_transformers(state), to_transformers(wrapped)
    assert plain.keys() == found.keys() and all(torch.equal(plain[name], found[name]) for name in plain)


def test_half_precision_comes_back_in_single():
    state, _, _ = golden("gelu")
    halves = to_transformers({name: tensor.half() for name, tensor in state.items()})
    singles = to_transformers({name: tensor.half().float() for name, tensor in state.items()})
    assert all(halves[name].dtype == torch.float32 and torch.equal(halves[name], singles[name]) for name in singles)


def test_a_name_that_open_clip_does_not_have_is_refused():
    state, _, _ = golden("gelu")
    with pytest.raises(UserError, match=r"HPS\.pt.*visual\.head\.weight") as caught:
        to_transformers(state | {"visual.head.weight": torch.zeros(1)}, Path("HPS.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("An astronaut’s glove ﬁre &amp; “NASA 2049” Ａ  x", 'An astronaut\'s glove fire & "NASA 2049" A  x'),
        ("‘a’ ‚b‛ ʼc “d” „e‟", "'a' 'b' 'c \"d\" \"e\""),
        ("ﬀ ﬁ ﬂ ﬃ ﬄ ﬆ Ĳ ĳ ŉ", "ff fi fl ffi ffl st IJ ij 'n"),
        ("ＦＵＬＬ　ｗｉｄｔｈ！", "FULL width!"),
        ("a\r\nb\rc\u2028d\u2029e", "a\nb\nc\nd\ne"),
        ("\ufeffa\x00b\x1fc\x7fd\ufffc", "abcd"),
        ("cafe\u0301", "café"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("<b>fish</b> &amp;amp; chips &rsquo;", "<b>fish</b> & chips ’"),
        ("&rsquo;tis &quot;it&quot;", '\'tis "it"'),
        ("  \t spaced \n", "spaced"),
        ("", ""),
        ('plain "Ascii", 100% — Ünïcode 日本 😀', 'plain "Ascii", 100% — Ünïcode 日本 😀'),
    ],
)
def test_captions_are_cleaned_as_ftfy_and_open_clip_do(text, plain):
    """The right-hand sides are those of ftfy 6.3 and open_clip 3.3, before capitals and blanks are made one."""
    assert clean(text) == plain
