"""ImageReward, arXiv 2304.05977."""

from flowtilt.io.published import Hub
from flowtilt.rewards.about.base import BuiltIn, PublishedScore

_BERT = Hub(
    "bert",
    "google-bert/bert-base-uncased",
    "86b5e0934494bd15c9632b12f734a8a67f723594",
    ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    "Apache-2.0",
    former=("bert-base-uncased",),
)
_WEIGHTS = Hub(
    "imagereward",
    "zai-org/ImageReward",
    "5736be03b2652728fb87788c9797b0570450ab72",
    ("ImageReward.pt",),
    "Apache-2.0",
    former=("THUDM/ImageReward",),
    elsewhere=("~/.cache/ImageReward/ImageReward.pt",),
)
_README = {"1.webp": 0.5811622738838196, "2.webp": 0.2745276093482971, "3.webp": -1.4131819009780884, "4.webp": -2.029569625854492}
_TOLERANCE = 0.02  # the README says that numbers differ slightly by device; ours are fp32
IMAGEREWARD = BuiltIn(
    name="imagereward",
    source="flowtilt.rewards.imagereward:ImageReward",
    differentiable=True,
    weights=(_WEIGHTS, _BERT),
    networks={"imagereward": "flowtilt.rewards.imagereward:meta_network"},
    paper_place=7,
    usual=(-2.5, 2.2),
    published=tuple(PublishedScore(image, score, _TOLERANCE) for image, score in _README.items()),
)
