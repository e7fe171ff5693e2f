"""Rewards that compare the images of a prompt get all of them, however a rollout is parted and spread over processes."""

import threading

import pytest
import torch

from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.comparing import Shares, check_groups, refuse_comparing
from flowtilt.rewards.overlapped import Scoring

PER_PROMPT, PROMPTS = 4, 5
NUMBER = PER_PROMPT * PROMPTS


def rank_in_group(images, prompts):
    """The share of the prompt's other images that are darker; says how many there were."""
    assert len(images) == PER_PROMPT and len({prompt.text for prompt in prompts}) == 1
    means = images.mean((1, 2, 3))
    return RewardOutput((means[:, None] > means).sum(1) / (len(means) - 1), details={"others": torch.full((len(means),), len(means) - 1.0)})


rank_in_group.compares = True


class Elsewhere:
    compares = off_device = True

    def __call__(self, images, prompts):
        return rank_in_group(images, prompts)


class Ranks:
    """Worlds in threads, whose sums and lists meet."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size)
        self.given: dict[int, object] = {}

    def meet(self, rank, value):
        self.given[rank] = value
        self.barrier.wait(20)
        found = [self.given[k] for k in range(self.size)]
        self.barrier.wait(20)
        return found


class OneOf(World):
    def join(self, ranks):
        self.ranks = ranks
        return self

    def sum_(self, tensors):
        parts = self.ranks.meet(self.rank, [tensor.clone() for tensor in tensors])
        for k, tensor in enumerate(tensors):
            tensor.copy_(sum(part[k] for part in parts))

    def gather_json(self, values):
        return [value for part in self.ranks.meet(self.rank, list(values)) for value in part]


def images():
    return torch.rand(NUMBER, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def scored(world, reward, cut):
    mine = world.share(NUMBER)
    prompts = [Prompt(f"p{i // PER_PROMPT % 4}") for i in mine]  # the last prompt is the first one once more, a group of its own
    with Scoring({"rank": reward}, "cpu", Shares(world, NUMBER, PER_PROMPT)) as scoring:
        for rows in torch.arange(len(mine)).split(cut):
            scoring.add(images()[mine.start : mine.stop][rows], [prompts[k] for k in rows])
        return scoring.finish()[0]


def of_ranks(size, reward, cut):
    ranks, found, faults = Ranks(size), {}, []

    def work(rank):
        try:
            found[rank] = scored(OneOf(rank, size, torch.device("cpu")).join(ranks), reward, cut)
        except BaseException as error:
            faults.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    return {name: torch.cat([found[rank][name] for rank in range(size)]) for name in found[0]}


@pytest.fixture(scope="module")
def expected():
    return scored(World(0, 1, torch.device("cpu")), rank_in_group, NUMBER)


def test_each_group_is_judged_by_itself(expected):
    assert expected["rank"].view(PROMPTS, PER_PROMPT).sort(1).values.tolist() == [pytest.approx([0, 1 / 3, 2 / 3, 1])] * PROMPTS
    assert expected["rank/others"].tolist() == [PER_PROMPT - 1] * NUMBER


@pytest.mark.parametrize("reward", [rank_in_group, Elsewhere()], ids=["here", "elsewhere"])
@pytest.mark.parametrize(("size", "cut"), [(1, 3), (2, 20), (3, 5), (7, 2)])
def test_scores_depend_neither_on_parts_nor_on_processes(reward, size, cut, expected):
    found = of_ranks(size, reward, cut)
    assert found["rank"].equal(expected["rank"]) and found["rank/others"].equal(expected["rank/others"])


def test_where_there_is_nothing_to_compare_that_is_said_at_the_start():
    with pytest.raises(UserError, match=r"rollout.images_per_prompt: rank compares the images of a prompt; set it to 2 or more"):
        check_groups({"rank": rank_in_group}, 1)
    check_groups({"rank": rank_in_group}, 2)
    with pytest.raises(UserError, match=r"evaluate.rewards: rank compares the images of a prompt within a rollout"):
        refuse_comparing({"rank": rank_in_group}, "evaluate.rewards")
