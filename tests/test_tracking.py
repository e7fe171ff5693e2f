"""Trackers: what they are sent, that a failing one costs a run nothing, and that a resumed run is the same run there."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import quick

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.evaluate import Evaluation
from flowtilt.io.files import read_lines
from flowtilt.runs import tracking
from flowtilt.runs.folder import open_run

FAKE = """
calls = []
broken = ""

def _told(name, *values):
    calls.append((name, *values))
    if name == broken:
        raise RuntimeError(f"{name}: gone\\nlong story")

def init(**options): _told("init", options)
def log(values, step=None): _told("log", step, dict(values))
def finish(): _told("finish")

class Image:
    def __init__(self, image, caption): self.size, self.caption = image.size, caption
"""


@pytest.fixture
def hosted(request, tmp_path, monkeypatch):
    """A module in the place of wandb and trackio that notes what it is told."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    place = tmp_path / "modules"
    place.mkdir()
    monkeypatch.syspath_prepend(place)
    for name in ("wandb", "trackio"):
        (place / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: importlib.import_module(name)
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


class Writer:
    """TensorBoard's, as torch opens it."""

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.events = folder, purge_step, []

    def add_scalar(self, name, value, step):
        self.events.append((step, name, value))

    def add_text(self, name, value, step):
        self.events.append((step, name, value))

    def add_image(self, name, pixels, step, dataformats):
        self.events.append((step, name, (pixels.shape, dataformats)))

    def flush(self):
        pass

    def close(self):
        self.events.append("closed")


@pytest.fixture
def tensorboard(monkeypatch):
    made = []

    def opened(folder, purge_step):
        made.append(Writer(folder, purge_step))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=opened))
    return made


def evaluation():
    rows = [{"prompt": "a cat", "tag": "", "score": 0.5, "note": ""}, {"prompt": "a dog", "tag": "", "score": None, "note": ""}]
    scores = {"score": 0.25, "by_tag": {"one": 0.5}, "rewards": {"light": 0.3}, "stds": {}, "missing": {"light": 1}, "by_image": {}}
    return Evaluation(column="light", images=2, samples=torch.rand(2, 3, 8, 6), sample_rows=rows, **scores)


def trackers(folder, names, step=0, **recipe):
    lines = []
    overrides = [f"track={json.dumps(names)}", *(f"{key}={value}" for key, value in recipe.items())]
    return tracking.open_trackers(load_recipe("playground", overrides), folder, step, lines.append), lines


def test_a_run_sends_metrics_scores_samples_and_its_summary_and_goes_on_as_the_same_run(tmp_path, hosted):
    run, names = tmp_path / "run", ("wandb", "trackio")
    Trainer(quick(run, 'track=["wandb","trackio"]')).run()
    Trainer(open_run(run, ["rollouts=3"]), run).run()
    for name in names:
        calls = hosted(name).calls
        first, second = (options for what, options, *_ in (call for call in calls if call[0] == "init"))
        assert first["project"] == second["project"] == "playground" and first["config"]["rollouts"] == 2
        kept = json.loads((run / f"{name}.json").read_text())
        assert kept["project"] == "playground" and first["name"] == second["name"]
        if name == "wandb":
            assert first["id"] == second["id"] == kept["id"] and second["resume"] == "allow" and first["name"] == "run"
        else:
            assert kept["id"] in first["name"] and (first["resume"], second["resume"]) == ("never", "allow")
        logged = [(step, values) for what, step, values in (call for call in calls if call[0] == "log")]
        metrics = {step: values for step, values in logged if "reward/total" in values}
        assert list(metrics) == [1, 2, 3] and sum("reward/total" in values for _, values in logged) == 3
        for record in read_lines(run / "metrics.jsonl"):
            assert (
                metrics[record["rollout"]].items()
                >= {key: value for key, value in record.items() if key != "rollout" and value is not None}.items()
            )
        scores = {step: values["evaluation/score"] for step, values in logged if "evaluation/score" in values}
        assert scores == {record["rollout"]: record["score"] for record in read_lines(run / "evaluations.jsonl")}
        samples = {step: values for step, values in logged if "samples/00" in values}
        assert samples.keys() == scores.keys() and len(samples[2]) == 4 and samples[2]["samples/00"].size == (32, 32)
        summary = json.loads((run / "summary.json").read_text())
        assert logged[-1][1]["summary/score/after"] == summary["score"]["after"]
        assert [call[0] for call in calls].count("finish") == 2 and calls[-1][0] == "finish"


def test_a_run_that_was_set_back_sends_no_step_twice(tmp_path, hosted):
    for step in (0, 2):
        found, warned = trackers(tmp_path, ["wandb"], step)
        for k in range(step + 1, step + 4):
            found.log(k, {"loss": float(k)})
        found.evaluation(4, evaluation())
        found.guards(4, {"nan": "a gradient", "kl": "far"})
        found.close()
        assert not warned
    logged = [call[1:] for call in hosted("wandb").calls if call[0] == "log"]
    assert [step for step, values in logged if "loss" in values] == [1, 2, 3, 4, 5]
    assert [step for step, values in logged if "evaluation/score" in values] == [4]
    assert [values for step, values in logged if "guard/kl" in values] == [{"guard/kl": "far"}]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning_and_the_others_go_on(tmp_path, hosted, tensorboard, broken):
    hosted("wandb").broken = broken
    found, warned = trackers(tmp_path, ["wandb", "tensorboard", "trackio"])
    found.log(1, {"loss": 1.0})
    found.evaluation(1, evaluation())
    found.log(2, {"loss": 2.0})
    found.close()
    assert len(warned) == 1 and "wandb failed" in warned[0] and f"{broken}: gone" in warned[0] and "\n" not in warned[0]
    assert [step for what, step, *_ in (c for c in hosted("trackio").calls if c[0] == "log")] == [1, 1, 1, 2]
    assert hosted("trackio").calls[-1] == ("finish",) and tensorboard[0].events[-1] == "closed"


def test_a_run_ends_well_whatever_its_trackers_do(tmp_path, hosted, capsys):
    (tmp_path / "modules" / "trackio.py").write_text("raise SystemExit('no such project')")
    hosted("wandb").broken = "log"
    assert Trainer(quick(tmp_path / "run", "rollouts=1", 'track=["wandb","trackio"]')).run()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("track:")]
    assert len(told) == 2 and "trackio failed" in told[0] and "wandb failed" in told[1]


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(tmp_path, tensorboard):
    trackers(tmp_path, ["tensorboard"])[0].close()
    (tmp_path / "tensorboard").mkdir()
    found, warned = trackers(tmp_path, ["tensorboard"], step=4)
    found.evaluation(5, evaluation())
    found.guards(5, {"nan": "a gradient"})
    trackers(tmp_path, ["tensorboard"], step=0)
    assert [writer.purge_step for writer in tensorboard] == [None, 5, 0] and not warned
    assert {name for _, name, _ in tensorboard[1].events} >= {"evaluation/score", "evaluation/tag/one", "samples/01", "guard/nan"}
    assert (5, "samples/00", ((8, 6, 3), "HWC")) in tensorboard[1].events


def test_wandb_without_a_login_is_told_before_a_run_and_logs_offline(tmp_path, hosted, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(hosted("wandb"), "login", lambda **options: asked.append(options) or False, raising=False)
    tracking.check(["wandb"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "wandb login" in err
    trackers(tmp_path / "a", ["wandb"])
    assert hosted("wandb").calls[-1][1]["mode"] == "offline" and asked[-1]["prompt"] is False
    monkeypatch.setenv("WANDB_MODE", "online")  # said by the user
    tracking.check(["wandb"])
    trackers(tmp_path / "b", ["wandb"])
    assert "mode" not in hosted("wandb").calls[-1][1] and not capsys.readouterr().err


def test_a_tracker_that_is_missing_is_told_before_a_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio is not installed; pip install trackio"):
        tracking.check(["trackio"])


def test_wandbs_own_variable_names_the_project(tmp_path, hosted, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trackers(tmp_path, ["wandb", "trackio"])
    assert [hosted(name).calls[-1][1]["project"] for name in ("wandb", "trackio")] == ["mine", "playground"]
