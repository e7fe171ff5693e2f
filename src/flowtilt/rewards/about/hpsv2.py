"""Human Preference Score v2.1, arXiv 2306.09341."""

from flowtilt.io.published import Hub
from flowtilt.rewards.about.base import BuiltIn
from flowtilt.rewards.about.clip import TOKENIZER

_WEIGHTS = Hub(
    "hpsv2",
    "xswu/HPSv2",
    "697403c78157020a1ae59d23f111aa58ced35b0a",
    ("HPS_v2.1_compressed.pt",),
    "Apache-2.0",
    1_972_490_005,
    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
)
HPSV2 = BuiltIn(
    name="hpsv2",
    source="flowtilt.rewards.hpsv2:HPSv2",
    differentiable=True,
    weights=(_WEIGHTS, TOKENIZER),
    networks={"hpsv2": "flowtilt.rewards.clip:vit_h14"},
    paper_place=5,
    usual=(0.10, 0.45),
)
