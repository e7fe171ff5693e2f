"""GenEval's metadata: what a prompt asks for, or one line that names the key."""

import json
from pathlib import Path

from hypothesis import strategies as st

from flowtilt.prompts.files import read_prompts
from flowtilt.prompts.geneval_objects import CLASSES, COLORS, RELATIONS, TAGS
from flowtilt.rewards.geneval import judge
from flowtilt.rewards.geneval.metadata import parse
from fuzzing._mutations import json_values, mostly, mutated

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}], "prompt": "three dogs"},
    {
        "tag": "color_attr",
        "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1}],
        "prompt": "a red dog and a cat",
    },
    {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a dog",
    },
]


def inputs() -> st.SearchStrategy[bytes]:
    """A line of a metadata file."""
    odd = json_values()

    entry = st.fixed_dictionaries(
        {"class": mostly(st.sampled_from(CLASSES), odd), "count": mostly(st.integers(0, 5), odd)},
        optional={
            "color": mostly(st.sampled_from(COLORS), odd),
            "position": mostly(st.tuples(mostly(st.sampled_from(RELATIONS), odd), mostly(st.integers(0, 3), odd)).map(list), odd),
        },
    )
    entries = mostly(st.lists(mostly(entry, odd), max_size=4), odd)
    record = st.fixed_dictionaries(
        {"prompt": st.just("a photo"), "tag": mostly(st.sampled_from(TAGS), odd), "include": entries}, optional={"exclude": entries}
    )
    return record.map(lambda line: json.dumps(line).encode()) | mutated([json.dumps(line).encode() for line in LINES])


def read(payload: bytes, folder: Path) -> None:
    """Reads the line and judges an image of two dogs by it."""
    path = folder / "metadata.jsonl"
    path.write_bytes(payload)
    dogs = [{"class": "dog", "score": 0.95, "box": [9 * k, 0, 9 * k + 8, 8], "color": "red"} for k in range(2)]
    for prompt in read_prompts(path):
        metadata = {**prompt.metadata, "tag": prompt.tag}
        request = parse(metadata)
        assert sorted(request.order) == list(range(len(request.include)))
        assert 0 <= judge(dogs, metadata).score <= 1
