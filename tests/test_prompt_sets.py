"""A named set is the published one, byte for byte, wherever it is loaded; its name never means a stray file."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from flowtilt.errors import UserError
from flowtilt.io.download import PAUSES, blob_id
from flowtilt.prompts import Prompt, load_prompts, sets
from flowtilt.prompts.sets import SETS, PromptSet, Source

LINES = [{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}, {"tag": "colors", "prompt": "a red dog"}]
METADATA = "".join(json.dumps(line) + "\n" for line in LINES)
STYLES = {"anime": ["a cat", "a dog"], "photo": ["a dog", "a cow"]}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def source(folder: Path, url: str, name: str, text: str, tag: str = "") -> Source:
    (folder / name).write_text(text)
    return Source(f"{url}/{name}", blob_id(folder / name), len(text), tag)


@pytest.fixture
def published(tmp_path, monkeypatch) -> Iterator[Path]:
    """Two sets on a server, "dogs" of one file and "styles" of two; gives the server's folder."""
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("FLOWTILT_PROMPTS", str(tmp_path / "prompts"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        dogs = [source(folder, url, "metadata.jsonl", METADATA)]
        styles = [source(folder, url, f"{style}.json", json.dumps(captions), style) for style, captions in STYLES.items()]
        monkeypatch.setattr(sets, "SETS", {"dogs": PromptSet("two dogs", dogs), "styles": PromptSet("two styles", styles)})
        yield folder
        server.shutdown()


# the list --------------------------------------------------------------------------------------------


def test_a_name_can_be_no_path():
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in SETS) and "playground" not in SETS


def test_every_file_is_pinned_to_a_commit_and_a_checksum():
    for found in SETS.values():
        for file in found.sources:
            assert re.search(r"/[0-9a-f]{40}/", file.url) and re.fullmatch(r"[0-9a-f]{40}", file.git_blob)
            assert Path(file.url).suffix in (".txt", ".json", ".jsonl")
    files = [file for name, found in SETS.items() for _, file in found.files(name)]
    assert len(set(files)) == len(files) and "geneval.jsonl" in files and "hpdv2-concept-art.json" in files


# loading ---------------------------------------------------------------------------------------------


def test_a_set_is_fetched_when_it_is_first_named_and_then_kept(published, tmp_path):
    prompts = sets.load("dogs")
    assert prompts == [Prompt("two dogs", "counting", {"include": LINES[0]["include"]}), Prompt("a red dog", "colors")]
    kept = tmp_path / "prompts" / "dogs.jsonl"
    assert [p.where for p in prompts] == [f"{kept}:1", f"{kept}:2"]
    (published / "metadata.jsonl").unlink()
    assert sets.load("dogs") == prompts == load_prompts(kept)


def test_a_set_of_several_files_is_tagged_by_file_and_holds_each_caption_once(published, tmp_path):
    assert [(p.text, p.tag) for p in sets.load("styles")] == [("a cat", "anime"), ("a dog", "anime"), ("a cow", "photo")]
    assert sorted(path.name for path in (tmp_path / "prompts").iterdir()) == ["styles-anime.json", "styles-photo.json"]


def test_a_set_goes_into_flowtilts_cache_or_a_folder_that_is_named(published, tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWTILT_PROMPTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets.load("dogs")
    assert (tmp_path / "cache" / "flowtilt" / "prompts" / "dogs.jsonl").read_text() == METADATA
    assert sets.download("dogs", tmp_path / "here") == [tmp_path / "here" / "dogs.jsonl"]


@pytest.mark.parametrize("inside", ["mine.txt", "./dogs", "sub/dogs", "dogs."])
def test_what_has_a_slash_or_a_dot_is_a_path(published, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    Path(inside).write_text("mine\n")
    assert sets.load(inside) == sets.load(Path(inside)) == sets.load(str(tmp_path / inside)) == [Prompt("mine")]


def test_a_file_that_is_called_like_a_set_does_not_take_its_place(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dogs").write_text("mine\n")
    assert sets.load("dogs")[0].text == "two dogs"
    assert sets.load(Path("dogs")) == [Prompt("mine")]  # a Path is no name


# errors ----------------------------------------------------------------------------------------------


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        sets.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_says_what_there_is_and_how_a_file_is_given(published):
    assert refusal("dogz") == "prompts 'dogz': no such set (did you mean 'dogs'?); a file is given as ./dogz"
    assert "there are dogs, styles" in refusal("mammals")


def test_a_file_that_is_missing_is_no_set(published):
    assert "none.txt: No such file" in refusal("none.txt")


def test_a_kept_file_that_was_edited_is_not_the_set_any_more(published, tmp_path):
    sets.load("dogs")
    (tmp_path / "prompts" / "dogs.jsonl").write_text(METADATA.replace("red", "tan"))
    text = refusal("dogs")
    assert "dogs.jsonl is there but is not the published file: Git blob" in text and "by its path" in text


def test_a_set_that_has_changed_where_it_is_published_is_refused(published, tmp_path):
    (published / "metadata.jsonl").write_text(METADATA.replace("red", "tan"))
    assert "wrong content: Git blob" in refusal("dogs")
    assert list((tmp_path / "prompts").iterdir()) == []


@pytest.mark.parametrize("how", ["offline", "gone"])
def test_a_set_that_cannot_be_fetched_names_its_address_and_where_a_file_would_be_found(published, tmp_path, monkeypatch, how):
    if how == "gone":
        (published / "metadata.jsonl").unlink()
    else:
        monkeypatch.setattr(sets, "SETS", {"dogs": PromptSet("", [Source("http://127.0.0.1:9/metadata.jsonl", "0" * 40)])})
        monkeypatch.setattr("time.sleep", lambda _: None)
    text = refusal("dogs")
    assert text.startswith("prompts dogs: http://127.0.0.1:") and "/metadata.jsonl: " in text
    assert str(tmp_path / "prompts" / "dogs.jsonl") in text and "path" in text
    assert (f"{len(PAUSES) + 1} times" if how == "offline" else "not found (404)") in text
