"""Captions: encoded once and by themselves, kept within bounds, found on disk by the next process; encoders only visit."""

import pytest
import torch
from torch import nn

from flowtilt.models import captions
from flowtilt.models.captions import Captions, captions_of
from flowtilt.models.conditioning import Conditioning
from flowtilt.placement import visiting


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


def test_visiting_modules_come_home_as_they_were_also_after_an_error(monkeypatch):
    module = nn.BatchNorm1d(3)
    before = {name: (x.data_ptr(), x.clone()) for name, x in module.state_dict(keep_vars=True).items()}
    moved = []

    def to(x, device):  # one device only here: a copy stands for the one on a GPU
        moved.append(x)
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(RuntimeError, match="stop"), visiting([module, module], torch.device("cuda", 0)):
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
    with pytest.raises(torch.OutOfMemoryError), visiting([module], torch.device("cuda", 0)):
        pass
    assert moved and {name: x.data_ptr() for name, x in module.named_parameters()} == before
