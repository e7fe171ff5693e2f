"""The playground's verifier, and its smooth stand-in with a gradient."""

from dataclasses import replace

from flowtilt.rewards.about.base import BuiltIn

PLAYGROUND = BuiltIn(name="playground", source="flowtilt.rewards.playground:Playground", score_range=(0.0, 1.0), plan_note="on the CPU")
STRICT = replace(PLAYGROUND, name="playground_strict", source="flowtilt.rewards.playground:PlaygroundStrict")
PARTIAL = replace(PLAYGROUND, name="playground_partial", source="flowtilt.rewards.playground:PlaygroundPartial")
SMOOTH = replace(PLAYGROUND, name="playground_smooth", source="flowtilt.rewards.playground:PlaygroundSmooth", differentiable=True)
