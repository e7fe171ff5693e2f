"""What a reward says of itself, without importing torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowtilt.io.published import Published

Bounds = tuple[float, float]
"""The lowest and the highest score that there can be."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What any reward may say of itself. A user's own does so by attributes of these names; see `rewards.facts`.

    Args:
        score_range: the bounds of its scores, where there are any. They give an interval also where all prompts score alike.
        detail_ranges: those of its details, by name.
        reads_prompt: whether the score depends on the prompt; None is not known.
        differentiable: whether it has a gradient to the images.
        off_device: whether it computes elsewhere (a server, the CPU), so that it is asked while the next images are sampled.
        compares: whether a score depends on the other images of its prompt, so that it is called with all of them, and with no others.
        plan_note: what `flowtilt plan` says of its time and memory, a text or a function of the reward's options.
    """

    score_range: Bounds | None = None
    detail_ranges: Mapping[str, Bounds] = field(default_factory=dict)
    reads_prompt: bool | None = None
    differentiable: bool = False
    off_device: bool = False
    compares: bool = False
    plan_note: str | Callable[[Mapping[str, Any]], str] = ""

    def ranges(self, name: str) -> dict[str, Bounds]:
        """Bounds by column, for a reward of this name."""
        own = {name: self.score_range} if self.score_range else {}
        return own | {f"{name}/{detail}": bounds for detail, bounds in self.detail_ranges.items()}

    def plan_note_for(self, options: Mapping[str, Any]) -> str:
        """`plan_note` for these options."""
        return self.plan_note if isinstance(self.plan_note, str) else self.plan_note(options)


@dataclass(frozen=True)
class PublishedScore:
    """A score that the reward should give one of the reference images (`rewards.reference`).

    Args:
        image: the end of its address.
        score: published, or implied by what the image shows.
        tolerance: the greatest difference from it.
        caption: the prompt; "" is the image's own.
        tag, metadata: of that prompt.
    """

    image: str
    score: float
    tolerance: float = 0.0
    caption: str = ""
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BuiltIn(Facts):
    """One of flowtilt's own rewards.

    Args:
        name: what a recipe calls it.
        source: its function or class, as "module:name".
        weights: the files that it reads.
        networks: its models by name, each as "module:function", which returns a `rewards.networks.Network` on the meta device
            for images of so many pixels. The first reads every image; rewards that share a model give it the same name.
        packages: that it imports and the extra flowtilt[rewards] brings.
        variable: the environment variable that it can't do without, if there is one.
        paper_place: its place, from 1, in DiffusionNFT's table of eight, which "--rewards all" names; 0 is none.
        detail_notes: what a reader should know of a detail, by name.
        mean_over_tags: whether papers print the mean over tags, too.
        requests: how many requests to a server it makes, by its options, for prompts and images of each; none asks no server that
            costs money.
        check: raises UserError where options given by name make no sense, before anything is loaded or asked.
        service_options: options that say how its server is reached and paid, and change no score; a resumed run may set them anew.
        usual: where scores of ordinary images lie, for `flowtilt doctor --rewards`.
        published: scores of the reference images.
    """

    name: str
    source: str
    reads_prompt: bool | None = True
    weights: tuple[Published, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    variable: str = ""
    paper_place: int = 0
    detail_notes: Mapping[str, str] = field(default_factory=dict)
    mean_over_tags: bool = False
    requests: Callable[[Mapping[str, Any], int, int], float] | None = None
    check: Callable[[str, Mapping[str, Any]], None] | None = None
    service_options: tuple[str, ...] = ()
    usual: Bounds | None = None
    published: tuple[PublishedScore, ...] = ()
