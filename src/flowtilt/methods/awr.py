"""FlowAWR, arXiv 2606.30376. The loss: objectives/awr.py."""

from typing import ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import NO_CLIP, WEIGHT, Contrast
from flowtilt.methods.forward import AdvantageSettings


class AWRSettings(AdvantageSettings):
    type: Literal["awr"] = "awr"
    """The method; "awr" is FlowAWR, arXiv 2606.30376: matching of a target that an image's energy has moved."""
    energy: Literal["exponential", "linear", "sparsemax"] = "exponential"
    """E of an advantage A in a group of k: k softmax(A / temperature) - 1, A / temperature, or k sparsemax(A / temperature) - 1."""
    temperature: float = Field(default=1.0, gt=0, le=WEIGHT)
    """What divides advantages in the energy."""
    energy_clip: float = Field(default=3.0, gt=0, le=NO_CLIP)
    """Energies count up to plus and minus this."""
    gate: bool = False
    """Divide energies by their own spread within the group, as the published GenEval and OCR recipes for sparse rewards do."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""
    adaptive: bool = True
    """Divide each squared error by its mean absolute error of x0, as published; false follows the exact direction of the tilted optimum."""

    objective: ClassVar[str] = "flowtilt.objectives.awr:AWR"

    @property
    def contrast(self) -> Contrast:
        return Contrast("deviation", "the old policy anchors nothing and this is plain energy-weighted matching")
