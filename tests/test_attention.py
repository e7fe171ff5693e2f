"""A job that stands still: the rank that is silent, or keeps the others waiting, is named once."""

from flowtilt.distributed.attention import BUSY, IN_MESSAGE, STUCK, Attention


def lines(attention, seconds, reports, start=0.0):
    """What is said while ranks report every second; `reports` are those of a second."""
    said = []
    for second in range(seconds):
        for rank, report in reports(second).items():
            attention.heard(rank, report, start + second)
        said += attention.unusual(start + second)
    return said


def test_a_rank_that_is_not_heard_of_for_the_patience_is_named_once():
    found = lines(Attention(60), 300, lambda second: {0: IN_MESSAGE if second < 60 else STUCK} | ({1: BUSY} if second < 10 else {}))
    assert len(found) == 1 and found[0].startswith("rank 1 is silent for 60 s")


def test_a_rank_that_works_while_another_waits_for_the_patience_is_named_once():
    found = lines(Attention(60), 300, lambda second: {0: IN_MESSAGE if second < 60 else STUCK, 1: BUSY, 2: IN_MESSAGE})
    assert len(found) == 1 and found[0].startswith("rank 1 keeps the others waiting for 60 s")


def test_nothing_is_said_of_ranks_that_work_or_wait_for_less():
    assert lines(Attention(60), 300, lambda second: {0: BUSY, 1: IN_MESSAGE if second % 50 else BUSY}) == []


def test_a_process_that_was_stopped_itself_blames_nobody():
    attention = Attention(60)
    assert lines(attention, 10, lambda second: {0: BUSY, 1: BUSY}) == []
    assert lines(attention, 10, lambda second: {0: BUSY, 1: BUSY} if second else {}, start=1000.0) == []


def test_one_that_has_left_is_not_missed():
    attention = Attention(60)
    attention.heard(1, BUSY, 0.0)
    attention.forget(1)
    assert lines(attention, 100, lambda second: {0: BUSY}) == []
