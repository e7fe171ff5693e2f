"""`flowtilt check`: whether a recipe runs on this machine, tried in minutes and without training."""

from flowtilt.check.checklist import Checklist
from flowtilt.check.run import check

__all__ = ["Checklist", "check"]
