"""Answers of reward servers and of vision-language models, as a server that is broken or hostile may give them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from flowtilt.errors import UserError, printable
from flowtilt.io.web import Again, understood
from flowtilt.rewards.serving.wire import read_answer
from flowtilt.rewards.unifiedreward import content_of, points

GOOD = {"scores": [0.5, None], "notes": ["", "why"], "details": {"strict": [1, 0]}, "version": {"reward": "r"}}
CHAT = {"choices": [{"message": {"content": "Final Score: 4"}}]}
URL = "http://host:8765/score"
MOST = 4096


class Payload(NamedTuple):
    """One answer to a request about `images` images."""

    status: int
    location: str
    body: bytes
    images: int


def inputs() -> st.SearchStrategy[Payload]:
    """Good answers with parts replaced, removed or cut, any JSON, and any bytes, of any status."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([10**400, -(10**309), 3.5e38, 1e308])
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["\x1b[2J", "\u202e", "\ud800", "Final Score: 3", "**Final Score:** 9"])
    )
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))
    texts = st.one_of(values, _changed(values, GOOD), _changed(values, CHAT)).map(json.dumps)
    edited = st.builds(_edited, texts, st.integers(0, 200), st.binary(max_size=4), st.integers(0, 4))
    nested = st.integers(0, 20_000).map(lambda depth: b"[" * depth)
    large = st.integers(MOST - 2, MOST + 2).map(lambda size: b"{}".ljust(size))
    whole = texts.map(str.encode)
    bodies = whole | whole | edited | nested | large | st.binary(max_size=200)
    statuses = st.sampled_from([200] * 20 + [201, 204, 301, 302, 307, 400, 401, 403, 404, 422, 429, 500, 503, 999])
    return st.builds(Payload, statuses, st.text(max_size=40), bodies, st.sampled_from([2, 2, 2, 0, 1]))


def read(payload: Payload, folder: Path) -> None:
    """Reads the answer as a client does; what it would ask for again counts as refused."""
    try:
        said = understood(URL, payload.status, payload.location, payload.body, MOST)
    except (Again, ValueError) as error:  # `post_json` tries again, and says this when it gives up
        raise UserError(printable(str(error))) from None
    if "choices" in said:
        points(content_of(URL, said))
        return
    output, _ = read_answer(said, payload.images)
    assert len(output.scores) == len(output.notes) == payload.images
    assert all(note == printable(note) for note in output.notes) and all(name.isprintable() for name in output.details)


@st.composite
def _changed(draw: st.DrawFn, values: st.SearchStrategy[Any], good: dict[str, Any]) -> dict[str, Any]:
    """A good answer in which some places hold something else."""
    answer = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = answer
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
            elif isinstance(place, dict) and draw(st.booleans()):
                del place[key]
                break
            else:
                place[key] = draw(values)
                break
    return answer


def _edited(text: str, at: int, put: bytes, cut: int) -> bytes:
    data = text.encode()
    return data[:at] + put + data[at + cut :]
