"""Presets are valid, do what their table says, and leave the rest of params.yaml alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rlhf_tasks.config import flatten, load_params, set_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.presets import PRESETS, preset_values

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_valid(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    shutil.copyfile(REPOSITORY / "params.yaml", path)
    before = flatten(load_params(path))
    set_params(path, preset_values(name))
    after = flatten(load_params(path))
    assert {key: after[key] for key in PRESETS[name]} == PRESETS[name]
    assert {key for key in after if after[key] != before[key]} <= set(PRESETS[name])
    assert "# k1 | k2" in path.read_text()


def test_the_table_is_what_the_code_does() -> None:
    shipped = flatten(load_params(REPOSITORY / "params.yaml"))
    rows = {}
    for line in (REPOSITORY / "docs/presets.md").read_text().splitlines():
        if found := re.match(r"\| `(ppo[\w.]+)` \|(.*)\|$", line):
            rows[found[1]] = [YAML(typ="safe").load(cell.strip() or "null") for cell in found[2].split("|")]
    for key, cells in rows.items():
        assert cells == [shipped[key], *(values.get(key) for values in PRESETS.values())], key
    untold = {key for values in PRESETS.values() for key in values} - set(rows)
    assert all(values[key] == shipped[key] for values in PRESETS.values() for key in untold & set(values))


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="ziegler2019, tldr, trl"):
        preset_values("tlr")
