"""Values of a configuration that is written as Python: read from its syntax tree, never executed.

DiffusionNFT's and flow_grpo's configurations are files of functions that fill an `ml_collections.ConfigDict`. Here they are walked
through node by node: assignments, arithmetic, comparisons, `if`, `while` and `for`, calls of functions in the same file and of the
file beside it that is loaded as `base`. Everything else is code, and refused with its line.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from flowtilt.convert.allowed import CALLS, OPERATORS, Config
from flowtilt.convert.nodes import dotted, written
from flowtilt.errors import UserError
from flowtilt.io.nested import size

STEPS = 100_000
"""Nodes that are evaluated at most: a configuration has some hundred."""
LETTERS = 100
"""Elements and letters of a value that count as one node."""
LARGEST = 10**15
"""A number beyond this is no setting."""
GPUS = ("gpu_number", "n_gpus", "num_gpus", "gpu_num")
"""What these configurations call the number of GPUs."""
MODULES = ("os", "imp", "importlib", "ml_collections", "copy", "math")


@dataclass
class Read:
    """What one configuration says.

    Args:
        values: by dotted key.
        own: the keys that the file itself sets; the others are defaults of the file beside it.
        gpus: how many it was written for, where it says so.
    """

    values: dict[str, Any]
    own: set[str]
    gpus: int | None


class _Returned(Exception):
    def __init__(self, value: Any):
        self.value = value


class _Left(Exception):
    """`break` and `continue`."""

    def __init__(self, node: ast.Break | ast.Continue):
        self.node = node


@dataclass
class _File:
    """A file, read once: its functions and what it assigns at the top."""

    path: Path
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)


def configurations(path: Path) -> list[str]:
    """The names of the functions in a file that take nothing: its configurations."""
    tree = _parsed(path)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [one.name for one in functions if not one.name.startswith("_") and not one.args.args and not one.args.kwonlyargs]


def read_python(path: Path, name: str) -> Read:
    """What the configuration `name` of a file says.

    Raises:
        UserError: there is no such function, or something that would have to be executed, with its line.
    """
    reader = _Reader()
    try:
        file = reader.load(path)
        if name not in file.functions:
            raise UserError(f"convert {path}: there is no function {name}; there are {', '.join(configurations(path)) or 'none'}")
        found = reader.call(file, file.functions[name], [], {}, file.functions[name])
    except RecursionError:
        raise UserError(f"convert {path}: nested too deeply") from None
    if not isinstance(found, Config):
        raise UserError(f"convert {path}: {name} returns no ConfigDict")
    values = found.flat()
    own = set(values) if not reader.base else reader.assigned & values.keys()
    return Read(values, own, reader.gpus)


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"convert {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"convert {path}: not Python: {getattr(error, 'msg', error)}, line {getattr(error, 'lineno', 1)}") from None


class _Reader:
    """Walks through the files of one configuration."""

    def __init__(self) -> None:
        self.gpus: int | None = None
        self.base = False
        """Whether values come from another file, too."""
        self.assigned: set[str] = set()
        """Dotted keys that the file itself assigns."""
        self._files: dict[Path, _File] = {}
        self._left = STEPS
        self._depth = 0
        self._main: Path | None = None

    def load(self, path: Path) -> _File:
        """A file's functions and names."""
        if path in self._files:
            return self._files[path]
        self._main = self._main or path
        file = self._files[path] = _File(path)
        for node in _parsed(path).body:
            match node:
                case ast.FunctionDef():
                    file.functions[node.name] = node
                case ast.Import() | ast.ImportFrom():
                    self._imported(file, node)
                case ast.Expr(value=ast.Constant()):
                    pass
                case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                    self._statement(file, node, file.names)
                case _:
                    self._refuse(file, node)
        return file

    def _imported(self, file: _File, node: ast.Import | ast.ImportFrom) -> None:
        names = [one.name for one in node.names]
        modules = names if isinstance(node, ast.Import) else [node.module or ""]
        for module in modules:
            if module.partition(".")[0] in (*MODULES, "__future__", "typing"):
                continue
            beside = _beside(file.path, module)
            if not beside.is_file():
                self._refuse(file, node)
            there = self.load(beside)
            if isinstance(node, ast.Import):
                file.names[node.names[0].asname or module.rpartition(".")[2]] = there
            else:
                file.names |= {one.asname or one.name: there.functions.get(one.name, there.names.get(one.name)) for one in node.names}

    def call(self, file: _File, function: ast.FunctionDef, given: list[Any], named: Mapping[str, Any], node: ast.AST) -> Any:
        """What a function of a file returns."""
        if self._depth > 20 or function.args.posonlyargs or function.args.vararg or function.args.kwarg:
            self._refuse(file, node)
        arguments = function.args.args + function.args.kwonlyargs
        defaults = [None] * (len(function.args.args) - len(function.args.defaults)) + list(function.args.defaults)
        defaults += list(function.args.kw_defaults)
        local: dict[str, Any] = {}
        for k, (argument, default) in enumerate(zip(arguments, defaults, strict=True)):
            if k < len(given):
                local[argument.arg] = given[k]
            elif argument.arg in named:
                local[argument.arg] = named[argument.arg]
            elif default is not None:
                local[argument.arg] = self._value(file, default, file.names)
            else:
                self._refuse(file, node)
        self._note_gpus(local)
        self._depth += 1
        try:
            self._block(file, function.body, local)
        except _Returned as returned:
            self.base |= file.path != self._main
            return returned.value
        except _Left as left:
            self._refuse(file, left.node)
        finally:
            self._depth -= 1
        return None

    def _note_gpus(self, local: Mapping[str, Any]) -> None:
        for name in GPUS:
            if isinstance(value := local.get(name), int) and not isinstance(value, bool):
                self.gpus = value

    # statements ------------------------------------------------------------------------------------------

    def _block(self, file: _File, body: list[ast.stmt], local: dict[str, Any]) -> None:
        for node in body:
            self._statement(file, node, local)

    def _statement(self, file: _File, node: ast.stmt, local: dict[str, Any]) -> None:
        self._spend(file, node)
        match node:
            case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.Import() | ast.ImportFrom():
                if isinstance(node, ast.Import | ast.ImportFrom):
                    self._imported(file, node)
            case ast.Return(value=value):
                raise _Returned(value and self._value(file, value, local))
            case ast.Assign(targets=targets, value=value):
                found = self._value(file, value, local)
                for target in targets:
                    self._assign(file, target, found, local)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._assign(file, target, self._value(file, value, local), local)
            case ast.AugAssign(target=target, op=op, value=value):
                before = self._value(file, target, local)
                self._assign(file, target, self._combined(file, node, op, before, self._value(file, value, local)), local)
            case ast.If(test=test, body=body, orelse=other):
                self._block(file, body if self._value(file, test, local) else other, local)
            case ast.While(test=test, body=body, orelse=[]):
                while self._value(file, test, local):
                    if not self._round(file, body, local):
                        break
            case ast.For(target=target, iter=values, body=body, orelse=[]):
                found = self._value(file, values, local)
                for value in list(found) if isinstance(found, list | tuple | dict) else self._refuse(file, values):
                    self._assign(file, target, value, local)
                    if not self._round(file, body, local):
                        break
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Attribute(attr="unlocked")))], body=body):
                self._block(file, body, local)
            case ast.Assert(test=test):
                if not self._value(file, test, local):
                    raise UserError(f"convert {_place(file, node)}: what it asserts does not hold: {written(test)}")
            case ast.Break() | ast.Continue():
                raise _Left(node)
            case _:
                self._refuse(file, node)

    def _round(self, file: _File, body: list[ast.stmt], local: dict[str, Any]) -> bool:
        """One round of a loop; false where it was left."""
        try:
            self._block(file, body, local)
        except _Left as left:
            return isinstance(left.node, ast.Continue)
        return True

    def _assign(self, file: _File, target: ast.expr, value: Any, local: dict[str, Any]) -> None:
        match target:
            case ast.Name(id=name):
                local[name] = value
                self._note_gpus({name: value})
                return
            case ast.Attribute(value=owner, attr=name) if isinstance(found := self._value(file, owner, local), Config):
                found[name] = value
                self._made(file, target, found)
                if file.path == self._main and (key := dotted(target)):
                    self.assigned.add(key.partition(".")[2])
                return
            case ast.Subscript(value=owner, slice=key) if isinstance(found := self._value(file, owner, local), dict):
                if isinstance(name := self._value(file, key, local), str | int):
                    found[name] = value
                    self._made(file, target, found)
                    return
            case ast.Tuple(elts=targets) if isinstance(value, list | tuple) and len(value) == len(targets):
                for one, part in zip(targets, value, strict=True):
                    self._assign(file, one, part, local)
                return
        self._refuse(file, target)

    # expressions -----------------------------------------------------------------------------------------

    def _value(self, file: _File, node: ast.expr, local: Mapping[str, Any]) -> Any:
        self._spend(file, node)
        ask = lambda one: self._value(file, one, local)  # noqa: E731
        match node:
            case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
                return self._made(file, node, value)
            case ast.Name(id=name):
                for names in (local, file.names, {"__file__": str(file.path)}):
                    if name in names:
                        return names[name]
            case ast.Attribute(value=owner, attr=name) if not _module(node):
                found = ask(owner)
                if isinstance(found, Config) and name in found:
                    return found[name]
            case ast.List(elts=elements):
                return self._made(file, node, [ask(one) for one in elements])
            case ast.Tuple(elts=elements):
                return self._made(file, node, tuple(ask(one) for one in elements))
            case ast.Dict(keys=keys, values=values):
                names = [ask(key) for key in keys if key]
                if len(names) == len(keys) and all(isinstance(name, str | int) for name in names):
                    return self._made(file, node, dict(zip(names, map(ask, values), strict=True)))
            case ast.Subscript(value=owner, slice=key) if not isinstance(key, ast.Slice):
                try:
                    return ask(owner)[ask(key)]
                except (LookupError, TypeError):
                    pass
            case ast.BinOp(left=left, op=op, right=right):
                return self._combined(file, node, op, ask(left), ask(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(value := ask(operand), int | float):
                return -value
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not ask(operand)
            case ast.BoolOp(op=op, values=values):
                found = None
                for one in values:
                    found = ask(one)
                    if bool(found) == isinstance(op, ast.Or):
                        break
                return found
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [ask(left), *map(ask, others)]
                return all(self._combined(file, node, op, a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
            case ast.IfExp(test=test, body=body, orelse=other):
                return ask(body) if ask(test) else ask(other)
            case ast.JoinedStr(values=values) if not any(isinstance(one, ast.FormattedValue) and one.format_spec for one in values):
                parts = [ask(one.value) if isinstance(one, ast.FormattedValue) else ask(one) for one in values]
                return self._made(file, node, "".join(map(str, parts)))
            case ast.Call():
                return self._made(file, node, self._called(file, node, local))
        self._refuse(file, node)

    def _called(self, file: _File, node: ast.Call, local: Mapping[str, Any]) -> Any:
        name = dotted(node.func)
        given = [self._value(file, one, local) for one in node.args if not isinstance(one, ast.Starred)]
        named = {one.arg: self._value(file, one.value, local) for one in node.keywords if one.arg}
        if len(given) < len(node.args) or len(named) < len(node.keywords):
            self._refuse(file, node)
        if name in ("imp.load_source", "importlib.import_module"):
            beside = _beside(file.path, str(given[0])) if given else file.path
            if not beside.is_file():
                raise UserError(f"convert {_place(file, node)}: needs {beside.name}, which is not beside it; put it there")
            return self.load(beside)
        if name in CALLS:
            try:
                return CALLS[name](*given, **named)
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"convert {_place(file, node)}: {written(node)}: {error}") from None
        owner, _, last = name.rpartition(".")
        where = local.get(owner, file.names.get(owner)) if owner else file
        if isinstance(where, _File) and last in where.functions:
            return self.call(where, where.functions[last], given, named, node)
        if isinstance(function := file.names.get(name), ast.FunctionDef):
            there = next((other for other in self._files.values() if function in other.functions.values()), file)
            return self.call(there, function, given, named, node)
        self._refuse(file, node)

    def _combined(self, file: _File, node: ast.AST, op: ast.AST, a: Any, b: Any) -> Any:
        """An operator's value; only numbers are multiplied, and only numbers, texts and lists are added."""
        plain = all(isinstance(one, int | float) for one in (a, b))
        if type(op) in OPERATORS and (plain or not isinstance(op, ast.Mult | ast.Mod)):
            try:
                found = OPERATORS[type(op)](a, b)
            except (TypeError, ZeroDivisionError, OverflowError) as error:
                raise UserError(f"convert {_place(file, node)}: {written(node)}: {error}") from None
            return self._made(file, node, found)
        if isinstance(op, ast.Pow) and plain and 0 < abs(a) <= 1024 and isinstance(b, int) and abs(b) <= 32:
            return self._made(file, node, a**b)
        self._refuse(file, node)

    # bounds ----------------------------------------------------------------------------------------------

    def _spend(self, file: _File, node: ast.AST, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise UserError(f"convert {_place(file, node)}: a loop that does not end, or values that grow")

    def _made(self, file: _File, node: ast.AST, value: Any) -> Any:
        """The value, once it is known to be of a size and a number that settings have."""
        if isinstance(value, int | float) and not abs(value) < LARGEST:
            self._refuse(file, node)
        self._spend(file, node, size(value, LETTERS * (self._left + 1)) // LETTERS)
        return value

    def _refuse(self, file: _File, node: ast.AST) -> NoReturn:
        raise UserError(
            f"convert {_place(file, node)}: `{written(node)}` is code, and a configuration is not executed; write its value there"
        )


def _beside(path: Path, module: str) -> Path:
    """The file of a module beside another; a folder, which is no file, where the name is none."""
    name = module.rpartition(".")[2]
    return path.with_name(f"{name}.py") if name.isidentifier() and len(name) < 200 else path.parent


def _place(file: _File, node: ast.AST) -> str:
    return f"{file.path}:{getattr(node, 'lineno', 1)}"


def _module(node: ast.Attribute) -> bool:
    return dotted(node).partition(".")[0] in MODULES
