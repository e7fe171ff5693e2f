"""Ranks of one start meet under one name, whatever earlier starts have left in the store."""

import time

import pytest
import torch.distributed as dist

from flowtilt import UserError
from flowtilt.distributed.rendezvous import _follow, _lead
from flowtilt.io.threads import in_threads


def start(store, size, token, late=()):
    def follow(rank):
        time.sleep(0.1 * (rank in late))
        return _follow(store, f"{token}-{rank}", rank, time.monotonic() + 20)

    tasks = [lambda: _lead(store, token, size, time.monotonic() + 20), *(lambda rank=rank: follow(rank) for rank in range(1, size))]
    return in_threads(tasks, size)


def test_every_start_has_a_name_of_its_own_that_all_its_ranks_know():
    store = dist.HashStore()
    assert start(store, 3, "first") == ["first"] * 3
    assert start(store, 4, "second", late=(1, 3)) == ["second"] * 4
    assert start(store, 2, "third", late=(1,)) == ["third"] * 2


def test_a_rank_that_does_not_come_is_named():
    soon = time.monotonic() + 0.1
    with pytest.raises(UserError, match="2 of 3 ranks did not come, rank 1 first"):
        _lead(dist.HashStore(), "name", 3, soon)
    with pytest.raises(UserError, match="rank 1: the first rank did not answer"):
        _follow(dist.HashStore(), "token", 1, soon)
