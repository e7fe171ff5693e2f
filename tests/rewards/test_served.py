"""A served reward gives what the same reward gives here, whatever happens to the server in between."""

import logging
import multiprocessing
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from ranks import forked
from reward_servers import ask, grey, levels, logged, prompt, running, wait_until

from flowtilt.errors import UserError
from flowtilt.io.images import to_bytes
from flowtilt.playground import world
from flowtilt.rewards import RewardOutput, applies, load_reward, score
from flowtilt.rewards.about import BuiltIn, built_in
from flowtilt.rewards.playground import Playground
from flowtilt.rewards.serving import client as served
from flowtilt.rewards.serving import server
from flowtilt.rewards.serving.client import RemoteReward
from flowtilt.rewards.serving.wire import Limits, answer, read_answer
from flowtilt.seeding import generator


def images_of(number, size=8):
    """8-bit noise [N, 3, size, size]."""
    return torch.randint(0, 256, (number, 3, size, size), generator=torch.Generator().manual_seed(0)).float() / 255


def prompts_of(number):
    return [prompt(f"prompt {i}", tag=f"tag {i % 3}", metadata={"include": [{"class": "dog", "count": i}]}) for i in range(number)]


class Keeps:
    """Remembers what it was given, by the prompt's text; its score is the number in the text, later numbers being scored sooner."""

    def __init__(self):
        self.images, self.prompts = {}, {}

    def __call__(self, images, prompts):
        numbers = [int(p.text.split()[-1]) for p in prompts]
        self.images |= dict(zip(numbers, images, strict=True))
        self.prompts |= dict(zip(numbers, prompts, strict=True))
        return torch.tensor(numbers).float()


def test_images_of_8_bits_and_prompts_arrive_exactly_and_scores_keep_their_order():
    keeps = Keeps()
    images, prompts = images_of(50), prompts_of(50)
    with running({"keeps": keeps}, max_batch=4) as (url, _):
        output = RemoteReward(url, "keeps", images_per_request=3, workers=8)(images, prompts)
    assert torch.equal(output.scores, torch.arange(50.0))
    assert all(torch.equal(keeps.images[i], images[i]) for i in range(50))
    assert [keeps.prompts[i] for i in range(50)] == prompts and keeps.prompts[7].metadata == prompts[7].metadata


def test_scores_of_fp32_nan_details_and_notes_come_back_exactly():
    values = torch.tensor([0.1, -1e-30, torch.nan, 3.4e38, 1 / 3])

    def reward(images, prompts):
        at = torch.tensor([int(p.text.split()[-1]) for p in prompts])
        details = {"strict": values[at] / 2} | ({"late": at.float()} if 4 in at else {})
        return RewardOutput(values[at], [f"ä\ud800 {i}" for i in at.tolist()], details)

    with running({"r": reward}, max_batch=1) as (url, _):
        output = RemoteReward(url, "r", images_per_request=2)(images_of(5), prompts_of(5))
    torch.testing.assert_close(output.scores, values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(output.details["strict"], values / 2, rtol=0, atol=0, equal_nan=True)
    assert output.details["late"][:4].isnan().all() and output.details["late"][4] == 4
    assert list(output.notes) == [f"ä\ud800 {i}" for i in range(5)]


def test_a_served_judge_is_asked_whatever_its_settings_there_are():
    with running({"judge": Keeps()}) as (url, _):
        remote = RemoteReward(url, "judge")
        assert applies(remote, prompt("a circle")) == ""
        assert remote(images_of(1), prompts_of(1)).scores.tolist() == [0.0]


def test_a_recipes_address_gives_what_the_reward_gives_here():
    prompts = world.prompts("test")[::12]
    drawn = [world.arrange(p if i % 2 else prompts[i - 1], generator(0, "test", i)) for i, p in enumerate(prompts)]
    images = to_bytes(world.render(drawn)).float() / 255
    with running({"playground": Playground()}) as (url, _):
        remote = load_reward("playground", url, options={"images_per_request": 4})
        there, said = score({"r": remote}, images, prompts)
    here, told = score({"r": Playground()}, images, prompts)
    assert torch.equal(there["r"], here["r"]) and said == told and len(here["r"].unique()) > 2


def test_the_path_of_an_address_names_the_reward():
    with running({"levels": levels}) as (url, _):
        named = RemoteReward(f"{url}/levels/", "anything")
        assert named.reward == "levels" and named.url == url
        assert named(grey(3)[None], [prompt()]).scores.tolist() == [3]


@pytest.mark.parametrize("url", ["http://", "http://:80", "http://host:port", "http://host:99999", "http://host?x=1", "http://[::1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="is not"):
        RemoteReward(url, "r")


@pytest.mark.parametrize("option", ["timeout", "images_per_request", "workers"])
def test_options_must_be_positive(option):
    with pytest.raises(UserError, match=f"{option} must be more than 0"):
        load_reward("r", "http://127.0.0.1:9", options={option: 0})


def test_it_works_off_the_device_keeps_the_servers_version_and_scores_no_images():
    with running({"levels": levels}) as (url, _):
        reward = RemoteReward(url, "levels")
        assert RemoteReward.off_device and reward.version["reward"] == "levels"
        empty = reward(torch.empty(0, 3, 8, 8), [])
    assert empty.scores.shape == (0,) and not empty.notes


def test_an_image_with_a_nan_has_no_score_though_its_png_would():
    """`score` sees to that, for every reward."""
    images = torch.stack([grey(1), grey(2), grey(3)])
    images[1, 0, 4, 4] = torch.nan
    reward = lambda images, prompts: RewardOutput(levels(images, prompts), (), {"d": levels(images, prompts)})  # noqa: E731
    with running({"r": reward}) as (url, _):
        found, notes = score({"r": RemoteReward(url, "r", images_per_request=2)}, images, prompts_of(3))
    for values in (found["r"], found["r/d"]):
        assert values[[0, 2]].tolist() == [1, 3] and values[1].isnan()
    assert notes == ["", "the image is not finite", ""]


def test_whether_it_applies_is_what_the_built_in_reward_says(monkeypatch):
    class Judge:
        @staticmethod
        def applies(prompt):
            return "" if prompt.metadata else "needs metadata"

    monkeypatch.setattr(served, "find_reward", lambda name, source: Judge)
    monkeypatch.setitem(built_in(), "judge", BuiltIn(name="judge", source="somewhere:Judge"))
    with running({"judge": levels, "own": levels}) as (url, _):
        assert applies(RemoteReward(url, "judge"), prompt()) == "needs metadata"
        assert applies(RemoteReward(url, "judge"), prompt(metadata={"a": 1})) == ""
        assert applies(RemoteReward(url, "own"), prompt()) == ""


# what goes wrong --------------------------------------------------------------------------------------


def test_a_missing_server_is_told_before_a_run_starts(monkeypatch):
    monkeypatch.setattr(served, "FIRST_ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=f"no reward server at {url} .*flowtilt serve-rewards --rewards geneval"):
        RemoteReward(url, "geneval")


def test_an_unknown_reward_and_a_wrong_key_are_told_at_once(monkeypatch):
    with running({"levels": levels}, key="right") as (url, _):
        began = time.monotonic()
        monkeypatch.setenv("FLOWTILT_REWARD_KEY", "wrong")
        with pytest.raises(UserError, match=r"rewards\.levels: .*FLOWTILT_REWARD_KEY"):
            RemoteReward(url, "levels")
        monkeypatch.setenv("FLOWTILT_REWARD_KEY", "right")
        with pytest.raises(UserError, match="no reward 'level' here; this server has levels"):
            RemoteReward(url, "level")
        assert RemoteReward(url, "levels")(grey(3)[None], [prompt()]).scores.tolist() == [3]
        assert time.monotonic() - began < 5


def test_a_reward_that_fails_there_is_an_error_here_and_is_not_tried_again():
    calls = []

    def broken(images, prompts):
        calls.append(len(images))
        raise RuntimeError("no weights today")

    with running({"broken": broken}) as (url, _):
        reward = RemoteReward(url, "broken", images_per_request=1, workers=1)
        with pytest.raises(UserError, match="422: RuntimeError: no weights today"):
            reward(images_of(20), prompts_of(20))
    assert len(calls) < 20


def test_a_full_server_is_asked_again_until_it_has_room():
    def slow(images, prompts):
        time.sleep(0.1)
        return levels(images, prompts)

    images = torch.stack([grey(i) for i in range(12)])
    with running({"slow": slow}, limits=Limits(waiting=4), max_batch=4) as (url, _):
        output = RemoteReward(url, "slow", images_per_request=2, workers=4)(images, prompts_of(12))
        text = ask(url, None, path="/metrics", method="GET")[1]
    assert output.scores.tolist() == list(range(12))
    assert 'status="503"' in text


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"scores": [1], "notes": [""]},
        {"scores": [1, "2"], "notes": ["", ""]},
        {"scores": [1, True], "notes": ["", ""]},
        {"scores": [1, 2], "notes": [""]},
        {"scores": [1, 2], "notes": ["", ""], "details": {"a": [1]}},
        {"scores": [1, 2], "notes": ["", ""], "details": []},
    ],
)
def test_what_is_not_an_answer_is_refused(said):
    with pytest.raises(UserError, match="not the answer of a reward server"):
        read_answer(said, 2)


def test_an_answer_survives_being_said():
    output = RewardOutput(torch.tensor([torch.nan, 0.1]), ["a", ""], {"d": torch.tensor([1.0, torch.nan])})
    heard, version = read_answer(answer(output, {"reward": "r"}), 2)
    torch.testing.assert_close(heard.scores, output.scores, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(heard.details["d"], output.details["d"], rtol=0, atol=0, equal_nan=True)
    assert heard.notes == ["a", ""] and version == {"reward": "r"}


# real processes ----------------------------------------------------------------------------------------

REWARD = """
import time

def slow(images, prompts):
    time.sleep(1.0 if images.min() == 1 else 0.02 * len(images))
    return images[:, 0, 0, 0] * 255
"""


def serving(place, port, said):
    """`flowtilt serve-rewards`, its lines through a pipe."""
    server.serve({"slow": {"source": f"{place}:slow"}}, port=port, max_batch=4, tell=said.send)


class Process:
    """A server of its own process, which can be killed and started again on its port."""

    def __init__(self, folder):
        (folder / "own.py").write_text(REWARD)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.place, self.url = folder / "own.py", f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.said, told = multiprocessing.Pipe(duplex=False)
        self.process = forked(serving, str(self.place), self.port, told)
        told.close()

    def answered(self):
        text = ask(self.url, None, path="/metrics", method="GET")[1]
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("flowtilt_requests_total"))


@pytest.fixture
def process(tmp_path):
    process = Process(tmp_path)
    yield process
    process.process.kill()
    process.process.join()


def test_a_killed_server_loses_nothing_and_a_stopped_one_finishes_what_it_has_taken(process):
    reward = RemoteReward(process.url, "slow", images_per_request=2, workers=4, timeout=30, patience=60)
    assert [process.said.recv().split(";")[0] for _ in range(2)] == ["loading slow", "serving slow"]
    images = torch.stack([grey(i) for i in range(96)])
    with ThreadPoolExecutor() as pool, logged(logging.WARNING) as away:
        scores = pool.submit(reward, images, prompts_of(96))
        wait_until(lambda: process.answered() >= 10)
        process.process.kill()
        process.process.join(20)
        assert not scores.done()
        process.start()
        assert scores.result(60).scores.tolist() == list(range(96))
        assert 1 <= sum("trying again" in line for line in away) <= 4 and "answers again" in away[-1]

        impatient = RemoteReward(process.url, "slow", images_per_request=2, workers=4, patience=0)
        last = pool.submit(impatient, torch.ones(8, 3, 8, 8), prompts_of(8))
        wait_until(lambda: ask(process.url, None, path="/health", method="GET")[1]["waiting_images"] == 8)
        process.process.terminate()
        process.process.join(20)
        assert process.process.exitcode == 0
        assert last.result(20).scores.tolist() == [255] * 8
