"""What `flowtilt demo` shows: base and tuned from the same noise."""

from pathlib import Path

import pytest

from flowtilt import UserError
from flowtilt.evaluate.demo import SEEN, answer, page
from flowtilt.evaluate.side_by_side import SideBySide


@pytest.fixture(scope="module")
def pair(finished):
    return SideBySide(loras=[finished], steps=2)


def test_an_answer_is_base_and_tuned_from_the_noise_of_its_seed(pair, finished):
    base, tuned = answer(pair, "a red circle", 3)
    assert base.size == tuned.size == (SEEN, SEEN) and base.tobytes() != tuned.tobytes()
    assert [image.tobytes() for image in answer(pair, "a red circle", 3)] == [base.tobytes(), tuned.tobytes()]
    assert answer(pair, "a red circle", 4)[0].tobytes() != base.tobytes()
    with pytest.raises(UserError, match="Type a prompt"):
        answer(pair, " ", 3)


def test_its_page_can_be_built(pair):
    pytest.importorskip("gradio")
    names = [block.label for block in page(pair, Path("runs/mine")).blocks.values() if getattr(block, "label", None)]
    assert {"prompt", "seed", *pair.roles} <= set(names)
