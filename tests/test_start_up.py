"""What happens before a command begins, and to what it prints: other terminals, pipes, environments."""

import os
import subprocess
import sys

import pytest

from flowtilt import UserError
from flowtilt.distributed.torchrun import place
from flowtilt.training.pace import BEFORE, LAST, Pace


def shell(line, **environment):
    """A line of bash in which `flowtilt` is the command; its exit status, stdout and stderr."""
    flowtilt = f'flowtilt() {{ "{sys.executable}" -m flowtilt "$@"; }}; set -o pipefail; '
    done = subprocess.run(["bash", "-c", flowtilt + line], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "environment", "status", "out", "err"),
    [
        ("flowtilt keys | head -1", {}, 0, "name ", ""),
        ("flowtilt keys 2>&1 | true", {}, 0, "", ""),
        ("flowtilt keys > /dev/full", {}, 2, "", "can't write to standard output: No space left"),
        ("flowtilt keys >&-", {}, 0, "", ""),
        ("flowtilt train 'née' 2>&1", {"PYTHONIOENCODING": "ascii"}, 2, r"recipe 'n\xe9e'", ""),
        ("flowtilt train 'née'", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, 2, "", "no such recipe"),
        ("flowtilt keys", {"WORLD_SIZE": "2"}, 2, "", "WORLD_SIZE=2 in the environment, but no RANK"),
    ],
)
def test_output_and_environment_end_no_command_in_a_traceback(line, environment, status, out, err):
    found = shell(line, **environment)
    assert found[0] == status and "Traceback" not in found[2] and "Error" not in found[2], found
    assert out in found[1] and err in found[2] and (found[2] == "") == (err == "")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR and no MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "less than WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        place()


def test_one_process_needs_nothing_of_torchrun(monkeypatch):
    assert place() == (0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() == (0, 1, 0)


@pytest.mark.parametrize(
    ("before", "environment", "policy"),
    [("", {}, "passive"), ("", {"OMP_WAIT_POLICY": "active"}, "active"), ("", {"KMP_BLOCKTIME": "200"}, ""), ("import torch;", {}, "")],
)
def test_openmp_waits_asleep_unless_the_user_chose_or_torch_is_loaded(before, environment, policy):
    code = f"import os; {before} import flowtilt; print(os.environ.get('OMP_WAIT_POLICY', ''))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment, check=True)
    assert done.stdout.strip() == policy


def test_importing_flowtilt_imports_nothing_heavy():
    code = "import sys, flowtilt; print([name for name in ('torch', 'pydantic', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_run_that_becomes_far_slower_says_so_once():
    def said(*speeds):
        pace = Pace()
        return [k for k, speed in enumerate(speeds) if pace.remark({"images_per_second": speed, "time/sample": 2.0, "time/train": 1.0})]

    fast = [60.0, 57.0] * BEFORE
    assert said(*fast, *[2.0] * LAST * 3, *fast, *[2.0] * LAST) == [len(fast) + LAST - 1]
    assert said(*fast, 2.0, 2.0, 50.0, 2.0, 2.0, 50.0) == [] == said(*fast, *[30.0] * 20) == said(*[2.0] * 3)
    assert "goes into 'sample'" in str(_last(fast))


def _last(fast):
    pace = Pace()
    return [pace.remark({"images_per_second": speed, "time/sample": 2.0, "time/train": 1.0}) for speed in (*fast, *[2.0] * LAST)][-1]
