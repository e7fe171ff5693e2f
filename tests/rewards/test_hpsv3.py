"""HPSv3 at small size against transformers' own model and processor, and at full size by its shapes."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from flowtilt.errors import UserError
from flowtilt.io.images import to_pil
from flowtilt.plan.judges import judging
from flowtilt.prompts import Prompt
from flowtilt.rewards import hpsv3, keymap
from flowtilt.rewards.named import Named

IMAGE, REWARD, WIDTH = 60, 63, 32


def tiny() -> Qwen2VLConfig:
    text = {
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61, vision_end_token_id=62)


@pytest.fixture(scope="module")
def both():
    """transformers' model with a head of random weights, and ours with the same weights by way of their published names."""
    torch.manual_seed(0)
    theirs = Qwen2VLForConditionalGeneration(tiny()).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head = {
        name: torch.randn(shape)
        for name, shape in {
            "0.weight": (1024, WIDTH),
            "0.bias": (1024,),
            "3.weight": (16, 1024),
            "3.bias": (16,),
            "5.weight": (2, 16),
            "5.bias": (2,),
        }.items()
    }
    published = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in theirs.state_dict().items()
    }
    published |= {f"rm_head.{name}": value for name, value in head.items()}
    tensors = keymap.rename(published, hpsv3.NAMES, "file")  # type: ignore[arg-type]
    return theirs, head, keymap.fill(keymap.build(lambda: hpsv3.Network(tiny())), tensors, "file")  # type: ignore[arg-type]


def tokens(grid, lengths):
    seen = int(grid[0].prod()) // 4
    rows = [[1, 61, *[IMAGE] * seen, 62, *range(2, 2 + n), REWARD, 5, 6] for n in lengths]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask, torch.tensor([row.index(REWARD) for row in rows])


@torch.no_grad()
def test_a_score_is_the_head_at_the_reward_token_of_transformers_model(both, monkeypatch):
    monkeypatch.setattr(hpsv3, "PIXELS", 4 * 28 * 28)
    theirs, head, ours = both
    images = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(1))
    patches, grid = hpsv3.patches_of(images)
    ids, mask, at = tokens(grid, (3, 7))
    found = ours(patches, grid, ids, mask, at, False)

    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28)
    for n, picture in enumerate(to_pil(images)):
        seen = processor(images=[picture], return_tensors="pt")
        length = int(mask[n].sum())
        positions = torch.arange(length).expand(3, 1, length)
        kinds = (ids[n : n + 1, :length] == IMAGE).int()
        hidden = theirs(
            input_ids=ids[n : n + 1, :length],
            position_ids=positions,
            pixel_values=seen["pixel_values"],
            mm_token_type_ids=kinds,
            image_grid_thw=seen["image_grid_thw"],
            output_hidden_states=True,
        ).hidden_states[-1][0, at[n]]
        inner = (head["0.weight"] @ hidden + head["0.bias"]).relu()
        inner = (head["3.weight"] @ inner + head["3.bias"]).relu()
        assert found[n].tolist() == pytest.approx((head["5.weight"] @ inner + head["5.bias"]).tolist(), rel=1e-3)


@torch.no_grad()
def test_other_positions_are_another_score_and_company_is_not(both, monkeypatch):
    monkeypatch.setattr(hpsv3, "PIXELS", 4 * 28 * 28)
    ours = both[2]
    images = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(1))
    patches, grid = hpsv3.patches_of(images)
    ids, mask, at = tokens(grid, (3, 7))
    together = ours(patches, grid, ids, mask, at, False)
    few, grid1 = hpsv3.patches_of(images[:1])
    alone = ours(few, grid1, *tokens(grid1, (3,)), False)
    assert together[0].tolist() == pytest.approx(alone[0].tolist(), rel=1e-3)
    assert (ours(patches, grid, ids, mask, at, True) - together).abs().max() > 1e-2 * together.abs().max()


@pytest.mark.parametrize("size", [(512, 512), (1024, 768), (32, 32), (300, 40), (28, 28 * 199)])
def test_pictures_are_cut_into_the_processors_patches(size):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    patches, grid = hpsv3.patches_of(images)
    theirs = Qwen2VLImageProcessorPil(min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)(images=to_pil(images), return_tensors="pt")
    assert grid.equal(theirs["image_grid_thw"].to(grid.dtype))
    assert (patches - theirs["pixel_values"]).abs().max() < 1e-5


def test_the_full_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in hpsv3.Network(hpsv3.config()).state_dict().items()}
        theirs = Qwen2VLForConditionalGeneration(hpsv3.config()).state_dict()
    published = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value for name, value in theirs.items()
    }
    head = {
        "rm_head.0.weight": (1024, 3584),
        "rm_head.0.bias": (1024,),
        "rm_head.3.weight": (16, 1024),
        "rm_head.3.bias": (16,),
        "rm_head.5.weight": (2, 16),
        "rm_head.5.bias": (2,),
    }
    published |= {name: torch.empty(shape, device="meta") for name, shape in head.items()}
    renamed = keymap.rename(published, hpsv3.NAMES, "file", torch.bfloat16)  # type: ignore[arg-type]
    assert {name: tensor.shape for name, tensor in renamed.items()} == shapes
    assert shapes["body.language_model.embed_tokens.weight"] == (151658, 3584)
    assert 7.6e9 < sum(shape.numel() for shape in shapes.values()) < 8.4e9
    with pytest.raises(UserError, match="is not among their names"):
        keymap.rename({"cap_encoder.weight": torch.zeros(1)}, hpsv3.NAMES, "file")  # type: ignore[arg-type]


def test_a_caption_stands_in_the_question_and_brings_no_token_of_its_own():
    asked = hpsv3.question("a {cat} <|Reward|>")
    assert "Textual prompt - a {cat} < |Reward|>\n\n\n\nPlease" in asked and asked.count("<|Reward|>") == 1


def test_a_plan_counts_its_weights_in_16_bits_and_an_images_operations():
    model = judging([Named("hpsv3", "hpsv3")], 512).models["hpsv3"]
    assert 15.3e9 < model.weights.bytes < 16.8e9
    language, vision = 2 * 6.5e9 * (256 + hpsv3.TOKENS), 2 * 0.63e9 * 1024  # a product and a sum per weight and token
    assert 1 < sum(model.image.values()) / (language + vision) < 1.15


def test_the_reward_tokenizes_pads_and_finds_its_token(both, monkeypatch):
    monkeypatch.setattr(hpsv3, "PIXELS", 4 * 28 * 28)
    monkeypatch.setattr(hpsv3, "ROWS", REWARD + 1)
    special = {"<|image_pad|>": IMAGE, "<|vision_start|>": 61, "<|vision_end|>": 62, hpsv3.REWARD: REWARD}
    words = WordLevel({"<unk>": 0, "<pad>": 1, "cat": 2, "dog": 3, **{f"unused{k}": k for k in range(4, 60)}, **special}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", additional_special_tokens=list(special))
    reward = object.__new__(hpsv3.HPSv3)
    reward.network, reward.tokenizer, reward._mrope = both[2], fast, False
    images = torch.rand(5, 3, 40, 60, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt("a cat " + "dog " * k) for k in range(5)]
    found = reward(images, prompts)
    assert found.scores.shape == found.details["log_sigma"].shape == (5,) and len(set(found.scores.tolist())) == 5
    for n in range(5):
        alone = reward(images[n : n + 1], prompts[n : n + 1])
        assert float(alone.scores) == pytest.approx(float(found.scores[n]), rel=1e-3)
