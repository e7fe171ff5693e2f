"""HPSv3, arXiv 2508.03789: a preference head on Qwen2-VL-7B."""

from flowtilt.io.published import Hub
from flowtilt.rewards.about.base import BuiltIn

# neither repository's commit could be looked up where this was written; `flowtilt download` checks what the hub states of "main"
_WEIGHTS = Hub("hpsv3", "MizzenAI/HPSv3", "main", ("HPSv3.safetensors",), "Apache-2.0")
_TOKENIZER = Hub(
    "qwen2-vl",
    "Qwen/Qwen2-VL-7B-Instruct",
    "main",
    ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    "Apache-2.0",
)
HPSV3 = BuiltIn(
    name="hpsv3",
    source="flowtilt.rewards.hpsv3:HPSv3",
    weights=(_WEIGHTS, _TOKENIZER),
    networks={"hpsv3": "flowtilt.rewards.hpsv3:meta_network"},
    plan_note="its captions' own length; it is taken to be 100 tokens",
)
