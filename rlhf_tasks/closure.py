"""Which files of this project a module runs: its import closure inside `rlhf_tasks`.

A stage's key holds the digest of this closure, and `dvc.yaml` lists it as the stage's deps, so an edit to the report
retrains no model. Imports under `if TYPE_CHECKING:` do not run and do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "rlhf_tasks"
SOURCE_ROOT = Path(__file__).resolve().parent.parent


@cache
def import_closure(module: str) -> tuple[str, ...]:
    """The files that importing `module` runs, as sorted paths such as `rlhf_tasks/ppo/rollout.py`."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _file_of(name)
        found[name] = path.relative_to(SOURCE_ROOT).as_posix()
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        waiting.extend(_imports(path))
    return tuple(sorted(found.values()))


def _file_of(module: str) -> Path:
    base = SOURCE_ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Modules of this package that the file imports, at any depth of the code."""
    for node in _running_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ImportError(f"{path}:{node.lineno}: a relative import; write it absolute, so that keys can follow it")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file_of(inner).exists() else node.module


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _running_nodes(node)
