"""A user's own method, by the page that tells how: docs/guides/add-an-objective.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import LIGHT, QUICK, two_blocks
from test_docs import blocks

import flowtilt as ft
from flowtilt import Trainer, UserError, load_recipe
from flowtilt.cli import main
from flowtilt.io.files import read_lines
from flowtilt.objectives import ForwardProcess
from flowtilt.plan.passes import passes_of
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "add-an-objective.md"
SHORT = [*(item for item in QUICK if not item.startswith("objective.")), *LIGHT]
TIMES = ["objective.times=stratified", "objective.times_per_image=2"]
STEPS = ["objective.type=steps.py:Vanilla", "objective.eta=0.5"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the page's files."""
    monkeypatch.chdir(tmp_path)
    for code in blocks(PAGE, "python"):
        name = re.match(r"# (\S+)", code)
        assert name
        Path(name[1]).write_text(code)
    return tmp_path


def recipe(*overrides, run="run"):
    return load_recipe("playground", [*overrides[:1], *SHORT, two_blocks(), f"run={run}", *overrides[1:]])


def weights(run):
    found = checkpoint.newest(Path(run))
    assert found
    return {(file, name): value for file, tensors in found.tensors.items() for name, value in tensors.items()}


def test_the_pages_command_trains_and_its_run_is_read_without_its_file(place, capsys):
    words = shlex.split(blocks(PAGE, "bash")[0].replace("\\\n", " "))[1:]
    assert main([*words, *SHORT, two_blocks(), "guards=stop"]) == 0
    run = Path("runs/mine")
    records = read_lines(run / "metrics.jsonl")
    assert len(records) == 2 and all(record["weight"] > 0 and record["kl"] >= 0 for record in records)
    Path("mine.py").unlink()  # what is only read needs no code
    assert main(["compare", "runs/mine", "-o", "comparison.html"]) == 0
    assert main(["sample", "a red circle", "--lora", "runs/mine", "-o", "sample.png", "--steps", "2"]) == 0
    assert main(["export", "runs/mine", "-o", "exported"]) == 0
    assert main(["train", "--resume", "runs/mine", "rollouts=3"]) == 2
    assert "no file" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [["objective.type=mine.py:Exponential", *TIMES], STEPS], ids=["clean samples", "kept steps"])
def test_it_resumes_to_the_bit(place, settings):
    Trainer(recipe(*settings, "rollouts=2", run="whole")).run()
    Trainer(recipe(*settings, "rollouts=1", run="broken")).run()
    Trainer(open_run(Path("broken"), ["rollouts=2"]), Path("broken")).run()
    whole, broken = weights("whole"), weights("broken")
    assert whole.keys() == broken.keys() and all(bool((whole[key] == broken[key]).all()) for key in whole)
    assert read_lines(Path("whole/metrics.jsonl"))[1]["loss"] == read_lines(Path("broken/metrics.jsonl"))[1]["loss"]


def test_a_copy_of_a_built_in_loss_trains_to_the_same_bits(place):
    Path("copied.py").write_text(
        "from flowtilt.objectives.nft import NFT\n\n\nclass Copied(NFT):\n    type: str = ''\n    objective = ''\n"
    )
    own = ["objective.beta=0.5", "objective.consistency=0.3", "objective.kl=0", *TIMES]
    Trainer(recipe("objective.type=nft", *own, run="built_in")).run()
    Trainer(recipe("objective.type=copied.py:Copied", *own, run="own")).run()
    one, other = weights("built_in"), weights("own")
    assert all(bool((one[key] == other[key]).all()) for key in one)


def test_it_is_planned_with_the_passes_that_it_declares(place, capsys):
    size = ["rollout.steps=10", "objective.times_per_image=3"]
    assert main(["plan", "sd35m", "objective.type=mine.py:Exponential", *size, "rewards.mine=1", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert main(["plan", "sd35m", "objective.type=nft", "objective.kl=1e-3", *size, "rewards.mine=1", "--json"]) == 0
    assert own["work"] == json.loads(capsys.readouterr().out)["work"]


def test_its_own_guard_fires_once_after_its_patience(place):
    source = Path("mine.py").read_text().replace('m["weight"] > 10', 'm["weight"] > 0').replace("Guard(3,", "Guard(2,")
    Path("mine.py").write_text(source)
    Trainer(recipe("objective.type=mine.py:Exponential", *TIMES, "rollouts=3")).run()
    fired = [record for record in read_lines(Path("run/guards.jsonl")) if record["guard"] == "objective/weights"]
    assert [record["rollout"] for record in fired] == [2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.temprature=1", r"objective\.temprature: unknown key; did you mean 'objective\.temperature'"),
        ("objective.temperature=0", r"objective\.temperature: must be greater than 0, not 0"),
        ("objective.beta=1", r"objective\.beta: .*belongs to objective\.type = 'nft'"),
        ("objective.type=mine.py:Exponentiel", r"no class 'Exponentiel' in mine\.py; did you mean 'Exponential'"),
        ("objective.type=mine.py", r'add ":class" to mine\.py, as in mine\.py:Exponential'),
        ("objective.type=nowhere.py:Mine", r"no file nowhere\.py"),
    ],
)
def test_a_wrong_setting_is_one_line(place, override, message):
    with pytest.raises(UserError, match=message) as told:
        load_recipe("playground", ["objective.type=mine.py:Exponential", *TIMES, override])
    assert "\n" not in str(told.value)


BROKEN = """
import torch
from flowtilt.objectives import ForwardProcess

class {name}(ForwardProcess):
    own_metrics = ({metrics})
    def {method}(self, at, batch):
        error = (at.v - at.v_target).square().flatten(1).mean(1)
        {body}
"""


@pytest.mark.parametrize(
    ("method", "metrics", "body", "message"),
    [
        ("loss_of_mine", "", "return error, {}", r"has no sample_loss; subclass"),
        ("sample_loss", "", "return error.mean(), {}", r"loss must be a tensor of floats \[\d+\].* not a tensor of float32 \[\]"),
        ("sample_loss", "", "return error.detach(), {}", r"loss has no gradient"),
        ("sample_loss", "", "return error * float('nan'), {}", r"loss is not finite for \d+ of \d+ samples"),
        ("sample_loss", "", "return error, {'x': error}", r"sample_loss returned the metric 'x', which own_metrics does not declare"),
        ("sample_loss", "'x',", "return error, {'x': error.mean()}", r"metric 'x' must be a tensor \[\d+\]"),
        ("sample_loss", "", "error.mean()", r"sample_loss must return a pair of .*, not a NoneType"),
        ("sample_loss", "", "return error + at.v_ref.square().flatten(1).mean(1), {}", r"at broken\.py:9; v_ref .* set it above 0"),
        ("sample_loss", "", "raise ValueError('too dark')", r"the loss failed: ValueError: too dark, at broken\.py:9"),
        ("loss", "", "return at.velocity('critic', batch.x0, batch.t, batch.conditioning), {}", r"has no sample_loss"),
    ],
)
def test_a_broken_method_is_one_line_and_nothing_is_half_written(place, method, metrics, body, message):
    Path("broken.py").write_text(BROKEN.format(name="Broken", method=method, metrics=metrics, body=body))
    with pytest.raises(UserError, match=message) as told:
        Trainer(recipe("objective.type=broken.py:Broken", *TIMES)).run()
    assert "\n" not in str(told.value)
    assert not Path("run").exists() or [found.name for found in Path("run/checkpoints").iterdir()] == ["step-000000"]


def test_a_role_that_nobody_has_is_one_line(place):
    Path("broken.py").write_text(
        "from flowtilt.objectives import ForwardProcess\n\n\nclass Broken(ForwardProcess):\n"
        "    def sample_loss(self, at, batch):\n        raise AssertionError\n\n"
        "    def loss(self, policy, batch):\n        v = policy.velocity('critic', batch.x0, batch.t, batch.conditioning)\n"
        "        return v.flatten(1).mean(1), {}\n"
    )
    with pytest.raises(UserError, match=r"no role 'critic'; there are current, old, ema, reference, teacher"):
        Trainer(recipe("objective.type=broken.py:Broken", *TIMES)).run()


def test_a_class_that_is_no_method_is_one_line(place):
    Path("other.py").write_text("class Other:\n    pass\n\n\ndef function():\n    pass\n")
    for name in ("Other", "function"):
        with pytest.raises(UserError, match=r"is not a method; subclass flowtilt\.objectives\.ForwardProcess"):
            load_recipe("playground", [f"objective.type=other.py:{name}"])


BESIDE = """
from flowtilt.methods.base import Contrast, Guard
from flowtilt.objectives import ForwardProcess

class Beside(ForwardProcess):
    {body}
    def sample_loss(self, at, batch):
        return (at.v - at.v_target).square().flatten(1).mean(1), {{}}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("own_metrics = 'gap'", r"own_metrics = 'gap' must be a tuple"),
        ("own_metrics = ('loss',)", r"own_metrics = .* none of them loss"),
        ("times: float = 1.0", r"its key 'times' is one that ForwardProcess has with another meaning; rename it"),
        ("scale = 2.0", r"'scale' has no annotation; write `scale: float = "),
        ("def check(self, recipe): recipe.nothing", r"check failed: AttributeError: .*, at beside\.py:6"),
        ("def passes(self, recipe, step): return recipe.nothing", r"passes failed: AttributeError: .*, at beside\.py:6"),
        ("contrast = property(lambda self: 'gap')", r"contrast must give a flowtilt\.methods\.base\.Contrast\(metric, unused\), not a str"),
        ("def guards(self): return {'a': 3}", r"guards\(\)\['a'\] must give a .*Guard\(patience, check\), not a int"),
        ("def guards(self): return {'a': Guard(1, lambda m: m['gapp'])}", r"guards\(\)\['a'\] failed: KeyError: 'gapp', at beside\.py:6"),
    ],
)
def test_a_mistake_beside_the_loss_is_one_line_with_its_place(place, body, message):
    Path("beside.py").write_text(BESIDE.format(body=body))
    with pytest.raises(UserError, match=message) as told:
        trainer = Trainer(recipe("objective.type=beside.py:Beside", *TIMES))
        passes_of(trainer.recipe, 1)
        trainer.run()
    assert "\n" not in str(told.value)


def test_a_check_of_ones_own_leaves_flowtilts_in_force(place):
    Path("beside.py").write_text(BESIDE.format(body="def check(self, recipe): pass"))
    with pytest.raises(UserError, match=r"rollout\.images_per_prompt: rewards are compared within a prompt's images"):
        load_recipe("playground", ["objective.type=beside.py:Beside", *TIMES, "rollout.images_per_prompt=1"])


def test_a_learner_holds_an_own_class_to_the_same(place):
    class Scalar(ForwardProcess):
        def sample_loss(self, at, batch):
            return (at.v - at.v_target).square().mean(), {}

    policy = ft.load_policy("playground", lora_rank=2)
    batch = policy.sample(["a red circle"], images_per_prompt=2, steps=2)
    with pytest.raises(UserError, match=r"objective Scalar: loss must be a tensor of floats \[\d+\]"):
        ft.Learner(policy, Scalar(times="stratified", times_per_image=1), lr=1e-3).step(batch, torch.tensor([1.0, -1.0]))


def test_the_order_of_keys_on_the_command_line_does_not_matter(place):
    last = load_recipe("playground", ["objective.temperature=0.25", *TIMES, "objective.type=mine.py:Exponential"]).objective
    assert last == load_recipe("playground", ["objective.type=mine.py:Exponential", "objective.temperature=0.25", *TIMES]).objective
    assert last.temperature == 0.25
    assert load_recipe("sd35m-geneval", ["objective.times_per_image=3", "objective.type=awm"]).objective.times_per_image == 3


def test_a_card_names_the_file_of_a_method_without_its_folder(place):
    Trainer(recipe("objective.type=mine.py:Exponential", *TIMES, "rollouts=1")).run()
    card = Path("run/lora/README.md").read_text()
    assert "reinforced with mine.py:Exponential" in card and str(place) not in card
