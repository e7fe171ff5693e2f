"""The size of an image as a JPEG file, arXiv 2305.13301."""

from flowtilt.rewards.about.base import BuiltIn

COMPRESSIBILITY = BuiltIn(
    name="jpeg_compressibility", source="flowtilt.rewards.jpeg:compressibility", reads_prompt=False, plan_note="on the CPU"
)
INCOMPRESSIBILITY = BuiltIn(
    name="jpeg_incompressibility", source="flowtilt.rewards.jpeg:incompressibility", reads_prompt=False, plan_note="on the CPU"
)
