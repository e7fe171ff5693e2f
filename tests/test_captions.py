"""Captions: encoded once and by themselves, kept within bounds, found on disk by the next process; encoders only visit."""

from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import letters
from torch import nn
from transformers import T5Tokenizer

from flowtilt.config import ModelSettings
from flowtilt.device.placement import on_device
from flowtilt.io.user_code import from_file
from flowtilt.models import captions
from flowtilt.models.captions import Captions, captions_of
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.cutting import notice_cut
from flowtilt.models.opening import open_model
from flowtilt.playground import world as playground
from flowtilt.prompts import Prompt


class Encoder:
    """Counts what it encodes."""

    def __init__(self):
        self.seen = []

    def __call__(self, text):
        self.seen.append(text)
        return {"e": torch.full((4,), float(len(text)))}


def build(encode, folder=None):
    return Captions(encode, [], torch.device("cpu"), folder)


def test_rows_follow_the_captions_and_each_is_encoded_once():
    encode = Encoder()
    given = build(encode)(["aa", "b", "aa", "ccc"])
    assert encode.seen == ["aa", "b", "ccc"]
    assert given.tensors()["e"][:, 0].tolist() == [2, 1, 2, 3] and len(given.distinct["e"]) == 3
    part = given.select(torch.tensor([3, 0, 0]))
    assert len(part) == 3 and part.tensors()["e"][:, 0].tolist() == [3, 2, 2]
    both = part.join(Conditioning({"e": torch.zeros(1, 4)}, torch.zeros(2, dtype=torch.long)))
    assert both.tensors()["e"][:, 0].tolist() == [3, 2, 2, 0, 0]


def test_memory_is_bounded_and_the_least_recently_used_goes_first(monkeypatch):
    monkeypatch.setattr(captions, "IN_MEMORY", 3 * 16)
    encode = Encoder()
    known = build(encode)
    for text in ("a", "b", "c", "a", "d", "a", "b"):
        known([text])
    assert encode.seen == ["a", "b", "c", "d", "b"]
    assert len(known([f"word {k}" for k in range(40)])) == 40 and len(known._kept) == 3


def test_another_process_finds_embeddings_on_disk_and_a_torn_file_is_made_anew(tmp_path):
    build(Encoder(), tmp_path)(["a", "bb"])
    encode = Encoder()
    assert build(encode, tmp_path)(["bb", "a", "ccc"]).tensors()["e"][:, 0].tolist() == [2, 1, 3]
    assert encode.seen == ["ccc"]
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert build(encode, tmp_path)(["a"]).tensors()["e"].eq(1).all()
    assert encode.seen == ["ccc", "a"]


def test_the_disk_is_bounded(tmp_path, monkeypatch):
    build(Encoder(), tmp_path)(["a"])
    one = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(captions, "ON_DISK", 5 * one)
    build(Encoder(), tmp_path)([f"word {k}" for k in range(20)])
    assert len(list(tmp_path.iterdir())) == 5


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    encode = Encoder()
    known = build(encode, tmp_path / "file" / "below")
    assert known(["a"]).tensors()["e"].eq(1).all() and known(["a", "bb"]).tensors()["e"][1].eq(2).all()
    assert encode.seen == ["a", "bb"]


def test_other_weights_or_lengths_have_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def folder(weight, length):
        pipeline = nn.Module()
        pipeline.components = {"text_encoder": nn.Linear(2, 2), "text_encoder_2": None, "vae": nn.Linear(1, 1)}
        nn.init.constant_(pipeline.components["text_encoder"].weight, weight)
        nn.init.zeros_(pipeline.components["text_encoder"].bias)
        return captions_of(pipeline, Encoder(), torch.device("cpu"), True, length)._folder

    assert folder(1.0, 128) == folder(1.0, 128)
    assert len({folder(1.0, 128), folder(2.0, 128), folder(1.0, 256)}) == 3


def test_other_tokenizers_have_another_folder_whatever_their_last_call_left_set(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoder = nn.Linear(2, 2)

    def folder(words):
        pipeline = nn.Module()
        pipeline.components = {"text_encoder": encoder, "tokenizer": words, "tokenizer_2": None}
        return captions_of(pipeline, Encoder(), torch.device("cpu"), True)._folder

    one, same, other = letters(), letters(), T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], extra_ids=0)
    same(["a cat"], truncation=True, max_length=2, padding="max_length")
    shorter = letters()
    shorter.model_max_length = 7
    assert folder(one) == folder(same)
    assert len({folder(words) for words in (one, other, shorter, None)}) == 4


def test_a_family_that_reads_captions_otherwise_has_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipeline = nn.Module()
    pipeline.components = {"text_encoder": nn.Linear(2, 2)}

    def folder(code):
        (tmp_path / "mine.py").write_text(f"class Mine:\n    def read(self, text):\n        return {code}\n")
        family = from_file("model.adapter", f"{tmp_path}/mine.py:Mine")()
        return captions_of(pipeline, family.read, torch.device("cpu"), True)._folder

    assert folder("1") == folder("1") != folder("22")


def pipeline_of(clip_tokens, t5_length=None):
    """CLIP's part played by a tokenizer of letters, too."""

    class CLIPTextModel:
        pass

    class T5EncoderModel:
        pass

    clip = letters()
    clip.model_max_length = clip_tokens
    parts = {"text_encoder": CLIPTextModel(), "tokenizer": clip, "text_encoder_3": None, "tokenizer_3": None}
    if t5_length:
        parts |= {"text_encoder_3": T5EncoderModel(), "tokenizer_3": letters()}
    return SimpleNamespace(pipeline=SimpleNamespace(components=parts), protocol={"t5_length": t5_length or 0})


LONG = [Prompt("a cat"), Prompt("a " + "x" * 20, where="p.txt:2"), Prompt("b " + "y" * 40, where="p.txt:3"), Prompt("b " + "y" * 40)]


def test_captions_that_every_encoder_cuts_are_counted_and_the_first_is_named(capsys):
    notice_cut(pipeline_of(16), LONG)
    said = capsys.readouterr().err
    assert said.startswith("prompts: 2 of 3 captions are longer than the text encoders read (CLIP: 16 tokens) and are cut; p.txt:2 loses")
    lost = said.split('"')[1]
    assert LONG[1].text.endswith(lost) and 0 < len(lost) < 20 and said.count("\n") == 1


def test_a_caption_that_the_t5_reads_whole_is_not_cut(capsys):
    notice_cut(pipeline_of(16, 30), LONG)
    assert "1 of 3 captions are longer than the text encoders read (T5: 30 tokens)" in capsys.readouterr().err
    notice_cut(pipeline_of(16, 99), LONG)
    notice_cut(pipeline_of(99, 1), LONG)  # the playground's T5 reads nothing
    assert capsys.readouterr().err == ""


def test_no_caption_of_the_playground_is_cut_and_a_longer_one_is(capsys):
    model = open_model(ModelSettings(path="playground"), torch.device("cpu"))
    given = [*playground.prompts("train"), *playground.prompts("test")]
    capsys.readouterr()
    notice_cut(model, given)
    assert "prompts:" not in capsys.readouterr().err
    notice_cut(model, [Prompt("a red circle left of a blue square and a green cross")])
    assert "1 of 1 captions" in capsys.readouterr().err


def test_visiting_modules_come_home_as_they_were_also_after_an_error(monkeypatch):
    module = nn.BatchNorm1d(3)
    before = {name: (x.data_ptr(), x.clone()) for name, x in module.state_dict(keep_vars=True).items()}
    moved = []

    def to(x, device):  # one device only here: a copy stands for the one on a GPU
        moved.append(x)
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(RuntimeError, match="stop"), on_device([module, module], torch.device("cuda", 0)):
        for x in module.state_dict().values():
            x.zero_()
        raise RuntimeError("stop")
    assert len(moved) == len(before) == 5
    for name, x in module.state_dict(keep_vars=True).items():
        assert x.data_ptr() == before[name][0] and torch.equal(x, before[name][1])


def test_what_has_moved_goes_home_also_where_memory_ends_half_way(monkeypatch):
    module = nn.Linear(2, 2)
    before = {name: x.data_ptr() for name, x in module.named_parameters()}
    moved = []

    def to(x, device):
        if moved:
            raise torch.OutOfMemoryError("full")
        moved.append(x)
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError), on_device([module], torch.device("cuda", 0)):
        pass
    assert moved and {name: x.data_ptr() for name, x in module.named_parameters()} == before
