"""What a recipe will ask of a machine, computed before there is one: parameters, memory, work, hours.

Models are built on torch's meta device, which has shapes and no numbers, and flowtilt's own code runs on
them: what is counted is what a run does. `docs/explain/plan.md` has the rules.
"""

from flowtilt.plan.machine import GPUS, Machine
from flowtilt.plan.plan import Plan, make_plan
from flowtilt.plan.within import Proposal, proposal

__all__ = ["GPUS", "Machine", "Plan", "Proposal", "make_plan", "proposal"]
