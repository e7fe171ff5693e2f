"""A reward's code can't hurt what runs beside it: the process is as before, images are untouched, and what it does wrong is one line."""

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick

from flowtilt import RewardOutput, Trainer, UserError
from flowtilt.distributed import signals
from flowtilt.io import containment as usercode
from flowtilt.io.containment import contained
from flowtilt.io.files import read_lines
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward, score
from flowtilt.rewards.gradient import reward_gradient
from flowtilt.rewards.serving.answers import seed_of

IMAGES = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(f"picture {k}", metadata={"include": [{"class": "dog"}]}) for k in range(4)]


@pytest.fixture
def said():
    """What flowtilt logs in the meantime."""
    lines, logger = [], logging.getLogger("flowtilt")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def mean(images, prompts):
    return images.mean((1, 2, 3))


def fromfile(folder, text, name="reward", stem="mine"):
    (folder / f"{stem}.py").write_text(text)
    return load_reward("mine", f"{folder}/{stem}.py:{name}")


# images and prompts ------------------------------------------------------------------------------------------

CHANGES = {
    "in torch": lambda x: x.mul_(255),
    "through numpy": lambda x: np.multiply(x.numpy(), 255, out=x.numpy()),
    "through data": lambda x: x.data.zero_(),
    "a view": lambda x: x.permute(0, 2, 3, 1).contiguous().numel() or x[0].view(-1)[:5].fill_(9),
    "an index": lambda x: x.__setitem__((slice(None), 0), 0.0),
    "dlpack": lambda x: torch.from_dlpack(x).zero_(),
    "the storage": lambda x: x.untyped_storage().fill_(0),
    "its size": lambda x: x.resize_(1, 3, 2, 2),
    "set_": lambda x: x.set_(torch.zeros(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_nobody_elses(change):
    images = IMAGES.clone()

    def careless(images, prompts):
        scores = mean(images, prompts)
        CHANGES[change](images)
        return scores

    found, _ = score({"careless": careless, "mean": mean}, images, PROMPTS)
    assert torch.equal(images, IMAGES) and images.shape == IMAGES.shape
    assert torch.equal(found["careless"], found["mean"])


def test_what_a_reward_does_to_its_prompts_is_nobody_elses():
    def careless(images, prompts):
        prompts[0].metadata["include"][0]["class"] = "cat"
        object.__setattr__(prompts[1], "text", "another")
        prompts.clear()
        return torch.zeros(4)

    seen = []
    score({"careless": careless, "later": lambda images, prompts: seen.extend(prompts) or torch.zeros(4)}, IMAGES, PROMPTS)
    assert seen == PROMPTS and PROMPTS[0].metadata == {"include": [{"class": "dog"}]} and PROMPTS[1].text == "picture 1"


def test_a_change_in_place_under_a_gradient_is_refused_by_name():
    def careless(images, prompts):
        scores = images.mean((1, 2, 3))
        images.data.mul_(2)
        return scores

    with pytest.raises(UserError, match="reward careless: changes the images in place"):
        reward_gradient({"careless": careless}, {"careless": 1.0}, lambda x: x, IMAGES, PROMPTS, margin=None, chunk=4)


# the process -------------------------------------------------------------------------------------------------


def state():
    return {
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.get_rng_state().tolist(),
        "seed": torch.initial_seed(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "errors": np.geterr(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "timer": signal.getitimer(signal.ITIMER_REAL)[0],
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "path": list(sys.path),
        "argv": list(sys.argv),
        "rank": os.environ.get("WORLD_SIZE"),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable, logging.getLogger("flowtilt").disabled),
        "recursion": sys.getrecursionlimit(),
        "denormal": bool(torch.tensor(1e-40) / 2 > 0),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


DOES = {
    "chdir": "os.chdir('/')",
    "grad": "torch.set_grad_enabled(not torch.is_grad_enabled())",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "seeds": "torch.manual_seed(1); random.seed(1); np.random.seed(1)",
    "draws": "torch.rand(3); random.random(); np.random.rand()",
    "threads": "torch.set_num_threads(3)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "errors": "np.seterr(all='raise')",
    "signals": "signal.signal(signal.SIGTERM, lambda *_: None); signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "blocks": "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
    "alarm": "signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1000)",
    "warnings": "warnings.simplefilter('error')",
    "hooks": "sys.excepthook = threading.excepthook = print",
    "streams": "sys.stdout = sys.stderr = open(os.devnull, 'w')",
    "closes": "sys.stdout.close()",
    "path": "sys.path.insert(0, '/'); sys.argv = ['x']",
    "another path": "sys.path = ['/']",
    "rank": "os.environ['WORLD_SIZE'] = '7'",
    "logs": "logging.basicConfig(level=1, force=True); logging.disable(50); logging.getLogger('flowtilt').disabled = True",
    "recursion": "sys.setrecursionlimit(12345)",
    "denormal": "torch.set_flush_denormal(True)",
    "autocast": "torch.autocast('cpu', torch.bfloat16).__enter__()",
}
IMPORTS = "import logging, os, random, signal, sys, threading, warnings\nimport numpy as np, torch\n"
CALL = "def reward(images, prompts):\n    {}\n    return images.mean((1, 2, 3))\n"


@pytest.mark.parametrize("what", DOES)
def test_the_process_is_as_it_was_whatever_a_file_does_at_import_or_in_a_call(tmp_path, what):
    before = state()
    calls = fromfile(tmp_path, IMPORTS + CALL.format(DOES[what]), stem="calls")
    assert torch.equal(score({"mine": calls, "mean": mean}, IMAGES, PROMPTS)[0]["mean"], mean(IMAGES, PROMPTS))
    assert state() == before
    at_import = fromfile(tmp_path, IMPORTS + DOES[what] + "\n" + CALL.format("pass"), stem="at_import")
    assert state() == before
    assert torch.equal(score({"mine": at_import}, IMAGES, PROMPTS)[0]["mine"], mean(IMAGES, PROMPTS))
    assert state() == before


def test_the_process_is_as_it_was_also_where_the_call_fails(tmp_path):
    before = state()
    with pytest.raises(UserError, match=r"mine\.py:4"):
        score({"mine": fromfile(tmp_path, IMPORTS + CALL.format("os.chdir('/'); raise ValueError"))}, IMAGES, PROMPTS)
    assert state() == before


def test_a_class_that_changes_the_process_when_it_is_built_or_asked_is_contained(tmp_path):
    before = state()
    text = (
        IMPORTS + "class Reward:\n    def __init__(self, *, device):\n        os.chdir('/')\n"
        "    def applies(self, prompt):\n        torch.set_default_dtype(torch.float64)\n        return ''\n"
        "    def __call__(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
    )
    from flowtilt.rewards import applicable

    reward = fromfile(tmp_path, text, "Reward")
    applicable(PROMPTS, {"mine": reward})
    assert state() == before


def test_inference_mode_that_is_left_on_is_refused_by_name(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_usercode import *
reward = fromfile(Path({str(tmp_path)!r}), IMPORTS + CALL.format("global on; on = torch.inference_mode(); on.__enter__()"))
try:
    score({{"mine": reward}}, IMAGES, PROMPTS)
except UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "reward mine: leaves torch.inference_mode switched" in said.stdout, said.stderr


def test_what_is_put_back_and_matters_to_the_file_is_said_once(tmp_path, said):
    reward = fromfile(tmp_path, IMPORTS + "os.chdir('/')\n" + CALL.format("torch.set_default_dtype(torch.float64)"))
    for _ in range(2):
        score({f"mine of {tmp_path}": reward}, IMAGES, PROMPTS)
    assert [line.partition(": ")[2] for line in said] == [
        "changes the working directory; flowtilt put it back",
        "changes torch's default dtype; flowtilt put it back",
    ]
    assert "mine.py" in said[0]


def test_what_a_reward_draws_depends_on_its_images_alone():
    def noisy(images, prompts):
        return torch.rand(len(images)) + float(np.random.rand()) + random.random()

    first = score({"noisy": noisy}, IMAGES, PROMPTS)[0]["noisy"]
    torch.manual_seed(5)
    assert torch.equal(score({"noisy": noisy}, IMAGES, PROMPTS)[0]["noisy"], first)
    assert not torch.equal(score({"noisy": noisy}, IMAGES.flip(0), PROMPTS)[0]["noisy"], first)
    assert seed_of("a", PROMPTS, torch.ones(4)) != seed_of("b", PROMPTS, torch.ones(4))


def test_prints_of_user_code_go_to_stderr_and_the_programs_own_to_stdout(tmp_path, capsys):
    reward = fromfile(tmp_path, IMPORTS + "print('imported')\n" + CALL.format("print('called'); sys.stdout.write('written')"))
    score({"mine": reward}, IMAGES, PROMPTS)
    print("result")
    out, err = capsys.readouterr()
    assert out == "result\n" and all(word in err for word in ("imported", "called", "written"))


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-"])
def test_what_c_libraries_and_child_processes_write_is_no_result(closed):
    code = (
        "import os, subprocess; from flowtilt.cli import output; output.make_robust(); "
        "os.write(1, b'c '); subprocess.run(['echo', 'child']); print('result')"
    )
    said = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "{code}" {closed}'], capture_output=True, text=True, timeout=60)
    assert (said.stdout, said.stderr) == {"": ("result\n", "c child\n"), ">&-": ("", ""), "2>&-": ("result\n", "")}[closed]


def test_a_loop_of_a_rewards_own_does_not_take_the_programs_signals():
    with signals.handled():
        before = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        score({"mine": lambda images, prompts: signal.set_wakeup_fd(-1) and mean(images, prompts)}, IMAGES, PROMPTS)
        after = signal.set_wakeup_fd(before, warn_on_full_buffer=False)
    assert before == after != -1


def test_threads_that_keep_a_program_alive_are_named():
    code = (
        "import threading, time; from flowtilt.io import threads; threads.name_those_left(0.2); "
        "threading.Thread(target=time.sleep, args=(1,), name='lingers').start()"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr
    assert said == "flowtilt: all is done and saved; waiting for lingers, started by a reward or a library; Ctrl-C ends it\n"


def test_while_a_thread_runs_user_code_the_main_thread_keeps_its_stdout(capsys):
    entered, leave = threading.Event(), threading.Event()

    def work():
        with contained("thread"):
            print("theirs")
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    with contained("main"):
        print("theirs, too")
    print("ours")
    leave.set()
    thread.join()
    out, err = capsys.readouterr()
    assert out == "ours\n" and err == "theirs\ntheirs, too\n"


def test_a_slow_call_is_named(monkeypatch, said):
    monkeypatch.setattr(usercode, "SLOW", 0.05)
    score({"mine": lambda images, prompts: time.sleep(0.2) or mean(images, prompts)}, IMAGES, PROMPTS)
    assert said[0] == "still waiting for reward mine after 0 s"


def test_a_run_is_the_same_bits_beside_a_reward_that_changes_everything(tmp_path):
    text = IMPORTS + "".join(f"{DOES[k]}\n" for k in ("chdir", "grad", "dtype", "seeds", "threads", "warnings"))
    change = "; ".join(DOES[k] for k in ("chdir", "grad", "dtype", "seeds", "threads", "warnings")) + "; images.numpy().fill(0)"
    (tmp_path / "wild.py").write_text(text + CALL.format(change))
    runs = {}
    for name, more in {"plain": [], "wild": [f'rewards.wild={{source="{tmp_path}/wild.py:reward",weight=0}}']}.items():
        Trainer(quick(tmp_path / name, "rollouts=1", "rollout.prompts=2", *more)).run()
        (line,) = read_lines(tmp_path / name / "metrics.jsonl")
        runs[name] = {key: value for key, value in line.items() if "time" not in key and "second" not in key and "wild" not in key}
    assert runs["plain"] == runs["wild"]


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

    with pytest.raises(UserError, match=rf"reward mine failed: {said}, at .*test_usercode\.py:\d+"):
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


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_child_processes_find_the_functions_of_the_file_and_of_its_neighbours(tmp_path, method):
    (tmp_path / "helper_of_children.py").write_text("def half(x):\n    return float(x.mean() / 2)\n")
    (tmp_path / "my reward-1.py").write_text(CHILDREN.format(method=method))
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
