"""Reward servers on ports of their own, for tests."""

import http.client
import json
import logging
import socket
import threading
import time
from base64 import b64encode
from contextlib import contextmanager
from typing import Any

import torch

from flowtilt.io.images import to_png
from flowtilt.io.listening import Server
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.serving.service import app


@contextmanager
def running(rewards, **options):
    """The address of a server in a thread, and the server; it is shut down in the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app(rewards, **options), log_level="error")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    port = listener.getsockname()[1]
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def logged(level):
    """What flowtilt's servers and their clients log in the meantime, line by line."""
    lines, logger = [], logging.getLogger("flowtilt")
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def ask(url, body, key=None, path="/score", method="POST", **more) -> tuple[int, Any]:
    """Status and JSON (or text) of one request with `more` headers; `body` is JSON unless it is bytes."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    # as urllib: a server that closes before it has read everything resets the connection
    headers = {"Connection": "close", "Content-Type": "application/json", **more} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    try:
        return answer.status, json.loads(text)
    except json.JSONDecodeError:
        return answer.status, text


def connected(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)


def asking(reward, images, texts=None):
    """The body for images [3, H, W], or files where they are bytes."""
    files = [image if isinstance(image, bytes) else to_png(image) for image in images]
    texts = texts or [f"prompt {i}" for i in range(len(files))]
    prompts = [{"text": text, "tag": "", "metadata": {}} for text in texts]
    return {"reward": reward, "images": [b64encode(file).decode() for file in files], "prompts": prompts}


def grey(level, size=8):
    """[3, size, size] of one 8-bit level."""
    return torch.full((3, size, size), level / 255)


def levels(images, prompts):
    """A reward: the level of each image."""
    return images[:, 0, 0, 0] * 255


def prompt(text="a", **more):
    return Prompt(text, **more)


def picky(images, prompts):
    if any(p.text == "poison" for p in prompts):
        raise ValueError("no antidote\nknown")
    return levels(images, prompts)


def judged(images, prompts):
    scores = levels(images, prompts)
    scores[scores == 7] = torch.nan
    return RewardOutput(scores, [f"saw {p.text} {p.tag} {p.metadata}" for p in prompts], {"half": scores / 2})
