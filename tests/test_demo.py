"""What `flowtilt demo` shows: base and tuned from the same noise."""

from pathlib import Path

import pytest
from PIL import Image

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


def test_its_page_answers_over_http(pair):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    application = page(pair, Path("runs/mine"))
    try:
        _, url, _ = application.launch(prevent_thread_lock=True, quiet=True, share=False)
        served = client.Client(url, verbose=False)
        base, tuned = (Image.open(path).convert("RGB").tobytes() for path in served.predict("a red circle", 3, api_name="/sample"))
        assert [base, tuned] == [image.tobytes() for image in answer(pair, "a red circle", 3)]
        with pytest.raises(Exception, match="Type a prompt"):
            served.predict(" ", 3, api_name="/sample")
    finally:
        application.close()
