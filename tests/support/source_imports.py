"""What a source file imports, seen from its syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

from attrs import frozen

CORE = "dinov3_framework"


@frozen
class Import:
    """One imported module, or name of a module, as ``module:name``."""

    module: str
    name: str  # empty for ``import module``
    line: int
    lazy: bool  # inside a function, or for type checkers only

    def __str__(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module


def imports_of(tree: ast.Module, package: str) -> list[Import]:
    """Every import of a file; relative ones are told by the package that the file lies in."""
    found: list[Import] = []
    _collect(tree, package, False, found)
    return found


def _collect(node: ast.AST, package: str, lazy: bool, found: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(alias.name, "", child.lineno, lazy) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                module = ".".join([*parents, module] if module else parents)
            found += [Import(module, alias.name, child.lineno, lazy) for alias in child.names]
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            if factory := _factory(child.value):
                found.append(Import(*factory, child.lineno, True))
        elif isinstance(child, ast.Call) and _is_import_call(child):
            target = child.args[0]
            if isinstance(target, ast.Constant):
                found.append(Import(str(target.value), "", child.lineno, True))
        within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        _collect(child, package, lazy or within or typing_only, found)


def _factory(text: str) -> tuple[str, str] | None:
    """module and attribute of a string like ``"dinov3_vit.transformer:VisionTransformer"``."""
    module, colon, attribute = text.partition(":")
    words = [*module.split("."), *attribute.split(".")]
    if colon and module.startswith("dinov3") and all(word.isidentifier() for word in words):
        return module, attribute
    return None


def _is_import_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("import_module", "__import__") and bool(call.args)


def module_name(path: Path, root: Path) -> str:
    """The dotted name of a file below the folder that its package lies in."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_file(path: Path, root: Path) -> list[Import]:
    """Every import of a source file whose top package lies in ``root``."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports_of(ast.parse(path.read_text("utf-8")), package)
