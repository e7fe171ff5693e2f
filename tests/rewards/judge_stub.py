"""A server of chat completions that does what a test says, misdeeds included."""

import base64
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from local_server import LocalServer, send

from flowtilt.io.images import read_image


def likely(**tokens: float) -> dict[str, Any]:
    """An answer whose first token has these probabilities."""
    return {"tokens": tokens}


class Stub(LocalServer):
    """Answers with `say(question, images, request)`: a text, `likely(...)`, a status, or a function of the handler."""

    def __init__(self, say: Any = "Yes", models: list[str] | None = None):
        self.say: Callable[[str, list[torch.Tensor], dict], Any] = say if callable(say) else lambda *_: say
        self.models: Any = ["eye"] if models is None else models
        self.logprobs = True
        self.usage: dict[str, int] | None = {"prompt_tokens": 100, "completion_tokens": 1}
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        super().__init__()

    def listed(self, handler):
        self.headers.append(dict(handler.headers))
        found = self.models
        names = found if isinstance(found, list) else []
        send(handler, found if isinstance(found, int) else 200, {"data": [{"id": name} for name in names]})

    @property
    def asked(self) -> list[dict]:
        """The requests but for the one about a grey square."""
        return [request for request in self.requests if "grey square" not in question_of(request)]

    def answer(self, handler):
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
        images = [read_image(base64.b64decode(part["image_url"]["url"].partition(",")[2])) for part in parts_of(request, "image_url")]
        said = self.say(question_of(request), images, request)
        if callable(said):
            return said(handler)
        if isinstance(said, int):
            return send(handler, said, {"error": {"message": "trouble"}})
        if isinstance(said, tuple):
            return send(handler, said[0], said[1], **(said[2] if len(said) > 2 else {}))
        tokens = said["tokens"] if isinstance(said, dict) else {}
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": max(tokens, key=lambda t: tokens[t]) if tokens else said}}
        if tokens and self.logprobs and request.get("logprobs"):
            tops = [{"token": token, "logprob": math.log(share)} for token, share in tokens.items()]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        return send(handler, 200, {"choices": [choice]} | ({"usage": self.usage} if self.usage else {}))


def parts_of(request: dict, kind: str) -> list[dict]:
    return [part for part in request["messages"][0]["content"] if part["type"] == kind]


def question_of(request: dict) -> str:
    return "\n".join(part["text"] for part in parts_of(request, "text"))


@contextmanager
def stub(say: Any = "Yes", **more: Any) -> Iterator[Stub]:
    found = Stub(say, **more)
    try:
        yield found
    finally:
        found.close()
