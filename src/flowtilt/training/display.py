"""What a person sees while a run is going: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from flowtilt.errors import printable


class Display:
    """A run's progress on stderr; silent on every rank but the first.

    Args:
        progress: the metric that is shown, and its name there.
    """

    def __init__(self, steps: int, start: int, progress: tuple[str, str], quiet: bool = False, score_name: str = "score"):
        self._quiet, self._score_name, self._progress = quiet, score_name, progress
        self._score: float | None = None
        self._bar = tqdm(
            total=steps, initial=start, unit="rollout", dynamic_ncols=True, disable=quiet or not sys.stderr.isatty(), smoothing=0.1
        )
        self._steps, self._start = steps, start
        self._since = self._last = time.monotonic()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each rollout."""
        phases = {name.removeprefix("time/"): seconds for name, seconds in metrics.items() if name.startswith("time/")}
        longest = " ".join(f"{name} {seconds:.2f}s" for name, seconds in sorted(phases.items(), key=lambda item: -item[1])[:3])
        judged = "" if self._score is None else f"{self._score_name} {self._score:.3f} · "
        metric, name = self._progress
        score_text = f"{name} {metrics.get(metric, float('nan')):.3f}"
        text = f"{score_text} · {judged}{metrics['images_per_second']:.0f} img/s · {longest}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and not self._quiet and now - self._last > 10:
            left = (now - self._since) / (step - self._start) * (self._steps - step)
            print(f"{step}/{self._steps} · {text} · {left:.0f} s left", file=sys.stderr, flush=True)
            self._last = now

    def evaluation(self, step: int, score: float, by_tag: Mapping[str, float]) -> None:
        """After each evaluation."""
        self._score = score
        tags = " ".join(f"{tag} {value:.2f}" for tag, value in by_tag.items())
        self.say(f"after {step} rollout{'s' * (step != 1)}: {self._score_name} {score:.3f}" + (f" ({tags})" if tags else ""))

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._quiet:
            self._bar.write(printable(text), file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self._bar.close()
