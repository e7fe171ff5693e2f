"""One frozen model a process, whose features do not depend on what stands beside an image or a text."""

import json
import math
from pathlib import Path

import narrow_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards import clip, openclip
from flowtilt.rewards.clip import CLIP, IMAGES, TEXTS, load
from flowtilt.rewards.hpsv2 import HPSv2
from flowtilt.rewards.pickscore import PickScore
from flowtilt.seeding import generator

NAMES = ("clip-l", "pickscore", "hpsv2")
FOLDERS = {"clip-l": "openai/clip-vit-large-patch14", "pickscore": "yuvalkirstain/PickScore_v1"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Narrow weights of every kind where flowtilt looks for them."""
    narrow_clip.write_all(tmp_path)
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(openclip, "config", lambda name: narrow_clip.config())
    load.cache_clear()
    yield tmp_path
    load.cache_clear()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 224, 224, generator=generator(seed, "pictures"))


def refused(name: str) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(UserError) as caught:
        load(name, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_loaded_once_frozen_and_in_single_precision(folder, name):
    before = torch.random.get_rng_state()
    model = load(name, "cpu").model
    assert load(name, torch.device("cpu")).model is model
    assert not model.training and all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_what_transformers_loads_from_it(folder, name):
    theirs = CLIPModel.from_pretrained(folder / FOLDERS[name]).state_dict()
    ours = load(name, "cpu").model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_hps_stored_in_half_precision_is_computed_in_single(folder):
    path = folder / "HPS_v2.1_compressed.pt"
    stored = torch.load(path, weights_only=True)["state_dict"]
    images, prompts = pictures(2), [Prompt("a cat"), Prompt("a dog")]
    scores = HPSv2(device="cpu")(images, prompts)
    torch.save({"state_dict": {name: tensor.float() for name, tensor in stored.items()}}, path)
    load.cache_clear()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16} and scores.dtype == torch.float32
    assert torch.equal(HPSv2(device="cpu")(images, prompts), scores)


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_are_told_with_what_to_type(folder, name):
    (folder / "HPS_v2.1_compressed.pt").unlink() if name == "hpsv2" else (folder / FOLDERS[name] / "model.safetensors").unlink()
    assert "is missing: `flowtilt download" in refused(name)


def test_pickscore_without_the_tokenizers_folder_says_so(folder):
    (folder / FOLDERS["clip-l"]).rename(folder / "elsewhere")
    assert refused("pickscore").startswith("clip-tokenizer is missing")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_cut_short_is_refused(folder, name):
    path = folder / "HPS_v2.1_compressed.pt" if name == "hpsv2" else folder / FOLDERS[name] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    message = refused(name)
    assert "cut short" in message and str(path if name == "hpsv2" else path.parent) in message


def test_a_damaged_configuration_is_refused(folder):
    (folder / FOLDERS["clip-l"] / "config.json").write_text('{"projection_dim": 16,')
    assert FOLDERS["clip-l"] in refused("clip-l")


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s | {"text_model.head.weight": torch.zeros(2)}, "text_model.head.weight"),
        (lambda s: {key: s[key] for key in s if key != "visual_projection.weight"}, "visual_projection.weight"),
        (lambda s: s | {"visual_projection.weight": torch.zeros(3, 3)}, "visual_projection.weight"),
        (lambda s: {f"clip.{key}": s[key] for key in s}, "logit_scale"),
    ],
)
def test_a_folder_with_other_names_or_shapes_is_refused(folder, change, told):
    path = folder / FOLDERS["pickscore"] / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    message = refused("pickscore")
    assert FOLDERS["pickscore"] in message and told in message


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s | {"visual.head.weight": torch.zeros(2)}, "visual.head.weight"),
        (lambda s: {key: s[key] for key in s if key != "visual.proj"}, "visual_projection.weight"),
        (lambda s: s | {"visual.proj": torch.zeros(3, 3)}, "visual_projection.weight"),
        (lambda s: {key: s[key] for key in s if "resblocks.1" not in key}, "encoder.layers.1"),
        (lambda s: {}, "logit_scale"),
    ],
)
def test_an_hps_file_with_other_names_or_shapes_is_refused(folder, change, told):
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": change(torch.load(path, weights_only=True)["state_dict"])}, path)
    message = refused("hpsv2")
    assert str(path) in message and told in message


def test_a_file_that_is_not_hps_is_refused(folder):
    torch.save({"weights": torch.zeros(3)}, folder / "HPS_v2.1_compressed.pt")
    assert 'no "state_dict"' in refused("hpsv2")


@pytest.mark.parametrize("scale", [14.3, 49, 121])
def test_a_clip_that_is_not_pickscore_is_refused_by_its_logit_scale(folder, scale):
    path = folder / FOLDERS["pickscore"] / "model.safetensors"
    save_file(load_file(path) | {"logit_scale": torch.tensor(math.log(scale))}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"exp\(logit_scale\)"):
        PickScore(device="cpu")


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    (folder / FOLDERS["clip-l"] / "vocab.json").unlink()
    assert refused("hpsv2").startswith("clip-tokenizer is missing")


def test_a_tokenizer_of_another_family_is_refused(folder):
    """One token fewer, so the end token has another number."""
    path = folder / FOLDERS["clip-l"] / "vocab.json"
    tokens = [token for token in json.loads(path.read_text()) if token != "red</w>"]
    path.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path.parent / "merges.txt").write_text("#version: 0.2\n")
    assert "tokenizer" in refused("pickscore")


def test_a_configuration_from_before_the_end_token_was_named_reads_the_same(folder):
    """Early ones of transformers state 2, upon which the highest token is read: it is the end token."""
    path = folder / FOLDERS["clip-l"] / "config.json"
    features = load("clip-l", "cpu").text_features(["a cat"])
    stated = json.loads(path.read_text())
    stated["text_config"]["eos_token_id"] = 2
    path.write_text(json.dumps(stated))
    load.cache_clear()
    assert load("clip-l", "cpu").model.text_model.eos_token_id == 2
    assert torch.equal(load("clip-l", "cpu").text_features(["a cat"]), features)


# features --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_transformers_own_forward(folder, name):
    """Which pads texts to 77 and normalises with its image processor's figures."""
    found, images, texts = load(name, "cpu"), pictures(3), ["a cat", "Two dogs in a red hat", ""]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    ids = found.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = found.model(pixel_values=(images - mean[:, None, None]) / std[:, None, None], **ids)
    torch.testing.assert_close(found.image_features(images), theirs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.text_features(texts), theirs.text_embeds, atol=1e-6, rtol=0)
    assert found.logit_scale == pytest.approx(100, rel=1e-3)


def test_more_images_than_fit_one_pass_keep_their_order(folder, monkeypatch):
    found, images = load("clip-l", "cpu"), pictures(5)
    one_by_one = torch.cat([found.image_features(image[None]) for image in images])
    sizes = []
    whole = found.model.get_image_features
    monkeypatch.setattr(clip, "IMAGES", 2)
    monkeypatch.setattr(found.model, "get_image_features", lambda pixel_values: sizes.append(len(pixel_values)) or whole(pixel_values))
    torch.testing.assert_close(found.image_features(images), one_by_one, atol=1e-6, rtol=0)
    assert sizes == [2, 2, 1] and IMAGES == 64


@pytest.mark.parametrize("clean", [False, True])
def test_a_text_has_the_same_bits_whatever_stands_beside_it(folder, clean):
    texts = ["a cat", "a much longer caption of two red dogs", "", "“cat” &amp; dog", "a cat"]
    together = load("clip-l", "cpu").text_features(texts, clean)
    load.cache_clear()
    alone = torch.stack([load("clip-l", "cpu").text_features([text], clean)[0] for text in texts])
    assert torch.equal(together, alone) and torch.equal(together[0], together[4])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))


def test_each_distinct_text_is_encoded_once(folder, monkeypatch):
    found, read = load("clip-l", "cpu"), []
    whole = found.model.get_text_features
    monkeypatch.setattr(found.model, "get_text_features", lambda input_ids: read.append(input_ids) or whole(input_ids))
    first = found.text_features(["a cat", "a dog", "a cat"])
    assert torch.equal(found.text_features(["a dog", "a cat", "a dog"]), first[[1, 0, 1]]) and len(read) == 2
    assert found._encoded.cache_info().maxsize == TEXTS


def test_only_cleaned_texts_are_cleaned(folder):
    found = load("clip-l", "cpu")
    plain, curly = found.text_features(["the cat's", "the cat’s"])
    assert not torch.equal(plain, curly)
    assert torch.equal(found.text_features(["the cat’s"], clean=True)[0], plain)


def test_a_text_is_cut_at_77_tokens_and_still_read_at_its_end(folder):
    long, cut, shorter = load("clip-l", "cpu").text_features(["cat " * 200, "cat " * 75, "cat " * 74])
    assert torch.equal(long, cut) and not torch.equal(cut, shorter)


def test_features_stay_in_single_precision_where_the_rest_is_automatically_in_half(folder):
    found, images = load("clip-l", "cpu"), pictures(2)
    alone = found.image_features(images), found.text_features(["a cat"])
    load.cache_clear()
    found = load("clip-l", "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = found.image_features(images), found.text_features(["a cat"])
    assert torch.equal(alone[0], inside[0]) and torch.equal(alone[1], inside[1])


def test_the_gradient_of_an_images_features_is_its_own(folder):
    found, images = load("hpsv2", "cpu"), pictures(3).requires_grad_()
    features = found.image_features(images)
    torch.testing.assert_close(features.detach().norm(dim=1), torch.ones(3))
    features[1, 0].backward()
    assert images.grad is not None and images.grad[1].abs().max() > 0 and images.grad[[0, 2]].abs().max() == 0
    assert not found.text_features(["a cat"]).requires_grad


def test_texts_are_told_apart_and_images_too(folder):
    """So that the narrow weights of these tests can find faults at all."""
    for name in NAMES:
        found = load(name, "cpu")
        assert isinstance(found, CLIP)
        texts, images = found.text_features(["a cat", "a dog"]), found.image_features(pictures(2))
        assert F.cosine_similarity(*texts, dim=0) < 0.999 and (images[0] - images[1]).abs().max() > 1e-3
