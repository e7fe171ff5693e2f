"""Rewards as a command line names them, what a score was made with, and the comparison with published scores."""

import pytest
import torch

from flowtilt import UserError
from flowtilt.io.files import digest
from flowtilt.rewards import RewardOutput, reference
from flowtilt.rewards.about import built_in, of_paper
from flowtilt.rewards.jpeg import incompressibility
from flowtilt.rewards.named import Named, load_named, parse, with_compat
from flowtilt.rewards.versions import versions_of


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No weights, no hub cache, no server."""
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("FLOWTILT_UNIFIEDREWARD_URL", raising=False)
    return tmp_path


def test_a_word_is_a_name_a_file_or_a_name_with_its_source(nowhere):
    (nowhere / "mine.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    source = f"{nowhere}/mine.py:f"
    assert parse(["ocr", source, f"bright={source}"]) == [Named("ocr", "ocr"), Named("f", source), Named("bright", source)]
    assert parse(["http://host:1/geneval"]) == [Named("geneval", "http://host:1/geneval")]
    found, left_out = load_named(parse([source, f"bright={source}"]))
    assert list(found) == ["f", "bright"] and not left_out


def test_compat_goes_to_those_that_have_such_a_mode():
    assert [(one.name, one.options) for one in map(with_compat, parse(["geneval", "pickscore", "ocr"]))] == [
        ("geneval", {"compat": True}),
        ("pickscore", {}),
        ("ocr", {"compat": True}),
    ]


def test_all_leaves_out_what_cannot_run_here_and_says_why(nowhere):
    found, left_out = load_named(parse(["all"]))
    assert list(found) == ["ocr"] and set(left_out) == set(of_paper()) - {"ocr"}
    assert "flowtilt download pickscore" in left_out["pickscore"] and "FLOWTILT_UNIFIEDREWARD_URL" in left_out["unifiedreward"]


def test_what_was_named_itself_must_load():
    with pytest.raises(UserError, match="HPS_v2"):
        load_named(parse(["ocr", "hpsv2"]))
    with pytest.raises(UserError, match="name at least one"):
        load_named([])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["http://host:8765"], "needs a name, as in geneval=http://host:8765"),
        (["mine.py:reward", "other.py:reward"], "two are called reward; write another name before one, as in other=other.py:reward"),
        (["a/b=ocr"], "needs a name"),
    ],
)
def test_a_reward_has_a_name_of_its_own(words, said):
    with pytest.raises(UserError, match=said):
        parse(words)


def test_what_is_named_itself_replaces_one_of_all():
    for words in (["all", "geneval=http://h:1"], ["geneval=http://h:1", "all"]):
        (found,) = [one for one in parse(words) if one.name == "geneval"]
        assert found.source == "http://h:1" and not found.optional and len(parse(words)) == len(of_paper())


def test_a_server_decides_for_itself_whose_numbers_it_gives():
    with pytest.raises(UserError, match="geneval is a server's; start that with --compat"):
        with_compat(Named("geneval", "http://h:1"))


def test_a_version_tells_the_weights_and_what_the_reward_says_of_itself(nowhere):
    class Judge:
        def __init__(self):
            self.version = {"model": "seven"}

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    from flowtilt.rewards.aesthetic import Aesthetic

    folder = nowhere / "weights" / "openai" / "clip-vit-large-patch14"
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        (folder / file).write_text(file)
    (nowhere / "weights" / "sac+logos+ava1-l14-linearMSE.pth").write_text("head")
    unbuilt = object.__new__(Aesthetic)
    found = versions_of({"mine": Judge(), "size": incompressibility, "beauty": unbuilt})
    assert found["mine"]["version"] == {"model": "seven"}
    assert found["mine"]["file"] == "test_named.py" and len(found["mine"]["sha256"]) == 64
    assert found["size"] == {"reward": "jpeg_incompressibility"}
    assert found["beauty"]["reward"] == "aesthetic"
    assert found["beauty"]["weights"]["clip-l"]["model.safetensors"] == digest(folder / "model.safetensors")


# published scores -------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Grey pictures instead of the published ones: the k-th has brightness k / 10."""
    from flowtilt.io.images import to_png

    paths = []
    for k in range(5):
        paths.append(tmp_path / f"{k}.png")
        paths[-1].write_bytes(to_png(torch.full((3, 8, 8), k / 10)))
    monkeypatch.setattr(reference, "fetch_images", lambda: paths)
    return paths


def judge(monkeypatch, function):
    monkeypatch.setattr(reference, "load_reward", lambda name, source, device: function)


def test_the_published_scores_are_recognised_and_others_are_not(pictures, monkeypatch):
    published = torch.tensor([*(one.score for one in built_in()["imagereward"].published), 0.0])

    def right(images, prompts):
        own = reference.REFERENCES[round(float(images.mean()) * 10)]
        score = published[round(float(images.mean()) * 10)] - (0.0 if own.caption == prompts[0].text else 0.1)
        return score.view(1)

    judge(monkeypatch, right)
    lines = list(reference.compare(["imagereward"]))
    assert len(lines) == 6 and all(line.startswith("ok") for line in lines)
    judge(monkeypatch, lambda images, prompts: right(images, prompts) + 0.03)
    assert [line.startswith("WRONG") for line in reference.compare(["imagereward"])] == [True] * 4 + [False] * 2


def test_a_score_that_does_not_heed_the_caption_is_wrong(pictures, monkeypatch):
    judge(monkeypatch, lambda images, prompts: torch.tensor([0.3]))
    lines = list(reference.compare(["clipscore"]))
    assert [line.split()[0] for line in lines] == ["ok", "WRONG"]


def test_the_cat_must_be_found(pictures, monkeypatch):
    judge(monkeypatch, lambda images, prompts: RewardOutput(torch.tensor([0.0]), ["expected cat==1, found 0"]))
    (line,) = reference.compare(["geneval"])
    assert line.startswith("WRONG") and "found 0" in line


def test_missing_weights_are_named_without_asking_the_network(nowhere):
    lines = list(reference.compare(of_paper()))
    assert [line.split()[0] for line in lines].count("MISSING") == 7 and any(line.startswith("note    ocr") for line in lines)
