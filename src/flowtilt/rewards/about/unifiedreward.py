"""UnifiedReward, arXiv 2503.05236. Its model is on a server that the user starts."""

from flowtilt.rewards.about.base import BuiltIn

UNIFIEDREWARD = BuiltIn(
    name="unifiedreward",
    source="flowtilt.rewards.unifiedreward:UnifiedReward",
    off_device=True,
    plan_note="on its server while images are sampled",
    variable="FLOWTILT_UNIFIEDREWARD_URL",
    paper_place=8,
    service_options=("server", "workers", "timeout", "patience", "max_missing"),
)
