"""ClipScore, arXiv 2104.08718."""

from flowtilt.rewards.about.base import BuiltIn
from flowtilt.rewards.about.clip import CLIP_L, CLIP_L_NETWORK, TOKENIZER

CLIPSCORE = BuiltIn(
    name="clipscore",
    source="flowtilt.rewards.clipscore:ClipScore",
    differentiable=True,
    weights=(CLIP_L, TOKENIZER),
    networks=CLIP_L_NETWORK,
    paper_place=4,
    usual=(0.10, 0.45),
)
