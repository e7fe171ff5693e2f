"""Judging part by part: the same scores as at once, models on the device for their own turn only, notes of the first that has one."""

import torch
from torch import nn

from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput, judging, load_reward, score
from flowtilt.rewards.judging import judge

PROMPTS = [Prompt(f"picture {k}") for k in range(7)]
IMAGES = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def mean(images, prompts):
    return images.mean((1, 2, 3))


def odd(images, prompts):
    """Has a detail and notes for some images, and calls without that detail."""
    numbers = [int(p.text.split()[1]) for p in prompts]
    details = {"seven": torch.full((len(prompts),), 7.0)} if 5 in numbers else {}
    return RewardOutput(torch.tensor([float(n) for n in numbers]), ["odd" if n % 2 else "" for n in numbers], details)


def test_parts_are_joined_in_order(monkeypatch):
    monkeypatch.setattr(judging, "PART", 3)
    found, notes = judge({"mean": mean, "odd": odd}, IMAGES, PROMPTS, "cpu")
    assert torch.equal(found["mean"], score({"mean": mean}, IMAGES, PROMPTS)[0]["mean"])
    assert found["odd"].tolist() == [0, 1, 2, 3, 4, 5, 6] and notes == ["", "odd", "", "odd", "", "odd", ""]
    assert found["odd/seven"].isnan().tolist() == [True, True, True, False, False, False, True]
    assert list(found) == ["mean", "odd", "odd/seven"]


def test_a_model_is_there_for_its_own_turn(monkeypatch):
    visits = []

    class Reward:
        def __init__(self, name):
            self.modules = (nn.Linear(1, 1),)
            self.name = name

        def __call__(self, images, prompts):
            visits.append(self.name)
            return images.mean((1, 2, 3))

    from contextlib import contextmanager

    @contextmanager
    def on_device(modules, device):
        visits.append(("in", len(modules)))
        yield
        visits.append("out")

    monkeypatch.setattr(judging, "on_device", on_device)
    monkeypatch.setattr(judging, "PART", 4)
    judge({"a": Reward("a"), "b": Reward("b"), "plain": mean}, IMAGES, PROMPTS, "cpu")
    assert visits == [("in", 1), "a", "a", "out", ("in", 1), "b", "b", "out", ("in", 0), "out"]


def test_nothing_to_judge_is_no_error():
    found, notes = judge({"mean": mean}, torch.empty(0, 3, 4, 4), [], "cpu")
    assert found["mean"].shape == (0,) and notes == []


def test_a_class_waits_elsewhere_only_if_it_names_its_models(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Plain:\n"
        "    def __init__(self, *, device):\n        self.device = device\n"
        "    def __call__(self, images, prompts):\n        return torch.ones(len(images))\n"
        "class Roaming(Plain):\n    modules = ()\n"
        "class Network(torch.nn.Module):\n"
        "    def __init__(self, *, device):\n        super().__init__()\n        self.device = device\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, images, prompts):\n        return images.mean((1, 2, 3)) * self.scale\n"
    )
    built = {}
    for name in ("Plain", "Roaming", "Network"):
        built[name] = load_reward("mine", f"{tmp_path}/mine.py:{name}", device="meta", storage_device="cpu")
    assert {name: reward.device.type for name, reward in built.items()} == {"Plain": "meta", "Roaming": "cpu", "Network": "meta"}
    found, _ = judge({"network": built["Network"]}, IMAGES, PROMPTS, "cpu")
    assert torch.equal(found["network"], mean(IMAGES, PROMPTS))
