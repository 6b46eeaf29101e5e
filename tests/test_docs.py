"""Pages whose examples run, print what they say; the page of parameters is what `config.Params` allows."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from rlhf_tasks.config import Params, load_params, parse_params

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"


def test_the_page_of_one_iteration_runs_as_it_stands() -> None:
    with torch.random.fork_rng():
        found = doctest.testfile(str(DOCS / "one-iteration.md"), module_relative=False)
    torch.set_printoptions(profile="default")
    assert found.attempted > 40
    assert found.failed == 0


def test_the_page_of_parameters_is_what_the_code_allows() -> None:
    """Every key once, with its type and range, its default, and what params.yaml ships where that is something else."""
    shipped = load_params(REPOSITORY / "params.yaml").model_dump(mode="json", by_alias=True)
    found = re.findall(r"^\| `([\w.\[\]]+)` \|(.*)\|$", (DOCS / "parameters.md").read_text(), re.MULTILINE)
    documented = {key: [cell.strip() for cell in cells.split(" | ")] for key, cells in found}
    assert len(documented) == len(found), "a key stands twice"
    parameters = dict(leaves(Params.model_json_schema(by_alias=True)))
    assert documented.keys() == parameters.keys()
    for key, schema in parameters.items():
        allowed, default, as_shipped, purpose = documented[key]
        assert allowed == in_words(schema), key
        assert (default == "required") is ("default" not in schema), key
        if default != "required":
            assert yaml(default) == schema["default"], key
        if "[]" not in key and key != "data.sources":
            present = at(shipped, key)
            assert (yaml(as_shipped) if as_shipped else schema["default"]) == present, key
            assert bool(as_shipped) is (present != schema.get("default")), key
        assert purpose, key


def test_fragments_of_params_yaml_in_the_docs_are_valid() -> None:
    """Put into the shipped file, as a reader would."""
    shipped, found = yaml((REPOSITORY / "params.yaml").read_text()), 0
    for page in [REPOSITORY / "README.md", *DOCS.glob("*.md")]:
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            fragment = yaml(text)
            if isinstance(fragment, dict) and fragment.keys() <= shipped.keys():
                parse_params(merged(shipped, fragment), f"a fragment of {page.name}")
                found += 1
    assert found > 4


def merged(one: Any, other: Any) -> Any:
    """The second one's values in place of the first one's."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {key: merged(one.get(key), value) for key, value in other.items()}


def leaves(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of params.yaml with its JSON schema; a list's keys as `data.sources[].kind`."""

    def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        required = section.get("required", [])
        for name, inner in section["properties"].items():
            key = prefix + name
            if "$ref" in inner:
                yield from walk(resolve(inner), key + ".")
                continue
            yield key, inner if name not in required else {k: v for k, v in inner.items() if k != "default"}
            if "$ref" in inner.get("items", {}):
                yield from walk(resolve(inner["items"]), key + "[].")

    def resolve(reference: dict[str, Any]) -> Any:
        return schema["$defs"][reference["$ref"].removeprefix("#/$defs/")]

    yield from walk(schema, "")


def in_words(schema: dict[str, Any]) -> str:
    """Type and range: `integer ≥ 1`, `number > 0 or null`, a choice as its words."""
    if "anyOf" in schema:
        return " or ".join(in_words(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{word}`" for word in schema.get("enum") or [schema["const"]])
    if "prefixItems" in schema:
        return f"[{', '.join(in_words(one) for one in schema['prefixItems'])}]"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema)
    kind = {"string": "text", "array": "list", "null": "null", "object": "mapping"}.get(schema["type"], schema["type"])
    return f"{kind} {bounds}".strip()


def yaml(cell: str) -> Any:
    """What a cell of the table stands for."""
    return YAML(typ="safe").load(cell.strip("`"))


def at(document: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        document = document[part]
    return document
