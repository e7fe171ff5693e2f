"""`flowtilt init`, `recipes NAME`, `keys PATTERN`, `sweep` and `completion`."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import LIGHT, QUICK, two_blocks

from flowtilt.cli import main, sweep
from flowtilt.config import known_keys, load_recipe, recipe_names
from flowtilt.errors import UserError
from flowtilt.io.files import read_lines


def complaint(capsys, *words):
    """The one line that a mistake ends in."""
    assert main(list(words)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", recipe_names())
def test_init_writes_every_key_with_its_meaning_and_the_same_recipe(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ['rewards.x={source="ocr", weight=0, options={level=1}}'] if name == "playground" else []
    assert main(["init", "my.toml", "--from", name, *given]) == 0
    assert "flowtilt train my.toml" in capsys.readouterr().out
    recipe = load_recipe("my.toml")
    assert recipe == load_recipe(name, ["name=my", *given])
    lines = Path("my.toml").read_text().splitlines()
    keys = {line.removeprefix("# ").partition(" =")[0] for line in lines if " =" in line}
    kind = recipe.objective.type
    for key in known_keys():
        if not key.name.startswith(("objective.", "rewards")) or kind in key.types:
            assert key.name.rpartition(".")[2] in keys, key.name
            assert key.name.startswith("model.") or (key.field.description or "").split()[0] in " ".join(lines)


def test_init_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text("mine")
    assert "my.toml is there already" in complaint(capsys, "init", "my.toml")
    assert "must end in .toml" in complaint(capsys, "init", "my.yaml")
    assert "did you mean 'sd35m-geneval'" in complaint(capsys, "init", "new.toml", "--from", "sd35m-genevl")
    assert Path("my.toml").read_text() == "mine" and not Path("new.toml").exists()


def test_a_recipe_is_shown_with_those_that_it_is_based_on(capsys):
    assert main(["recipes", "sd35m-geneval"]) == 0
    told = capsys.readouterr().out
    assert told.index("# --- sd35m-geneval.toml") < told.index("# --- sd35m.toml") and 'base = "sd35m"' in told
    assert "did you mean 'playground'" in complaint(capsys, "recipes", "playgruond")


def test_keys_are_searched_by_name_and_meaning(capsys):
    assert main(["keys", "peak learning rate"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["optimizer.lr"]
    assert main(["keys", r"^rollout\."]) == 0
    assert all(line.startswith("rollout.") for line in capsys.readouterr().out.splitlines())
    assert "did you mean 'optimizer.lr'" in complaint(capsys, "keys", "lrr")
    assert "not a regular expression" in complaint(capsys, "keys", "(")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.5,1, 2", ["0.5", "1", "2"]),
        ("0..3", ["0", "1", "2", "3"]),
        ("-1..1", ["-1", "0", "1"]),
        ("1e-3", ["1e-3"]),
        ('["a","b"],[]', ['["a","b"]', "[]"]),
        ('"a,b.txt",c', ['"a,b.txt"', "c"]),
        ("{ x = 1, y = 2 }", ["{ x = 1, y = 2 }"]),
        ("0.5..1", ["0.5..1"]),
    ],
)
def test_values_of_a_sweep(text, found):
    assert sweep.values(text) == found


def test_a_sweep_is_every_combination(capsys):
    found = sweep.runs_of(["objective.beta=0.5,1", "seed=0..2", "rollouts=4"])
    assert list(found) == [f"beta={beta},seed={seed}" for beta in ("0.5", "1") for seed in range(3)]
    assert found["beta=1,seed=2"] == ["objective.beta=1", "seed=2", "rollouts=4"]
    assert next(iter(sweep.runs_of(["rollout.steps=4,5", "evaluate.steps=4,5"]))) == "rollout.steps=4,evaluate.steps=4"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["seed=1"], "nothing varies"),
        (["seed=1,2", "seed=3"], "seed is given twice"),
        (["seed"], "not key=value"),
        (["seed=3..1"], "must rise"),
        (["seed=0..999", "rollouts=1,2"], "2000 runs are too many"),
        (["sead=0..1"], "did you mean 'seed'"),
        (["prompts=a/b,a+b,a?b"], "same name"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_line(keys, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if said == "same name":
        keys = ["prompts=a/b,a?b"]
    assert said in complaint(capsys, "sweep", "playground", *keys)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """What was trained, in this process; "fail" in the words ends a run as a mistake would."""
    monkeypatch.chdir(tmp_path)
    found = []

    def train(words):
        found.append(list(words))
        return main(list(words))

    monkeypatch.setattr(sweep, "train", train)
    return found


def short():
    return [*QUICK, *LIGHT, two_blocks()]


def test_a_sweep_trains_compares_skips_and_resumes(trained, tmp_path, capsys):
    words = ["sweep", "playground", *short(), "objective.beta=0.5,1", "-o", "beta"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "beta=0.5" in told.out and "[2/2] beta=1" in told.err
    assert (tmp_path / "beta" / "compare.html").is_file() and json.loads((tmp_path / "beta" / "compare.json").read_text())
    trained.clear()
    (tmp_path / "beta" / "beta=1" / "summary.json").unlink()  # as if it had been interrupted
    assert main(words) == 0 and trained == [["train", "--resume", "beta/beta=1", "rollouts=2", *_may_change()]]
    trained.clear()
    assert main(words) == 0 and trained == [] and "finished already" in capsys.readouterr().err
    assert "another recipe (optimizer differ)" in complaint(capsys, *words, "optimizer.lr=1e-3")
    # longer: both go on
    assert main([word if word != "rollouts=2" else "rollouts=3" for word in words]) == 0
    assert [len(read_lines(tmp_path / "beta" / name / "metrics.jsonl")) for name in ("beta=0.5", "beta=1")] == [3, 3]


def _may_change():
    return [item for item in short() if item.startswith(("evaluate", "checkpoint"))]


def test_a_run_that_fails_does_not_keep_the_others_from_training(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    statuses = iter([2, 0, 3])
    monkeypatch.setattr(sweep, "train", lambda words: next(statuses))
    monkeypatch.setattr(sweep, "_compare", lambda runs, folder: print("compared", *(run.name for run in runs)))
    assert main(["sweep", "playground", "seed=0..2"]) == 2
    told = capsys.readouterr()
    assert "1 of 3 runs failed: seed=0" in told.err and "stopped before the end: seed=2" in told.err
    assert told.out == "compared seed=1 seed=2\n"


def test_an_interrupted_sweep_says_how_it_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "train", lambda words: 130)
    assert main(["sweep", "playground", "seed=0..2"]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_a_run_of_a_sweep_is_a_process_of_its_own(capfd):
    assert sweep.train(["train", "nothing"]) == 2
    assert "no such recipe" in capfd.readouterr().err


def test_a_shell_completes_commands_options_and_recipes(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for word in ("serve-rewards", "--init-lora", "sd35m-geneval"):
        assert word in script
    (tmp_path / "flowtilt").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "flowtilt")], check=False).returncode == 0
    for shell in ("zsh", "tcsh"):
        assert main(["completion", shell]) == 0 and "sweep" in capsys.readouterr().out
    assert load_recipe("playground") and main(["train", "my.toml"]) == 2  # the parser itself still takes files


def test_a_sweep_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setattr("flowtilt.distributed.torchrun.place", lambda: type("Place", (), {"size": 2})())
    with pytest.raises(UserError, match="trains in one process"):
        sweep._sweep(type("Args", (), {"keys": ["seed=0,1"], "recipe": "playground", "output": None})())
