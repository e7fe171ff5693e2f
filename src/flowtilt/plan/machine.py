"""GPUs that can be rented, by what their makers promise."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from flowtilt.errors import UserError


@dataclass(frozen=True)
class GPU:
    """Published figures, without sparsity.

    Args:
        memory: GiB.
        half, tf32, single: TFLOP/s of products in bf16 or fp16, in TF32, in fp32.
        link: what joins GPUs of a machine, a name of `LINKS`.
    """

    memory: float
    half: float
    tf32: float
    single: float
    link: str = "pcie"

    def rate(self, precision: str) -> float:
        """FLOP/s of "half", "tf32" or "single"."""
        return 1e12 * {"half": self.half, "tf32": self.tf32, "single": self.single}[precision]


GPUS = {
    "h100": GPU(80, 989.4, 494.7, 66.9, "nvlink"),  # SXM; H100 datasheet
    "h200": GPU(141e9 / 2**30, 989.4, 494.7, 66.9, "nvlink"),  # H200 datasheet; the memory is in decimal units there
    "a100": GPU(80, 312, 156, 19.5, "nvlink3"),  # A100 datasheet
    "l40s": GPU(48, 362, 183, 91.6),  # L40S datasheet
    "4090": GPU(24, 165.2, 82.6, 82.6),  # Ada architecture whitepaper, accumulated in fp32
    "3090": GPU(24, 71, 35.6, 35.6),  # GA102 architecture whitepaper, accumulated in fp32
}


LINKS = {
    "nvlink": 450.0,  # NVLink 4, each GPU and direction; H100 datasheet: 900 both ways
    "nvlink3": 300.0,  # A100 datasheet: 600 both ways
    "pcie": 32.0,  # PCIe 4.0 x16, each direction
    "infiniband": 400.0,  # a machine's 8 ports of NDR, 400 Gb/s each, as in a DGX H100
    "ethernet": 12.5,  # a machine's one port of 100 Gb/s
}
"""GB/s in one direction, as makers promise."""
LINK_REACHED = 0.7
"""Share of a link that messages are taken to reach, an assumption."""

REACHED = {False: 0.24, True: 0.37}
"""Utilisation measured in sampling and training: eager on an H200, compiled on an H100 (docs/results/performance.md)."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Args:
        gpu: a name of `GPUS`.
        gpus: how many.
        nodes: machines that they are in, equally many in each.
        inside, between: GB/s in one direction, of each GPU to the others of its machine and of a machine to the others; or a name of
            `LINKS`. None of the first is what joins such GPUs.
        memory: GiB of each; none is what the GPU has.
        utilisation: the share of each precision's peak that a run is assumed to reach, in (0, 1]; none is what was measured.

    Raises:
        UserError: no such GPU, or a number out of range.
    """

    gpu: str = "h100"
    gpus: int = 1
    nodes: int = 1
    inside: str | None = None
    between: str = "infiniband"
    memory: float | None = None
    utilisation: float | None = None

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"plan: no figures for the GPU {self.gpu!r}; there are {', '.join(GPUS)}; --gpu-memory sets its memory alone")
        if self.gpus < 1:
            raise UserError(f"plan: --gpus must be at least 1, not {self.gpus}")
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise UserError(f"plan: --gpu-memory must be more than 0 GiB, not {self.memory:g}")
        if self.gpus % self.nodes:
            raise UserError(f"plan: --nodes {self.nodes} does not divide --gpus {self.gpus}; each machine is taken to have as many")
        _speed("--link", self.link)
        _speed("--network", self.between)
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise UserError(f"plan: --utilisation must be above 0 and at most 1, not {self.utilisation:g}")

    @property
    def gib(self) -> float:
        """Memory of one GPU."""
        return GPUS[self.gpu].memory if self.memory is None else self.memory

    @property
    def link(self) -> str:
        """What joins the GPUs of a machine."""
        return GPUS[self.gpu].link if self.inside is None else self.inside

    @property
    def slowest(self) -> float:
        """Bytes per second, of the slowest link of a ring around all GPUs."""
        inside, between = _speed("--link", self.link), _speed("--network", self.between)
        return 1e9 * LINK_REACHED * (inside if self.nodes == 1 else min(inside, between))

    def share(self, rows: int) -> int:
        """The most of `rows` that one GPU gets; see `distributed.World.share`."""
        return -(-rows // self.gpus)

    def groups(self, prompts: int, images_per_prompt: int) -> int:
        """The most prompts of a rollout that the images of one GPU belong to."""
        images = prompts * images_per_prompt
        ends = [images * rank // self.gpus for rank in range(self.gpus + 1)]
        return max((end - 1) // images_per_prompt - start // images_per_prompt + 1 for start, end in pairwise(ends) if start < end)

    def reached(self, compiled: bool) -> float:
        """The share of each precision's peak that a run is assumed to reach."""
        return REACHED[compiled] if self.utilisation is None else self.utilisation

    def hours(self, flops: Mapping[str, float], utilisation: float) -> float:
        """Hours that work takes, each precision at its own peak; twice the GPUs take half the time."""
        seconds = sum(count / GPUS[self.gpu].rate(precision) for precision, count in flops.items())
        return seconds / (self.gpus * utilisation) / 3600


def _speed(option: str, told: str) -> float:
    """GB/s."""
    if told in LINKS:
        return LINKS[told]
    try:
        found = float(told)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise UserError(f"plan: {option} is a number of GB/s or one of {', '.join(LINKS)}, not {told!r}")
    return found
