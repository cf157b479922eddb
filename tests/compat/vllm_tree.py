"""Reads names, parameters and members out of a vLLM source tree, by its syntax alone."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Found(NamedTuple):
    """Where a name is defined."""

    module: str
    node: ast.AST


class VllmTree:
    """The sources below a folder that holds the package `vllm`.

    Args:
        folder: an unpacked wheel, a checkout, or site-packages.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Classes are asked about again and again.
        self._parse, self.members, self.words = cache(self._parse_file), cache(self._members), cache(self._words)

    def has(self, module: str, name: str = "") -> bool:
        """Returns whether a module exists and, with a name, defines or passes it on."""
        return self._parse(module) is not None if not name else self._find(module, name) is not None

    def takes(self, module: str, name: str) -> set[str]:
        """Returns the parameters of a function, or the fields and constructor's parameters of a class."""
        found = self._find(module, name)
        if found is None:
            return set()
        if isinstance(found.node, ast.ClassDef):
            constructor = self._find(found.module, f"{found.node.name}.__init__")
            own = _parameters(constructor.node) if constructor else set()
            return own | self.members(module, name)
        return _parameters(found.node)

    def _members(self, module: str, name: str) -> set[str]:
        """Returns what a class defines and what its methods set on `self`, those of its bases included."""
        found = self._find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return set()
        names = {bound for statement in found.node.body for bound in _bound_by(statement)}
        names |= {
            node.attr
            for node in ast.walk(found.node)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
        for base in found.node.bases:
            names |= self.members(found.module, base_name(base))
        return names

    def abstract(self, module: str, name: str) -> set[str]:
        """Returns the methods that a class leaves to its subclasses."""
        found = self._find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return set()
        own = {statement.name: statement for statement in found.node.body if isinstance(statement, Definition)}
        inherited = {left for base in found.node.bases for left in self.abstract(found.module, base_name(base))}
        marked = {name for name, statement in own.items() if _is_abstract(statement)}
        return (inherited - own.keys()) | marked

    def _words(self, module: str) -> set[str]:
        """Returns the strings that stand in a module."""
        source = self._parse(module)
        nodes = ast.walk(source) if source else iter(())
        return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    def _find(self, module: str, name: str) -> Found | None:
        """Returns the definition of "name" or "Class.method", through re-exports and base classes."""
        owner, _, member = name.partition(".")
        found = self._find_top(module, owner)
        if not member or found is None or not isinstance(found.node, ast.ClassDef):
            return found
        for statement in found.node.body:
            if isinstance(statement, Definition) and statement.name == member:
                return Found(found.module, statement)
        inherited = (self._find(found.module, f"{base_name(base)}.{member}") for base in found.node.bases)
        return next((base for base in inherited if base is not None), None)

    def _find_top(self, module: str, name: str) -> Found | None:
        source = self._parse(module)
        if source is None or not name:
            return None
        for node in _top_level(source.body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        target = self._absolute(module, node)
                        return self._find_top(target, alias.name) or self._module(f"{target}.{alias.name}")
            elif name in _bound_by(node):
                return Found(module, node)
        # vLLM's own package passes names on lazily, from a table.
        if module == "vllm" and name in self.words("vllm"):
            return Found(module, source)
        return self._module(f"{module}.{name}")

    def _module(self, module: str) -> Found | None:
        source = self._parse(module)
        return Found(module, source) if source else None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self._path(module).name == "__init__.py"
        parts = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _path(self, module: str) -> Path:
        path = self._folder.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _parse_file(self, module: str) -> ast.Module | None:
        path = self._path(module)
        return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def _top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Returns a module's statements, those under `if` and `try` too."""
    found: list[ast.stmt] = []
    for statement in body:
        found.append(statement)
        if isinstance(statement, ast.If | ast.Try):
            found += _top_level([*statement.body, *statement.orelse])
            for handler in getattr(statement, "handlers", []):
                found += _top_level(handler.body)
    return found


def _bound_by(node: ast.AST) -> set[str]:
    if isinstance(node, Definition):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _parameters(node: ast.AST) -> set[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    arguments = node.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _is_abstract(node: Definition) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "abstractmethod" for mark in node.decorator_list)


def base_name(base: ast.expr) -> str:
    """Returns the name of a base class, without what stands in brackets."""
    inner = base.value if isinstance(base, ast.Subscript) else base
    return inner.id if isinstance(inner, ast.Name) else ""
