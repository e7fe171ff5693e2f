"""The index of a run's samples: images with captions, or one line."""

import json
from pathlib import Path

from hypothesis import strategies as st

from flowtilt.evaluate.pairs import find_pairs
from fuzzing._mutations import damaged, json_values

ROWS = [{"file": f"{k:02d}.png", "prompt": f"prompt {k}", "tag": "t", "score": 0.5, "note": ""} for k in range(3)]
FILES = [json.dumps(ROWS).encode(), json.dumps(ROWS[:1], indent=1).encode()]


def inputs() -> st.SearchStrategy[bytes]:
    """The bytes of index.json."""
    row = st.fixed_dictionaries(
        {"file": st.sampled_from(["00.png", "01.png", "../00.png", "\0"]) | json_values(), "prompt": st.text() | json_values()}
    )
    return damaged(FILES) | st.lists(row, max_size=4).map(lambda rows: json.dumps(rows).encode())


def read(payload: bytes, folder: Path) -> None:
    """Finds the images of a step and their captions."""
    step = folder / "step-000004"
    step.mkdir(exist_ok=True)
    for row in ROWS:
        (step / row["file"]).touch()
    (step / "index.json").write_bytes(payload)
    for pair in find_pairs([step], None):
        assert pair.file.parent == step and pair.file.is_file()
