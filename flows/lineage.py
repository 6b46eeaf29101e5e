"""`rlhf lineage`: the tree from an Actor down to the raw rows; digests and ids are whole in `--json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from flows.console import console
from rlhf_tasks import versioning
from rlhf_tasks.config import load_params
from rlhf_tasks.explain import flat
from rlhf_tasks.lineage import Document, broken_links, environment_of, inputs_of, lineage_here, lineage_of
from rlhf_tasks.source import source_of
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace


def find_lineage(root: Path, name: str) -> Document:
    """The lineage of a registered version, of a git revision, or, without a name, of the workspace.

    Raises:
        UserError: there is none.
    """
    if name.startswith("models:/"):
        from rlhf_tasks.origins import origin_of_version

        return origin_of_version(root, name).document
    if name:
        return _lineage_at(root, name)
    return lineage_here(Workspace(root, load_params(root / "params.yaml")), source_of(root))


def _lineage_at(root: Path, revision: str) -> Document:
    from rlhf_tasks.origins import add_makers

    document = lineage_of(lambda path: versioning.read_at(root, revision, path))
    add_makers(root, document)
    git = {"commit": versioning.commit_of(root, revision), "dirty": False}
    return document | {"revision": revision, "git": git, "environment": environment_of(document)}


def say_lineage(root: Path, name: str, *, as_json: bool) -> None:
    """Print a lineage, for people or for machines."""
    document = find_lineage(root, name)
    if as_json:
        print(json.dumps(document, indent=1, sort_keys=True))
        return
    last = list(STAGES)[-1]
    tree = Tree(escape(name or "this checkout"))
    for line in _head(document):
        tree.add(escape(line))
    _add_stage(tree, document, last, set())
    console.print(tree)
    for line in broken_links(document):
        console.print(f"[red]broken: {escape(line)}[/red]", soft_wrap=True)


def _head(document: Document) -> list[str]:
    lines = []
    if model := document.get("model"):
        lines.append(f"{model['name']} version {model['version']}, registered {model['created']}")
    if git := document.get("git"):
        lines.append(f"git {git['commit']}{' with changes (source.patch)' if git['dirty'] else ''}")
    if runs := document.get("runs"):
        lines.append(", ".join(f"{tool} run {run}" for tool, run in runs.items()))
    if environment := document.get("environment"):
        lines.append(_named(environment))
    if machine := document.get("machine"):
        lines.append(", ".join(str(machine[k]) for k in ("processor", "gpu", "system") if k in machine))
        lines.append(f"Python {machine['python']}, {machine['cores']} cores, {machine['memory_gb']} GB")
    return lines


def _add_stage(tree: Tree, document: Document, stage: str, seen: set[str]) -> None:
    """A stage, what it was made of, and below it the stages that made that."""
    facts = document["stages"][stage]
    seen.add(stage)
    branch = tree.add(f"[bold]{stage}[/bold]  key {facts['key'][:12]}{escape(_made(facts))}")
    identity = facts["identity"]
    values = [f"{name}={value}" for name, value in flat(identity["parameters"]).items() if value is not None]
    branch.add(escape(", ".join(values)))
    branch.add(escape(f"code: {len(identity['code'])} files; environment: {_environment(identity)}"))
    for path, digest, maker in inputs_of(document, stage):
        leaf = branch.add(escape(f"{path}  sha256 {digest[:12]}{_md5(document, maker, path)}"))
        if maker is None:
            continue
        if maker in seen:
            leaf.add(f"{maker}, see above")
        else:
            _add_stage(leaf, document, maker, seen)


def _made(facts: dict[str, Any]) -> str:
    parts = [facts[name] for name in ("made",) if facts.get(name)]
    parts += [f"{facts['seconds']:.0f} s"] if facts.get("seconds") else []
    parts += [f"{tool} run {run[:8]}" for tool, run in facts.get("runs", {}).items() if run]
    return f"  ({', '.join(parts)})" if parts else ""


def _environment(identity: dict[str, Any]) -> str:
    return _named(identity["environment"])


def _named(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flat(environment).items())


def _md5(document: Document, maker: str | None, path: str) -> str:
    md5 = document["stages"][maker]["dvc"].get(path) if maker else None
    return f"  dvc {md5[:12]}" if md5 else ""
