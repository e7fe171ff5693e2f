"""Folders are layers, as docs/architecture.md draws them: no import runs upward."""

import ast
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "flowtilt"


def rows():
    """The row of each folder and file in the page's diagram, from the top."""
    diagram = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    found = {}
    for number, line in enumerate(diagram.strip().splitlines()):
        names = [word.removesuffix("/").removesuffix(".py") for word in line.split()]
        # what a row holds comes before its description
        found |= {name: number for name in takewhile(lambda name: any((SOURCE / end).exists() for end in (name, f"{name}.py")), names)}
    return found


def imports(file):
    """The first names below `flowtilt` that a file imports, with their lines, also inside of functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flowtilt":
            names = [node.module] if node.module != "flowtilt" else [f"flowtilt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("flowtilt.")]
        yield from ((name.split(".")[1], node.lineno) for name in names)


def test_no_import_runs_upward():
    row = rows()
    assert {"cli", "training", "io", "flow"} <= set(row)
    upward = [
        f"{file.relative_to(SOURCE)}:{line} imports {to}"
        for file in SOURCE.rglob("*.py")
        for here in [file.relative_to(SOURCE).with_suffix("").parts[0]]
        for to, line in imports(file)
        if row.get(to, len(row)) < row.get(here, -1)
    ]
    assert not upward
