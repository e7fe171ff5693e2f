"""A reward server under many requests: what is joined, in which order, and who pays for whose error."""

import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from reward_servers import ask, asking, connected, grey, judged, levels, picky, prompt, running, wait_until

from flowtilt.rewards.serving.batching import Batcher
from flowtilt.rewards.serving.wire import Limits


class Gate:
    """The reward `levels`, which remembers its calls; the first one lasts until `open` is set."""

    def __init__(self):
        self.open, self.entered = threading.Event(), threading.Event()
        self.sizes, self.texts, self.threads, self.inside, self.crowd = [], [], set(), 0, 0

    def __call__(self, images, prompts):
        self.inside += 1
        self.crowd = max(self.crowd, self.inside)
        self.sizes.append(len(images))
        self.texts += [p.text for p in prompts]
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.open.wait(20)
        self.inside -= 1
        return levels(images, prompts)


def in_threads(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def behind_the_gate(gate, url, bodies):
    """Answers to requests that were all waiting while the reward was busy with another."""
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        first = pool.submit(ask, url, asking("gate", [grey(1)], ["first"]))
        assert gate.entered.wait(20)
        rest = []
        queued = 0
        for body in bodies:
            rest.append(pool.submit(ask, url, body))
            queued += len(body["images"])
            wait_until(lambda: ask(url, None, path="/health", method="GET")[1]["queued_images"] == queued)  # noqa: B023
        gate.open.set()
        assert first.result(20)[0] == 200
        return [future.result(20) for future in rest]


def test_requests_that_wait_together_are_scored_in_one_call_by_one_thread():
    gate = Gate()
    with running({"gate": gate}, max_batch=8) as (url, _):
        answers = behind_the_gate(gate, url, [asking("gate", [grey(10 * i), grey(10 * i + 1)]) for i in range(10)])
    assert [said["scores"] for _, said in answers] == [[10 * i, 10 * i + 1] for i in range(10)]
    assert gate.sizes == [1, 8, 8, 4]
    assert len(gate.threads) == gate.crowd == 1


def test_a_batch_is_answered_before_the_next_begins():
    begin, futures, answered = threading.Event(), [], []

    def reward(images, prompts):
        assert begin.wait(20)
        answered.append(sum(future.done() for future in futures))
        return levels(images, prompts)

    batcher = Batcher({"r": reward}, max_batch=4, linger=0.0, measured=lambda *_: None)
    futures.append(batcher.submit("r", [grey(0)], [prompt()]))
    wait_until(futures[0].running)
    futures += [batcher.submit("r", [grey(i), grey(i)], [prompt()] * 2) for i in range(1, 5)]
    begin.set()
    batcher.close()
    assert [future.result().scores.tolist() for future in futures] == [[0], *([i, i] for i in range(1, 5))]
    assert answered == [0, 1, 3]


def test_images_of_different_sizes_never_meet_and_come_back_in_order():
    gate = Gate()
    with running({"gate": gate}, max_batch=8) as (url, _):
        bodies = [asking("gate", [grey(i, 8), grey(50 + i, 12), grey(100 + i, 8)]) for i in range(2)]
        answers = behind_the_gate(gate, url, bodies)
    assert [said["scores"] for _, said in answers] == [[i, 50 + i, 100 + i] for i in range(2)]
    assert gate.sizes == [1, 4, 2]


def test_a_request_larger_than_a_batch_is_scored_in_parts():
    gate = Gate()
    gate.open.set()
    with running({"gate": gate}, max_batch=4) as (url, _):
        assert ask(url, asking("gate", [grey(i) for i in range(10)]))[1]["scores"] == list(range(10))
    assert gate.sizes == [4, 4, 2]


def test_a_poisonous_request_fails_alone():
    gate = Gate()

    def reward(images, prompts):
        return picky(images, prompts) if gate.open.is_set() else gate(images, prompts)

    with running({"gate": reward}) as (url, _):
        bodies = [asking("gate", [grey(i), grey(i + 1)], ["fine", "poison" if i == 2 else "fine"]) for i in range(5)]
        answers = behind_the_gate(gate, url, bodies)
        assert ask(url, asking("gate", [grey(9)]))[1]["scores"] == [9]
    assert [status for status, _ in answers] == [200, 200, 422, 200, 200]
    assert answers[2][1]["error"].startswith("ValueError: no antidote known, at ")
    assert all(said["scores"] == [i, i + 1] for i, (status, said) in enumerate(answers) if status == 200)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (lambda images, prompts: torch.zeros(99), "want a tensor of shape [1]"),
        (lambda images, prompts: levels(images, prompts) / 0, "infinite"),
        (lambda images, prompts: sys.exit("bye"), "SystemExit: bye"),
    ],
)
def test_a_reward_that_misbehaves_is_told_and_the_next_request_is_served(reward, says):
    with running({"bad": reward, "levels": levels}) as (url, _):
        status, said = ask(url, asking("bad", [grey(1)]))
        assert status == 422 and says in said["error"]
        assert ask(url, asking("levels", [grey(1), grey(2)]))[0] == 200


def test_a_client_that_leaves_before_its_turn_is_not_scored():
    gate = Gate()
    with running({"gate": gate}) as (url, _), ThreadPoolExecutor() as pool:
        first = pool.submit(ask, url, asking("gate", [grey(1)], ["first"]))
        assert gate.entered.wait(20)
        body = json.dumps(asking("gate", [grey(2)], ["left"])).encode()
        waiting = lambda: ask(url, None, path="/health", method="GET")[1]["waiting_images"]  # noqa: E731
        with connected(url) as connection:
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            wait_until(lambda: waiting() == 2)
        wait_until(lambda: waiting() == 1)
        gate.open.set()
        assert first.result(20)[0] == 200
        assert ask(url, asking("gate", [grey(3)], ["stayed"]))[1]["scores"] == [3]
    assert gate.texts == ["first", "stayed"]


def test_a_full_server_says_when_to_come_back_and_takes_more_afterwards():
    gate = Gate()
    with running({"gate": gate}, limits=Limits(waiting=4)) as (url, _), ThreadPoolExecutor() as pool:
        first = pool.submit(ask, url, asking("gate", [grey(i) for i in range(3)]))
        assert gate.entered.wait(20)
        status, said = ask(url, asking("gate", [grey(1), grey(2)]))
        assert status == 503 and "waiting: 3 of at most" in said["error"]
        gate.open.set()
        assert first.result(20)[0] == 200
        assert ask(url, asking("gate", [grey(i) for i in range(6)]))[0] == 200  # more than `waiting`, to an empty server


def test_two_hundred_requests_at_once_are_all_answered_each_with_its_own_scores():
    with running({"levels": levels, "judged": judged}) as (url, _):
        bodies = [asking("levels", [grey(i), grey(255 - i)]) for i in range(200)]
        answers = in_threads([lambda body=body: ask(url, body) for body in bodies])
        text = ask(url, None, path="/metrics", method="GET")[1]
    assert [said["scores"] for _, said in answers] == [[i, 255 - i] for i in range(200)]
    assert 'flowtilt_requests_total{reward="levels",status="200"} 200' in text


def test_a_server_that_is_told_to_stop_finishes_what_it_has_taken():
    gate = Gate()
    with ThreadPoolExecutor() as pool, running({"gate": gate}, max_batch=2) as (url, server):
        asked = [pool.submit(ask, url, asking("gate", [grey(i), grey(i)])) for i in range(6)]
        wait_until(lambda: ask(url, None, path="/health", method="GET")[1]["waiting_images"] == 12)
        server.should_exit = True
        time.sleep(0.3)
        gate.open.set()
        assert [future.result(20)[1]["scores"] for future in asked] == [[i, i] for i in range(6)]


def test_metrics_count_requests_images_and_batches_and_tell_nothing_of_their_contents():
    with running({"picky": picky, "judged": judged}) as (url, _):
        ask(url, asking("picky", [grey(1), grey(2), b"broken"], ["a secret", "b", "c"]))
        ask(url, asking("picky", [grey(1)], ["poison"]))
        ask(url, asking("a secret", [grey(1)]))
        ask(url, b"a secret")
        status, text = ask(url, None, path="/metrics", method="GET")
    figures = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            figures[name] = float(value)
    assert status == 200 and "secret" not in text
    assert figures['flowtilt_requests_total{reward="picky",status="200"}'] == 1
    assert figures['flowtilt_requests_total{reward="picky",status="422"}'] == 1
    assert figures['flowtilt_requests_total{reward="",status="404"}'] == 1
    assert figures['flowtilt_requests_total{reward="",status="400"}'] == 1
    assert figures['flowtilt_images_total{reward="picky"}'] == 2
    assert figures['flowtilt_unreadable_images_total{reward="picky"}'] == 1
    assert figures["flowtilt_waiting_images"] == 0
    assert 0 < figures['flowtilt_scoring_seconds_total{reward="picky"}'] < 10
    assert figures['flowtilt_scoring_seconds_total{reward="judged"}'] == 0
    bounds = [figures[f'flowtilt_batch_images_bucket{{reward="picky",le="{le}"}}'] for le in ("1", "2", "256", "+Inf")]
    assert bounds == [0, 1, 1, 1]
    assert figures['flowtilt_batch_images_sum{reward="picky"}'] == 2 and figures['flowtilt_batch_images_count{reward="picky"}'] == 1
    assert all(math.isfinite(value) for value in figures.values())
