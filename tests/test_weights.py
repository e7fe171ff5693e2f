"""Weights are found where a user may have put them, fetched to where they are found, and never run code."""

import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from flowtilt.errors import UserError
from flowtilt.io import download, published, weights
from flowtilt.io.published import Hub, Url
from flowtilt.rewards.about import all_weights, built_in, download_weights, find_weights

WEIGHTS = all_weights()


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch) -> Path:
    """Caches that are empty, and FLOWTILT_WEIGHTS, which this gives."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def put(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")
    return folder


# the list --------------------------------------------------------------------------------------------


def test_one_name_is_one_entry():
    entries = [entry for one in built_in().values() for entry in one.weights]
    assert all(WEIGHTS[entry.name] == entry for entry in entries)


UNPINNED = {"hpsv3", "qwen2-vl"}
"""Their commits are not known here; docs/reference/rewards.md says so."""


def test_every_file_is_pinned():
    for name, entry in WEIGHTS.items():
        if not isinstance(entry, Hub):
            assert re.fullmatch(r"[0-9a-f]{8}([0-9a-f]{56})?", entry.sha256) and entry.source.startswith("https://")
        elif name not in UNPINNED:
            assert re.fullmatch(r"[0-9a-f]{40}", entry.revision) and entry.files


# finding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_missing_say_where_they_come_from_and_how(nowhere, name):
    with pytest.raises(UserError) as caught:
        find_weights(name)
    text = str(caught.value)
    reward = re.search(r"`flowtilt download (\w+)`", text)
    assert (
        reward
        and WEIGHTS[name] in built_in()[reward[1]].weights
        and (getattr(WEIGHTS[name], "mirror", None) or WEIGHTS[name].source) in text
        and str(nowhere) in text
        and "\n" not in text
    )


def test_the_reward_that_is_named_needs_as_little_else_as_any():
    """Who lacks CLIP for GenEval is not sent to fetch PickScore's four gigabytes."""
    with pytest.raises(UserError, match="`flowtilt download clipscore`"):
        find_weights("clip-l")


def test_the_hubs_cache_is_named_where_hub_files_go_there(monkeypatch):
    monkeypatch.delenv("FLOWTILT_WEIGHTS")
    with pytest.raises(UserError, match="into the hub cache"):
        find_weights("clip-l")
    with pytest.raises(UserError, match=r"into .*/cache/flowtilt/weights"):
        find_weights("aesthetic")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hpsv2", "HPS_v2.1_compressed.pt"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
        ("mask2former", "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"),
        ("mask2former", "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"),
    ],
)
def test_a_single_file_is_found_under_its_own_name_or_its_usual_one(nowhere, name, file):
    put(nowhere, file)
    assert find_weights(name) == nowhere / file


@pytest.mark.parametrize("folder", ["openai/clip-vit-large-patch14", "clip-vit-large-patch14"])
def test_a_folder_is_found_under_the_repositorys_name_once_it_holds_what_is_needed(nowhere, folder):
    put(nowhere / folder, "config.json")
    with pytest.raises(UserError):
        find_weights("clip-l")
    put(nowhere / folder, "model.safetensors")
    assert find_weights("clip-l") == nowhere / folder


def test_files_are_found_in_the_hubs_cache_at_the_pinned_revision_only(tmp_path):
    for name, other in (("clip-l", False), ("hpsv2", False), ("pickscore", True)):
        entry = WEIGHTS[name]
        assert isinstance(entry, Hub)
        place = tmp_path / "hub" / f"models--{entry.repo.replace('/', '--')}" / "snapshots" / ("0" * 40 if other else entry.revision)
        put(place, *entry.files)
        if other:
            with pytest.raises(UserError):
                find_weights(name)
        else:
            assert find_weights(name) == (place if len(entry.files) > 1 else place / entry.files[0])


# fetching: the one call that reaches the network, recorded -------------------------------------------


@pytest.fixture
def fetched(monkeypatch, tmp_path) -> list[Path]:
    """Files that were "fetched", as empty ones where the real ones would be."""
    made: list[Path] = []

    def fetch(url: str, path: Path, **expected) -> Path:
        assert url.startswith("https://") and expected["sha256"]
        made.append(put(path.parent, path.name) / path.name)
        return path

    def fetch_hub(repo: str, revision: str, files, *, to: Path | None = None) -> list[Path]:
        place = to or tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
        made.extend(put(place, *files) / file for file in files)
        return [place / file for file in files]

    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(published, "fetch_hub", fetch_hub)
    monkeypatch.setattr(published, "wrong", lambda path, **expected: "")  # empty files have no published sum
    return made


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("where", ["caches", "FLOWTILT_WEIGHTS", "folder"])
def test_what_was_fetched_is_what_is_found(fetched, monkeypatch, tmp_path, nowhere, name, where):
    if where == "caches":
        monkeypatch.delenv("FLOWTILT_WEIGHTS")
    if where == "folder":
        path = download_weights(name, tmp_path / "shelf")
        assert path.is_relative_to(tmp_path / "shelf")
        monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "shelf"))
    else:
        path = download_weights(name)
        assert path.is_relative_to(nowhere) == (where == "FLOWTILT_WEIGHTS")
    assert fetched and find_weights(name) == path


def test_a_right_file_under_its_usual_name_is_not_fetched_again(fetched, nowhere, monkeypatch):
    entry = WEIGHTS["mask2former"]
    assert isinstance(entry, Url) and entry.alias
    put(nowhere, entry.alias)
    monkeypatch.setattr(published, "wrong", lambda path, **expected: "")
    assert download_weights("mask2former") == nowhere / entry.alias and not fetched
    monkeypatch.setattr(published, "wrong", lambda path, **expected: "another sum")
    assert download_weights("mask2former") == nowhere / entry.files[0]


def test_a_hub_that_sends_another_file_than_was_published_is_refused(fetched, nowhere, monkeypatch):
    monkeypatch.setattr(published, "wrong", download.wrong)
    with pytest.raises(UserError, match=r"HPS_v2\.1_compressed\.pt is not the published file, though the hub says so: SHA-256 2d711642"):
        download_weights("hpsv2")


def test_what_another_program_has_fetched_is_checked_and_not_fetched_again(fetched, monkeypatch, tmp_path):
    monkeypatch.delenv("FLOWTILT_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = WEIGHTS["imagereward"]
    assert isinstance(entry, Hub) and entry.elsewhere
    place = Path(os.path.expanduser(entry.elsewhere[0]))
    put(place.parent, place.name)
    monkeypatch.setattr(published, "hub_wrong", lambda *_: "")
    assert download_weights("imagereward") == place and not fetched
    monkeypatch.setattr(published, "hub_wrong", lambda *_: "another sum")
    assert download_weights("imagereward") != place and fetched


# reading ---------------------------------------------------------------------------------------------


def test_a_dictionary_of_tensors_comes_back(tmp_path):
    state = OrderedDict(weight=torch.arange(6.0).reshape(2, 3))
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "w.pth")
    found = weights.read(tmp_path / "w.pth")
    assert found["meta"] == {"epoch": 3} and torch.equal(found["state_dict"]["weight"], state["weight"])


class Shell:
    """What a pickle may hold that is no weight."""

    def __reduce__(self):
        return os.mkdir, ("pickled",)


class Harmless:
    pass


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Shell()}, "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: holds more than tensors") as caught:
        weights.read(Path("w.pth"))
    assert "\n" not in str(caught.value) and not Path("pickled").exists()


def test_a_type_that_a_caller_allows_is_read_and_no_other(tmp_path):
    torch.save({"meta": Harmless()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        weights.read(tmp_path / "w.pth")
    assert isinstance(weights.read(tmp_path / "w.pth", allowed=[Harmless])["meta"], Harmless)
    with pytest.raises(UserError, match="holds more than tensors"):
        weights.read(tmp_path / "w.pth")


def test_a_file_that_was_cut_short_is_refused_in_one_line_wherever_it_was_cut(tmp_path):
    torch.save({"weight": torch.ones(500)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for end in (0, 1, 10, len(data) // 2, len(data) - 10):
        (tmp_path / "w.pth").write_bytes(data[:end])
        with pytest.raises(UserError, match=r"w\.pth: ") as caught:
            weights.read(tmp_path / "w.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none\.pth: can't be read"):
        weights.read(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "data", [b"<!DOCTYPE html>\n<html>", b"version https://git-lfs.github.com/spec/v1\noid", b"\x80\x02}q\x00X\xff", bytes(range(256))]
)
def test_what_is_no_weights_file_at_all_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"w\.pth: ") as caught:
        weights.read(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
