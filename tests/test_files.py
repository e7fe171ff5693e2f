"""Whatever fails while a file or folder is written, the old one is still there, whole, and nothing else is."""

import ast
import errno
import hashlib
import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import flowtilt
from flowtilt.cli import main
from flowtilt.errors import UserError
from flowtilt.io.files import append_line, digest, disk_errors, read_lines, whole_folder, write_atomic, write_json
from flowtilt.io.images import to_png
from flowtilt.io.tensors import save_file


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.fixture(params=["fsync", "rename"])
def failing(request, monkeypatch):
    """The disk is full, noticed when the data is forced out or when the new file is to take its place."""
    monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "replace")}[request.param], full_disk)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused_in_one_line(caught: pytest.ExceptionInfo, path: Path) -> bool:
    text = str(caught.value)
    return str(path) in text and "No space left on device" in text and "\n" not in text


# one file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["ein Bär\n", b"\x00\xff\r\n", ""])
def test_what_is_written_is_what_is_read(tmp_path, data):
    path = tmp_path / "new" / "folder" / "file"
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(path.parent) == ["file"]


def test_writing_replaces_the_old_file(tmp_path):
    write_atomic(tmp_path / "file", "old and long")
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, failing):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError) as caught:
        write_atomic(path, "new")
    assert refused_in_one_line(caught, path)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_an_interruption_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write") as caught:
        write_atomic(tmp_path / "file" / "inside", "x")
    assert "\n" not in str(caught.value)


def test_json_is_written_whole_with_its_keys_in_order(tmp_path):
    value = {"z": 1, "a": [1.5, None, "Bär"]}
    write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and list(json.loads(text)) == ["z", "a"] and "Bär" in text


# a folder --------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_when_its_block_has_ended(tmp_path):
    path = tmp_path / "deep" / "step-1"
    with whole_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "x" and names(path.parent) == ["step-1"]


def test_a_folder_replaces_the_old_one_and_keeps_none_of_its_files(tmp_path):
    for name in ("old", "new"):
        with whole_folder(tmp_path / "step-1") as temporary:
            (temporary / name).write_text(name)
    assert names(tmp_path / "step-1") == ["new"] and names(tmp_path) == ["step-1"]


def old_folder(tmp_path: Path) -> Path:
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "file").write_text("old")
    return path


def attempt(path: Path) -> None:
    with whole_folder(path) as temporary:
        (temporary / "file").write_text("new")


def test_a_full_disk_leaves_the_old_folder_and_no_other(tmp_path, failing):
    path = old_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        attempt(path)
    assert refused_in_one_line(caught, path)
    assert (path / "file").read_text() == "old" and names(tmp_path) == ["step-1"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    """The one rename that fails is the second, when the old folder has already stepped aside."""
    path, rename, calls = old_folder(tmp_path), Path.replace, []

    def second_fails(self, target):
        calls.append(target)
        return full_disk() if len(calls) == 2 else rename(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(UserError) as caught:
        attempt(path)
    assert refused_in_one_line(caught, path)
    assert (path / "file").read_text() == "old" and names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_error_in_the_block_passes_as_it_is_and_leaves_the_old_folder(tmp_path, error):
    path = old_folder(tmp_path)
    with pytest.raises(error, match=r"^mine$"), whole_folder(path) as temporary:
        (temporary / "file").write_text("new")
        raise error("mine")
    assert (path / "file").read_text() == "old" and names(tmp_path) == ["step-1"]


def test_a_full_disk_in_the_block_is_one_line_and_leaves_the_old_folder(tmp_path):
    path = old_folder(tmp_path)
    with pytest.raises(UserError) as caught, whole_folder(path):
        full_disk()
    assert refused_in_one_line(caught, path)
    assert (path / "file").read_text() == "old" and names(tmp_path) == ["step-1"]


def test_safetensors_own_error_is_one_line_too(tmp_path):
    error = type("SafetensorError", (Exception,), {})
    with pytest.raises(UserError, match=r"can't write .*: I/O error: No space left"), disk_errors(tmp_path):
        raise error("I/O error: No space left")


# lines -----------------------------------------------------------------------------------------------


def test_lines_come_back_as_they_were_appended(tmp_path):
    records = [{"rollout": 1, "text": "Bär\n\u2028"}, {"rollout": 2, "values": [1, 2.5], "none": None}]
    for record in records:
        append_line(tmp_path / "m.jsonl", record)
    assert read_lines(tmp_path / "m.jsonl") == records


def test_numbers_that_json_has_not_become_null(tmp_path):
    append_line(tmp_path / "m.jsonl", {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail) == {"a": None, "b": None, "c": None, "d": 0.5}


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path):
    path = tmp_path / "m.jsonl"
    append_line(path, {"rollout": 1})
    append_line(path, {"rollout": 2, "reward/a": 0.25})
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read_lines(path) == [{"rollout": 1}]
    path.write_bytes(whole[:-1])  # only the line's end is missing
    assert len(read_lines(path)) == 2


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "m.jsonl") == []


def test_a_line_that_cannot_be_appended_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", full_disk)
    with pytest.raises(UserError) as caught:
        append_line(tmp_path / "m.jsonl", {"rollout": 1})
    assert refused_in_one_line(caught, tmp_path / "m.jsonl")


def test_the_digest_is_sha_256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 10000)
    assert digest(tmp_path / "file") == hashlib.sha256(b"abc" * 10000).hexdigest()


# what is no plain file, and file systems that lack something ----------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch, number):
    def folders_fail(file):
        if stat.S_ISDIR(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", folders_fail)
    write_atomic(tmp_path / "file", "new")
    with whole_folder(tmp_path / "step-1") as temporary:
        (temporary / "sub").mkdir()
    assert names(tmp_path) == ["file", "step-1"]


@pytest.mark.parametrize(("number", "said"), [(28, "free some"), (errno.EDQUOT, "free some"), (5, "choose"), (13, "permissions")])
def test_only_a_full_disk_is_to_be_emptied(tmp_path, number, said):
    with pytest.raises(UserError, match=said) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert ("free" in str(caught.value)) == ("free" in said)


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for target in ("there/file", "there/new"):
        (tmp_path / "there" / "file").write_text("old")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        write_atomic(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink() and (tmp_path / target).read_text() == "new"
    assert names(tmp_path) == ["link", "there"] and names(tmp_path / "there") == ["file", "new"]
    (tmp_path / "linked").symlink_to("there")
    with whole_folder(tmp_path / "linked") as temporary:
        (temporary / "inside").touch()
    assert (tmp_path / "linked").is_symlink() and names(tmp_path / "there") == ["inside"]


def test_a_fifo_and_a_device_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    write_atomic(tmp_path / "fifo", b"through")
    reader.join()
    assert read == [b"through"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    write_atomic(tmp_path / "null", "gone")
    assert (tmp_path / "null").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode) and names(tmp_path) == ["fifo", "null"]


def test_an_open_descriptor_keeps_what_is_in_its_file_and_standard_output_is_the_commands(tmp_path, capsysbinary):
    with (tmp_path / "log").open("wb", buffering=0) as file:
        file.write(b"before, ")
        write_atomic(Path(f"/dev/fd/{file.fileno()}"), b"after")
    assert (tmp_path / "log").read_bytes() == b"before, after"
    write_atomic(Path("/dev/stdout"), "a line\n")
    assert capsysbinary.readouterr().out == b"a line\n"


def test_scores_go_into_a_fifo_at_once(tmp_path):
    """A first, empty writing would end its reader."""
    (tmp_path / "0.png").write_bytes(to_png(torch.rand(3, 8, 8)))
    os.mkfifo(tmp_path / "scores")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "scores").read_text()))
    reader.start()
    assert main(["score", str(tmp_path / "0.png"), "--rewards", "jpeg_compressibility", "-o", str(tmp_path / "scores")]) == 0
    reader.join()
    assert json.loads(read[0])["scores"]["jpeg_compressibility"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_weights_have_the_permissions_of_other_files(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors", {"b": "ü", "a": "1"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == mode and names(tmp_path) == ["w.safetensors"]
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.zeros(3))
    with safe_open(tmp_path / "w.safetensors", "pt") as opened:
        assert opened.metadata() == {"a": "1", "b": "ü"}


def test_equal_tensors_give_equal_files(tmp_path):
    """safetensors orders what is beside the tensors anew each time."""
    tensors = {"b": torch.arange(4.0), "a": torch.arange(3)}
    written = set()
    for _ in range(8):
        save_file(tensors, tmp_path / "w.safetensors", {str(k): "x" for k in range(6)})
        written.add((tmp_path / "w.safetensors").read_bytes())
    assert len(written) == 1


def test_no_module_needs_what_windows_lacks_to_be_imported():
    """`cli.train` and the like are imported there; what only a POSIX system has is asked for where it is used."""
    for file in Path(flowtilt.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_bytes())
        found = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not {"fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog"} & set(found), file
