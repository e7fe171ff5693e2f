"""One server of OpenAI's chat completions: which model it has, what its requests may hold, and its answers."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from flowtilt.errors import UserError, printable
from flowtilt.io import threads
from flowtilt.io.notices import notice
from flowtilt.io.web import Refused, get_json, post_json
from flowtilt.rewards.judge.budget import Budget, Spent
from flowtilt.rewards.judge.kept import Kept, key_of
from flowtilt.rewards.judge.reading import Answer, tokens
from flowtilt.rewards.judge.wording import Part, picture, text
from flowtilt.rewards.serving.wire import key_for

KEY, HOST = "FLOWTILT_JUDGE_KEY", "FLOWTILT_JUDGE_HOST"
FIRST = 10.0
"""Seconds for which a server may be missing when a run starts."""
LOADING = 60.0
"""Seconds for which it may fail then; some load the model at the first question."""
TOP = 20
"""First tokens whose log-probabilities are asked for: the most that vLLM and OpenAI give."""
FEW = 5
MOST_TOKENS = 10**9
"""Of one request: more is no count."""


class Client:
    """Asks a model. `start` must come first.

    Args:
        name: what the recipe calls the reward, for messages.
        url: the address up to "/v1", with its scheme.
        model: the name under which the server has it; "" takes the only one that it has.
        logprobs: "auto" asks for them and does without where the server has none, "need" ends there, "off" does not ask.
        length: tokens of an answer without log-probabilities.
        timeout: seconds for one try.
        patience: seconds for which a failed request is tried again.

    Raises:
        UserError: a second server would get the key.
    """

    def __init__(self, name: str, url: str, model: str, *, logprobs: str, length: int, timeout: float, patience: float, budget: Budget):
        self.name, self.model = name, model
        self.url = url.strip().rstrip("/")
        self._key = key_for(self.url, KEY, HOST)
        self._timeout, self._patience, self._length = timeout, patience, length
        self._top, self._needs = (0 if logprobs == "off" else TOP), logprobs == "need"
        self._fields: dict[str, Any] = {"temperature": 0, "seed": 0}
        self._limit = "max_tokens"
        self.budget, self.kept = budget, Kept(name)
        self._counts_tokens = bool(budget.limits.max_tokens or budget.limits.max_cost)
        self._largest = Spent()
        self._lock, self._alone = threading.Lock(), threading.Lock()

    @property
    def gives_logprobs(self) -> bool:
        """Whether answers have log-probabilities, once `start` has found out."""
        return self._top > 0

    def start(self) -> None:
        """Finds the model, and by one question about a grey square what the server takes.

        Raises:
            UserError: the server can't be reached, has no such model, refuses pictures or the key, or has no log-probabilities though
                they are needed.
        """
        listed = self._listed()
        if not self.model:
            if len(listed) != 1:
                raise UserError(f"rewards.{self.name}: name the model; {self.url} serves {_some(listed)}")
            self.model = listed[0]
        elif listed and self.model not in listed and not os.path.isdir(self.model):  # `transformers serve` does not list folders
            raise UserError(f"rewards.{self.name}: {self.url} does not serve {self.model!r}; it serves {_some(listed)}")
        question = [picture(Image.new("RGB", (64, 64), "grey"), "png", 0), text("Is this a grey square? Answer yes or no.")]
        while True:
            try:
                reply = self._post(self._body(question), min(self._patience, LOADING))
                break
            except Refused as error:
                if error.status not in (400, 404, 422) or not self._give_way(str(error)):
                    raise self._explained(error) from None
            except UserError as error:
                raise UserError(f"rewards.{self.name}: {error}") from None
        answer = self._answer(reply)
        if self._top and not answer.first:
            self._without_logprobs()
        self.budget.settle(Spent(), Spent(1, answer.read, answer.written))
        if self._counts_tokens and not answer.read:
            raise UserError(
                f"rewards.{self.name}: {self.url} does not count tokens (usage), so max_tokens and max_cost can't be kept; set max_calls"
            )

    def ask(self, parts: Sequence[Part]) -> Answer:
        """The answer to one message, a kept one where the same was asked before.

        Raises:
            UserError: the server stays away for `patience` seconds, refuses, or the budget does not reach.
        """
        body = self._body(parts)
        key = key_of(body)
        if kept := self.kept.get(key):
            return kept
        with self._first_alone():
            answer = self._paid(body)
        self.kept.add(key, answer)
        return answer

    @contextmanager
    def _first_alone(self) -> Iterator[None]:
        """Where tokens are counted, the first request is alone: what it costs says what the others will."""
        if not self._counts_tokens or self._largest.calls:
            yield
            return
        with threads.waiting():
            self._alone.acquire()
        try:
            yield
        finally:
            self._alone.release()

    def _paid(self, body: dict[str, Any]) -> Answer:
        """The server's answer, within the budget."""
        # a longer caption may cost a little more than the largest request so far
        most = Spent(1, self._largest.read * 11 // 10, self._largest.written)
        self.budget.reserve(most)
        cost = None
        try:
            answer = self._answer(self._post(body, self._patience))
            cost = Spent(1, answer.read, answer.written)
        except Refused as error:
            raise self._explained(error) from None
        finally:
            self.budget.settle(most, cost)
        with self._lock:
            self._largest = Spent(1, max(self._largest.read, answer.read), max(self._largest.written, answer.written))
        return answer

    def _listed(self) -> list[str]:
        """The models that the server says it has; none where it has no list."""
        try:
            found = get_json(f"{self.url}/models", key=self._key, timeout=FIRST, patience=FIRST).get("data")
        except Refused as error:
            if error.status in (404, 405, 501):
                return []
            raise self._explained(error) from None
        except UserError as error:
            raise UserError(f"rewards.{self.name}: {error}; is the judge's server running there?") from None
        entries = found if isinstance(found, list) else []
        return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def _body(self, parts: Sequence[Part]) -> dict[str, Any]:
        asked = {"logprobs": True, "top_logprobs": self._top} if self._top else {}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": list(parts)}],
            **self._fields,
            self._limit: 1 if self._top else self._length,
            **asked,
        }

    def _post(self, body: dict[str, Any], patience: float) -> dict[str, Any]:
        return post_json(f"{self.url}/chat/completions", body, key=self._key, timeout=self._timeout, patience=patience, waiting=notice)

    def _give_way(self, refusal: str) -> bool:
        """Leaves out of requests what a refusal names, or else log-probabilities; false where nothing is left to leave out."""
        said = refusal.lower()
        if "max_completion_tokens" in said and self._limit == "max_tokens":
            self._limit = "max_completion_tokens"
            return True
        for field in [field for field in self._fields if field in said]:
            del self._fields[field]
            return True
        if not self._top or not ("logprob" in said or "model" not in said):
            return False
        if "top_logprobs" in said and self._top > FEW:
            self._top = FEW
        else:
            self._without_logprobs()
        return True

    def _without_logprobs(self) -> None:
        if self._needs:
            raise UserError(
                f"rewards.{self.name}: {self.url} gives no log-probabilities; serve the model with vLLM, SGLang or llama.cpp, "
                'or set logprobs = "auto"'
            )
        self._top = 0
        notice(f"rewards.{self.name}: {self.url} gives no log-probabilities; scores are from the words of the answers: yes 1, no 0")

    def _answer(self, reply: dict[str, Any]) -> Answer:
        """A chat completion, read.

        Raises:
            UserError: it is none.
        """
        try:
            choice = reply["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            shown = quoted(str(reply)[:200])
            raise UserError(f"rewards.{self.name}: {self.url} answers without choices[0].message.content: {shown}") from None
        usage = reply.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = (usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
        read, written = (count if isinstance(count, int) and 0 <= count <= MOST_TOKENS else 0 for count in counts)
        return Answer(
            content if isinstance(content, str) else "", _first_tokens(choice.get("logprobs")) if self._top else None, read, written
        )

    def _explained(self, error: Refused) -> UserError:
        more = ""
        if error.status in (401, 403):
            more = f"; {'correct' if self._key else 'set'} {KEY}"
        return UserError(f"rewards.{self.name}: {error}{more}")


def quoted(answer: str, length: int = 100) -> str:
    """An answer's beginning, in one line and in quotes."""
    words = printable(" ".join(answer.split()))
    return f'"{words[:length]}{"…" if len(words) > length else ""}"'


def _first_tokens(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """The first token's alternatives in a choice's `logprobs`; () where they are not there."""
    try:
        return tokens([(entry["token"], entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"]]) or ()
    except (LookupError, TypeError):
        return ()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(" ".join(name.split()))[:80] for name in names[:5])
    return (shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
