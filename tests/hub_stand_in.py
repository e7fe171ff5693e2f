"""A Hugging Face hub on this machine: repositories are folders, and what is asked for is written down."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each a folder; those in `gated` refuse their files."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.refused: set[str] = set()
        self.sent: list[str] = []
        """Files that were sent, as owner/name/path."""

    def answer(self, request: Any) -> None:
        path = request.path.partition("?")[0].strip("/")
        words = path.split("/")
        api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if api else words[:2])
        if path == "api/whoami-v2":
            return _reply(request, json.dumps({"name": "somebody"}).encode())
        if name not in self.repositories:
            return _refuse(request, 404, "RepoNotFound")
        if api and words[4:] == ["auth-check"]:
            return _refuse(request, 403, "GatedRepo") if name in self.refused else _reply(request, b"{}")
        if api and words[4:5] == ["revision"] and words[5] not in ("main", COMMIT):
            return _refuse(request, 404, "RevisionNotFound")
        if api:
            return _reply(request, json.dumps(self.info(name)).encode())
        file = self.repositories[name] / "/".join(words[4:])
        if name in self.refused:
            return _refuse(request, 403, "GatedRepo")
        if not file.is_file():
            return _refuse(request, 404, "EntryNotFound")
        if request.command == "GET":
            self.sent.append("/".join([name, *words[4:]]))
        etag = hashlib.sha256(file.read_bytes()).hexdigest()
        return _reply(request, file.read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def info(self, name: str) -> dict[str, Any]:
        folder = self.repositories[name]
        files = [_file(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()]
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "gated": "auto" if name in self.gated else False, "tags": []}


def _file(folder: Path, file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    found = {"rfilename": str(file.relative_to(folder)), "size": len(data)}
    found["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if file.suffix == ".safetensors":
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return found


def _reply(request: Any, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(200)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _refuse(request: Any, status: int, code: str) -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", code)
    request.send_header("Content-Length", "0")
    request.end_headers()


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub at the address that huggingface_hub believes in; its cache is `folder`/cache."""
    from huggingface_hub import constants

    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        def do_HEAD(self) -> None:
            hub.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        patch.setenv("no_proxy", "*")
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        yield hub
        server.shutdown()
