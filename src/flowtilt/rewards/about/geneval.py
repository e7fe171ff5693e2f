"""GenEval, arXiv 2310.11513."""

from flowtilt.io.published import Url
from flowtilt.rewards.about.base import BuiltIn, PublishedScore
from flowtilt.rewards.about.clip import CLIP_L, CLIP_L_NETWORK, TOKENIZER

_DETECTOR = Url(
    "mask2former",
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    "743b7d99015f1224c6d57fd4b14d04b15cc8ec72ae7ee7831e7c71d8873b7a54",
    "Apache-2.0",
    size=275_630_991,
    alias="mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",  # as GenEval's own script saves it
    # OpenMMLab's server is slow
    mirror="https://huggingface.co/tsbpp/geneval_mask2former/resolve/22b5a198cedf6b45e45165cf1c865d58de4a2832/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",
)
_CAT = {"include": [{"class": "cat", "count": 1}]}
GENEVAL = BuiltIn(
    name="geneval",
    source="flowtilt.rewards.geneval:GenEval",
    score_range=(0.0, 1.0),
    detail_ranges={"strict": (0.0, 1.0), "correct": (0.0, 1.0)},
    weights=(_DETECTOR, CLIP_L, TOKENIZER),
    networks={"mask2former": "flowtilt.rewards.geneval.detect:meta_network", **CLIP_L_NETWORK},
    plan_note="without the colours' crops, whose number depends on the images",
    paper_place=1,
    mean_over_tags=True,
    published=(PublishedScore("demo_image.jpg", 1.0, caption="a photo of a cat", tag="single_object", metadata=_CAT),),
)
