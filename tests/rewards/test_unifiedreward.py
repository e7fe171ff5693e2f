"""UnifiedReward's client against a server on the loopback that misbehaves in every way seen and some more."""

import base64
import json
import socket
import threading
import time
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import pytest
import torch
from local_server import LocalServer, send
from PIL import Image

from flowtilt.errors import UserError
from flowtilt.io.images import from_pil, to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward, score
from flowtilt.rewards.unified_versions import QUESTION_2, QUESTION_QWEN, mean_of_axes, points, version_of
from flowtilt.rewards.unifiedreward import KEY, URL, UnifiedReward

QUESTION = (Path(__file__).parent / "golden" / "unifiedreward_question.txt").read_text()
"""As flow_grpo sends it, {prompt} standing for the caption."""


class Server(LocalServer):
    """Answers a caption with its script's next entry, the last one for ever: an answer's text, a status, or a misdeed."""

    def __init__(self):
        self.script: dict[str, list] = defaultdict(lambda: ["Final Score: 3"])
        self.requests: list[tuple[str, dict, bytes]] = []
        self.key: str | None = None
        super().__init__()

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        caption = json.loads(body)["messages"][0]["content"][1]["text"].rpartition("Caption: [")[2][:-1]
        with self.lock:
            self.requests.append((handler.path, dict(handler.headers), body))
            script = self.script[caption]
            entry = script.pop(0) if len(script) > 1 else script[0]
        if self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            return send(handler, 401, {"error": {"message": "invalid api key"}})
        if callable(entry):
            entry = entry()
        if isinstance(entry, int):
            return send(handler, entry, {"error": "trouble"})
        if entry == "never":
            return self.over.wait(10)
        reply = entry if isinstance(entry, dict) else {"choices": [{"message": {"role": "assistant", "content": entry}}]}
        return send(handler, 200, reply, cut=9 if entry == "cut" else 0)


@pytest.fixture
def server(monkeypatch):
    for name in (URL, KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    yield found
    found.close()


def judge(server, captions, images=None, **options):
    reward = UnifiedReward(device="cpu", server=server.url, **{"timeout": 5.0, "patience": 3.0, **options})
    return reward(torch.zeros(len(captions), 3, 8, 8) if images is None else images, [Prompt(caption) for caption in captions])


def numbered(count: int) -> list[str]:
    return [f"caption {k}" for k in range(count)]


# the request -----------------------------------------------------------------------------------------


def test_the_request_is_flow_grpos_to_the_byte(server, monkeypatch):
    monkeypatch.setenv(KEY, " flowgrpo\n")
    server.key = "flowgrpo"
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    caption = 'a "sign", {prompt} {0} ü'
    assert judge(server, [caption], image).scores.tolist() == pytest.approx([0.6])
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    url = json.loads(body)["messages"][0]["content"][0]["image_url"]["url"]
    text = QUESTION.replace("{prompt}", caption)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    asked = {"model": "UnifiedReward-7b-v1.5", "temperature": 0, "messages": [{"role": "user", "content": content}]}
    assert body == json.dumps(asked).encode()
    start, _, data = url.partition(",")
    sent = Image.open(BytesIO(base64.b64decode(data, validate=True)))
    assert start == "data:image/png;base64" and sent.format == "PNG" and sent.mode == "RGB"
    assert torch.equal(from_pil(sent), from_pil(to_pil(image)[0].resize((512, 512), Image.Resampling.BICUBIC)))


def test_a_picture_of_the_right_size_is_sent_as_it_is(server):
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    judge(server, ["x"], image, model="another")
    asked = json.loads(server.requests[0][2])
    sent = Image.open(BytesIO(base64.b64decode(asked["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])))
    assert torch.equal(from_pil(sent), from_pil(to_pil(image)[0])) and asked["model"] == "another"
    assert "Authorization" not in server.requests[0][1]


def test_many_are_asked_for_at_once_but_no_more_than_workers(server):
    meeting = threading.Barrier(4, timeout=5)

    def together() -> str:
        meeting.wait()
        time.sleep(0.1)  # for a fifth to come, were there one
        return "Final Score: 4"

    for caption in numbered(12):
        server.script[caption] = [together]
    assert judge(server, numbered(12), workers=4).scores.tolist() == pytest.approx([0.8] * 12)
    assert server.most == 4


def test_scores_keep_the_order_of_the_images_whatever_comes_first(server):
    def after(seconds: float, value: float):
        def answer() -> str:
            time.sleep(seconds)
            return f"Final Score: {value}"

        return answer

    values = [1 + k / 4 for k in range(16)]
    for k, (caption, value) in enumerate(zip(numbered(16), values, strict=True)):
        server.script[caption] = [after((16 - k) * 0.02, value)]
    found = judge(server, numbered(16))
    assert found.scores.tolist() == pytest.approx([value / 5 for value in values])
    assert found.details["points"].tolist() == values and list(found.notes) == [""] * 16


def test_no_image_asks_for_nothing(server):
    assert judge(server, []).scores.shape == (0,) and not server.requests


# a server in trouble ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [[500, 500], [503], [429], ["cut"], ["never"]], ids=str)
def test_trouble_that_passes_is_waited_for(server, trouble):
    server.script["x"] = [*trouble, "Final Score: 4"]
    assert judge(server, ["x"], timeout=0.3).scores.tolist() == pytest.approx([0.8])
    assert len(server.requests) == len(trouble) + 1


@pytest.mark.parametrize("trouble", [500, "cut", "never"])
def test_trouble_that_stays_ends_in_an_error_that_names_the_server(server, trouble):
    server.script["x"] = [trouble]
    with pytest.raises(UserError, match=r"127.0.0.1.*no answer in 0 s of trying"):
        judge(server, ["x"], timeout=0.2, patience=0.3)


def test_a_refused_connection_ends_in_an_error(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        reward = UnifiedReward(device="cpu", server=f"http://127.0.0.1:{free.getsockname()[1]}/v1", patience=0.3)
        with pytest.raises(UserError, match=r"reward unifiedreward failed: http://127.0.0.1.*[Rr]efused"):
            score({"unifiedreward": reward}, torch.zeros(3, 3, 8, 8), [Prompt("x")] * 3)


@pytest.mark.parametrize(("key", "advice"), [(None, f"set {KEY}"), ("wrong", f"correct {KEY}")])
def test_a_wrong_key_is_told_at_once_and_never_shown(server, monkeypatch, key, advice):
    if key:
        monkeypatch.setenv(KEY, key)
    server.key = "right"
    with pytest.raises(UserError, match=advice) as caught:
        judge(server, ["x"])
    assert len(server.requests) == 1 and "wrong" not in str(caught.value)


def test_after_a_failure_the_images_that_wait_are_not_asked_for(server):
    server.script["caption 0"] = [400]
    with pytest.raises(UserError, match="refused with 400: trouble"):
        judge(server, numbered(200), workers=2)
    assert len(server.requests) < 100


@pytest.mark.parametrize(
    "reply", [{}, {"error": "no such model"}, {"choices": []}, {"choices": None}, {"choices": [{"text": "4"}]}], ids=str
)
def test_an_answer_of_another_form_is_an_error(server, reply):
    server.script["x"] = [reply]
    with pytest.raises(UserError, match="answers without choices"):
        judge(server, ["x"])


# the answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ours", "upstream"),
    [
        ("Final Score: 4", 4, 4),
        ("Final Score:4.25", 4.25, 4.25),
        ("Good.\nFinal Score:\n\n3", 3, 3),
        ("'Final Score:'. Final Score: 2", 2, 2),
        ("Final Score: 2, no, Final Score: 5", 2, 2),
        ("Final Score: 4/5", 4, 4),
        ("Final Score: 5.7", 5, 5.7),
        ("**Final Score:** 4", 4, 0),
        ("**Final Score**: **4**", 4, 0),
        ("Final Score : 4", 4, 0),
        ("final score: 4", 4, 0),
        ("Final Score: 10", None, 1),
        ("Final Score: 45", None, 4),
        ("Final Score: 0.5", None, 0),
        ("Final Score: -1", None, 0),
        ("Final Score: none", None, 0),
        ("4", None, 0),
        ("", None, 0),
    ],
)
def test_points_are_read_with_tolerance_and_in_compat_as_upstream(answer, ours, upstream):
    assert points(answer) == pytest.approx(float("nan") if ours is None else ours, nan_ok=True)
    assert points(answer, compat=True) == upstream


@pytest.mark.parametrize("nonsense", ["I can't see\nany image. " + "z" * 200, "", None, [1]], ids=["text", "empty", "null", "list"])
def test_one_unreadable_answer_of_ten_is_missing_and_the_note_quotes_it(server, nonsense):
    server.script["caption 3"] = [nonsense]
    found = judge(server, numbered(10))
    assert found.scores.isnan().nonzero().tolist() == [[3]] and found.scores.nansum() == pytest.approx(9 * 0.6)
    assert found.details["points"][3].isnan()
    assert [bool(note) for note in found.notes] == [k == 3 for k in range(10)]
    assert found.notes[3].startswith(f'no score in the answer "{nonsense[:10] if isinstance(nonsense, str) else ""}')
    assert len(found.notes[3]) < 150 and "\n" not in found.notes[3]


@pytest.mark.parametrize(("count", "lost", "fails"), [(1, 1, False), (3, 1, False), (10, 2, False), (10, 3, True), (2, 2, True)])
def test_too_many_unreadable_answers_are_an_error_with_an_example(server, count, lost, fails):
    for caption in numbered(lost):
        server.script[caption] = ["What a lovely day"]
    if not fails:
        assert int(judge(server, numbered(count)).scores.isnan().sum()) == lost
        return
    with pytest.raises(UserError, match=rf'{lost} of {count} answers .*"What a lovely day"'):
        judge(server, numbered(count))


def test_compat_counts_unreadable_answers_as_0(server):
    server.script["x"] = ["What a lovely day"]
    found = judge(server, ["x", "x", "y"], compat=True)
    assert found.scores.tolist() == pytest.approx([0, 0, 0.6])


# how it is set ---------------------------------------------------------------------------------------


def test_without_a_server_the_error_says_what_to_set_and_how_to_start_it(server):
    with pytest.raises(UserError, match=rf"sglang.launch_server.*{URL}=http.*{KEY}") as caught:
        load_reward("unifiedreward", "unifiedreward")
    assert "\n" not in str(caught.value)


def test_the_address_comes_from_the_environment_and_an_option_goes_before_it(server, monkeypatch):
    monkeypatch.setenv(URL, server.url + "/")
    for options in ({}, {"server": server.url}):
        scores, notes = score({"u": load_reward("u", "unifiedreward", options=options)}, torch.zeros(1, 3, 8, 8), [Prompt("x")])
        assert scores["u"].tolist() == scores["u/points"].div(5).tolist() == pytest.approx([0.6]) and notes == [""]
    assert [path for path, *_ in server.requests] == ["/v1/chat/completions"] * 2


@pytest.mark.parametrize("address", ["127.0.0.1:17140", "ftp://a/v1", "v1"])
def test_an_address_of_no_server_is_refused_at_once(address):
    with pytest.raises(UserError, match="no address of a server"):
        UnifiedReward(device="cpu", server=address)


def test_a_key_is_no_option_and_a_broken_one_is_refused_unseen(server, monkeypatch):
    with pytest.raises(UserError, match="unknown option 'key'"):
        load_reward("unifiedreward", "unifiedreward", options={"server": server.url, "key": "secret"})
    monkeypatch.setenv(KEY, "sec\nret")
    with pytest.raises(UserError, match=KEY) as caught:
        UnifiedReward(device="cpu", server=server.url)
    assert "sec" not in str(caught.value)


# the versions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("UnifiedReward-7b-v1.5", "1.5"),
        ("UnifiedReward-qwen-32b", "qwen"),
        ("CodeGoat24/UnifiedReward-2.0-qwen-7b", "2.0"),
        ("UnifiedReward-2.0-qwen3vl-8b", "2.0"),
        ("judge", "1.5"),
    ],
)
def test_the_models_name_tells_its_version(model, version):
    assert version_of(model) == version


@pytest.mark.parametrize("model", ["UnifiedReward-Think-qwen-7b", "UnifiedReward-Flex-qwen35-9b"])
def test_a_model_that_compares_two_images_is_refused(server, model):
    with pytest.raises(UserError, match="compares two images"):
        UnifiedReward(server=server.url, model=model)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 3.5", (3.0, 2.5, 3.0, 3.5)),
        ("- **Alignment**: 4.0 / 5\n- **Coherence**: 3.0 / 5\n- **Style**: 5 / 5", (4.0, 4.0, 3.0, 5.0)),
    ],
)
def test_version_2_gives_three_scores_and_their_mean(answer, found):
    mean, axes = mean_of_axes(answer)
    assert (mean, *axes.values()) == pytest.approx(found)


def test_an_answer_of_version_2_that_lacks_a_score_is_missing():
    mean, axes = mean_of_axes("Alignment Score (1-5): 3.0\nThe image is well composed.")
    assert mean != mean and axes["alignment"] == 3 and axes["style"] != axes["style"]


def test_each_version_is_asked_its_own_question_and_read_its_own_way(server):
    server.script["x"] = ["Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4"]
    found = judge(server, ["x"], model="UnifiedReward-2.0-qwen-7b")
    assert found.scores.tolist() == pytest.approx([0.6]) and found.details["style"].tolist() == [4.0]
    judge(server, ["y"], model="another", version="qwen")
    asked = [json.loads(body)["messages"][0]["content"][1]["text"] for *_, body in server.requests]
    assert asked == [QUESTION_2.replace("{prompt}", "x"), QUESTION_QWEN.replace("{prompt}", "y")]
    with pytest.raises(UserError, match="no version '3'"):
        UnifiedReward(server=server.url, version="3")
    with pytest.raises(UserError, match="compat reads a final score"):
        UnifiedReward(server=server.url, version="2.0", compat=True)
