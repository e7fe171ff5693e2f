"""What a configuration may compute with: operators, functions and tables that can do nothing else."""

import ast
import operator
import os
from collections.abc import Callable
from typing import Any


class Config(dict[str, Any]):
    """A ConfigDict: keys that are read and set as attributes."""

    def flat(self, prefix: str = "") -> dict[str, Any]:
        """Values by dotted key; a plain dict is a value."""
        found: dict[str, Any] = {}
        for key, value in self.items():
            found |= value.flat(f"{prefix}{key}.") if isinstance(value, Config) else {f"{prefix}{key}": value}
        return found


OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "str": str, "bool": bool, "len": len, "min": min, "max": max, "round": round, "abs": abs, "list": list,
    "tuple": tuple, "dict": dict, "os.path.join": os.path.join, "os.path.basename": os.path.basename, "os.path.dirname": os.path.dirname,
    "os.getcwd": lambda: "", "ml_collections.ConfigDict": lambda *given: Config(*given),
    "ml_collections.config_dict.ConfigDict": lambda *given: Config(*given), "config_dict.ConfigDict": lambda *given: Config(*given),
}  # fmt: skip
