"""`flowtilt serve-rewards`: one process that owns the reward models and answers over HTTP, see `service`.

There is no TLS: the key is sent in clear, so beyond a network of your own put a proxy or a tunnel in front.
"""

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from flowtilt.errors import UserError
from flowtilt.io.addresses import bound, in_url, is_loopback, taken
from flowtilt.rewards import load_reward
from flowtilt.rewards.serving.wire import HOST, KEY, PORT, Limits

try:
    from flowtilt.io.listening import Server
    from flowtilt.rewards.serving.service import app
except ModuleNotFoundError as error:
    raise UserError(f"serve-rewards needs {error.name}: pip install starlette uvicorn") from error

log = logging.getLogger("flowtilt")


def serve(
    rewards: Mapping[str, Mapping[str, Any]],
    *,
    host: str = HOST,
    port: int = PORT,
    key: str | None = None,
    device: torch.device | str = "cpu",
    max_batch: int = 32,
    limits: Limits | None = None,
    tell: Callable[[str], None] = log.info,
) -> None:
    """Loads rewards, then answers until SIGTERM or Ctrl-C, which let it finish what it has taken.

    Args:
        rewards: name = {"source": …, "options": {…}}, both optional; the source is the name where none is given.
        port: 0 takes a free one.
        key: what clients must send; `wire.key_from_environment`.
        max_batch: images of one call of a reward.
        tell: told a line before each reward is loaded, and one when the server listens.

    Raises:
        UserError: no key and a host that others can reach, the port is taken, or a reward can't be loaded.
    """
    if not rewards:
        raise UserError("serve-rewards: which rewards? name some, as in --rewards geneval,ocr")
    if not key and not is_loopback(host):
        raise UserError(f"serve-rewards: others could reach {host}: set {KEY} to a key, or leave --host at {HOST}")
    _raise_file_limit()
    with bound(host, port, "serve-rewards") as listener:
        loaded = {}
        for name, settings in rewards.items():
            tell(f"loading {name}")
            loaded[name] = load_reward(name, settings.get("source", name), device=device, options=settings.get("options"))
        port = listener.getsockname()[1]
        line = f'serving {", ".join(loaded)}; in a recipe: rewards.{next(iter(loaded), "NAME")} = "http://{in_url(host)}:{port}"'
        server = Server(app(loaded, key=key, max_batch=max_batch, limits=limits, local=not key), lambda: tell(line))
        # uvicorn raises the signal again once it has shut down; a server that was told to stop has not failed
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            server.run(sockets=[listener])
        except OSError as error:  # another one bound the same port and was first to listen
            raise taken(host, port, "serve-rewards", error) from None
        finally:
            signal.signal(signal.SIGTERM, before)


def _raise_file_limit() -> None:
    """A connection takes a descriptor; the usual soft limit is 1,024. Windows has no such limit."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
