"""Every file kind is read lazily and in order; every broken one is refused in a sentence that says where."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_tasks.config import Source
from rlhf_tasks.data.sources import read_rows
from rlhf_tasks.errors import UserError

ROWS = [
    {"prompt": "你好,世界", "completion": " 电影很好看 🎬"},
    {"prompt": "line\u2028separator", "completion": 'quotes " and, commas\nand lines'},
    {"prompt": "שלום", "completion": "x" * 200_000},
]


def read(path: Path) -> list:
    return list(read_rows(Source(kind="sft", path=str(path))))


def write(folder: Path, name: str) -> Path:
    """ROWS in the format that the name asks for."""
    path = folder / name
    plain = folder / name.removesuffix(".gz")
    if plain.suffix == ".json":
        plain.write_text(json.dumps({"data": ROWS}, ensure_ascii=False), encoding="utf-8")
    elif plain.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        plain.write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    elif plain.suffix == ".csv":
        with plain.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, end):
    path = write(tmp_path, f"rows.{kind}{end}")
    places = {"jsonl": [":1", ":3", ":4"], "csv": [":2", ":3", ":5"]}.get(kind, [":row 1", ":row 2", ":row 3"])
    assert read(path) == [(f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)]


def test_a_json_list_is_read_like_its_data_object(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    assert [row for _, row in read(path)] == ROWS


def test_rows_before_a_broken_one_are_given(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{broken')
    rows = read_rows(Source(kind="sft", path=str(path)))
    assert next(rows) == (f"{path}:1", {"a": 1})
    with pytest.raises(UserError, match=r"rows.jsonl:2: broken JSON"):
        next(rows)


BROKEN = {
    "a.json": (b'[\n{"a": 1},\n{"a": }]', r"a\.json:3: broken JSON \(Expecting value\)$"),
    "b.json": (
        b'{"a": 1}\n{"a": 2}',
        r"b\.json:2: broken JSON \(Extra data\); a file with one object a line .* \.jsonl",
    ),
    "c.json": (b'{"rows": []}', r'c\.json: found an object, expected a list of rows or \{"data": \[rows\]\}'),
    "d.json": (b'["text"]', r"d\.json:row 1: found a text, expected an object with named fields"),
    "e.json": (b'[{"a": \n"\xff"}]', r"e\.json:2: not UTF-8; save the file in that encoding"),
    "f.json": (b"[]", r"f\.json: holds no rows; fill the file or remove it from `data\.sources`"),
    "g.json": (b"[" * 100_000, r"g\.json:1: broken JSON \(nested too deeply\)"),
    "a.jsonl": (b'{"a": 1}\n\n[1, 2]\n', r"a\.jsonl:3: found a list, expected an object"),
    "b.jsonl": (b'{"a": 1}\n{"a": "\xe9"}\n', r"b\.jsonl:2: not UTF-8"),
    "c.jsonl": (b"\n \n", r"c\.jsonl: holds no rows"),
    "d.jsonl": (b"", r"d\.jsonl: holds no rows"),
    "a.csv": (b"a,b\n1,2\n3\n", r"a\.csv:3: found 1 cells, expected 2, one for each column"),
    "b.csv": (b"a,a\n1,2\n", r"b\.csv:1: found the columns \['a', 'a'\], expected a name for each, and each only once"),
    "c.csv": (b'a,b\n1,"2\n', r"c\.csv:2: broken CSV \(unexpected end of data\); check the quotes"),
    "d.csv": (b"a,b\n", r"d\.csv: holds no rows"),
    "a.parquet": (b"no parquet at all", r"a\.parquet: not a readable Parquet file \(.*\); write it again"),
    "a.jsonl.gz": (b'{"a": 1}', r"a\.jsonl\.gz: damaged gzip file \(.*\); copy or download it again"),
    "b.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 100)[:-9], r"b\.jsonl\.gz: damaged gzip file"),
    "a.txt": (b"text", r"a\.txt: unknown kind of file `\.txt`; expected \.json, \.jsonl, \.csv, \.parquet, each also"),
    "a.gz": (b"text", r"a\.gz: unknown kind of file ``"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no\.jsonl: not found; correct its path in `data\.sources`, relative to"):
        read(tmp_path / "no.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: is a folder, not a file"):
        read(tmp_path / "folder.json")


def test_a_hub_source_is_loaded_by_datasets_at_its_revision(tmp_path, monkeypatch):
    """`load_dataset` reads a local folder like a repository, so this needs no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    hub = str(tmp_path / "hub")
    rows = list(read_rows(Source(kind="sft", hub=hub, revision="abc")))
    assert rows == [(f"{hub}[train]:row {n}", row) for n, row in enumerate(ROWS, 1)]
    with pytest.raises(UserError, match=r"could not load split `test` at revision `abc`: .*; check the three"):
        list(read_rows(Source(kind="sft", hub=hub, revision="abc", split="test")))
