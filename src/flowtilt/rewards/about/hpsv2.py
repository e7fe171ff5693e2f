"""Human Preference Score v2.1, arXiv 2306.09341."""

from flowtilt.io.published import Hub
from flowtilt.rewards.about.base import BuiltIn
from flowtilt.rewards.about.clip import TOKENIZER

_COMMIT = "697403c78157020a1ae59d23f111aa58ced35b0a"
HPSV2 = BuiltIn(
    name="hpsv2",
    source="flowtilt.rewards.hpsv2:HPSv2",
    differentiable=True,
    weights=(Hub("hpsv2", "xswu/HPSv2", _COMMIT, ("HPS_v2.1_compressed.pt",), "Apache-2.0", 1_972_490_005), TOKENIZER),
    networks={"hpsv2": "flowtilt.rewards.clip:vit_h14"},
    paper_place=5,
    usual=(0.10, 0.45),
)
