"""The micro-batch: halves where memory runs out, each kind of work by itself, and prefers other savings to tiny sizes."""

import pytest
import torch

from flowtilt.device.micro_batch import FEWEST, START, MicroBatch
from flowtilt.errors import UserError


def work(most, tried):
    def run(size):
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    return run


def test_auto_halves_for_good_and_for_its_kind_alone():
    micro, tried = MicroBatch("auto", "cpu"), []
    assert micro.run_with_backoff("train", work(10, tried)) == 6
    assert micro.run_with_backoff("train", work(10, tried)) == 6
    assert tried == [96, 48, 24, 12, 6, 6]
    assert micro.run_with_backoff("sample", work(100, tried)) == START["cpu"]
    again = MicroBatch("auto", "cpu")
    again.restore(micro.sizes)
    assert again.size("train") == 6 and again.size("decode") == START["cpu"]


def test_before_a_size_becomes_tiny_other_savings_are_tried_once_and_the_search_begins_anew():
    micro, tried, saved = MicroBatch("auto", "cpu"), [], []
    limit = {False: 2, True: 30}

    def run(size):
        return work(limit[bool(saved)], tried)(size)

    def save():
        return not saved and not saved.append(True)

    assert micro.run_with_backoff("train", run, save) == 24
    assert tried == [96, 48, 24, 12, 6, 96, 48, 24] and min(tried) >= FEWEST


def test_a_fixed_size_is_never_changed_but_savings_are_tried():
    micro, tried = MicroBatch(8, "cpu"), []
    with pytest.raises(UserError, match=r"micro_batch = 8 \(train\)"):
        micro.run_with_backoff("train", work(7, tried))
    ways = iter([True, False])
    with pytest.raises(UserError):
        micro.run_with_backoff("train", work(7, tried), lambda: next(ways))
    assert tried == [8, 8, 8]
    micro.restore({"train": 2})
    assert micro.size("train") == 8


def test_a_single_row_that_does_not_fit_is_one_line():
    with pytest.raises(UserError, match="out of memory with micro_batch = 1"):
        MicroBatch("auto", "cpu").run_with_backoff("train", work(0, []))


def test_a_try_that_failed_counts_for_nothing():
    class Policy:
        evaluations = 7

    policy = Policy()

    def run(size):
        policy.evaluations += 5
        return work(30, [])(size)

    assert MicroBatch("auto", "cpu").run_with_backoff("train", run, counter=policy) == 24 and policy.evaluations == 12
