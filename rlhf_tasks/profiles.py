"""Profiles: whole params.yaml files by name, in `profiles/`. `rlhf use NAME` makes one of them the params.yaml."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from rlhf_tasks.config import as_yaml, flatten, load_params
from rlhf_tasks.errors import UserError

FOLDER, PREVIOUS = "profiles", "previous"


def use_profile(root: Path, name: str) -> list[str]:
    """Make a profile the params.yaml; what that said before becomes the profile `previous`.

    Returns:
        What changed, each as `key: old -> new`.

    Raises:
        UserError: there is no such profile, or it is not valid; params.yaml is then as it was.
    """
    params, profile, previous = root / "params.yaml", _find(root, name), root / FOLDER / f"{PREVIOUS}.yaml"
    new = flatten(load_params(profile))
    try:
        old = flatten(load_params(params))
    except UserError:  # a wrong one, or none, is a reason to use another
        old = {}
    text = profile.read_bytes()
    if params.exists() and params.read_bytes() != text:
        shutil.copyfile(params, previous)
    temporary = params.with_name(params.name + ".new")
    temporary.write_bytes(text)
    temporary.replace(params)
    return [
        f"{key}: {as_yaml(old.get(key))} -> {as_yaml(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def profile_names(root: Path) -> list[str]:
    """The profiles that there are."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def _find(root: Path, name: str) -> Path:
    known = profile_names(root)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{FOLDER}/{name}.yaml: not found; there is {', '.join(known) or 'none'}{hint}")
    return root / FOLDER / f"{name}.yaml"
