"""Threads: their order, their number, and that a program ends well whatever they do."""

import subprocess
import sys
import threading

import pytest

from flowtilt.io.threads import Background, in_threads


def test_threads_keep_order_and_their_number():
    going, most, lock = 0, 0, threading.Lock()
    meet = threading.Barrier(3)

    def work(k):
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        meet.wait(20)
        with lock:
            going -= 1
        return k

    assert in_threads([lambda k=k: work(k) for k in range(9)], 3) == list(range(9)) and most == 3
    assert in_threads([], 3) == []


def test_the_first_error_ends_the_rest():
    done = []
    with pytest.raises(ValueError, match="two"):
        in_threads([lambda k=k: done.append(k) if k < 2 else (_ for _ in ()).throw(ValueError("two")) for k in range(100)], 1)
    assert done == [0, 1]


def test_what_was_not_begun_when_the_background_closed_is_not_done():
    background, begun, release, done = Background(), threading.Event(), threading.Event(), []

    def first():
        begun.set()
        assert release.wait(20)
        return "first"

    future = background.submit(first)
    background.submit(lambda: done.append("second"))
    assert begun.wait(20)
    background.close()
    release.set()
    assert future.result(20) == "first" and not done


# the end of the program ------------------------------------------------------------------------------------

COMPUTES = """
import sys, threading, torch
from flowtilt.io.threads import Background, in_threads
begun = threading.Barrier(4)

def compute(wait=True):
    if wait:
        begun.wait()
    for _ in range(100):
        (torch.rand(3, 256, 256) * 255).round().clamp(0, 255).byte()

one, several = Background(), Background()
one.submit(compute)
several.submit(lambda: in_threads([compute, compute, lambda: compute(False)], 2))
begun.wait()
one.close()
several.close()
sys.exit(2)
"""


def test_threads_that_compute_do_not_abort_a_program_that_ends():
    """Without care this failed 8 times of 8: "terminate called without an active exception", 134."""
    ended = subprocess.run([sys.executable, "-c", COMPUTES], timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "")


def test_a_thread_that_waits_for_a_server_is_not_waited_for():
    code = """
import socket, threading, time
from flowtilt.io import threads
from flowtilt.io.web import post_json
threads.GRACE = 600.0
silent = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{silent.getsockname()[1]}"
threads.Background().submit(lambda: threads.in_threads([lambda: post_json(url, {}, timeout=600)], 1))
silent.accept()  # the request is on its way, and stays unanswered
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
