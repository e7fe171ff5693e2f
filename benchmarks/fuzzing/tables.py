"""Tables that name images: each image has the row that names it, or the table is refused."""

from pathlib import Path

from hypothesis import strategies as st

from flowtilt.evaluate.pairs import find_pairs
from flowtilt.prompts.files import read_prompts
from fuzzing._mutations import damaged

NAMES = ("1.png", "2.png", "10.png")
FILES = [
    b"image,prompt\n10.png,red\n1.png,red\n2.png,green\n",
    b'file_name,text,label\n./10.png,"a, b",3\nimages/1.png,red,4\n',
    b'{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png", "text": "b"}\n',
    b'{"image": "1", "prompt": "a"}\n{"image": "2", "prompt": "b"}\n{"image": "10", "prompt": "a"}\n',
    b"prompt\na\nb\nc\n",
]


def inputs() -> st.SearchStrategy[tuple[str, bool, bytes]]:
    """The table's suffix, whether it is given or lies beside the images, and its bytes."""
    return st.tuples(st.sampled_from([".csv", ".jsonl"]), st.booleans(), damaged(FILES))


def read(payload: tuple[str, bool, bytes], folder: Path) -> None:
    """Finds the prompts of three images."""
    suffix, given, data = payload
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for name in NAMES:
            (images / name).touch()
    for old in images.glob("metadata.*"):
        old.unlink()
    table = (folder / f"table{suffix}") if given else images / f"metadata{suffix}"
    table.write_bytes(data)
    pairs = find_pairs([images], read_prompts(table), table=table) if given else find_pairs([images], None)
    found = [pair.file.name for pair in pairs]
    assert found and len(set(found)) == len(found) and found == [name for name in NAMES if name in found]
