"""DiffusionNFT, arXiv 2509.16117. The loss: objectives/nft.py."""

from typing import ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import NO_CLIP, WEIGHT, Contrast
from flowtilt.methods.forward import AdvantageSettings


class NFTSettings(AdvantageSettings):
    type: Literal["nft"] = "nft"
    """The method; "nft" is DiffusionNFT, arXiv 2509.16117."""
    beta: float = Field(default=1.0, gt=0, le=WEIGHT)
    """How far the implicit positive and negative velocities stand from the old policy's."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""
    adaptive: bool = True
    """Divide each squared error of x0 by its mean absolute error, as published; false has the plain square, small near data."""

    objective: ClassVar[str] = "flowtilt.objectives.nft:NFT"

    @property
    def contrast(self) -> Contrast:
        return Contrast("deviation", "objective.beta does nothing and this is plain advantage-weighted matching")
