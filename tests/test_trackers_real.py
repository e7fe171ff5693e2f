"""Each tracker's real package, where it is installed, read back by its own reader: what a run sends, and goes on sending."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowtilt import load_recipe
from flowtilt.config import Recipe
from flowtilt.evaluate import Evaluation
from flowtilt.runs.tracking import open_trackers


def needs(*packages: str):
    """Skips a test where a package is missing, and says which."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def evaluation(score: float) -> Evaluation:
    rows = [{"prompt": "a cat", "tag": "", "score": 0.5, "note": ""}, {"prompt": "a dog", "tag": "", "score": None, "note": ""}]
    scores = {"score": score, "by_tag": {"one": score}, "rewards": {"light": 0.3}, "stds": {}, "missing": {"light": 1}, "by_image": {}}
    return Evaluation(column="light", images=2, samples=torch.rand(2, 3, 8, 6), sample_rows=rows, **scores)


def recipe_for(tracker: str) -> Recipe:
    return load_recipe("playground", [f"track={json.dumps([tracker])}", "objective.beta=0.25"])


def a_run_and_its_resume(run: Path, tracker: str) -> None:
    """Three rollouts of which the last is lost with a kill, then three more, evaluated after rollouts 2 and 5."""
    run.mkdir()
    recipe = recipe_for(tracker)
    warned: list[str] = []
    for step in (0, 2):
        trackers = open_trackers(recipe, run, step, warned.append)
        for k in range(step + 1, step + 4):
            trackers.log(k, {"reward/total": k / 8, "time/sample": 1.0})
            if k in (2, 5):
                trackers.evaluation(k, evaluation(k / 8))
            if k in (1, 4):
                trackers.guards(k, {"norm": "far from the base"})
        if step:
            trackers.summary(5, {"steps": 5, "score": {"before": 0.25, "after": 0.625}})
        trackers.close()
    assert not warned


@needs("tensorboard")
def test_tensorboard_has_all_that_a_run_sent_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    a_run_and_its_resume(tmp_path / "run", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={}).Reload()
    assert [(e.step, e.value) for e in found.Scalars("reward/total")] == [(k, k / 8) for k in (1, 2, 3, 4, 5)]
    assert [(e.step, e.value) for e in found.Scalars("evaluation/score")] == [(2, 0.25), (5, 0.625)]
    assert [e.step for e in found.Images("samples/01")] == [2, 5]
    texts = {tag: [e.tensor_proto.string_val[0].decode() for e in found.Tensors(f"{tag}/text_summary")] for tag in ("recipe", "captions")}
    assert "beta = 0.25" in texts["recipe"][0] and "a cat (0.5)" in texts["captions"][-1]
    assert [e.step for e in found.Tensors("guard/norm/text_summary")] == [1, 4]
    assert found.Scalars("summary/score/after")[0].value == 0.625


@needs("mlflow")
def test_mlflow_has_one_run_that_goes_on(tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/mlflow.db" if importlib.util.find_spec("sqlalchemy") else f"file:{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    a_run_and_its_resume(tmp_path / "run", "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("playground")
    (found,) = client.search_runs([experiment.experiment_id])
    own = found.info.run_id
    assert found.info.status == "FINISHED" and found.data.params["objective.beta"] == "0.25"
    assert [(m.step, m.value) for m in client.get_metric_history(own, "reward/total")] == [(k, k / 8) for k in (1, 2, 3, 4, 5)]
    assert [(m.step, m.value) for m in client.get_metric_history(own, "evaluation/score")] == [(2, 0.25), (5, 0.625)]
    assert found.data.tags["guard/norm"] == "rollout 4: far from the base" and found.data.metrics["summary/score/after"] == 0.625
    names = {file.path for folder in ("", "captions", "images") for file in client.list_artifacts(own, folder or None)}
    assert {"recipe.toml", "captions/rollout-000002.json", "captions/rollout-000005.json"} <= names
    assert sum(name.endswith(".png") and "samples" in name for name in names) == 4  # two images, twice


@needs("trackio")
def test_trackio_has_one_run_that_goes_on(tmp_path):
    """In a process of its own: trackio fixes its folder when it is imported."""
    script = f"""
import json, os, sys
os.environ["TRACKIO_DIR"] = {str(tmp_path / "trackio")!r}
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_trackers_real import a_run_and_its_resume
a_run_and_its_resume(Path({str(tmp_path / "run")!r}), "trackio")
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("playground")
logs = SQLiteStorage.get_logs("playground", name)
print("FOUND", json.dumps([name, SQLiteStorage.get_run_config("playground", name), logs], default=str))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    name, config, logs = json.loads(done.stdout.partition("FOUND ")[2])
    assert name.startswith("run-") and config["objective"]["beta"] == 0.25
    assert [(log["step"], log["reward/total"]) for log in logs if "reward/total" in log] == [(k, k / 8) for k in (1, 2, 3, 4, 5)]
    assert [(log["step"], log["evaluation/score"]) for log in logs if "evaluation/score" in log] == [(2, 0.25), (5, 0.625)]
    assert [log["step"] for log in logs if "guard/norm" in log] == [1, 4]
    assert [log["samples/00"]["caption"] for log in logs if "samples/00" in log] == ["a cat (0.5)"] * 2
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 4


@needs("wandb")
def test_wandb_offline_has_one_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    a_run_and_its_resume(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert len(files) == 2 and len({run.run_id for run in runs}) == 1 and runs[0].display_name == "run"
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["objective"]["beta"] == 0.25
    logs = []
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            logs.append(items | {"step": items.get("_step", record.history.step.num)})
    assert [(log["step"], log["reward/total"]) for log in logs if "reward/total" in log] == [(k, k / 8) for k in (1, 2, 3, 4, 5)]
    assert [(log["step"], log["evaluation/score"]) for log in logs if "evaluation/score" in log] == [(2, 0.25), (5, 0.625)]
    assert [log["step"] for log in logs if "guard/norm" in log] == [1, 4]
    assert [log["samples/00/caption"] for log in logs if "samples/00/caption" in log] == ["a cat (0.5)"] * 2
    assert len(list((tmp_path / "wandb").rglob("*.png"))) == 4


def wandb_records(file: Path):
    """The records of a .wandb file: blocks of 32 KiB with chunks (checksum, length, type) of protobuf messages, as LevelDB logs."""
    from wandb.proto import wandb_internal_pb2

    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record
