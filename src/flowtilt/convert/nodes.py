"""Nodes of a syntax tree as text."""

import ast


def written(node: ast.AST) -> str:
    """A node as code, shortened to one line."""
    try:
        text = " ".join(ast.unparse(node).split())
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of terms
        return "…"
    return text if len(text) <= 80 else text[:79] + "…"


def dotted(node: ast.AST) -> str:
    """a.b.c as text; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""
