"""Gathering what a model card says (model_card.py) from a workspace and its lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rlhf_tasks.chat_template import jinja_of, trained_template
from rlhf_tasks.data.files import source_files
from rlhf_tasks.explain import flat
from rlhf_tasks.lineage import Document, environment_of
from rlhf_tasks.model_card import HUB, NOT_STATED, Facts, Origin
from rlhf_tasks.models import load_tokenizer
from rlhf_tasks.report import make_report
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

LICENCE_FILE = re.compile(r"(licen[cs]e|copying)", re.IGNORECASE)


def gather_facts(workspace: Workspace, document: Document, example: str) -> Facts:
    """All that is known of how the workspace's models were made.

    Args:
        document: their lineage.
        example: a prompt as the models read it.
    """
    root, actor = workspace.root, workspace.root / STAGES["register"].inputs["actor"]
    tokenizer, stages, examples = load_tokenizer(actor), document["stages"], workspace.params.evaluate.examples
    template = trained_template(workspace.params.data, tokenizer, example)
    return Facts(
        template=template,
        chat_template=jinja_of(template, tokenizer),
        origins=list(_origins(root, stages["prepare"]["identity"])),
        recipe={name: flat(facts["identity"]["parameters"]) for name, facts in stages.items()},
        environment=environment_of(document),
        keys={name: facts["key"] for name, facts in stages.items()},
        metrics={name: json.loads((root / stage.metrics).read_text()) for name, stage in STAGES.items()},
        results={stage: make_report(root, examples, stage).tables for stage in ("reward", "evaluate")},
        weights=count_weights(actor),
    )


def count_weights(folder: Path) -> int:
    """The number of weights in a checkpoint's safetensors files, of which only the headers are read."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _origins(root: Path, identity: dict[str, Any]) -> Iterator[Origin]:
    """The data and the base model that `prepare` read."""
    digests, data, model = identity["inputs"], identity["parameters"]["data"], identity["parameters"]["model"]
    for source in data["sources"]:
        if source["hub"]:
            yield Origin(f"{source['hub']} ({source['split']})", source["kind"], source["revision"], HUB)
            continue
        for path in source_files(source["path"], root):
            yield Origin(path, source["kind"], digests[path], licence_beside(root, path))
    if model["revision"]:
        yield Origin(model["base"], "base model", model["revision"], HUB)
    elif model["base"] != "scratch":
        yield Origin(model["base"], "base model", digests[model["base"]], licence_beside(root, model["base"]))


def licence_beside(root: Path, path: str) -> str:
    """The licence files in the folder of a file, with their first lines; the project's own are not the data's."""
    folder = root / path if (root / path).is_dir() else (root / path).parent
    if folder.resolve() == root.resolve() or not folder.is_dir():
        return NOT_STATED
    files = sorted(file for file in folder.iterdir() if LICENCE_FILE.match(file.name) and file.is_file())
    return "; ".join(f"{file.name}: {_first_line(file)}" for file in files) or NOT_STATED


def _first_line(file: Path) -> str:
    lines = (line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
    return next(filter(None, lines), "empty")[:100]
