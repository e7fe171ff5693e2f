"""`python -m flowtilt.playground.judge`: a judge to try the reward "judge" with, which looks at playground images with the verifier.

It speaks OpenAI's chat completions as a vision-language model's server does: /v1/models and /v1/chat/completions, with
log-probabilities. It answers what `rewards.judge` asks, about the caption that stands in double quotes.
"""

import argparse
import json
import math
import re
import sys
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.addresses import taken
from flowtilt.io.images import read_image
from flowtilt.playground import verify, world
from flowtilt.prompts import Prompt

MODEL = "playground"
MOST = 2**24
"""Bytes of a request."""
SURE = 1e-4
"""The least probability of either answer."""


def look(images: Sequence[Tensor], caption: str) -> list[float]:
    """The verifier's scores of images, mean of strict and partial; 0 where the caption is not in the playground's grammar."""
    try:
        world.parse(caption)
    except UserError:
        return [0.0] * len(images)
    verdicts = verify.judge(torch.stack(list(images)), [Prompt(caption)] * len(images))
    return [(verdict.strict + verdict.partial) / 2 for verdict in verdicts]


def answer(question: str, images: Sequence[Tensor]) -> dict[str, float] | str:
    """What the judge says: probabilities of the first word, or a text."""
    quoted = re.findall(r'"(?:[^"\\]|\\.)*"', question)
    scores = look(images, json.loads(quoted[-1]) if quoted else "")
    if "Answer yes or no" in question:
        return _two("Yes", "No", scores[0])
    if "Answer 1 or 2" in question and len(scores) == 2:
        return _two("1", "2", 0.5 + (scores[0] - scores[1]) / 2)
    if limits := re.search(r"one number from (\S+) to (\S+)", question):
        low, high = map(float, limits.groups())
        return f"{low + (high - low) * scores[0]:.3g}"
    return "I only judge pictures of the playground."


def _two(one: str, other: str, share: float) -> dict[str, float]:
    share = min(max(share, SURE), 1 - SURE)
    return {one: share, other: 1 - share}


def completion(request: dict[str, Any]) -> dict[str, Any]:
    """The chat completion for a request."""
    parts = request["messages"][-1]["content"]
    images = [read_image(b64decode(part["image_url"]["url"].partition(",")[2])) for part in parts if part["type"] == "image_url"]
    said = answer("\n".join(part["text"] for part in parts if part["type"] == "text"), images)
    likely = sorted(said.items(), key=lambda pair: -pair[1]) if isinstance(said, dict) else []
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": likely[0][0] if likely else said}}
    if request.get("logprobs") and likely:
        tops = [{"token": token, "logprob": math.log(share)} for token, share in likely]
        choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
    usage = {"prompt_tokens": 64 * len(images) + 64, "completion_tokens": 1}
    return {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        found = self.path.rstrip("/").endswith("/models")
        self._send(
            200 if found else 404, {"object": "list", "data": [{"id": MODEL, "object": "model"}]} if found else {"error": "not found"}
        )

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if not self.path.endswith("/chat/completions") or not 0 < length <= MOST:
            return self._send(404, {"error": "want /v1/chat/completions"})
        try:
            self._send(200, completion(json.loads(self.rfile.read(length))))
        except (ValueError, KeyError, TypeError, IndexError, UserError) as error:
            self._send(400, {"error": f"not a request that this judge can read: {error}"})

    def _send(self, status: int, reply: dict[str, Any]) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each image would be all that is seen."""


class Server(ThreadingHTTPServer):
    """Many clients at once may wait to be heard."""

    daemon_threads = True
    request_queue_size = 64


def server(port: int) -> Server:
    """The judge at a port of this machine, 0 taking a free one; `serve_forever` starts it."""
    return Server(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="A judge of playground images at http://127.0.0.1:PORT/v1, for the reward `judge`.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    port = parser.parse_args().port
    try:
        found = server(port)
    except (OSError, OverflowError) as error:
        print(f"flowtilt: {taken('127.0.0.1', port, 'judge', error)}", file=sys.stderr)
        sys.exit(2)
    print(f"judging at http://127.0.0.1:{found.server_port}/v1", flush=True)
    with suppress(KeyboardInterrupt):
        found.serve_forever()


if __name__ == "__main__":
    main()
