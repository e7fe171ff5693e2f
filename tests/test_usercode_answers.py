"""What a reward raises or answers, and its child processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import quick
from test_usercode import IMAGES, PROMPTS, fromfile, mean

from flowtilt import RewardOutput, Trainer, UserError
from flowtilt.rewards import score

# failures and answers ----------------------------------------------------------------------------------------


class TimedOut(BaseException):
    pass


class Unsayable(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TimedOut("60 s"), "TimedOut: 60 s"),
        (SystemExit(3), "SystemExit: 3"),
        (GeneratorExit(), "GeneratorExit"),
        (Unsayable(), "Unsayable"),
    ],
)
def test_whatever_a_reward_raises_is_one_line_with_its_place(error, said):
    def fails(images, prompts):
        raise error

    with pytest.raises(UserError, match=rf"reward mine failed: {said}, at .*test_usercode_answers\.py:\d+"):
        score({"mine": fails}, IMAGES, PROMPTS)


@pytest.mark.parametrize("handler", [lambda *_: sys.exit(143), signal.default_int_handler])
def test_what_a_signals_handler_raises_is_no_fault_of_the_reward(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            score({"mine": lambda images, prompts: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5)}, IMAGES, PROMPTS)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.0, np.float32(3), torch.tensor(4)],
        (1, 2, 3, 4),
        np.array([1, 2, 3, 4]),
        *(torch.tensor([1, 2, 3, 4]).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64)),
        torch.tensor([1.0, 2, 3, 4], requires_grad=True),
    ],
    ids=lambda answer: f"{type(answer).__name__} {getattr(answer, 'dtype', '')}",
)
def test_numbers_are_scores_in_whatever_form_they_come(answer):
    def reward(images, prompts):
        return RewardOutput(answer, details={"same": answer})

    found, _ = score({"r": reward}, IMAGES, PROMPTS)
    assert found["r"].tolist() == found["r/same"].tolist() == [1, 2, 3, 4] and found["r"].dtype == torch.float32
    assert score({"r": lambda images, prompts: torch.tensor([True, False, True, True])}, IMAGES, PROMPTS)[0]["r"].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, r"returned None \(is a return missing\?\), want a tensor of shape \[4\], one score per image"),
        (0.5, "returned a float, want"),
        ("0.5", "returned a str, want"),
        (torch.zeros(()), r"returned a tensor of shape \[\] and float32, want"),
        (torch.zeros(4, 1), r"shape \[4, 1\]"),
        (torch.zeros(3), r"shape \[3\]"),
        (torch.zeros(4, dtype=torch.complex64), "complex64"),
        (torch.zeros(4, device="meta"), "meta device"),
        (torch.zeros(4).to_sparse(), "sparse_coo tensor"),
        (np.array(["a"] * 4), r"an array of shape \[4\] and <U1"),
        (np.zeros(4, dtype=complex), "complex128"),
        (["1", "2", "3", "4"], r"a list of 4 values \(str\)"),
        ([[1], [2], [3], [4]], r"a list of 4 values \(list\)"),
        ([0.5, None, 1, 1], "NoneType"),
        ([torch.zeros(1)] * 4, "Tensor"),
        ({"a": torch.zeros(4)}, r"a dict with 'a', want a key .score."),
        (RewardOutput(torch.zeros(4), details={"a": torch.zeros(3)}), r"reward mine/a: returned a tensor of shape \[3\]"),
        (RewardOutput(torch.zeros(4), details=[1]), "details are a list"),
        (RewardOutput(torch.zeros(4), details={1: torch.zeros(4)}), "details are a dict"),
        (RewardOutput(torch.zeros(4), notes="abcd"), "notes are a str"),
        (RewardOutput(torch.zeros(4), notes=[1, 2, 3, 4]), "notes are a list"),
        (torch.tensor([0, 1, torch.inf, 0]), 'infinite for "picture 2"; return NaN'),
        (torch.tensor([0, 1e300, 0, 0], dtype=torch.float64), '1e.300, which is too large for float32, for "picture 1"'),
        ([10**400, 0, 0, 0], "a list of 4 values"),
    ],
)
def test_an_answer_of_another_kind_is_one_line_that_says_what_came(answer, said):
    with pytest.raises(UserError, match=said) as caught:
        score({"mine": lambda images, prompts: answer}, IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)


def test_a_trained_reward_that_is_nan_everywhere_ends_the_run_though_another_one_is_there(tmp_path):
    (tmp_path / "nan.py").write_text("import torch\ndef nan(images, prompts):\n    return torch.full((len(images),), torch.nan)\n")
    recipe = quick(tmp_path / "run", "rollouts=1", f"rewards.nothing={tmp_path}/nan.py:nan")
    with pytest.raises(UserError, match=r"reward nothing: has no score \(NaN\) for any of the 12 images of rollout 1; .*rewards\.nothing"):
        Trainer(recipe).run()


# child processes ---------------------------------------------------------------------------------------------

CHILDREN = """
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from helper_of_children import half
import torch

def work(x):
    return float(x.mean())

def pool(images, prompts):
    with mp.get_context("{method}").Pool(1) as pool:
        return torch.tensor(pool.map(work, list(images.numpy())))

def executor(images, prompts):
    with ProcessPoolExecutor(1, mp.get_context("{method}")) as pool:
        return torch.tensor(list(pool.map(half, list(images.numpy()))))
"""


def test_child_processes_find_the_functions_of_the_file_and_of_its_neighbours(tmp_path):
    (tmp_path / "helper_of_children.py").write_text("def half(x):\n    return float(x.mean() / 2)\n")
    (tmp_path / "my reward-1.py").write_text(CHILDREN.format(method="spawn"))
    command = [sys.executable, "-c", CODE.format(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert said.returncode == 0, said.stderr
    mean, half = map(float, said.stdout.split())
    assert mean == 0.25 and half == 0.125


CODE = """
import torch
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward, score
if __name__ == "__main__":
    place = "{}/my reward-1.py:"
    rewards = {{name: load_reward(name, place + name) for name in ("pool", "executor")}}
    found, _ = score(rewards, torch.full((1, 3, 2, 2), 0.25), [Prompt("a")])
    print(float(found["pool"]), float(found["executor"]))
"""


def test_a_file_is_loaded_anew_each_time(tmp_path):
    text = "n = 0\ndef reward(images, prompts):\n    global n\n    n += 1\n    return torch.full((len(images),), float(n))\nimport torch\n"
    first, second = fromfile(tmp_path, text), fromfile(tmp_path, text)
    values = [float(score({"r": reward}, IMAGES, PROMPTS)[0]["r"][0]) for reward in (first, first, second)]
    assert values == [1, 2, 1]


def test_an_import_that_was_put_on_the_path_is_found_in_a_call(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "late_helper.py").write_text("FACTOR = 2.0\n")
    reward = fromfile(
        tmp_path,
        f"import sys\nsys.path.insert(0, {str(tmp_path / 'elsewhere')!r})\n"
        "def reward(images, prompts):\n    from late_helper import FACTOR\n    return FACTOR * images.mean((1, 2, 3))\n",
    )
    with contextlib.suppress(KeyError):
        del sys.modules["late_helper"]
    assert torch.equal(score({"r": reward}, IMAGES, PROMPTS)[0]["r"], 2 * mean(IMAGES, PROMPTS))
