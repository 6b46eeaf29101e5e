"""Which files of this project a module runs: its import closure inside `rlhf_tasks`.

A stage's key holds the digest of this closure, and `dvc.yaml` lists it as the stage's deps, so an edit to the report
retrains no model. Imports under `if TYPE_CHECKING:` do not run and do not count.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

from rlhf_tasks.errors import UserError

PACKAGE = "rlhf_tasks"
PARSE_TRIES = 9
SOURCE_ROOT = Path(__file__).resolve().parent.parent


@cache
def import_closure(module: str) -> tuple[str, ...]:
    """The files that importing `module` runs, as sorted paths such as `rlhf_tasks/ppo/rollout.py`."""
    return _closure(module, SOURCE_ROOT)


def user_closure(module: str, root: Path) -> tuple[str, ...]:
    """The files of the project at `root` that importing a user's module runs; none if the module is not there.

    Raises:
        UserError: one of them is no Python.
    """
    return _closure(module, root) if _file_of(module, root).exists() else ()


def installed_closure(module: str) -> dict[str, Path]:
    """The files of its own package that importing an installed module runs, by their names in it."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}
    home = Path(spec.origin).parent.parent if spec.submodule_search_locations else Path(spec.origin).parent
    top = module.partition(".")[0]
    return {name: home / name for name in _closure(module, home) if Path(name).parts[0].removesuffix(".py") == top}


def libraries_of(module: str, root: Path) -> dict[str, str]:
    """The versions of the installed libraries that a user's module, or what it imports of the project, imports."""
    makers = {maker for top in _imported_libraries(module, root) for maker in _distributions().get(top, ())}
    return {maker: version(maker) for maker in sorted(makers)}


def foreign_sources(module: str, root: Path) -> dict[str, Path]:
    """The files outside the project that a user's module runs and no version tells apart, by their names in a package.

    They are its own, if it is installed, and those of what it imports from PYTHONPATH or an editable install.
    """
    loose = [top for top in _imported_libraries(module, root) if _is_loose(top)]
    own = [] if user_closure(module, root) else [module]
    return {name: path for top in own + loose for name, path in installed_closure(top).items()}


def _imported_libraries(module: str, root: Path) -> list[str]:
    """The top-level modules from elsewhere that a user's module, or what it imports of its own, imports."""
    files = [root / name for name in user_closure(module, root)] or list(installed_closure(module).values())
    nodes = [node for path in files for node in _running_nodes(_parse(path, path.parent))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    tops -= {PACKAGE, module.partition(".")[0]}
    return sorted(top for top in tops if not _file_of(top, root).exists())


def _is_loose(top: str) -> bool:
    """Whether a module may change while no version does."""
    makers = _distributions().get(top, [])
    origins = [json.loads(distribution(maker).read_text("direct_url.json") or "{}") for maker in makers]
    return not makers or any(origin.get("dir_info", {}).get("editable") for origin in origins)


@cache
def _distributions() -> Mapping[str, list[str]]:
    """The installed distributions by the modules that they bring; reading all their records takes a second."""
    return packages_distributions()


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
        waiting.extend(_imports(name, path, root, package))
    return tuple(sorted(found.values()))


def _file_of(module: str, root: Path) -> Path:
    """Where a module would lie: a package comes before a module of the same name, and that before a mere folder."""
    base = root.joinpath(*module.split("."))
    return package if (package := base / "__init__.py").exists() else base.with_name(base.name + ".py")


def _imports(name: str, path: Path, root: Path, package: str) -> Iterator[str]:
    """What a module imports, at any depth of its code, from its own package or, a user's, from the folder `root`."""

    def counts(imported: str) -> bool:
        top = imported.partition(".")[0]
        beside = (root / top).is_dir() or (root / f"{top}.py").exists()
        return top == package or (package != PACKAGE and beside)

    for node in _running_nodes(_parse(path, root)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if counts(alias.name))
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, name, path)
            if not counts(source):
                continue
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if _file_of(inner, root).exists() else source


def _parse(path: Path, root: Path) -> ast.Module:
    text = path.read_bytes()
    try:
        for _ in range(PARSE_TRIES - 1):
            with suppress(SystemError):  # CPython 3.11 counts recursion for all threads; another one parsed meanwhile
                return ast.parse(text)
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: bytes that are no UTF-8, or 0
        place = f"{path.relative_to(root)}:{getattr(error, 'lineno', None) or 1}"
        raise UserError(f"{place}: not readable as Python: {getattr(error, 'msg', error)}") from None


def _absolute(node: ast.ImportFrom, name: str, path: Path) -> str:
    """The module that `from … import` names, seen from the module `name`."""
    if not node.level:
        return node.module or ""
    base = name.split(".")
    base = base[: len(base) - node.level + (path.name == "__init__.py")]
    return ".".join([*base, *([node.module] if node.module else [])])


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from _running_nodes(other)
            continue
        yield node
        yield from _running_nodes(node)
