"""A reward's code can't hurt what runs beside it: the process is as before, images are untouched, and what it does wrong is one line."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import quick

from flowtilt import Trainer, UserError
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
    reward = fromfile(tmp_path, IMPORTS + CALL.format("global on; on = torch.inference_mode(); on.__enter__()"))
    with ThreadPoolExecutor(1) as its_own_mode, pytest.raises(UserError, match=r"reward mine: leaves torch\.inference_mode switched"):
        its_own_mode.submit(score, {"mine": reward}, IMAGES, PROMPTS).result()


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
