"""Jobs that are started again: one command begins a run and goes on with it, on however many processes."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import LIGHT, QUICK, two_blocks
from ranks import together

from flowtilt.cli import main
from flowtilt.io.files import read_lines

LAUNCH = Path(__file__).parent.parent / "examples" / "launch"


def test_one_command_begins_a_run_on_two_processes_and_goes_on_with_it_on_one(tmp_path, capsys):
    words = ["train", "playground", *QUICK, two_blocks(), *LIGHT, "evaluate.every=0", f"run={tmp_path}/run", "--or-resume"]
    done = together(2, main, [*words, "rollouts=1"], folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    first = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert main([*words, "rollouts=2"]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["rollout"] for line in lines] == [1, 2] and lines[0] == first[0]
    assert main([*words, "rollout.steps=5"]) == 2
    assert "a run of another recipe (rollout differ)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--or-resume"], ["playground", "--or-resume"], ["playground", "--or-resume", "--resume", "r"]])
def test_without_a_recipe_and_a_folder_there_is_nothing_to_go_on_with(words, capsys):
    assert main(["train", *words]) == 2
    assert "--or-resume" in capsys.readouterr().err


@pytest.fixture
def job(tmp_path):
    """Stand-ins of Slurm's commands, which write down how they were called."""
    for name, text in {
        "srun": 'shift; exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.log; [ "$1" = show ] && echo first.example || true',
        "torchrun": f'echo "$@" >> {tmp_path}/torchrun.log; {{ACT}}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_NNODES": "2"}

    def run(act, **further):
        place = tmp_path / "torchrun"
        place.write_text(place.read_text().replace("{ACT}", act))
        return subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env={**os.environ, **own, "RUN": f"{tmp_path}/run", **further}, timeout=60)

    return run, tmp_path


@pytest.mark.parametrize(
    ("act", "status", "requeued"),
    [("trap : USR1; sleep 0.3; kill -USR1 $PPID; sleep 0.3; exit 1", 1, True), ("exit 1", 1, False), ("exit 0", 0, False)],
)
def test_the_slurm_script_goes_back_into_the_queue_when_its_time_is_over_and_not_when_the_run_failed(job, act, status, requeued):
    run, place = job
    assert run(act).returncode == status
    assert ("requeue 7" in (place / "scontrol.log").read_text()) == requeued
    said = (place / "torchrun.log").read_text()
    assert "--nnodes 2" in said and "first.example:29500" in said and f"run={place}/run --or-resume" in said


def test_the_other_files_are_yaml_with_the_same_command():
    import yaml

    sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert "--or-resume" in sky["run"] and sky["resources"]["use_spot"] is True
    claim, service, batch = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = batch["spec"]["template"]["spec"]
    assert (
        pod["subdomain"] == service["metadata"]["name"]
        and pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    )
    assert "--or-resume" in pod["containers"][0]["args"][0] and batch["spec"]["completions"] == batch["spec"]["parallelism"]
