"""What a judge may cost: calls, tokens, money. A run ends before it is exceeded."""

import threading
from dataclasses import dataclass

from flowtilt.errors import UserError


@dataclass(frozen=True)
class Spent:
    """What was paid for.

    Args:
        calls: answers of the server.
        read, written: tokens of the requests and of the answers.
    """

    calls: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.calls + other.calls, self.read + other.read, self.written + other.written)

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.calls - other.calls, self.read - other.read, self.written - other.written)

    def __mul__(self, times: int) -> "Spent":
        return Spent(self.calls * times, self.read * times, self.written * times)

    @property
    def tokens(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Limits:
    """The most that may be spent, 0 being no limit, and prices for a million tokens read and written."""

    max_calls: int = 0
    max_tokens: int = 0
    max_cost: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, spent: Spent) -> float:
        return (spent.read * self.price_in + spent.written * self.price_out) / 1e6

    def exceeded(self, spent: Spent) -> str:
        """The limit that so much exceeds; "" where none is."""
        if self.max_calls and spent.calls > self.max_calls:
            return f"max_calls = {self.max_calls}"
        if self.max_tokens and spent.tokens > self.max_tokens:
            return f"max_tokens = {self.max_tokens}"
        return f"max_cost = {self.max_cost:g}" if self.max_cost and self.cost(spent) > self.max_cost else ""


class Budget:
    """Counts what this process spends, and what it has asked for and not got yet.

    Several processes have equal shares of what was left when they began.
    """

    def __init__(self, name: str, limits: Limits):
        self._name, self.limits = name, limits
        self.before, self._own, self._begun = Spent(), Spent(), Spent()
        self._share = 1
        self._lock = threading.Lock()

    def begin(self, before: Spent, share: int) -> None:
        """Counts as one of `share` processes, on top of what all of them spent `before`."""
        with self._lock:
            self.before, self._share = before, share

    @property
    def own(self) -> Spent:
        """What this process has spent since it began."""
        return self._own

    def reserve(self, most: Spent) -> None:
        """Takes note of a request that will cost at most so much.

        Raises:
            UserError: the budget does not reach.
        """
        with self._lock:
            everyone = self.before + (self._own + self._begun + most) * self._share
            if limit := self.limits.exceeded(everyone):
                key = f"rewards.{self._name}.{limit.partition(' ')[0]}"
                raise UserError(f"rewards.{self._name}: its budget ends here, {limit}, with {self.told()}; raise it to go on: {key}=…")
            self._begun += most

    def settle(self, most: Spent, cost: Spent | None) -> None:
        """A reserved request is over, and has cost so much; nothing where it failed."""
        with self._lock:
            self._begun -= most
            self._own += cost or Spent()

    def told(self) -> str:
        """What was spent, in words."""
        all_of_it = self.before + self._own * self._share
        money = f", {self.limits.cost(all_of_it):.4g} in money" if self.limits.price_in or self.limits.price_out else ""
        about = "about " if self._share > 1 else ""
        return f"{about}{all_of_it.calls:,} calls and {all_of_it.tokens:,} tokens{money} spent"
