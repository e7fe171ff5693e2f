"""What a client takes from a server it can't trust: no redirect, not too much, not for too long, and nothing that moves a cursor."""

import contextlib
import socket
import threading
import time

import pytest
import torch
from reward_servers import prompt

from flowtilt.cli import main
from flowtilt.errors import UserError, printable
from flowtilt.io.web import Refused, post_json
from flowtilt.rewards.serving import wire
from flowtilt.rewards.serving.client import RemoteReward
from flowtilt.rewards.serving.wire import key_for, read_answer
from flowtilt.rewards.unifiedreward import UnifiedReward


@contextlib.contextmanager
def answering(*parts, pause=0.0):
    """A server that answers every request with these parts; its address and the requests."""
    listener = socket.create_server(("127.0.0.1", 0))
    heard, stopped = [], threading.Event()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            request = b""
            # closing before all is read would reset the connection
            while not request.endswith(b"}") and (part := connection.recv(65536)):
                request += part
            heard.append(request)
            for part in parts:
                connection.sendall(part)
                if stopped.wait(pause):
                    return

    def serve():
        while not stopped.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=answer, args=[listener.accept()[0]], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
    stopped.set()
    listener.close()


def head(status=200, **headers):
    return "\r\n".join([f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status):
    with answering(b"HTTP/1.1 200 OK\r\n\r\n{}") as (other, stolen), answering(head(status, Location=f"{other}/x")) as (url, heard):
        with pytest.raises(Refused, match=rf"redirects to {other}/x \({status}\), which is not followed"):
            post_json(url, {}, key="s3cret", timeout=20, patience=5)
        assert len(heard) == 1 and not stolen


def test_an_answer_without_end_is_cut_at_the_most():
    with answering(head(), *([b" " * 65536] * 1000)) as (url, _), pytest.raises(Refused, match="more than 100000 bytes"):
        post_json(url, {}, timeout=60, patience=5, most=100_000)


@pytest.mark.parametrize("start", [b"", head(), b"HTTP/1.1 200 OK\r\nX: "])
def test_a_drip_meets_the_deadline_of_the_whole_answer(start):
    with answering(start, *([b" "] * 1000), pause=0.1) as (url, _):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"no whole answer in 0\.5 s"):
            post_json(url, {}, timeout=0.5, patience=0)
        assert time.monotonic() - began < 5


def test_an_answer_that_is_cut_off_is_asked_for_again():
    with answering(head(**{"Content-Length": 10}), b'{"a": 1') as (url, heard), pytest.raises(UserError, match="cut off"):
        post_json(url, {}, timeout=20, patience=0.5)
    assert len(heard) > 1


NASTY = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eabc\r\x00"


@pytest.mark.parametrize("status", [200, 302, 401, 404, 503])
def test_a_servers_control_characters_stay_out_of_what_is_said(status, capsys, monkeypatch):
    monkeypatch.setattr("flowtilt.rewards.serving.client.FIRST_ANSWER_SECONDS", 0.1)
    body = ("{" + NASTY).encode()
    with answering(head(status, Location="http://x/\x1b[2J", **{"Content-Length": len(body)}) + body) as (url, _):
        assert main(["score", __file__.replace("test_web.py", ""), "--rewards", f"r={url}"]) == 2
        with pytest.raises(UserError) as caught:
            RemoteReward(url, "r")
    for said in (str(caught.value), capsys.readouterr().err):
        assert not any(c in said for c in "\x1b\x07\x9b\u202e\x00\r")


def test_what_is_printable_stays_as_it_is():
    assert printable("naïve 漢字 👩\u200d🎨\n\tx") == "naïve 漢字 👩\u200d🎨\n\tx"
    assert printable(NASTY) == "?[2J?]0;owned??31m?abc??"


def test_notes_and_details_of_an_answer_have_no_control_characters():
    said = {"scores": [1], "notes": [NASTY], "details": {"a": [1]}, "version": {}}
    assert read_answer(said, 1)[0].notes == [printable(NASTY)]
    for name in ("", "a\x1b[2J", "a\nb"):
        with pytest.raises(UserError, match="no name of a detail"):
            read_answer(said | {"details": {name: [1]}}, 1)
    with pytest.raises(UserError, match="too large"):
        read_answer(said | {"scores": [10**400]}, 1)


def test_the_key_goes_to_one_host(monkeypatch):
    monkeypatch.setattr(wire, "_given_to", {})
    monkeypatch.setenv("FLOWTILT_REWARD_KEY", "k")
    assert key_for("http://a.example:1") == key_for("https://a.example:2") == "k"
    with pytest.raises(UserError, match=r"FLOWTILT_REWARD_KEY would be sent to a\.example and b\.example; name in FLOWTILT_REWARD_HOST"):
        key_for("http://b.example")
    monkeypatch.setenv("FLOWTILT_REWARD_HOST", "b.example, 127.0.0.1,c.example:8765")
    assert [key_for(f"http://{host}") for host in ("a.example", "b.example", "localhost:1", "c.example", "x.b.example")] == [
        None,
        "k",
        "k",
        "k",
        None,
    ]


def test_a_server_that_is_not_named_gets_no_key_and_the_line_says_so(monkeypatch):
    monkeypatch.setenv("FLOWTILT_REWARD_KEY", "s3cret")
    monkeypatch.setenv("FLOWTILT_REWARD_HOST", "scores.example")
    with answering(head(401)) as (url, heard):
        with pytest.raises(UserError, match="FLOWTILT_REWARD_KEY was not sent, for FLOWTILT_REWARD_HOST does not name this server"):
            RemoteReward(url, "r")
        assert heard and b"s3cret" not in heard[0]


def test_unifiedrewards_key_goes_to_the_host_of_its_own_address(monkeypatch):
    monkeypatch.setenv("FLOWTILT_UNIFIEDREWARD_KEY", "s3cret")
    monkeypatch.setenv("FLOWTILT_UNIFIEDREWARD_URL", "http://mine.example/v1")
    with answering(head(400)) as (url, heard):
        with pytest.raises(UserError):
            UnifiedReward(server=f"{url}/v1", patience=0)(torch.zeros(1, 3, 8, 8), [prompt()])
        assert heard and b"s3cret" not in heard[0]
