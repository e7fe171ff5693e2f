"""A download is whole and right or it is an error in one line; what had come is not lost."""

import fcntl
import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowtilt.errors import UserError
from flowtilt.io import download
from flowtilt.io.download import blob_id, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = (0.0, 0.0)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any address, and misbehaves as it is told.

    Args:
        cut: bytes after which each answer's connection is closed.
        failures: statuses of the next answers.
        lie: added to the length that is told.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cut, self.lie, self.told = CONTENT, True, None, 0, True
        self.failures: list[int] = []
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.failures:
            return self.send_error(server.failures.pop(0))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return None
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.told:
            self.send_header("Content-Length", str(len(body) + server.lie))
        self.end_headers()
        self.wfile.write(body[: server.cut])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new" / "file.bin"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def refusal(url: str, path: Path, **expected) -> str:
    """The one line with which fetching fails; no file may be there then."""
    with pytest.raises(UserError) as caught:
        fetch(url, path, pauses=QUICK, **expected)
    assert "\n" not in str(caught.value) and not path.exists()
    return str(caught.value)


# what arrives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [{}, {"sha256": SHA256}, {"sha256": SHA256[:8]}, {"size": len(CONTENT)}])
def test_a_file_arrives_whole_and_alone(server, path, expected):
    assert fetch(server.url, path, **expected) == path
    assert path.read_bytes() == CONTENT and names(path.parent) == ["file.bin"]


def test_a_file_that_is_there_and_right_is_not_fetched_again(server, path):
    fetch(server.url, path, sha256=SHA256)
    fetch(server.url, path, sha256=SHA256, size=len(CONTENT))
    assert len(server.asked) == 1


def test_another_file_in_its_place_is_an_error_and_is_left_alone(server, path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{path} is there but is not the published file: 4 bytes, expected {len(CONTENT)}"):
        fetch(server.url, path, size=len(CONTENT))
    assert path.read_bytes() == b"mine" and not server.asked


def test_the_blob_id_is_the_one_that_git_gives(tmp_path):
    """`printf 'hello\\n' | git hash-object --stdin`, and the id of the empty blob, which every Git knows."""
    (tmp_path / "hello").write_bytes(b"hello\n")
    (tmp_path / "empty").write_bytes(b"")
    assert blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert blob_id(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_a_length_that_is_not_told_is_no_hindrance(server, path):
    server.told = False
    assert fetch(server.url, path, sha256=SHA256).read_bytes() == CONTENT


# cut connections -------------------------------------------------------------------------------------


def test_a_cut_connection_is_gone_on_with_where_it_was_cut(server, path):
    server.cut = 400_000
    assert fetch(server.url, path, sha256=SHA256, pauses=QUICK).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


def test_tries_are_counted_anew_as_long_as_bytes_come(server, path):
    server.cut = 100_000
    assert fetch(server.url, path, sha256=SHA256, pauses=(0.0,)).read_bytes() == CONTENT
    assert len(server.asked) == 11


def test_a_server_without_ranges_begins_again_until_it_gets_through(server, path):
    server.ranges, server.cut = False, 400_000
    assert "the connection was cut, 3 times" in refusal(server.url, path, sha256=SHA256)
    server.cut = None
    assert fetch(server.url, path, sha256=SHA256, pauses=QUICK).read_bytes() == CONTENT


def test_what_had_come_before_an_error_is_kept_for_the_next_call(server, path):
    server.cut = 400_000
    with pytest.raises(UserError):
        fetch(server.url, path, sha256=SHA256, pauses=())
    assert names(path.parent) == ["file.bin.part"]
    server.cut = None
    assert fetch(server.url, path, sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-"] and names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("length", [1000, len(CONTENT), len(CONTENT) + 1000])
@pytest.mark.parametrize("size", [None, len(CONTENT)])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_partial_file_of_something_else_is_thrown_away_and_fetched_anew(server, path, length, size, ranges):
    server.ranges = ranges
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(b"x" * length)
    assert fetch(server.url, path, sha256=SHA256, size=size, pauses=QUICK).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_partial_file_that_is_whole_is_not_fetched_again(server, path, size):
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(CONTENT)
    assert fetch(server.url, path, sha256=SHA256, size=size).read_bytes() == CONTENT
    assert server.asked == ([] if size else [f"bytes={len(CONTENT)}-"])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_may_change_is_asked_for_again(server, path, status):
    server.failures = [status, status]
    assert fetch(server.url, path, sha256=SHA256, pauses=QUICK).read_bytes() == CONTENT
    server.failures = [status] * 3
    path.unlink()
    assert f"the server answers {status}, 3 times" in refusal(server.url, path)
    assert names(path.parent) == []


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "words"), [(404, "not found (404)"), (403, "refused (403)"), (410, "not found (410)")])
def test_a_final_answer_is_one_line_at_once(server, path, status, words):
    server.failures = [status]
    assert refusal(server.url, path) == f"{server.url}: {words}"
    assert len(server.asked) == 1 and names(path.parent) == []


def test_no_network_is_one_line(server, path):
    server.shutdown()
    server.server_close()
    text = refusal(server.url, path)
    assert "refused" in text and "3 times; check the network" in text and names(path.parent) == []


def test_wrong_content_names_both_sums_and_is_removed(server, path):
    other = hashlib.sha256(b"other").hexdigest()
    text = refusal(server.url, path, sha256=other)
    assert SHA256 in text and other in text and server.url in text and names(path.parent) == []
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert f"expected {blob}" in refusal(server.url, path, git_blob=blob)


def test_wrong_content_is_not_fetched_over_and_over(server, path):
    """Only what an earlier call left is worth a second look."""
    refusal(server.url, path, sha256="0" * 64)
    assert len(server.asked) == 1
    path.with_name("file.bin.part").write_bytes(CONTENT[:1000])
    refusal(server.url, path, sha256="0" * 64)
    assert server.asked[1:] == ["bytes=1000-", None]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("off", [-1000, 1000])
def test_another_size_than_the_published_one_is_wrong_content(server, path, told, off):
    server.told = told
    text = refusal(server.url, path, size=len(CONTENT) + off)
    assert "wrong content" in text and str(len(CONTENT) + off) in text and names(path.parent) == []


def test_a_server_that_tells_a_wrong_length_is_found_out(server, path):
    server.lie, server.ranges = 10, False
    assert "cut" in refusal(server.url, path, sha256=SHA256)
    server.ranges = True  # now it says itself that no byte follows
    assert fetch(server.url, path, sha256=SHA256, pauses=QUICK).read_bytes() == CONTENT


def test_a_full_disk_is_one_line_and_what_had_come_is_kept(server, path, monkeypatch):
    room, whole = [100_000], Path.open

    class Full(download.FileIO):
        def write(self, data):
            if not room[0]:
                raise OSError(28, "No space left on device")
            room[0] -= (written := super().write(data[: room[0]]) or 0)
            return written

    monkeypatch.setattr(Path, "open", lambda self, mode="r", **how: Full(self, mode) if mode == "ab" else whole(self, mode, **how))
    text = refusal(server.url, path, sha256=SHA256)
    assert "can't write" in text and str(path) in text and "No space left" in text
    assert path.with_name("file.bin.part").read_bytes() == CONTENT[:100_000]


def test_a_disk_without_room_is_noticed_before_anything_comes(server, path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 500_000))
    assert "1 MB to come, 0 MB free" in refusal(server.url, path)


def test_a_folder_that_cannot_be_made_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write .*choose another folder"):
        fetch(server.url, tmp_path / "file" / "inside" / "file.bin")


# several at once -------------------------------------------------------------------------------------


def test_of_several_that_fetch_one_file_one_downloads(server, path):
    """Locks are of open files, so threads stand for processes here."""
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: fetch(server.url, path, sha256=SHA256), range(8))) == [path] * 8
    assert len(server.asked) == 1 and path.read_bytes() == CONTENT and names(path.parent) == ["file.bin"]


def test_when_one_of_several_fails_the_next_tries_for_itself(server, path):
    server.failures = [404, 404, 404]
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(fetch, server.url, path, sha256=SHA256) for _ in range(8)]
        failures = [result for result in results if result.exception()]
    assert len(failures) == 3 and len(server.asked) == 4 and path.read_bytes() == CONTENT and names(path.parent) == ["file.bin"]


def test_what_another_had_fetched_until_it_was_killed_is_gone_on_with(server, path):
    path.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with path.with_name("file.bin.part").open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            waiting = pool.submit(fetch, server.url, path, sha256=SHA256)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            other.write(CONTENT[:300_000])
        assert waiting.result(timeout=10).read_bytes() == CONTENT
    assert server.asked == ["bytes=300000-"]
