"""Processes that share one run. With one process every function is the identity.

A rank owns a contiguous share of a rollout's images; what it needs of the others comes through
`gather`, and gradients meet in one flat sum. Everything sent is a tensor: nothing is pickled.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowtilt.distributed import rendezvous, torchrun
from flowtilt.errors import UserError

LARGE = 2**22
"""Numbers of a tensor beyond which a sum over the ranks makes no copy of it."""


@dataclass
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    before_message: Callable[[], None] = field(default=lambda: None, compare=False)
    """What every rank does before a message to the others; see `sharding`."""
    in_message_since: ClassVar[float | None] = None
    """Since when this process has waited for the others in a message, by `time.monotonic`."""

    def share(self, number: int) -> range:
        """Which of `number` rows are this rank's; shares differ by at most one row."""
        return self.share_of(number, self.rank)

    def share_of(self, number: int, rank: int) -> range:
        """Which of `number` rows are another rank's."""
        return range(number * rank // self.size, number * (rank + 1) // self.size)

    @contextmanager
    def _message(self) -> Iterator[None]:
        World.in_message_since = time.monotonic()
        try:
            self.before_message()
            yield
        finally:
            World.in_message_since = None

    def gather(self, rows: Tensor, number: int) -> Tensor:
        """All `number` rows, in order, from each rank's share of them."""
        if self.size == 1:
            return rows
        longest = max(len(self.share_of(number, rank)) for rank in range(self.size))
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._message():
            dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[: len(self.share_of(number, rank))] for rank, part in enumerate(parts)])

    def gather_columns(self, columns: Mapping[str, Tensor], number: int, shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """`gather` of each named column [n, *shape], on the CPU; NaN where a rank has no such column."""
        names = dict.fromkeys(self.gather_json(list(columns)))
        blank = torch.full((len(self.share(number)), *shape), torch.nan)
        return {name: self.gather(columns.get(name, blank).to(self.device), number).cpu() for name in names}

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on the first rank, as JSON, on all of them; what it raises for the user is raised on all."""
        gathered: list[Any] = []
        if self.rank == 0:
            try:
                gathered = [[work(), None]]
            except UserError as error:
                gathered = [[None, str(error)]]
        value, complaint = self.gather_json(gathered)[0]
        if complaint is not None:
            raise UserError(complaint)
        return value

    def gather_json(self, values: Sequence[Any]) -> list[Any]:
        """Every rank's list, joined in the order of ranks."""
        if self.size == 1:
            return list(values)
        text = torch.tensor(list(json.dumps(list(values)).encode()), dtype=torch.uint8, device=self.device)
        length = torch.zeros(self.size, dtype=torch.long, device=self.device)
        length[self.rank] = len(text)
        with self._message():
            dist.all_reduce(length)
            padded = torch.zeros(int(length.max()), dtype=torch.uint8, device=self.device)
            padded[: len(text)] = text
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded)
        return [value for part, size in zip(parts, length.tolist(), strict=True) for value in json.loads(bytes(part[:size].tolist()))]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds tensors up over the ranks, in place, in one message; those beyond `LARGE` have one each, and no copy."""
        if self.size == 1:
            return
        large = [x for x in tensors if x.numel() > LARGE and x.is_contiguous()]
        small = [x for x in tensors if not any(x is other for other in large)]
        flat = torch.cat([x.flatten() for x in small]) if small else None
        with self._message():
            for x in [*large, *([] if flat is None else [flat])]:
                dist.all_reduce(x)
        if flat is not None:
            for x, part in zip(small, flat.split([x.numel() for x in small]), strict=True):
                x.copy_(part.view_as(x))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        value = torch.tensor([float(flag)], device=self.device)
        self.sum_([value])
        return bool(value)

    def barrier(self) -> None:
        if self.size > 1:
            with self._message():
                dist.barrier()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises a UserError on every rank where one has other facts (JSON) than the first: it names the rank and the fact."""
        ranks: list[dict[str, Any]] = self.gather_json([dict(facts)])
        for rank, theirs in enumerate(ranks):
            if differing := [name for name in ranks[0] | theirs if theirs.get(name) != ranks[0].get(name)]:
                name = differing[0]
                others = f" (and {', '.join(differing[1:4])}{', …' if len(differing) > 4 else ''})" if len(differing) > 1 else ""
                raise UserError(
                    f"ranks differ: rank {rank} has {name} = {_shown(theirs.get(name))}, rank 0 has {_shown(ranks[0].get(name))}{others}; "
                    "give every rank the same command, files and versions"
                )


def meet() -> dist.Store | None:
    """Where the processes that torchrun started find each other, once all of them are there; none without torchrun.

    Raises:
        UserError: some of them did not come, or the environment is not torchrun's.
    """
    rank, size, _ = torchrun.place()
    return rendezvous.meet(rank, size) if size > 1 else None


def start(store: dist.Store | None = None) -> World:
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on CPUs. Alone without torchrun.

    Args:
        store: what `meet` returned; none meets now.

    Raises:
        UserError: some of them did not come, or the environment is not torchrun's.
    """
    rank, size, local = torchrun.place()
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = store or meet()
        # longer than a reward server may stay away: one rank waits for it, the others for that rank
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=2))
    return World(rank, size, device)


def stop() -> None:
    """Leaves the group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has started this job anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job() -> str | None:
    """What names a torchrun job through its restarts: its --rdzv-id, or else the torchrun process; none without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def _shown(value: Any) -> str:
    """A value in a message; of a long one the end, by which paths differ."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else "…" + text[-59:]
