"""ImageReward's file fills transformers' BLIP, which scores what the published code scores, one image with one prompt."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards import imagereward, keymap, load_reward, pixels
from flowtilt.rewards.imagereward import ImageReward, Network

GOLDEN = Path(__file__).parent / "golden" / "imagereward_tiny.safetensors"
"""A narrow random network's weights and what the published code computes with them."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "blue", "on", "the", "mat", "sit", "##s", "two"]


published = imagereward.configs


def tiny_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The published architecture with other sizes."""
    vision, text = published()
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    for name, size in sizes.items():
        setattr(vision, name, size)
    sizes = {"vocab_size": 200, "hidden_size": 48, "encoder_hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    for name, size in (sizes | {"num_attention_heads": 4, "max_position_embeddings": 40}).items():
        setattr(text, name, size)
    return vision, text


def golden(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(prefix)}


def write_bert(folder: Path) -> None:
    """A tokenizer of a few words under bert-base-uncased's file names."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')


def use_tiny(monkeypatch: pytest.MonkeyPatch, folder: Path, state: object = None) -> Path:
    """The golden weights and a tokenizer as files in FLOWTILT_WEIGHTS, and the architecture that they fit."""
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(folder))
    monkeypatch.setattr(imagereward, "configs", tiny_configs)
    monkeypatch.setattr(imagereward, "SIZE", 32)
    torch.save(golden("sd.") if state is None else state, folder / "ImageReward.pt")
    write_bert(folder / "bert-base-uncased")
    return folder / "ImageReward.pt"


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> ImageReward:
    use_tiny(monkeypatch, tmp_path)
    return ImageReward(device="cpu")


def pictures(*size: int) -> Tensor:
    return torch.randint(256, size, generator=torch.Generator().manual_seed(5)) / 255


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


THREE = prompts("a red cat sits on the mat", "two dogs", "blue")


def layout(vision: BlipVisionConfig, text: BlipTextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    eye, wide, patch = "blip.visual_encoder.", vision.hidden_size, vision.patch_size
    found |= {eye + "cls_token": (1, 1, wide), eye + "pos_embed": (1, (vision.image_size // patch) ** 2 + 1, wide)}
    found |= {eye + "patch_embed.proj.weight": (wide, 3, patch, patch), eye + "patch_embed.proj.bias": (wide,)}
    norm(eye + "norm", wide)
    for i in range(vision.num_hidden_layers):
        for n in (1, 2):
            norm(f"{eye}blocks.{i}.norm{n}", wide)
        linear(f"{eye}blocks.{i}.attn.qkv", 3 * wide, wide)
        linear(f"{eye}blocks.{i}.attn.proj", wide, wide)
        linear(f"{eye}blocks.{i}.mlp.fc1", 4 * wide, wide)
        linear(f"{eye}blocks.{i}.mlp.fc2", wide, 4 * wide)
    read, width, inner = "blip.text_encoder.", text.hidden_size, text.intermediate_size
    found |= {f"{read}embeddings.word_embeddings.weight": (text.vocab_size, width)}
    found |= {f"{read}embeddings.position_embeddings.weight": (text.max_position_embeddings, width)}
    found |= {f"{read}embeddings.position_ids": (1, text.max_position_embeddings)}
    norm(f"{read}embeddings.LayerNorm", width)
    for i in range(text.num_hidden_layers):
        for kind, into in (("attention", width), ("crossattention", text.encoder_hidden_size)):
            part = f"{read}encoder.layer.{i}.{kind}."
            linear(part + "self.query", width, width)
            linear(part + "self.key", width, into)
            linear(part + "self.value", width, into)
            linear(part + "output.dense", width, width)
            norm(part + "output.LayerNorm", width)
        linear(f"{read}encoder.layer.{i}.intermediate.dense", inner, width)
        linear(f"{read}encoder.layer.{i}.output.dense", width, inner)
        norm(f"{read}encoder.layer.{i}.output.LayerNorm", width)
    linear("blip.vision_proj", 256, wide)
    linear("blip.text_proj", 256, width)
    for i, (into, out) in zip((0, 2, 4, 6, 7), ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        linear(f"mlp.layers.{i}", out, into)
    return found


# names -----------------------------------------------------------------------------------------------


def test_the_layout_that_these_tests_write_is_the_published_one():
    assert layout(*tiny_configs()) == {name: tuple(tensor.shape) for name, tensor in golden("sd.").items()}


def test_the_published_names_fill_the_full_network_and_only_blips_projections_are_left_over():
    shapes, path = layout(*imagereward.configs()), Path("ImageReward.pt")
    assert len(shapes) == 625
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        network = Network(*imagereward.configs())
    keymap.fill(network, keymap.rename(state, imagereward.NAMES, path), path)
    left = {name for name in shapes if not keymap.rename({name: state[name]}, imagereward.NAMES, path)}
    projections = {f"blip.{kind}_proj.{part}" for kind in ("vision", "text") for part in ("weight", "bias")}
    assert left == projections | {"blip.text_encoder.embeddings.position_ids"}
    assert sum(p.numel() for p in network.parameters()) == 446_206_689
    assert network.vision.embeddings.position_embedding.shape[1] == 14 * 14 + 1


def test_attention_heads_are_64_wide_as_in_vit_l_and_bert_base():
    """No tensor's shape tells how many they are."""
    assert [config.hidden_size // config.num_attention_heads for config in published()] == [64, 64]


def test_every_value_arrives_once():
    state, seen = golden("sd."), set()
    for name, tensor in state.items():
        parts = keymap.rename({name: tensor}, imagereward.NAMES, GOLDEN)
        assert not seen & parts.keys() and all(torch.equal(part, tensor) for part in parts.values())
        seen |= parts.keys()
    assert len(seen) == len(state) - 5


# numbers ---------------------------------------------------------------------------------------------


def test_vision_text_and_reward_are_the_published_codes(tiny):
    given, want, network = golden("in."), golden("out."), tiny.network
    with torch.no_grad():
        seen = network.vision(given["pixels"]).last_hidden_state
        read = network.text(input_ids=given["ids"], attention_mask=given["mask"], encoder_hidden_states=seen).last_hidden_state
        scores = network(given["pixels"], given["ids"], given["mask"])
    torch.testing.assert_close(seen, want["vision"], atol=1e-5, rtol=0)
    torch.testing.assert_close(read[:, 0], want["cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores, want["reward"], atol=1e-5, rtol=0)


def test_a_score_is_the_networks_for_the_middle_of_the_image_and_35_tokens(tiny):
    """[CLS] is 2, [SEP] 3, padding 0; sits is two pieces."""
    ids = torch.zeros(1, 35, dtype=torch.long)
    ids[0, :10] = torch.tensor([2, *map(WORDS.index, ["a", "red", "cat", "sit", "##s", "on", "the", "mat"]), 3])
    image = pictures(1, 3, 32, 43)  # of a margin of 11, the half rounds to the even 6
    with torch.no_grad():
        want = tiny.network(pixels.normalize(image[..., 6:38]), ids, (ids > 0).long())
    torch.testing.assert_close(tiny(image, THREE[:1]), want, atol=1e-6, rtol=0)


def test_each_image_meets_its_own_prompt_only(tiny):
    images = pictures(3, 3, 40, 32)
    together = tiny(images, THREE)
    assert together.shape == (3,) and together.dtype == torch.float32 and together.isfinite().all()
    alone = torch.cat([tiny(image[None], [prompt]) for image, prompt in zip(images, THREE, strict=True)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiny(images.flip(0), THREE[::-1]), together.flip(0), atol=1e-5, rtol=0)
    assert (tiny(images, [THREE[1], THREE[2], THREE[0]]) - together).abs().min() > 1e-4
    assert (tiny(images.roll(1, 0), THREE) - together).abs().min() > 1e-4


def test_more_images_than_one_pass_holds_are_scored_in_order(tiny, monkeypatch):
    images, texts = pictures(7, 3, 32, 32), [*THREE, *THREE, THREE[0]]
    whole = tiny(images, texts)
    monkeypatch.setattr(imagereward, "IMAGES", 3)
    torch.testing.assert_close(tiny(images, texts), whole, atol=1e-5, rtol=0)


def test_capitals_do_not_count_and_words_beyond_33_pieces_are_not_read(tiny):
    images = pictures(2, 3, 32, 32)
    capital = tiny(images, prompts("A RED Cat", "a red cat"))
    assert torch.equal(capital, tiny(images, prompts("a red cat", "A red cAT")))
    start = " ".join(["cat"] * 32)
    last = tiny(images[:1].repeat(3, 1, 1, 1), prompts(f"{start} dog", f"{start} blue", f"{start} blue on the mat"))
    assert last[1] == last[2] and abs(last[0] - last[1]) > 1e-5


def test_a_callers_autocast_changes_nothing(tiny):
    images = pictures(3, 3, 40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny(images, THREE)
    assert torch.equal(mixed, tiny(images, THREE))


def test_padding_is_not_read(tiny):
    image, ids = pictures(1, 3, 32, 32), torch.zeros(1, 35, dtype=torch.long)
    ids[0, :4] = torch.tensor([2, 5, 6, 3])
    mask, other = (ids > 0).long(), ids.masked_fill(ids == 0, 9)
    with torch.no_grad():
        assert torch.equal(tiny.network(image, ids, mask), tiny.network(image, other, mask))
        assert not torch.equal(tiny.network(image, ids, mask), tiny.network(image, other, torch.ones_like(mask)))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (600, 1), (31, 33)])
def test_images_of_any_size_pass(tiny, size):
    assert tiny(pictures(2, 3, *size), THREE[:2]).isfinite().all()


# the gradient ----------------------------------------------------------------------------------------


def test_the_differentiable_score_is_the_score_where_nothing_is_rounded(tiny):
    images = pictures(3, 3, 32, 40)  # whole grey levels, cut but not resized
    torch.testing.assert_close(tiny.differentiable(images, THREE), tiny(images, THREE), atol=1e-5, rtol=0)


def test_rounding_moves_the_score_by_no_more_than_its_slope_allows(tiny):
    """Pillow's resize and the tensor's differ by 1.2 grey levels at most."""
    images = pictures(3, 3, 64, 48)
    crops = pixels.bicubic_crop_tensor(images, 32, "half_even").requires_grad_()
    (slope,) = torch.autograd.grad(tiny.differentiable(crops, THREE).sum(), crops)
    moved = (tiny.differentiable(images, THREE) - tiny(images, THREE)).abs()
    assert (moved > 0).all() and (moved < 1.2 / 255 * slope.abs().flatten(1).sum(1)).all()


def test_the_gradient_is_the_scores_slope(tiny):
    images = (0.1 + 0.8 * pictures(2, 3, 40, 32)).requires_grad_()
    (gradient,) = torch.autograd.grad(tiny.differentiable(images, THREE[:2]).sum(), images)
    direction = gradient / gradient.norm()
    step = 0.02 * direction
    with torch.no_grad():
        ahead, behind = (tiny.differentiable(images + sign * step, THREE[:2]).double().sum() for sign in (1, -1))
    slope = (ahead - behind) / (2 * step.norm())
    assert math.isclose(slope, gradient.norm(), rel_tol=1e-2)
    assert not any(p.requires_grad for p in tiny.network.parameters())


# files -----------------------------------------------------------------------------------------------


def test_it_is_built_by_name_and_its_network_is_read_once(tiny):
    built = load_reward("imagereward", "imagereward", device="cpu")
    assert isinstance(built, ImageReward) and built.network is tiny.network and not built.network.training
    with pytest.raises(UserError, match="unknown option 'resize'; it has no options"):
        load_reward("imagereward", "imagereward", options={"resize": "squash"})


def test_loading_leaves_the_random_state_alone(tmp_path, monkeypatch):
    use_tiny(monkeypatch, tmp_path)
    before = torch.get_rng_state()
    ImageReward(device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


HEAD = "mlp.layers.7.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != HEAD},
            r"head\.4\.bias missing for Network of transformers",
        ),
        (lambda state: state | {"visual.proj": state[HEAD]}, r"visual\.proj is not among their names"),
        (lambda state: state | {"blip.text_encoder.pooler.dense.bias": state[HEAD]}, r"text\.pooler\.dense\.bias too many"),
        (lambda state: state | {HEAD: torch.zeros(2)}, r"head\.4\.bias of another shape"),
        (lambda state: {"state_dict": state}, r"state_dict is not among their names"),
    ],
)
def test_another_file_is_refused_in_one_line_that_names_it(tmp_path, monkeypatch, change, message):
    path = use_tiny(monkeypatch, tmp_path, change(golden("sd.")))
    with pytest.raises(UserError, match=message) as caught:
        ImageReward(device="cpu")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path, monkeypatch):
    path = use_tiny(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    (tmp_path / "bert-base-uncased" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="bert is missing: `flowtilt download imagereward`"):
        ImageReward(device="cpu")
    path.unlink()
    with pytest.raises(UserError, match=r"ImageReward\.pt is missing: `flowtilt download imagereward`"):
        ImageReward(device="cpu")
