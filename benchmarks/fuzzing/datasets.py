"""Folders laid out as the hub's data sets, with damaged cards and files: captions, or one line."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from flowtilt.config.prompt_data import PromptData
from flowtilt.prompts.datasets import load
from fuzzing._mutations import damaged, mostly

CARDS = [
    b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n---\n# text\n",
    b"---\nconfigs:\n- config_name: other\n  data_files: data/train.parquet\n- data_files: [data/test.jsonl, data/train.csv]\n---\n",
    b"---\nlicense: mit\n---\n",
]
ODD = (
    "5", "[]", "[5]", "{a: 1}", "[{config_name: [1], data_files: x}]", "[{config_name: default, data_files: 5}]", "2026-13-45", "!!bool x",
    "[{config_name: 1, data_files: {a: b}}]", "[{data_files: [{split: [1], path: [[]]}]}]", "&a [*a]", '[{data_files: "[**/*"}]', "~",
    "[{config_name: default, data_files: [{split: train}]}]",
)  # fmt: skip


@cache
def tables() -> list[bytes]:
    """Parquet files with captions, tags and other columns."""
    found = []
    for columns in (
        {"caption": ["a dog", "a cat"], "tag": ["x", None], "image": [b"", b"\0"]},
        {"prompt": ["a dog", None]},
        {"prompt": [{"text": "a"}], "tag": [[1]]},
        {"prompt": [1, 2]},
        {"text": pa.array(["a", "b", "a"]).dictionary_encode(), "tag": [1.5, None, float("nan")]},
    ):
        buffer = BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="none")
        found.append(buffer.getvalue())
    return found


def inputs() -> st.SearchStrategy[tuple[bytes, str, bytes, dict[str, str]]]:
    """The card, a file's ending and bytes, and what a recipe says of the data set."""
    card = damaged(CARDS) | st.sampled_from(ODD).map(lambda odd: f"---\nconfigs: {odd}\n---\n".encode())
    lines = [b'{"prompt": "a", "tag": "b"}\n{"prompt": "c"}\n', json.dumps({"caption": "a", "kind": [1]}).encode()]
    file = st.tuples(st.just(".parquet"), damaged(tables())) | st.tuples(st.sampled_from([".jsonl", ".json", ".csv"]), damaged(lines))
    words = st.sampled_from(["prompt", "caption", "tag", "image", "kind", "\0", "x" * 300])
    said = st.fixed_dictionaries(
        {},
        optional={
            "column": words,
            "tag": words,
            "split": st.sampled_from(["train", "test", "\n"]),
            "config": st.sampled_from(["other", "1"]),
        },
    )
    return st.tuples(st.just(b"") | card, file, mostly(st.just({}), said)).map(lambda found: (found[0], *found[1], found[2]))


def read(payload: tuple[bytes, str, bytes, dict[str, str]], folder: Path) -> None:
    """Reads the captions of a split."""
    card, suffix, data, said = payload
    (folder / "data").mkdir(exist_ok=True)
    for old in (folder / "data").iterdir():
        old.unlink()
    (folder / "README.md").write_bytes(card)
    (folder / "data" / f"train{suffix}").write_bytes(data)
    found = load(PromptData(dataset=str(folder), **said))
    assert found and all(prompt.text.strip() == prompt.text != "" for prompt in found)
    json.dumps([[prompt.text, prompt.tag] for prompt in found], ensure_ascii=False).encode()
