"""Prompt files of every suffix: captions without anything invisible, or one line that says what is wrong."""

import json
from pathlib import Path

from hypothesis import strategies as st

from flowtilt.prompts.decoding import visible
from flowtilt.prompts.files import load_prompts, read_prompts
from flowtilt.rewards.ocr import plain, target
from fuzzing._mutations import damaged, json_values

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json")
TEXTS = [
    'a cat\na 5" nail beside a sign "HELLO"\n# note\n\n',
    'prompt,tag\na cat,A\n"a sign, ""Hi""",B\n',
    'tag; prompt\nx; "a sign that says STOP"\n',
    'Prompt\tCategory\n"Macbook\tA\na 13" laptop\tB\n',
    'Prompt\tCategory\r\n"a sign, ""Hi"""\tText\r\n"two\nlines"\tText\r\n',
    '{"prompt": "a photo of a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]}\n{"prompt": "b\\u200bc"}\n',
    '["a cat", {"prompt": "a dog", "n": [1, 2.5, null]}]',
]
FILES = [text.encode(encoding) for text in TEXTS for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1")]


def inputs() -> st.SearchStrategy[tuple[str, bytes]]:
    """A suffix and the file's bytes."""
    lines = st.lists(json_values(), max_size=3)
    written = lines.map(lambda found: "\n".join(map(json.dumps, found)).encode()) | lines.map(lambda found: json.dumps(found).encode())
    random = st.text(max_size=80).map(lambda text: text.encode(errors="ignore"))
    return st.tuples(st.sampled_from(SUFFIXES), damaged(FILES) | written | random)


def read(payload: tuple[str, bytes], folder: Path) -> None:
    """Reads the file and looks for the text to render in each caption."""
    suffix, data = payload
    path = folder / f"prompts{suffix}"
    path.write_bytes(data)
    found = read_prompts(path)
    for prompt in found:
        assert prompt.text and prompt.text == prompt.text.strip() == visible(prompt.text)
        assert prompt.where.startswith(f"{path}:") and int(prompt.where.rpartition(":")[2]) <= data.count(b"\n") + data.count(b"\r") + 1
        json.dumps([prompt.text, prompt.tag, dict(prompt.metadata)], ensure_ascii=False).encode()
        wanted = target(prompt.text)
        assert wanted is None or plain(wanted)
    assert {prompt.text for prompt in load_prompts(path)} == {prompt.text for prompt in found}
