"""What can be downloaded by name is what rewards read and what prompts can be named."""

from pathlib import Path

import pytest

from flowtilt.cli import catalogue
from flowtilt.errors import UserError
from flowtilt.prompts import sets
from flowtilt.rewards.about import built_in


@pytest.fixture
def fetched(monkeypatch, tmp_path) -> list[tuple[str, str, Path | None]]:
    """What was asked for, instead of the network; nothing has been downloaded before."""
    from huggingface_hub import constants

    asked: list[tuple[str, str, Path | None]] = []

    def record(kind: str, name: str, to: Path | None) -> Path:
        asked.append((kind, name, to))
        return Path(name)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("FLOWTILT_PROMPTS", str(tmp_path / "prompts"))
    monkeypatch.setattr(catalogue, "missing_size", lambda entry: 0)
    monkeypatch.setattr(catalogue, "download_weights", lambda name, to: record("weights", name, to))
    monkeypatch.setattr(sets, "download", lambda name, to: [record("prompts", name, to)])
    return asked


def test_a_name_that_is_a_rewards_and_a_sets_is_downloaded_as_both(fetched):
    assert catalogue.get(["geneval"]) == [Path("mask2former"), Path("clip-l"), Path("clip-tokenizer"), Path("geneval")]
    assert fetched == [
        (kind, name, None)
        for kind, name in (*(("weights", n) for n in ("mask2former", "clip-l", "clip-tokenizer")), ("prompts", "geneval"))
    ]


def test_what_several_names_share_is_downloaded_once_and_into_the_folder_that_is_named(fetched, tmp_path):
    catalogue.get(["pickscore", "clipscore", "drawbench", "drawbench"], tmp_path)
    assert fetched == [
        (kind, name, tmp_path)
        for kind, name in (("weights", "pickscore"), ("weights", "clip-tokenizer"), ("weights", "clip-l"), ("prompts", "drawbench"))
    ]


def test_an_unknown_name_is_refused_before_anything_is_fetched(fetched):
    with pytest.raises(UserError, match=r"'pickscor': .*did you mean 'pickscore'\?"):
        catalogue.get(["drawbench", "pickscor"])
    with pytest.raises(UserError, match="`flowtilt download --list` and `flowtilt recipes` list them"):
        catalogue.get(["laion5b"])
    assert not fetched


def test_the_list_has_every_reward_that_reads_weights_and_every_set(fetched, tmp_path):
    items = catalogue.listing()
    assert [item.name for item in items if item.kind == "weights"] == [name for name, one in built_in().items() if one.weights]
    assert [item.name for item in items if item.kind == "prompts"] == list(sets.SETS)
    assert all(source.startswith("https://") for item in items for source in item.sources)
    assert not any(item.there for item in items)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "hpdv2-anime.json").write_text("[]")
    (tmp_path / "prompts" / "ocr.txt").write_text("x")
    assert [item.name for item in catalogue.listing() if item.there] == ["ocr"]


def test_sizes_are_those_that_are_told_or_here_and_never_guessed(fetched, tmp_path):
    sizes = {(item.kind, item.name): (item.size, item.whole) for item in catalogue.listing()}
    assert sizes["prompts", "geneval"] == (85_209, True) and sizes["prompts", "hpdv2"] == (62_816 + 85_787 + 81_338 + 44_606, True)
    assert sizes["prompts", "ocr-train"] == (0, False) == sizes["weights", "pickscore"] and sizes["weights", "aesthetic"] == (
        3_714_759,
        False,
    )
    clip = tmp_path / "weights" / "openai" / "clip-vit-large-patch14"
    clip.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        (clip / file).write_bytes(bytes(100))
    sizes = {item.name: (item.size, item.whole) for item in catalogue.listing() if item.kind == "weights"}
    assert sizes["clipscore"] == (400, True) and sizes["aesthetic"] == (3_714_759 + 400, True) and not sizes["pickscore"][1]
