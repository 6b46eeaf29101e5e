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
    return _closure(module, SOURCE_ROOT)


def user_closure(module: str, root: Path) -> tuple[str, ...]:
    """The files of the project at `root` that importing a user's module runs; none if the module is not there."""
    return _closure(module, root) if _file_of(module, root).exists() else ()


def _closure(module: str, root: Path) -> tuple[str, ...]:
    found: dict[str, str] = {}
    waiting = [module]
    package = module.partition(".")[0]
    while waiting:
        name = waiting.pop()
        path = _file_of(name, root)
        if name in found or not path.exists():  # a folder without __init__.py has nothing to run
            continue
        found[name] = path.relative_to(root).as_posix()
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        waiting.extend(_imports(path, root, package))
    return tuple(sorted(found.values()))


def _file_of(module: str, root: Path) -> Path:
    base = root.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _imports(path: Path, root: Path, package: str) -> Iterator[str]:
    """Modules of `package`, or single files beside it, that the file imports, at any depth of the code."""

    def counts(name: str) -> bool:
        top = name.partition(".")[0]
        return top == package or (top != PACKAGE and package != PACKAGE and _file_of(top, root).exists())

    for node in _running_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if counts(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ImportError(f"{path}:{node.lineno}: a relative import; write it absolute, so that keys can follow it")
        elif isinstance(node, ast.ImportFrom) and node.module and counts(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file_of(inner, root).exists() else node.module


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _running_nodes(node)
