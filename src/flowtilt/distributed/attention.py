"""Which rank to name when a job stands still: one that is not heard of any more, or one for which the others wait in a message."""

BUSY, IN_MESSAGE, STUCK = b"b", b"m", b"s"
"""What ranks report: at work, waiting for the others in a message, and waiting there for longer than the patience."""
PATIENCE = 60.0
"""Seconds after which a rank is named."""
REPORTS = 30
"""Reports of a rank within the patience."""
LATE = 0.25
"""Share of the patience beyond which a report is no longer what a rank does now."""


class Attention:
    """What is known of ranks, and of which of them something was said: once each."""

    def __init__(self, patience: float = PATIENCE):
        self._patience = patience
        self._heard: dict[int, tuple[float, bytes]] = {}
        self._looked: float | None = None
        self._deaf_until = -float("inf")
        self._named: set[int] = set()

    def heard(self, rank: int, report: bytes, now: float) -> None:
        """Takes note of a report."""
        self._heard[rank] = (now, report)

    def forget(self, rank: int) -> None:
        """This rank has left."""
        self._heard.pop(rank, None)

    def unusual(self, now: float) -> list[str]:
        """A line for each rank that is silent, or for which others wait, for longer than the patience; to be called often."""
        if self._looked is not None and now - self._looked > self._patience / 2:  # this process itself was stopped: nobody could be heard
            self._heard = {rank: (now, report) for rank, (_, report) in self._heard.items()}
            self._deaf_until = now + self._patience  # what ranks reported meanwhile is heard only now
        self._looked = now
        if now < self._deaf_until:
            return []
        ages = {rank: now - at for rank, (at, _) in self._heard.items()}
        silent = [rank for rank, age in ages.items() if age > self._patience]
        current = {rank: report for rank, (_, report) in self._heard.items() if ages[rank] <= LATE * self._patience}
        awaited = [rank for rank, report in current.items() if report == BUSY] if STUCK in current.values() and not silent else []
        lines = [(rank, f"rank {rank} is silent for {self._patience:.0f} s: stopped, or its machine is out of reach") for rank in silent]
        lines += [(rank, f"rank {rank} keeps the others waiting for {self._patience:.0f} s: still at work") for rank in awaited]
        said = [f"{line}; the others go on waiting" for rank, line in lines if rank not in self._named]
        self._named |= {rank for rank, _ in lines}
        return said
