"""Real files, damaged, and random bytes."""

from collections.abc import Sequence

from hypothesis import strategies as st

EXTREMES = [
    b"",
    b"\x00",
    b"\xff",
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b'"',
    b"\n",
    b"\xef\xbb\xbf",
    b"9" * 5000,
    b"[" * 3000,
]


@st.composite
def mutated(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """One of the files with up to four edits: bytes changed, inserted, removed, repeated, cut off, or taken from another file."""
    data = draw(st.sampled_from(list(files)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 2, 4]))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 16)))
        kind = draw(st.sampled_from(["change", "insert", "remove", "repeat", "cut", "splice", "extreme"]))
        if kind == "change":
            data = data[:at] + draw(st.binary(min_size=end - at, max_size=end - at)) + data[end:]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=16)) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "splice":
            other = draw(st.sampled_from(list(files)))
            data = data[:at] + other[draw(st.integers(0, len(other))) :]
        else:
            data = data[:at] + draw(st.sampled_from(EXTREMES)) + data[end:]
    return data


def damaged(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Mutated files and, now and then, random bytes."""
    return st.one_of(mutated(files), mutated(files), mutated(files), st.binary(max_size=200))


def mostly(right: st.SearchStrategy, odd: st.SearchStrategy) -> st.SearchStrategy:
    """The right value, and now and then an odd one."""
    return st.sampled_from([True] * 19 + [False]).flatmap(lambda fine: right if fine else odd)


def json_values() -> st.SearchStrategy:
    """Any JSON, with numbers beyond every float and letters of every kind."""
    leaves = st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 1e308]) | st.floats() | st.text(max_size=8)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
