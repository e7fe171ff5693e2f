"""Rollouts as tables, and prompts from data sets."""

import json
import shutil

import pytest
import torch
from conftest import quick

from flowtilt import Trainer, UserError
from flowtilt.cli import main
from flowtilt.config import load_recipe, to_toml
from flowtilt.config.prompt_data import PromptData, as_source, parse
from flowtilt.io.files import read_lines
from flowtilt.io.images import read_image
from flowtilt.io.run_folder import RunFolder
from flowtilt.prompts import sets
from flowtilt.runs.folder import open_run

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def hub_like(tmp_path_factory):
    """Folders in the form of the hub's data sets."""
    place = tmp_path_factory.mktemp("data")
    captions = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "cross")]
    (place / "plain" / "data").mkdir(parents=True)
    for number in range(2):
        own = captions[number::2]
        table = pa.table({"caption": own, "kind": [text.split()[2] for text in own], "image": [b"" for _ in own]})
        pq.write_table(table, place / "plain" / "data" / f"train-{number:05d}-of-00002.parquet")
    pq.write_table(pa.table({"caption": ["a test"]}), place / "plain" / "data" / "test-00000-of-00001.parquet")
    (place / "carded").mkdir()
    (place / "carded" / "README.md").write_text(
        "---\nconfigs:\n- config_name: other\n  data_files: o.jsonl\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: lines/*.jsonl\n  - split: mine\n    path: [m.jsonl]\n---\n# text\n"
    )
    (place / "carded" / "lines").mkdir()
    for name, text in (("lines/a", "one"), ("lines/b", "two"), ("m", "three"), ("o", "four")):
        (place / "carded" / f"{name}.jsonl").write_text(json.dumps({"words": text, "n": 1}) + "\n")
    return place


def texts(**data):
    return sorted(prompt.text for prompt in sets.load(PromptData(**{key: str(value) for key, value in data.items()}).source()))


def test_a_split_is_found_by_the_card_or_by_the_files_names(hub_like):
    found = sets.load(PromptData(dataset=str(hub_like / "plain"), column="caption", tag="kind").source())
    assert len(found) == 9 and {p.tag for p in found} == {"circle", "square", "cross"}
    assert texts(dataset=hub_like / "plain", split="test") == ["a test"]
    assert texts(dataset=hub_like / "carded", column="words") == ["one", "two"]
    assert texts(dataset=hub_like / "carded", column="words", split="mine") == ["three"]
    assert texts(dataset=hub_like / "carded", column="words", config="other") == ["four"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"dataset": "plain", "column": "prompt"}, "no column 'prompt'; it has caption, kind, image"),
        ({"dataset": "plain", "tag": "colour"}, "no column 'colour'"),
        ({"dataset": "plain", "column": "image"}, "image holds no text"),
        ({"dataset": "plain", "split": "val"}, "there is no split 'val'; there are train, test"),
        ({"dataset": "carded"}, 'no "prompt" text'),
        ({"dataset": "carded", "column": "caption"}, "no column 'caption'; it has words, n"),
        ({"dataset": "carded", "config": "no"}, "there is no config 'no'; there are other, default"),
        ({"dataset": "nowhere"}, "no such folder"),
    ],
)
def test_a_data_set_without_what_is_asked_for_is_one_line(hub_like, data, said):
    with pytest.raises(UserError, match="(?s)" + said.replace("(", r"\(")) as caught:
        texts(**{**data, "dataset": hub_like / data["dataset"]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("configs", ["5", "[5]", "[{config_name: [1], data_files: x}]", "2026-13-45", "&a [*a]"])
def test_a_card_that_says_nothing_of_files_is_passed_over(tmp_path, configs):
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    (tmp_path / "train.txt.csv").write_text("prompt\na cat\n")
    assert texts(dataset=tmp_path) == ["a cat"]


def test_a_torn_parquet_file_is_one_line(tmp_path):
    pq.write_table(pa.table({"prompt": ["a cat"] * 9}), tmp_path / "train.parquet", compression="none")
    data = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(data[:8] + b"\xff" * 30 + data[38:])
    with pytest.raises(UserError, match=r"train\.parquet, row 0: can't be read: ") as caught:
        texts(dataset=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_recipe_has_a_table_and_keeps_one_text(hub_like, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(hub_like)
    recipe = load_recipe("playground", ['prompts={dataset="./plain",column="caption",split="train"}'])
    data = parse(recipe.prompts)
    assert data and data.dataset == str(hub_like / "plain") and data.column == "caption"
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    assert as_source({"dataset": "some/one", "column": "a b&c"}) == "dataset:some/one?column=a+b%26c"
    assert main(["train", "playground", 'prompts={dataset="plain",colum="x"}']) == 2
    assert "prompts.colum: there is no such key" in capsys.readouterr().err


@pytest.fixture(scope="module")
def logged(hub_like, tmp_path_factory):
    """A run of three rollouts on a data set, resumed after the second, with a lag and all rollouts written."""
    run = tmp_path_factory.mktemp("logged") / "run"
    data = f'prompts={{dataset="{hub_like}/plain",column="caption",tag="kind"}}'
    recipe = quick(run, data, "rollouts=2", "rollout.lag=1", "log.rollouts=true", "evaluate.every=0", "evaluate.prompts=playground")
    Trainer(recipe).run()
    kept = shutil.copytree(run / "rollouts", run.parent / "kept")
    trainer = Trainer(open_run(run, ["rollouts=3"]), resume=run)
    images = {}
    draw = trainer.method.rollouts.log.images
    trainer.method.rollouts.log.images = lambda step, which, x: (images.setdefault(step, x.clone()), draw(step, which, x))
    trainer.run()
    return run, kept, images


def test_a_rollouts_table_has_what_the_run_computed_and_names_its_images(logged):
    run, _, images = logged
    metrics = read_lines(run / "metrics.jsonl")
    for step in (1, 2, 3):
        folder = RunFolder(run).rollout(step)
        rows = pq.read_table(folder.table).to_pylist()
        assert len(rows) == 12 and [row["file_name"] for row in rows] == sorted(path.name for path in folder.path.glob("*.png"))
        assert {row["rollout"] for row in rows} == {step} and [row["prompt_index"] for row in rows] == [k // 4 for k in range(12)]
        assert all(row["tag"] in row["prompt"] for row in rows)
        total = torch.tensor([row["reward/total"] for row in rows]).double()
        assert float(total.mean()) == pytest.approx(metrics[step - 1]["reward/total"], rel=1e-6)
        groups = torch.tensor([row["advantage"] for row in rows]).view(3, 4)
        assert groups.sum(1).abs().max() < 1e-4 and groups.abs().max() > 0.1
        assert set(rows[0]) >= {"seed", "copy", "trained", "reward/light", "reward/playground"}
    shown = torch.stack([read_image(RunFolder(run).rollout(3).path / f"{k:05d}.png") for k in range(12)])
    assert (shown - images[3]).abs().max() <= 0.5 / 255 + 1e-6


def test_what_was_written_stays_when_the_run_goes_on(logged):
    run, kept, _ = logged
    for path in kept.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (run / "rollouts" / path.relative_to(kept)).read_bytes()


def test_without_pyarrow_or_rollouts_the_key_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"log.rollouts: Parquet files are written with pyarrow; install it: pip install flowtilt\[pairs\]"):
        Trainer(quick(tmp_path / "run", "log.rollouts=true"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"log.rollouts: dpo-offline has no scored rollouts"):
        load_recipe("playground-dpo", ["log.rollouts=true"])
