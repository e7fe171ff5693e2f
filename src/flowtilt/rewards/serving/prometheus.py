"""A reward server's figures, in the text format that Prometheus reads (version 0.0.4)."""

import threading
from collections import Counter
from collections.abc import Iterable

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of the batch sizes' histogram."""


class Metrics:
    """Counts names of rewards, never anything of a request's contents. Threads may share it."""

    def __init__(self, rewards: Iterable[str]):
        self._rewards = list(rewards)
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._images: Counter[str] = Counter()
        self._unreadable: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(self._rewards, 0.0)
        self._batches: dict[str, Counter[int]] = {name: Counter() for name in self._rewards}

    def answered(self, reward: str, status: str) -> None:
        """A request has ended; `reward` is "" where it named none of the server's."""
        with self._lock:
            self._requests[reward, status] += 1

    def unreadable(self, reward: str, images: int) -> None:
        with self._lock:
            self._unreadable[reward] += images

    def scored(self, reward: str, images: int, seconds: float) -> None:
        """A call of a reward has returned."""
        with self._lock:
            self._images[reward] += images
            self._seconds[reward] += seconds
            self._batches[reward][images] += 1

    def text(self, waiting: int) -> str:
        """All of it; `waiting` images are not yet answered."""
        with self._lock:
            lines = _head("requests_total", "counter", "Requests answered, by reward and HTTP status.")
            lines += [_line("requests_total", n, reward=r, status=s) for (r, s), n in sorted(self._requests.items())]
            for name, kind, about, values in (
                ("images_total", "counter", "Images scored.", self._images),
                ("unreadable_images_total", "counter", "Images that could not be read.", self._unreadable),
                ("scoring_seconds_total", "counter", "Seconds spent in the reward.", self._seconds),
            ):
                lines += _head(name, kind, about) + [_line(name, values[r], reward=r) for r in self._rewards]
            lines += [*_head("waiting_images", "gauge", "Images taken and not yet answered."), _line("waiting_images", waiting)]
            lines += _head("batch_images", "histogram", "Images of one call of the reward.")
            for reward, sizes in self._batches.items():
                for bound in BUCKETS:
                    within = sum(n for size, n in sizes.items() if size <= bound)
                    lines.append(_line("batch_images_bucket", within, reward=reward, le=str(bound)))
                lines.append(_line("batch_images_bucket", sizes.total(), reward=reward, le="+Inf"))
                lines.append(_line("batch_images_sum", sum(size * n for size, n in sizes.items()), reward=reward))
                lines.append(_line("batch_images_count", sizes.total(), reward=reward))
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP flowtilt_{name} {about}", f"# TYPE flowtilt_{name} {kind}"]


def _line(name: str, value: float, **labels: str) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"flowtilt_{name}{{{inside}}} {value}" if labels else f"flowtilt_{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
