"""PickScore, arXiv 2305.01569."""

from flowtilt.io.published import Hub
from flowtilt.rewards.about.base import BuiltIn
from flowtilt.rewards.about.clip import TOKENIZER

_WEIGHTS = Hub("pickscore", "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", ("config.json", "model.safetensors"))
PICKSCORE = BuiltIn(
    name="pickscore",
    source="flowtilt.rewards.pickscore:PickScore",
    differentiable=True,
    weights=(_WEIGHTS, TOKENIZER),
    networks={"pickscore": "flowtilt.rewards.clip:vit_h14"},
    paper_place=3,
    detail_notes={"raw": "what papers print"},
    usual=(0.60, 1.0),
)
