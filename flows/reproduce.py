"""`rlhf reproduce`: do it again in a clean folder and say whether it came out the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.markup import escape

from flows.console import console
from rlhf_tasks.errors import UserError
from rlhf_tasks.reproduction import Compared, compare, environment_changes, make_again, wanted


def reproduce(root: Path, name: str, into: Path | None) -> bool:
    """Make a version or revision again. Returns whether every digest agrees.

    Raises:
        UserError: it cannot be made again here; the message says why.
    """
    what = wanted(root, name)
    target = (into or Path(tempfile.mkdtemp(prefix="rlhf-reproduce-")) / "checkout").resolve()
    if target.is_file():
        raise UserError(f"--into {target}: found a file, expected a new or an empty folder; name another place")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--into {target}: found something there, expected a new or an empty folder")
    changed = " with source.patch" if what.patch else ""
    console.print(escape(f"{name}: git {what.commit[:12]}{changed}, again in {target}"), soft_wrap=True)
    project = make_again(root, target, what)
    console.print()
    equal = True
    for compared in compare(root, project, what):
        console.print(escape(_line(compared)), soft_wrap=True)
        equal = equal and not compared.differing
    changes = environment_changes(project, what.document) if what.document else None
    console.print(escape(_verdict(equal, changes)))
    return equal


def _line(compared: Compared) -> str:
    if not compared.differing:
        return f"{compared.stage:<10} equal    {compared.outs} outs"
    told = [f"{path}/{file}" if file else path for path, file in compared.differing.items()]
    return f"{compared.stage:<10} differs  {', '.join(told)}"


def _verdict(equal: bool, changes: dict[str, tuple[object, object]] | None) -> str:
    verdict = "reproduced: every digest agrees" if equal else "not reproduced"
    if changes is None:
        return f"{verdict}; the environment of then is not known here (`dvc fetch` gets it)"
    if not changes:
        return f"{verdict}; libraries, threads, device and instruction set are the same"
    told = ", ".join(f"{name} {then} then, {here} here" for name, (then, here) in changes.items())
    return f"{verdict}; other than then: {told}"
