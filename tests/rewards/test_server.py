"""Every request to a reward server is answered: with scores, or with one line that says why not."""

import contextlib
import random
import socket
import subprocess
import sys
import time
import zlib
from io import BytesIO

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from PIL import Image
from reward_servers import ask, asking, connected, grey, judged, levels, picky, running, wait_until

from flowtilt.errors import UserError
from flowtilt.io import listening
from flowtilt.io.images import to_pil, to_png
from flowtilt.rewards.serving import wire
from flowtilt.rewards.serving.server import serve
from flowtilt.rewards.serving.wire import Limits, key_from_environment, picture


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
        (b"[" + b"[]," * 66_000 + b"[]]", 413, "more than 131072 values"),
    ],
)
def test_a_bad_request_is_refused_with_one_line(url, body, status, says):
    answered, said = ask(url, body)
    assert answered == status
    assert says in said["error"] and "\n" not in said["error"]


def test_a_body_without_a_length_is_limited_as_it_comes(url):
    with connected(url) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
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
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


# who asks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_what_a_page_may_send_without_being_asked_is_refused(url, kind):
    status, said = ask(url, GOOD, **{"Content-Type": kind})
    assert status == 415 and "application/json" in said["error"]
    assert ask(url, GOOD, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


@pytest.mark.parametrize("path", ["/score", "/health", "/metrics"])
def test_pages_in_browsers_and_names_that_were_made_to_point_here_are_refused(path):
    with running({"levels": levels}, local=True) as (url, _):
        method, body = ("POST", GOOD) if path == "/score" else ("GET", None)
        assert ask(url, body, path=path, method=method, Origin="http://evil.example")[0] == 403
        for host in ("evil.example", "evil.example:80", "10.0.0.1", "127.0.0.1.evil.example", "["):
            assert ask(url, body, path=path, method=method, Host=host)[0] in (400, 403)
        for host in ("localhost:8765", "127.0.0.1", "[::1]:80"):
            assert ask(url, body, path=path, method=method, Host=host)[0] == 200


# connections -------------------------------------------------------------------------------------------


def test_who_sends_no_whole_headers_is_let_go_and_who_waits_for_a_score_is_not(monkeypatch):
    monkeypatch.setattr(listening, "IDLE", 0.3)

    def slow(images, prompts):
        time.sleep(1)
        return levels(images, prompts)

    with running({"slow": slow}) as (url, _), connected(url) as idle, connected(url) as begun, connected(url) as again:
        begun.sendall(b"POST /score HTTP/1.1\r\nHost:")
        again.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /hea")
        assert ask(url, asking("slow", [grey(1)]))[0] == 200
        for connection in (idle, begun):
            connection.settimeout(5)
            assert connection.recv(100) == b""
        while again.recv(1000):
            pass


def test_slow_bodies_keep_nobody_waiting():
    with running({"levels": levels}) as (url, _), contextlib.ExitStack() as slow:
        for _ in range(20):
            connection = slow.enter_context(connected(url))
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        assert ask(url, GOOD)[0] == 200
        assert time.monotonic() - began < 10


def test_bodies_that_are_held_together_have_a_limit_and_one_alone_has_not():
    with running({"levels": levels}, limits=Limits(held=5000)) as (url, _), connected(url) as other:
        assert ask(url, asking("levels", [torch.rand(3, 64, 64)]))[0] == 200
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
        other.sendall(head + b" " * 4000)
        wait_until(lambda: ask(url, asking("levels", [torch.rand(3, 64, 64)]))[0] == 503)
        other.close()
        wait_until(lambda: ask(url, asking("levels", [torch.rand(3, 64, 64)]))[0] == 200)


FULL = """
import resource, socket, sys, threading, time
from flowtilt.io import listening
from flowtilt.rewards.serving import wire
from flowtilt.rewards.serving.server import serve
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
def clients(line):
    if line.startswith("serving"):
        port = int(line.rpartition(":")[2].strip('"'))
        print(port, flush=True)
serve({"jpeg_compressibility": {}}, port=0, tell=clients)
"""


def test_at_the_limit_of_files_one_line_is_logged():
    with subprocess.Popen([sys.executable, "-c", FULL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        port = int(process.stdout.readline())
        taken = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        time.sleep(1.5)
        for connection in taken:
            connection.close()
        wait_until(lambda: ask(f"http://127.0.0.1:{port}", None, path="/health", method="GET")[0] == 200)
        process.terminate()
        said = process.stderr.read().splitlines()
    assert len(said) == 1 and "no more connections can be taken" in said[0] and process.returncode == 0


def test_it_says_that_it_serves_once_it_does():
    def told(line):
        if line.startswith("serving"):
            place = line.rpartition("http://")[2].strip('"')
            socket.create_connection(place.split(":"), timeout=5).close()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve({"jpeg_compressibility": {}}, port=0, tell=told)


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
    for name in ("rewards.serving.server", "io.listening"):
        monkeypatch.delitem(sys.modules, f"flowtilt.{name}")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs uvicorn: pip install starlette uvicorn"):
        import flowtilt.rewards.serving.server  # noqa: F401


# images ----------------------------------------------------------------------------------------------


def huge_png(side):
    """A few bytes that claim side x side pixels."""
    data = bytearray(to_png(grey(1)))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch):
    def decodes(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(wire, "read_image", decodes)
    assert picture(huge_png(4097), Limits().picture) == (None, "image can't be read: 4097 x 4097 pixels are too many, at most 16777216")


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
