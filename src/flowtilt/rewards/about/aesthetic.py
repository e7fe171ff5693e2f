"""LAION's improved aesthetic predictor."""

from flowtilt.io.published import Url
from flowtilt.rewards.about.base import BuiltIn
from flowtilt.rewards.about.clip import CLIP_L, CLIP_L_NETWORK, TOKENIZER

_HEAD = Url(
    "aesthetic",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/6934dd81792f086e613a121dbce43082cb8be85e/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    "Apache-2.0",
    size=3_714_759,
)
AESTHETIC = BuiltIn(
    name="aesthetic",
    source="flowtilt.rewards.aesthetic:Aesthetic",
    reads_prompt=False,
    weights=(_HEAD, CLIP_L, TOKENIZER),
    networks=CLIP_L_NETWORK,
    paper_place=6,
    usual=(2.0, 9.0),
)
