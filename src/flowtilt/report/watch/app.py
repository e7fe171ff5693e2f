"""The server of `flowtilt watch`: it reads files of runs, and runs and changes nothing.

/ is the page of the one run, or of all side by side; /3/ the page of the fourth. `version` beside a page changes when there
is more to show.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flowtilt.io.addresses import THIS_MACHINE, host_of
from flowtilt.io.locks import is_held
from flowtilt.io.run_folder import RunFolder, SamplesFolder
from flowtilt.report.document import document
from flowtilt.report.loading import load
from flowtilt.report.page import page
from flowtilt.report.watch.names import names_of
from flowtilt.report.watch.overview import Watched, overview


def app(folders: Sequence[Path], local: bool = True) -> ASGIApp:
    """The ASGI application.

    Args:
        folders: of runs; one that is not there yet is waited for.
        local: answers only requests to this machine's own names, which keeps out pages of elsewhere that point a name here.
    """
    pages = _Pages(folders)
    starlette = Starlette(
        routes=[
            Route("/", pages.first),
            Route("/version", pages.first_version),
            Route("/{place:int}", pages.without_slash),
            Route("/{place:int}/", pages.one),
            Route("/{place:int}/version", pages.one_version),
        ]
    )

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        host = next((value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"), "localhost")
        refused = scope["type"] == "http" and local and host_of(f"//{host}") != THIS_MACHINE
        refusal = PlainTextResponse("only http://127.0.0.1 and http://localhost are served; see flowtilt watch --host\n", 403)
        await (refusal if refused else starlette)(scope, receive, send)

    return door


class _Pages:
    """The endpoints; Starlette runs them on threads."""

    def __init__(self, folders: Sequence[Path]):
        self._folders, self._names = folders, names_of(folders)
        self._made: dict[int | None, tuple[str, str]] = {}  # place or none for all -> version, page

    def first(self, request: Request) -> Response:
        return self._answer(0 if len(self._folders) == 1 else None)

    def first_version(self, request: Request) -> Response:
        return PlainTextResponse(self._version(0 if len(self._folders) == 1 else None))

    def without_slash(self, request: Request) -> Response:
        return RedirectResponse(f"/{request.path_params['place']}/")

    def one(self, request: Request) -> Response:
        place = request.path_params["place"]
        return self._answer(place) if place < len(self._folders) else PlainTextResponse("there are fewer runs\n", 404)

    def one_version(self, request: Request) -> Response:
        place = request.path_params["place"]
        return PlainTextResponse(self._version(place) if place < len(self._folders) else "none")

    def _answer(self, place: int | None) -> Response:
        version = self._version(place)
        made = self._made.get(place)
        if made is None or made[0] != version:
            made = self._made[place] = version, self._page(place, version)
        return HTMLResponse(made[1], headers={"Cache-Control": "no-store"})

    def _page(self, place: int | None, version: str) -> str:
        if place is None:
            return overview(
                [Watched(name, load(f) if f.is_dir() else None) for name, f in zip(self._names, self._folders, strict=True)], version
            )
        folder = self._folders[place]
        return page(load(folder), version) if folder.is_dir() else _waiting(folder, version)

    def _version(self, place: int | None) -> str:
        chosen = self._folders if place is None else [self._folders[place]]
        return hashlib.sha256("\n".join(map(version_of, chosen)).encode()).hexdigest()[:16]


def version_of(folder: Path) -> str:
    """A text that changes when a run's page does: when a file changed, and when a trainer began or ended its work."""
    run = RunFolder(folder)
    files = [run.recipe, run.environment, run.summary, *(folder / name for name in RunFolder.logs())]
    with suppress(OSError):
        files += sorted(run.samples.glob(f"*/{SamplesFolder.index}"))
    return f"{folder} {is_held(folder)} " + " ".join(map(_stamp, files))


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "-"
    return f"{found.st_mtime_ns}.{found.st_size}"


def _waiting(folder: Path, version: str) -> str:
    body = f'<header><p class="about">flowtilt</p><h1>Waiting for {escape(str(folder))}</h1><p>There is no such folder yet.</p></header>'
    return document(f"waiting for {folder}", body, script="page.js", live={"version": version})
