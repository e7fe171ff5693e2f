"""Every request to a reward server is answered: with scores, or with one line that says why not."""

import json
import math
import random
import socket
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from PIL import Image
from reward_servers import ask, asking, grey, levels, prompt, running, wait_until

from flowtilt.errors import UserError
from flowtilt.pictures import to_pil, to_png
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.batching import Batcher
from flowtilt.rewards.server import serve
from flowtilt.rewards.wire import Limits, key_from_environment, picture


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


def picky(images, prompts):
    if any(p.text == "poison" for p in prompts):
        raise ValueError("no antidote\nknown")
    return levels(images, prompts)


def judged(images, prompts):
    scores = levels(images, prompts)
    scores[scores == 7] = torch.nan
    return RewardOutput(scores, [f"saw {p.text} {p.tag} {p.metadata}" for p in prompts], {"half": scores / 2})


@pytest.fixture(scope="module")
def url():
    with running({"levels": levels, "judged": judged, "picky": picky}, limits=Limits(images=8, pixels=4096, body=200_000)) as (url, _):
        yield url


def test_scores_details_notes_and_versions_come_back_and_nan_is_null(url):
    body = asking("judged", [grey(10), grey(7)])
    body["prompts"] = [{"text": "a", "tag": "t", "metadata": {"include": [1]}}, {"text": "b"}]
    status, said = ask(url, body)
    assert status == 200
    assert said["scores"] == [10, None] and said["details"] == {"half": [5, None]}
    assert said["notes"] == ["saw a t {'include': [1]}", "saw b  {}"]
    assert said["version"]["reward"] == "judged" and said["version"]["flowtilt"]


def test_the_rewards_own_version_is_told():
    class Versioned:
        def __init__(self):
            self.version = {"weights": "v2"}

        def __call__(self, images, prompts):
            return levels(images, prompts)

    with running({"mine": Versioned()}) as (url, _):
        assert ask(url, asking("mine", [grey(1)]))[1]["version"]["version"] == {"weights": "v2"}
        health = ask(url, None, path="/health", method="GET")[1]
    assert health["rewards"]["mine"]["version"] == {"weights": "v2"} and health["waiting_images"] == 0


def test_no_images_get_no_scores(url):
    assert ask(url, asking("levels", []))[1]["scores"] == []


GOOD = asking("levels", [grey(1), grey(2)])


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe\x00", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ([], 400, "must be an object"),
        ({}, 400, '"reward" must be'),
        (GOOD | {"reward": None}, 400, '"reward" must be'),
        (GOOD | {"reward": ["levels"]}, 400, '"reward" must be'),
        (GOOD | {"reward": "levles"}, 404, "no reward 'levles' here; this server has levels, judged, picky"),
        (GOOD | {"reward": "\ud800"}, 404, "no reward"),
        (GOOD | {"images": "x"}, 400, "must be lists"),
        (GOOD | {"prompts": None}, 400, "must be lists"),
        (GOOD | {"prompts": [{"text": "a"}]}, 400, '"images" has 2 and "prompts" 1'),
        (GOOD | {"images": ["AA==", 3]}, 400, "images[1] must be a file in base64, not int"),
        (GOOD | {"images": ["AA==", "n o"]}, 400, "images[1] is not base64"),
        (GOOD | {"images": ["AA==", "ä"]}, 400, "images[1] is not base64"),
        (GOOD | {"prompts": ["a", "b"]}, 400, 'prompts[0] must be an object with a "text"'),
        (GOOD | {"prompts": [{"text": "a"}, {"text": 1}]}, 400, 'prompts[1] must be an object with a "text"'),
        (GOOD | {"prompts": [{"text": "a"}, {"text": "b", "tag": 1}]}, 400, 'prompts[1]: "tag"'),
        (GOOD | {"prompts": [{"text": "a"}, {"text": "b", "metadata": []}]}, 400, 'prompts[1]: "tag"'),
        (asking("levels", [grey(1)] * 9), 413, "9 images in a request; at most 8"),
        (asking("levels", [grey(1, 40)] * 3), 413, "pictures of 4800 pixels"),
        (b" " * 200_001, 413, "larger than 200000 bytes"),
    ],
)
def test_a_bad_request_is_refused_with_one_line(url, body, status, says):
    answered, said = ask(url, body)
    assert answered == status
    assert says in said["error"] and "\n" not in said["error"]


def connected(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)


def test_a_body_without_a_length_is_limited_as_it_comes(url):
    with connected(url) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(5):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_is_too_large_is_told_so_even_to_who_goes_on_sending():
    with running({"levels": levels}, limits=Limits(body=10_000_000)) as (url, _):
        status, said = ask(url, b" " * 19_000_000)
    assert status == 413 and "larger than 10000000 bytes" in said["error"]


def test_a_body_that_never_ends_is_given_up():
    with running({"levels": levels}, limits=Limits(seconds=0.2)) as (url, _), connected(url) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


# the key ---------------------------------------------------------------------------------------------


def test_only_the_key_gets_scores_and_anyone_the_counts():
    with running({"levels": levels}, key="s3cret") as (url, _):
        for wrong in (None, "other", "s3cre", "s3cret2", "ä"):
            status, said = ask(url, GOOD, key=wrong)
            assert status == 401 and "FLOWTILT_REWARD_KEY" in said["error"] and "s3cret" not in said["error"]
        assert ask(url, GOOD, key="s3cret") == ask(url, GOOD, key="s3cret")
        assert ask(url, GOOD, key="s3cret")[0] == 200
        assert ask(url, None, path="/health", method="GET")[0] == ask(url, None, path="/metrics", method="GET")[0] == 200


def test_a_wrong_key_is_told_even_to_who_sends_much():
    with running({"levels": levels}, key="s3cret") as (url, _):
        assert ask(url, b"x" * 20_000_000, key="wrong")[0] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.168.1.1", "::", "example.org"])
def test_without_a_key_only_this_machine_is_served(host):
    with pytest.raises(UserError, match="set FLOWTILT_REWARD_KEY"):
        serve({"no such reward": {}}, host=host, port=0)


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused(monkeypatch, key):
    monkeypatch.setenv("FLOWTILT_REWARD_KEY", key)
    with pytest.raises(UserError, match="openssl rand"):
        key_from_environment()


def test_a_port_in_use_and_missing_rewards_are_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UserError, match=r"in use.*--port"):
        serve({"playground": {}}, port=other.getsockname()[1])
    with pytest.raises(UserError, match="which rewards"):
        serve({})
    with pytest.raises(UserError, match="no reward 'genevall'; did you mean 'geneval'"):
        serve({"genevall": {}}, port=0)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "flowtilt.rewards.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs uvicorn: pip install 'flowtilt\[serve\]'"):
        import flowtilt.rewards.server  # noqa: F401


# images ----------------------------------------------------------------------------------------------


def huge_png(side):
    """A few bytes that claim side x side pixels."""
    data = bytearray(to_png(grey(1)))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "empty": b"",
    "text": b"not a picture",
    "cut": to_png(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)))[:1500],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n",
    "too large": huge_png(9_000),
    "bomb": huge_png(100_000),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_costs_only_its_own_score(url, bad):
    status, said = ask(url, asking("judged", [grey(10), BAD[bad], grey(20)]))
    assert status == 200 and said["scores"] == [10, None, 20] and said["details"]["half"] == [5, None, 10]
    assert said["notes"][1].startswith("image can't be read: ") and said["notes"][0].startswith("saw prompt 0")


def test_a_request_of_bad_images_alone_is_answered(url):
    status, said = ask(url, asking("judged", [b"", b"x"]))
    assert status == 200 and said["scores"] == [None, None] and all("can't be read" in note for note in said["notes"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_pictures_are_images_or_notes_and_never_errors(kind):
    rng = random.Random(0)
    buffer = BytesIO()
    to_pil(torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)))[0].save(buffer, kind)
    whole = buffer.getvalue()
    assert picture(whole)[0] is not None
    for _ in range(150):
        data = bytearray(whole[: rng.randrange(len(whole)) if rng.random() < 0.3 else None])
        for _ in range(rng.randrange(1, 6)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        image, note = picture(bytes(data))
        assert (image is None) == note.startswith("image can't be read: ")
        assert image is None or (len(image) == 3 and bool(((image >= 0) & (image <= 1)).all()))


def test_formats_that_start_programs_are_not_opened(monkeypatch):
    from PIL import EpsImagePlugin

    def ghostscript(*_, **__):
        raise AssertionError("started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    assert picture(buffer.getvalue()) == (None, "image can't be read: not one of PNG, JPEG, WEBP, GIF, BMP")


# batches ---------------------------------------------------------------------------------------------


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
        assert ask(url, GOOD)[0] == 200


def test_a_client_that_leaves_before_its_turn_is_not_scored():
    gate = Gate()
    with running({"gate": gate}) as (url, _), ThreadPoolExecutor() as pool:
        first = pool.submit(ask, url, asking("gate", [grey(1)], ["first"]))
        assert gate.entered.wait(20)
        body = json.dumps(asking("gate", [grey(2)], ["left"])).encode()
        waiting = lambda: ask(url, None, path="/health", method="GET")[1]["waiting_images"]  # noqa: E731
        with connected(url) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
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
