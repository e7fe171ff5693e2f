"""Pair files of every kind: preferences whose images are there, or one line that names the row."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from flowtilt.errors import UserError
from flowtilt.io.images import read_image
from flowtilt.preferences import read_preferences
from flowtilt.preferences.parquet import Cells
from fuzzing._mutations import damaged, json_values

ROWS = [
    {"prompt": "a red dog", "chosen": "1.png", "rejected": "2.png"},
    {"prompt": "a cat", "chosen": "2.png", "rejected": "3.png", "weight": 0.5},
    {"prompt": "the same twice", "path1": "1.png", "path2": "1.png"},
]


def picture(level: int) -> bytes:
    """A small PNG of one grey."""
    buffer = BytesIO()
    Image.new("L", (2, 2), level).save(buffer, "PNG")
    return buffer.getvalue()


@cache
def tables() -> list[bytes]:
    """Parquet files in Pick-a-Pic's form, plain and compressed, with images as bytes and as Hugging Face's structs, and odd ones."""
    plain = {
        "caption": ["a dog", "a cat", ""],
        "jpg_0": [picture(0), picture(1), b""],
        "jpg_1": [picture(2), picture(3), None],
        "label_0": [1.0, 0.5, 0.0],
        "label_1": [0.0, 0.5, 1.0],
        "has_label": [True, True, None],
    }
    structs = {name: [{"bytes": value, "path": ""} for value in plain[name]] for name in ("jpg_0", "jpg_1")}
    swapped = {**plain, "caption": plain["jpg_0"], "label_0": ["1", "x", None]}
    found = []
    for columns, codec in ((plain, "snappy"), (plain, "none"), ({**plain, **structs}, "zstd"), (swapped, "none"), ({"a": [1]}, "none")):
        buffer = BytesIO()
        pq.write_table(pa.table(columns), buffer, compression=codec, row_group_size=2)
        found.append(buffer.getvalue())
    return found


def inputs() -> st.SearchStrategy[tuple[str, bytes]]:
    """A suffix and the file's bytes."""
    odd = json_values() | st.sampled_from(["a\nb.png", "x" * 300, "\0", "\ud800", "/", "..", "1.png/"])
    row = st.fixed_dictionaries(
        {"prompt": st.text(min_size=1) | odd, "chosen": st.sampled_from(["1.png", "2.png"]) | odd},
        optional={"rejected": st.sampled_from(["1.png", "3.png"]) | odd, "path2": odd, "weight": st.floats() | odd},
    )
    rows = st.lists(row | st.sampled_from(ROWS), max_size=4)
    lines = rows.map(lambda found: "\n".join(map(json.dumps, found)).encode()) | damaged(["\n".join(map(json.dumps, ROWS)).encode()])
    whole = (rows | json_values()).map(lambda found: json.dumps(found).encode()) | damaged([json.dumps(ROWS).encode()])
    return st.one_of(
        st.tuples(st.just(".jsonl"), lines),
        st.tuples(st.just(".json"), whole),
        st.tuples(st.just(".parquet"), damaged(tables())),
    )


def read(payload: tuple[str, bytes], folder: Path) -> None:
    """Reads the file, and the images of the pairs that it keeps."""
    suffix, data = payload
    for k in range(1, 4):
        if not (folder / f"{k}.png").exists():
            (folder / f"{k}.png").write_bytes(picture(k))
    path = folder / f"pairs{suffix}"
    path.write_bytes(data)
    cells = Cells()
    refused: list[Any] = []
    for pair in read_preferences(path).pairs:
        assert pair.prompt == pair.prompt.strip() != "" and 0 < pair.weight <= 1e6
        pair.prompt.encode()
        for one in (pair.chosen, pair.rejected):
            try:
                read_image(one.file if one.row is None else cells(one))
            except UserError as error:
                refused.append(error)
    if refused:
        raise refused[0]
