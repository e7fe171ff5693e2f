"""The command line as a person types it: what it prints, and one clear line for each mistake."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import typed
from conftest import QUICK
from PIL import Image

import flowtilt
from flowtilt.cli import main, parser
from flowtilt.config import recipe_names
from flowtilt.io.environment import is_older
from flowtilt.prompts.sets import SETS


def wait_for(path, command):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert command.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


def complaint(capsys, *words):
    """The one line that a mistake ends in."""
    assert main(list(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("flowtilt: ") and "Traceback" not in "\n".join(lines)
    return lines[-1]


def test_words_may_come_before_and_after_options():
    def read(*words):
        return vars(parser().parse_args(words))

    assert read("plan", "playground", "--gpus", "2", "rollouts=3", "seed=1") == read(
        "plan", "playground", "rollouts=3", "seed=1", "--gpus", "2"
    )
    assert read("compare", "-o", "page.html", "a", "b") == read("compare", "a", "-o", "page.html", "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "playgruond"], "did you mean 'playground'"),
        (["train"], "which recipe"),
        (["train", "playground", "objective.bta=1"], "did you mean 'objective.beta'"),
        (["train", "playground", "rollout.solver=eulr"], "'euler', 'ddim', 'dpm1', 'dpm2', 'heun' or 'cps'"),
        (["train", "playground", "rollouts=many"], "rollouts"),
        (["train", "playground", "optimizer.lr=-1"], "greater than 0"),
        (["train", "playground", "rollout.images_per_prompt=1"], "it takes 2 at least"),
        (["train", "playground", "objective.type=ppo"], "objective.type"),
        (["train", "playground", "--init-lora", "no where"], "lora no where"),
        (["train", "playground", "steps"], "not key=value"),
        (["train", "playground", "prompts=no.txt"], "no.txt"),
        (["train", "playground", "rewards.beauty=1"], "no reward 'beauty'"),
        (["train", "playground", "rewards.mine=no.py:f"], "no file no.py"),
        (["train", "playground", "model=no/such/folder"], "no/such/folder"),
        (["train", "playground", 'track=["wandb"]'], "pip install wandb"),
        (["train", "--resume", "nowhere"], "not a run"),
        (["sample", "a red circle", "--lora", "nowhere"], "nowhere"),
        (["sample", "a red circle", "--solver", "eulr"], "eulr"),
        (["sample", "a red circle", "--steps", "0"], "--steps"),
        (["sample", "a red circle", "--steps", "x"], "--steps"),
        (["sample", "a red circle", "-o", "x.xyz"], "can't write .xyz files; choose one of .png, .jpg"),
        (["sample", "a red circle", "--seed", "1", "--seed", "2"], "--seed: given twice"),
        (["sample", "a red circle", "-o", "x.png", "--output", "y.png"], "-o/--output: given twice"),
        (["evaluate", "--images", "2", "--images", "3"], "--images: given twice"),
        (["plan", "--gpu", "h200"], "required: recipe (see"),
        (["dance"], "there is no 'dance'; choose from train, sample"),
        (["trian", "playground"], "did you mean 'train'?"),
        (["--debg", "train"], "--debg"),
        (["prompts", "genval"], "did you mean 'geneval'?"),
        (["export", "run", "--to", "difusers", "-o", "x"], "did you mean 'diffusers'?"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in complaint(capsys, *words)
    assert list(tmp_path.rglob("*.jsonl")) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no prompt"), (b"\n  \n", "no prompt"), (b"caf\xe9\n" * 9, "not UTF-8"), (b"one\ntwo\n", "a rollout takes 18")],
)
def test_prompt_files_that_can_not_be_used(capsys, tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_bytes(content)
    assert said in complaint(capsys, "train", "playground", "prompts=p.txt")


@pytest.mark.parametrize("kind", ["broken", "foreign", "other shape", "empty"])
def test_a_broken_or_foreign_lora_is_refused(capsys, tmp_path, learnt, kind):
    import torch
    from safetensors.torch import load_file, save_file

    file = tmp_path / "x.safetensors"
    good = load_file(learnt / "lora" / "pytorch_lora_weights.safetensors")
    if kind == "broken":
        file.write_bytes((learnt / "lora" / "pytorch_lora_weights.safetensors").read_bytes()[:5000])
    elif kind == "foreign":
        save_file({"unet.mid_block.attn.to_q.lora_A.weight": torch.zeros(4, 4)}, file)
    elif kind == "other shape":
        save_file({k: torch.zeros(v.shape[0] * 2, v.shape[1] * 2) for k, v in good.items()}, file)
    else:
        save_file({}, file)
    assert str(file) in complaint(capsys, "sample", "a red circle", "--lora", str(file), "-o", str(tmp_path / "o.png"))
    assert not (tmp_path / "o.png").exists()


def test_sample_draws_base_and_tuned_side_by_side_and_repeats(tmp_path, learnt, capsys):
    for name in ("one.png", "two.png"):
        words = [
            "sample",
            "a red circle left of a blue square",
            "--lora",
            str(learnt),
            "--steps",
            "4",
            "--seed",
            "3",
            "-o",
            str(tmp_path / name),
        ]
        assert main(words) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = Image.open(tmp_path / "one.png")
    assert picture.width == 12 + 256 + 6 + 256 + 12 and picture.height > 256 + 2 * 12, "two images, and what they are"
    assert picture.convert("L").crop((0, 0, picture.width, 40)).getextrema()[0] < 100, "the prompt stands above"
    for name, kind in (("base.png", "PNG"), ("base.jpg", "JPEG"), ("base.WEBP", "WEBP"), ("base", "PNG")):
        assert main(["sample", "a red circle", "--steps", "1", "-o", str(tmp_path / name)]) == 0
        written = Image.open(tmp_path / name)
        assert (written.format, written.size) == (kind, (256, 256))


def test_ctrl_c_saves_says_how_to_go_on_and_exits(tmp_path):
    command = typed("train", "playground", *QUICK, "rollouts=500", "evaluate.every=0", "run=run", cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", command)
    command.interrupt()
    code, out, err = command.ended()
    assert code == 130
    assert "flowtilt train --resume run" in out and "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_evaluation_that_is_interrupted_says_how_it_goes_on_and_does(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef f(images, prompts):\n    time.sleep(0.5)\n    return images.mean((1, 2, 3))\n")
    words = ["evaluate", "--images", "96", "--steps", "1", "--rewards", "slow.py:f", "-o", "e"]
    command = typed(*words, cwd=tmp_path)
    wait_for(tmp_path / "e" / "scores-0.jsonl", command)
    command.interrupt()
    assert command.ended() == (130, "", "flowtilt: interrupted; the same command goes on from there\n")
    code, out, err = typed(*words, cwd=tmp_path, name="again").ended()
    assert code == 0 and "96 images" in out
    assert err == ""  # and no bar where nobody watches


def test_doctor_says_once_what_a_reward_lacks_and_that_it_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("FLOWTILT_UNIFIEDREWARD_URL", raising=False)
    for words in (["--rewards"], ["--rewards", "all,pickscore"], ["--rewards", "pickscore"]):
        assert main(["doctor", *words]) == 1
        told = capsys.readouterr().out
        assert told.count("PickScore") == 1 and told.count("MISSING pickscore") == 1
    assert "reward aesthetic" in told and main(["doctor", "--rewards", "jpeg_compressibility"]) == 0


def test_help_recipes_keys_and_doctor_are_readable(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0 and "examples:" in capsys.readouterr().out
    assert main(["recipes"]) == 0 and "playground" in capsys.readouterr().out
    assert main(["keys"]) == 0
    listed = capsys.readouterr().out
    assert "objective.beta" in listed and "rollout.images_per_prompt" in listed
    assert main(["doctor"]) == 0
    assert "ok      torch" in capsys.readouterr().out


def test_without_a_command_all_of_them_are_shown(capsys):
    assert main([]) == 2
    assert "serve-rewards" in capsys.readouterr().out


def test_the_version_is_that_of_the_package_and_of_its_citation(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"flowtilt {flowtilt.__version__}\n"
    root = Path(__file__).parent.parent
    assert f"\nversion: {flowtilt.__version__}\n" in (root / "CITATION.cff").read_text()
    assert 'dynamic = ["version"]' in (root / "pyproject.toml").read_text()


def test_lists_are_in_columns_and_complete(capsys):
    for command, names in (("recipes", recipe_names()), ("prompts", [*SETS, "playground", "playground-search"])):
        assert main([command]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sorted(line.split()[0] for line in lines) == sorted(names)
        starts = {len(line) - len(line.split(maxsplit=1)[1]) for line in lines}
        assert len(starts) == 1 and starts.pop() >= max(map(len, names)) + 2


def test_doctor_says_which_package_is_too_old(capsys, monkeypatch):
    monkeypatch.setattr("flowtilt.io.environment.requires", lambda name: ["torch>=2.11", "peft>=99.1", 'rapidocr>=3; extra == "rewards"'])
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("OLD     peft") and "needs 99.1 or newer - pip install 'peft>=99.1'" in line for line in lines)
    assert any(line.startswith("ok      torch") and line.endswith("(needs 2.11 or newer)") for line in lines)


@pytest.mark.parametrize(
    ("installed", "floor", "older"),
    [
        ("2.13.0+cpu", "2.11", False),
        ("2.9.1", "2.11", True),
        ("2.11", "2.11.0", False),
        ("3", "2.99", False),
        ("0.21.0rc1", "0.21", False),
        ("4.99.9", "5", True),
    ],
)
def test_versions_are_compared_by_their_numbers(installed, floor, older):
    assert is_older(installed, floor) is older


def test_reading_a_recipe_needs_no_torch():
    code = "import sys, flowtilt.cli; flowtilt.load_recipe('playground'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
