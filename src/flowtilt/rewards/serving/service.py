"""The ASGI application of a reward server; `wire` has what is said.

POST /score needs the key. GET /health and GET /metrics need none, wherever the server listens: they tell
names, versions and counts, nothing of any request.
"""

import asyncio
import hmac
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import flowtilt
from flowtilt.errors import UserError
from flowtilt.io.addresses import THIS_MACHINE, host_of
from flowtilt.io.user_errors import describe_error
from flowtilt.rewards import Reward, RewardOutput
from flowtilt.rewards.serving.batching import Batcher
from flowtilt.rewards.serving.prometheus import Metrics
from flowtilt.rewards.serving.wire import KEY, Limits, Refusal, answer, picture, read_request
from flowtilt.rewards.versions import versions_of

log = logging.getLogger("flowtilt")
READERS = 8
"""Requests that are parsed and decoded at a time, which bounds the memory they take."""


def app(
    rewards: Mapping[str, Reward],
    *,
    key: str | None = None,
    max_batch: int = 32,
    linger: float = 0.005,
    limits: Limits | None = None,
    local: bool = False,
) -> ASGIApp:
    """The ASGI application for rewards that are loaded; its thread starts and ends with the application's lifespan.

    Args:
        local: answers only requests to this machine's own names. A page in a browser on this machine can reach it under a name
            of the page's own, which it makes point here.
    """
    service = _Service(rewards, key, max_batch, linger, limits or Limits())
    starlette = Starlette(
        routes=[
            Route("/score", service.post_score, methods=["POST"]),
            Route("/health", service.get_health),
            Route("/metrics", service.get_metrics),
        ],
        lifespan=service.lifespan,
    )

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        why = _stranger(Headers(scope=scope), local) if scope["type"] == "http" else ""
        await (_json({"error": why}, 403) if why else starlette)(scope, receive, send)

    return door


def _stranger(headers: Headers, local: bool) -> str:
    """Why a request is not from a program that was told this address; "" where it may be."""
    if "origin" in headers:
        return "pages in browsers are not served"
    host = headers.get("host", "localhost")
    if local and host_of(f"//{host}") != THIS_MACHINE:
        return f"without {KEY} only this machine is served, as http://127.0.0.1 or http://localhost, not as {host[:100]!r}"
    return ""


class _Service:
    """The state behind the three addresses; everything but decoding and scoring happens on the event loop's thread."""

    def __init__(self, rewards: Mapping[str, Reward], key: str | None, max_batch: int, linger: float, limits: Limits):
        self.rewards, self.key, self.limits = rewards, key, limits
        self.max_batch, self.linger = max_batch, linger
        versions = versions_of(rewards)
        self.versions = {name: {"flowtilt": flowtilt.__version__, "reward": name, **versions[name]} for name in rewards}
        self.metrics = Metrics(rewards)
        self.images = self.pixels = self.held = 0

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.readers = asyncio.Semaphore(READERS)
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        self.batcher = Batcher(self.rewards, max_batch=self.max_batch, linger=self.linger, measured=self.metrics.scored)
        try:
            yield
        finally:
            self.batcher.close()
            self.decoders.shutdown()

    async def get_health(self, _: Request) -> Response:
        return _json({"status": "ok", "rewards": self.versions, "waiting_images": self.images, "queued_images": self.batcher.queued})

    async def get_metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.images), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def post_score(self, request: Request) -> Response:
        named: list[str] = []
        try:
            response, status = _json(await self._score(request, named)), "200"
        except Refusal as refusal:
            response, status = _json({"error": refusal.line}, refusal.status), str(refusal.status)
            if refusal.status == 422:
                log.error("reward %s failed: %s", "".join(named), refusal.line)
        except ClientDisconnect:
            response, status = Response(), "gone"
        self.metrics.answered("".join(named), status)
        return response

    async def _score(self, request: Request, named: list[str]) -> dict[str, Any]:
        """The answer; `named` gets the reward's name as soon as it is known to be one."""
        loop = asyncio.get_running_loop()
        if not self._knows_key(request):
            await self._discard(request.stream())
            raise Refusal(401, f"wrong or missing key; set {KEY} to the server's")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            await self._discard(request.stream())
            raise Refusal(415, 'the body must be JSON, with the header "Content-Type: application/json"')
        with ExitStack() as counted, ExitStack() as held:
            body = await self._body(request, held)  # outside of the readers: who sends slowly keeps nobody else waiting
            async with self.readers:
                asked = await loop.run_in_executor(self.decoders, read_request, body, self.rewards, self.limits)
                named.append(asked.reward)
                counted.enter_context(self._room(len(asked.files), asked.pixels))
                decoded = await loop.run_in_executor(
                    self.decoders, lambda files: [picture(file, self.limits.picture) for file in files], asked.files
                )
            reward, prompts = asked.reward, asked.prompts
            del body, asked  # the files are not needed while the images wait
            held.close()
            images = {i: image for i, (image, _) in enumerate(decoded) if image is not None}
            notes = [note for _, note in decoded]
            del decoded
            self.metrics.unreadable(reward, len(notes) - len(images))
            output = RewardOutput(torch.empty(0))
            if images:
                future = self.batcher.submit(reward, list(images.values()), [prompts[i] for i in images])
                output = await _unless_gone(request, future)
            return answer(_spread(output, list(images), notes), self.versions[reward])

    @contextmanager
    def _room(self, images: int, pixels: int) -> Iterator[None]:
        """Counts a request's images as waiting."""
        # an empty server takes whatever a request may be
        if self.images and (self.images + images > self.limits.waiting or self.pixels + pixels > self.limits.waiting_pixels):
            raise Refusal(503, f"waiting: {self.images} of at most {self.limits.waiting} images; try again later")
        self.images += images
        self.pixels += pixels
        try:
            yield
        finally:
            self.images -= images
            self.pixels -= pixels

    async def _body(self, request: Request, held: ExitStack) -> bytearray:
        """All of it, counted as held until `held` is closed."""
        body, stream = bytearray(), request.stream()

        def release() -> None:
            self.held -= len(body)
            body.clear()

        held.callback(release)
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in stream:
                    if len(body) + len(chunk) > self.limits.body:
                        refusal = Refusal(413, f"the body is larger than {self.limits.body} bytes; send fewer images (images_per_request)")
                        break
                    # an empty server takes whatever a request may be
                    if self.held > len(body) and self.held + len(chunk) > self.limits.held:
                        refusal = Refusal(503, f"receiving: {self.held} of at most {self.limits.held} bytes; try again later")
                        break
                    body += chunk
                    self.held += len(chunk)
                else:
                    return body
        except TimeoutError:
            raise Refusal(408, f"the body took longer than {self.limits.seconds:.0f} s") from None
        release()
        await self._discard(stream)
        raise refusal

    async def _discard(self, stream: AsyncIterator[bytes]) -> None:
        """Reads what is left of a refused body, as much as may be sent otherwise.

        Closing while a client still sends would reset the connection, and it would not get to see why.
        """
        left = self.limits.body
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in stream:
                    left -= len(chunk)
                    if left < 0:
                        return

    def _knows_key(self, request: Request) -> bool:
        if not self.key:
            return True
        return hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {self.key}".encode())


async def _unless_gone(request: Request, future: Future[RewardOutput]) -> RewardOutput:
    """A job's output. Where the client leaves before its turn the job is taken back: a client that tries again would double it.

    Raises:
        Refusal: 422 with the reward's own error.
    """
    judged = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(request.receive())  # after the body only a disconnect is left to receive
    try:
        await asyncio.wait({judged, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not judged.done():
            raise ClientDisconnect
        return judged.result()
    except ClientDisconnect:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error  # `score` names a reward and a prompt
        raise Refusal(422, describe_error(cause)) from None
    finally:
        gone.cancel()
        future.cancel()


def _spread(output: RewardOutput, rows: list[int], notes: list[str]) -> RewardOutput:
    """Output of the images `rows` among all that were sent; the others keep NaN and their note."""

    def over_all(values: torch.Tensor) -> torch.Tensor:
        full = torch.full((len(notes),), torch.nan)
        full[rows] = values
        return full

    for i, note in zip(rows, output.notes, strict=True):
        notes[i] = note
    return RewardOutput(over_all(output.scores), notes, {name: over_all(values) for name, values in output.details.items()})


def _json(content: Mapping[str, Any], status: int = 200) -> Response:
    # all ASCII: notes may quote prompts with halves of surrogate pairs, which UTF-8 can't hold
    text = json.dumps(content, allow_nan=False)
    return Response(text, status, {"Retry-After": "1"} if status == 503 else None, "application/json")
