"""docs/reference/metrics.md has every metric that any objective logs, none that is not logged, and every guard."""

import json
import re
from pathlib import Path

import pytest
from conftest import QUICK, two_blocks
from PIL import Image

from flowtilt import Trainer
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.methods import built_in
from flowtilt.methods.dpo import PairSettings
from flowtilt.methods.forward import ForwardSettings
from flowtilt.training.guards.rules import RULES

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
REWARD = """
from flowtilt import RewardOutput
def mine(images, prompts):
    return RewardOutput(images.mean((1, 2, 3)), details={"red": images[:, 0].mean((1, 2))})
"""
TINY = [
    "rollouts=1",
    "rollout.prompts=2",
    "rollout.images_per_prompt=2",
    "evaluate.every=0",
    "evaluate.images=1",
    "evaluate.samples=0",
    "evaluate.steps=2",
]


def first_cells(section):
    """Names in backticks in the first column of a section's table."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    assert text, section
    rows = re.findall(r"^\| (`.*?) \|", text[1], re.M)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


FOLLOWING = {
    "acdmd": ["rewards.playground=0", "rollout.images_per_prompt=1"],
    "mend": ["rewards.playground_smooth=0", "rollout.solver=euler", "rollout.steps=3", "objective.improve={playground_smooth=1.0}"],
    "rtdmd": ["rewards.playground_smooth=0", "objective.backprop={playground_smooth=1.0}"],
}
"""Those that follow rewards or a teacher by their gradient, each with all that it can log."""
KINDS = list(built_in())


def logged(kind, folder):
    if kind in FOLLOWING:
        return following(kind, folder)
    if issubclass(built_in()[kind], PairSettings):
        return of_pairs(kind, folder)
    settings = [f"objective.type={kind}", "rewards.mine=" + str(folder / "mine.py") + ":mine"]
    with_reference = [] if kind == "ram" else ["objective.kl=0.1"]
    size = [] if kind == "grpo" else ["objective.times_per_image=1"]
    size += ["combine=marble"] if kind == "nft" else []
    quick = [setting for setting in QUICK if not setting.startswith("objective.")]
    recipe = load_recipe(
        "playground", [*quick, *TINY, two_blocks(), *settings, "objective.guide=0.1", *with_reference, *size, f"run={folder / kind}"]
    )
    return run(recipe)


def of_pairs(kind, folder):
    quick = [setting for setting in QUICK if not setting.startswith(("objective.", "optimizer."))]
    own = ["rewards.mine=" + str(folder / "mine.py") + ":mine"]
    if kind == "dpo-offline":
        for name in "wl":
            Image.new("RGB", (32, 32), {"w": "red", "l": "blue"}[name]).save(folder / f"{name}.png")
        record = json.dumps({"prompt": "a red circle", "chosen": "w.png", "rejected": "l.png"})
        (folder / "pairs.jsonl").write_text(f"{record}\n{record}\n")
        own = [f"objective.pairs={json.dumps(str(folder / 'pairs.jsonl'))}", "rewards.playground=0"]
    settings = [f"objective.type={kind}", "optimizer.steps_per_rollout=1", *own]
    return run(load_recipe("playground", [*quick, *TINY, two_blocks(), *settings, f"run={folder / kind}"]))


def following(kind, folder):
    quick = [setting for setting in QUICK if not setting.startswith(("objective.", "optimizer."))]
    settings = [f"objective.type={kind}", "rollout.solver=cps", "optimizer.steps_per_rollout=1", *FOLLOWING[kind]]
    return run(load_recipe("playground", [*quick, *TINY, two_blocks(), *settings, f"run={folder / kind}"]))


def run(recipe):
    trainer = Trainer(recipe)
    trainer.run()
    return set(read_lines(trainer.run_folder / "metrics.jsonl")[0])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Names that each objective logs."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "mine.py").write_text(REWARD)
    return {kind: logged(kind, folder) for kind in KINDS}


def as_on_the_page(name):
    """`reward/mine/red_std` is `reward/<name>/<detail>` there."""
    name = re.sub(r"^(reward|missing|marble/alpha|marble/norm)/(mine|playground_smooth|playground)", r"\1/<name>", name)
    return re.sub(r"/<name>/red(_std)?$", "/<name>/<detail>", name)


def test_every_metric_is_on_the_page_and_the_page_names_no_other(found):
    documented = [name for section in ("Rewards", "Images", "The loss", "Time and cost") for name in first_cells(section)]
    assert set(documented) == {as_on_the_page(name) for names in found.values() for name in names}
    assert len(documented) == len(set(documented)) + 1  # kl is FlowGRPO's own, too


def test_a_row_of_the_loss_names_the_objectives_that_log_it(found):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE[PAGE.index("## The loss") : PAGE.index("## Time and cost")], re.M)
    said: dict[str, set[str]] = {}
    for name, kinds in rows:
        named = set(re.findall(rf"\b(?:{'|'.join(sorted(KINDS, key=len, reverse=True))})\b", kinds))
        named = set(KINDS) - named if kinds.startswith("all") else named
        said[name] = said.get(name, set()) | named
    forward = {kind for kind, method in built_in().items() if issubclass(method, ForwardSettings)}
    assert said.pop("norm_ratio") == set() and all(("norm_ratio" in found[kind]) == (kind in forward) for kind in KINDS)
    for name, kinds in said.items():
        assert kinds == {kind for kind in KINDS if name in found[kind]}, name


def test_every_guard_has_its_reason_and_metrics_point_to_guards_that_exist():
    assert first_cells("Guards") == [*RULES]
    assert set(re.findall(r"[Gg]uard `(\w+)`", PAGE)) <= set(RULES)
