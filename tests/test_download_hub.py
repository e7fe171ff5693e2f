"""Files of the hub: where they come to, and that each is what the hub tells."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_download import CONTENT, SHA256

from flowtilt.errors import UserError
from flowtilt.io.download import fetch_hub, wrong

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": CONTENT, "vocab.json": b"[]"}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as huggingface_hub asks for: what a commit's files are, and the files."""

    content: dict[str, bytes] = FILES

    def do_POST(self) -> None:
        from urllib.parse import parse_qs

        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert self.path == f"/api/models/owner/name/paths-info/{COMMIT}"
        paths = parse_qs(body)["paths"]
        self.answer(json.dumps([self.info(name) for name in paths if name in FILES]).encode())

    def info(self, name: str) -> dict:
        data = FILES[name]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        info = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name.endswith(".safetensors"):
            info["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return info

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name not in self.content or COMMIT not in self.path:
            return self.send_error(404)
        etag = hashlib.sha256(FILES[name]).hexdigest()
        return self.answer(self.content[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, body: bytes, headers: dict | None = None) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    """A hub of one repository at the address that huggingface_hub believes in; gives the cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield tmp_path / "cache"
        server.shutdown()


def test_hub_files_come_into_the_hubs_own_cache_where_it_finds_them(hub):
    from huggingface_hub import try_to_load_from_cache

    paths = fetch_hub("owner/name", COMMIT, list(FILES))
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert all(str(path) == try_to_load_from_cache("owner/name", path.name, revision=COMMIT) for path in paths)


def test_hub_files_come_into_a_folder_that_is_named(hub, tmp_path):
    paths = fetch_hub("owner/name", COMMIT, list(FILES), to=tmp_path / "here")
    assert paths == [tmp_path / "here" / name for name in FILES] and not hub.exists()


def test_a_file_that_the_commit_lacks_is_left_out_unless_it_is_one_of_the_first_two(hub):
    paths = fetch_hub("owner/name", COMMIT, ["config.json", "vocab.json", "special_tokens_map.json"])
    assert [path.name for path in paths] == ["config.json", "vocab.json"]
    with pytest.raises(UserError, match=r"owner/name: no none\.bin in revision 0123456789ab"):
        fetch_hub("owner/name", COMMIT, ["config.json", "none.bin"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("to", [True, False])
def test_a_hub_file_of_other_content_is_an_error_and_is_removed(hub, tmp_path, monkeypatch, name, to):
    """Of the right length, which is all that the hub's library looks at."""
    monkeypatch.setattr(Hub, "content", FILES | {name: b"x" * len(FILES[name])})
    target = tmp_path / "here" if to else None
    with pytest.raises(UserError, match=f"{name} is damaged: .* expected ") as caught:
        fetch_hub("owner/name", COMMIT, list(FILES), to=target)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Hub, "content", FILES)
    assert [path.read_bytes() for path in fetch_hub("owner/name", COMMIT, list(FILES), to=target)] == list(FILES.values())


def test_a_hub_that_refuses_or_cannot_be_reached_is_one_line(hub, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(UserError, match=r"hub repository owner/other: .*check the network") as refused:
        fetch_hub("owner/other", COMMIT, ["config.json"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"hub repository owner/name: .*check the network") as unreachable:
        fetch_hub("owner/name", COMMIT, ["config.json"])
    assert "\n" not in str(refused.value) + str(unreachable.value)


def test_sums_are_compared_whole_or_by_their_beginning(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert not wrong(tmp_path / "file", sha256=SHA256[:8], size=len(CONTENT))
    assert "SHA-256" in wrong(tmp_path / "file", sha256=SHA256[1:9])
    assert wrong(tmp_path / "file", size=1) == f"{len(CONTENT)} bytes, expected 1"
