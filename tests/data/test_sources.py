"""Every file kind is read lazily and in order; every broken one is refused in a sentence that says where."""

import csv
import gzip
import json
import os
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_tasks.config import Source
from rlhf_tasks.data import json_files
from rlhf_tasks.data.files import source_files
from rlhf_tasks.data.formats import Compared
from rlhf_tasks.data.sources import Meter, read_rows
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_file import line

ROWS = [
    {"prompt": "你好,世界", "completion": " 电影很好看 🎬"},
    {"prompt": "line\u2028separator", "completion": 'quotes " and, commas\nand lines'},
    {"prompt": "שלום", "completion": "x" * 200_000},
]


def rows_of(**source) -> list:
    """All rows of a source; the first that is wrong is raised, as `prepare` does."""
    found = []
    for where, row in read_rows(Source(kind="sft", **source)):
        if isinstance(row, UserError):
            raise row
        found.append((where, row))
    return found


def read(path: Path) -> list:
    return rows_of(path=str(path))


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


def test_all_of_a_label_is_read_from_parquet(tmp_path):
    row = line(Compared("a", ("b", "c"), (0.5, -1.0), ("sft", "actor")), "first", "ada")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    ((_, found),) = read_rows(Source(kind="labels", path=str(tmp_path / "rows.parquet")))
    assert {name: value for name, value in found.items() if name != "time"} | {"time": row["time"]} == row


def test_a_json_list_is_read_like_its_data_object(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    assert [row for _, row in read(path)] == ROWS


def test_reading_goes_on_after_what_is_wrong(tmp_path):
    """After a row of .jsonl or .csv with the next one, after a file that cannot be read on with the next file."""
    (tmp_path / "a.csv").write_bytes(b'a,b\n1\n1,2\n"\n",\xff\n3,4\n')
    (tmp_path / "b.json").write_text("[{")
    (tmp_path / "c.jsonl").write_bytes(b'{"a": 1}\n{broken\n[]\n{"a": "\xe9"}\n{"a": %s}\n{"a": 2}' % (b"9" * 5000))
    found = list(read_rows(Source(kind="sft", path=str(tmp_path))))
    assert [(Path(where).name, isinstance(row, UserError)) for where, row in found] == [
        ("a.csv:2", True), ("a.csv:3", False), ("a.csv:4", True), ("a.csv:6", False), ("b.json", True),
        ("c.jsonl:1", False), ("c.jsonl:2", True), ("c.jsonl:3", True), ("c.jsonl:4", True), ("c.jsonl:5", True),
        ("c.jsonl:6", False),
    ]  # fmt: skip
    assert "a.csv:4: not UTF-8" in str(found[2][1])
    assert "b.json:1: broken JSON" in str(found[4][1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("data"), inner, max_size=3)
    ),
    max_leaves=8,
)


class Pairs(list):
    """A JSON object as its pairs of name and value, doubled ones among them."""


def rows_in(whole):
    """The rows of a document: of its one list, or of the one list of objects that it names, which is `data`."""
    if not isinstance(whole, Pairs):
        return whole if isinstance(whole, list) else None
    lists = [(name, value) for name, value in whole if isinstance(value, list) and not isinstance(value, Pairs)]
    lists = [(name, value) for name, value in lists if name == "data" or any(isinstance(x, Pairs) for x in value)]
    return lists[0][1] if [name for name, _ in lists] == ["data"] else None


def is_doubled(value):
    if isinstance(value, Pairs):
        return len(dict(value)) < len(value) or any(is_doubled(inner) for _, inner in value)
    return isinstance(value, list) and any(map(is_doubled, value))


def plain(value):
    if isinstance(value, Pairs):
        return {name: plain(inner) for name, inner in value}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


@given(document=JSON | st.lists(st.dictionaries(st.text(max_size=2), JSON, max_size=2)), data=st.data())
def test_a_json_file_is_read_as_the_whole_of_it_would_be(tmp_path_factory, document, data):
    """A few bytes at a time, spread over lines or not, damaged or not."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    content = json.dumps(document, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 1])))
    raw = bytearray(content.encode())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=1)):
        raw[at] = data.draw(st.sampled_from(list(b'[]{},:"1 x\xff')))
    path.write_bytes(raw)
    try:
        rows = rows_in(json.loads(raw.decode("utf-8-sig"), object_pairs_hook=Pairs))
    except ValueError:
        rows = None
    with mock.patch.object(json_files, "CHUNK", data.draw(st.integers(1, 9))), path.open("rb") as file:
        try:
            found = list(json_files.read_json(path, file))
        except UserError:
            found = None
    if raw.strip() == b"":
        assert found == []
    elif isinstance(rows, list):
        good = [row for row in rows if isinstance(row, Pairs) and not is_doubled(row)]
        assert [row for _, row in found if isinstance(row, dict)] == [plain(row) for row in good]
        assert len(found) == len(rows)
    else:
        assert found is None


# Folders, patterns, fields, first rows --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """raw/b.jsonl, raw/a.csv, raw/deeper/c.jsonl.gz: a row each; and files that are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw/deeper").mkdir(parents=True)
    (tmp_path / "raw/.hidden").mkdir()
    (tmp_path / "raw/b.jsonl").write_text('{"n": "b"}\n')
    (tmp_path / "raw/a.csv").write_text("n\na\n")
    (tmp_path / "raw/deeper/c.jsonl.gz").write_bytes(gzip.compress(b'{"n": "c"}\n'))
    for name in ("raw/README.md", "raw/.d.jsonl", "raw/.hidden/e.jsonl"):
        (tmp_path / name).write_text("not read")
    return tmp_path / "raw"


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("raw", ["raw/a.csv:2", "raw/b.jsonl:1", "raw/deeper/c.jsonl.gz:1"]),
        ("raw/", ["raw/a.csv:2", "raw/b.jsonl:1", "raw/deeper/c.jsonl.gz:1"]),
        ("raw/*", ["raw/a.csv:2", "raw/b.jsonl:1"]),
        ("raw/[ab].*", ["raw/a.csv:2", "raw/b.jsonl:1"]),
        ("raw/**/*.jsonl*", ["raw/b.jsonl:1", "raw/deeper/c.jsonl.gz:1"]),
    ],
)
def test_a_folder_or_a_pattern_stands_for_its_files_by_name(folder, path, places):
    assert [where for where, _ in rows_of(path=path)] == places


def test_brackets_in_a_file_name_are_its_name(folder):
    (folder / "[ab].jsonl").write_text('{"n": "brackets"}\n')
    assert [row for _, row in rows_of(path="raw/[ab].jsonl")] == [{"n": "brackets"}]


def test_what_names_no_file_is_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"raw/empty: no file in this folder whose name ends in \.json, .*; correct"):
        rows_of(path="raw/empty")
    with pytest.raises(UserError, match=r"raw/\*\.md: no file matches whose name ends in"):
        rows_of(path="raw/*.md")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError, match=r"raw/pipe\.jsonl: found neither a file nor a folder"):
        rows_of(path="raw")
    (folder / "pipe.jsonl").unlink()
    (folder / "linked").symlink_to("deeper")
    with pytest.raises(UserError, match=r"raw/linked: found a link to a folder, which is not followed"):
        rows_of(path="raw")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"chosen": "a.good", "margin": "mrgn"},
            r"no row has the field `mrgn`, which `data\.sources\[\]\.fields` gives for `margin`; "
            r"the last one has `text`, `a`; correct it$",
        ),
        ({"chosen": "a.bad"}, r"no row has the field `a\.bad`, .* `chosen`"),
        ({"text": "prompt"}, r"no row has the field `prompt`, .*; correct it: .* did you mean `prompt: text`\?$"),
        ({"chosen": "a.good", "rejected": "text"}, None),
    ],
)
def test_a_field_that_no_row_has_is_said(tmp_path, fields, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "t"}\n{"text": "t", "a": {"good": null}}\n')
    if message is None:
        assert rows_of(path=str(path), fields=fields)[0][1] == {"text": "t"}
        return
    with pytest.raises(UserError, match=message):
        rows_of(path=str(path), fields=fields)


def test_the_first_rows_are_read_and_no_more(folder):
    (folder / "b.jsonl").write_text('{"n": 1}\n{"n": 2}\n{broken')
    assert [row["n"] for _, row in rows_of(path="raw", rows=3)] == ["a", 1, 2]
    with pytest.raises(UserError, match=r"b\.jsonl:3: broken"):
        rows_of(path="raw", rows=4)


def test_the_meter_ends_at_the_size_of_the_files(folder):
    source = Source(kind="sft", path="raw")
    meter = Meter.of([source, Source(kind="sft", path="missing")])
    assert (meter.done, meter.total) == (0, sum(path.stat().st_size for path in map(Path, source_files("raw"))))
    assert len(list(read_rows(source, meter))) == 3
    assert meter.fraction == 1


def parquet(columns=(), names=(), **named):
    """The bytes of a Parquet file with some columns."""
    arrays = [column if isinstance(column, pa.Array) else pa.array(column) for column in (*columns, *named.values())]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, [*names, *named]), sink)
    return sink.getvalue().to_pybytes()


TIMES = pa.array([1, 2**62], pa.timestamp("us"))
NOT_UTF8 = pa.array([b"fine", b"\xff"]).view(pa.string())

BROKEN = {
    "a.json": (b'[\n{"a": 1},\n{"a": }]', r"a\.json:3: broken JSON \(Expecting value\)$"),
    "b.json": (
        b'{"a": 1}\n{"a": 2}',
        r"b\.json:2: broken JSON \(Extra data\); a file with one object a line .* \.jsonl",
    ),
    "c.json": (
        b'{"rows": []}',
        r'c\.json: found an object with `rows`, expected a list of rows or \{"data": \[rows\]\}',
    ),
    "d.json": (b'["text"]', r"d\.json:row 1: found a text, expected an object with named fields"),
    "e.json": (b'[{"a": \n"\xff"}]', r"e\.json:2: not UTF-8; save the file in that encoding"),
    "f.json": (b"[]", r"f\.json: holds no rows; fill the file or remove it from `data\.sources`"),
    "g.json": (b"[" * 100_000, r"g\.json:1: broken JSON \(nested too deeply\)"),
    "h.json": (
        b'{"n": [1], "data": [{}], "test": [{}]}',
        r"h\.json: found 2 lists of rows \(`data`, `test`\), expected a",
    ),
    "i.json": (b'{"data": [], "data": [{}]}', r"i\.json: found 2 lists of rows \(`data`, `data`\), expected a list"),
    "j.json": (b'[{"a": 1}, {"a": {"b": 1, "b": 2}}]', r"j\.json:row 2: found `b` twice in one object, expected each"),
    "k.json": (
        "[{}]".encode("utf-16-be"),
        r"k\.json: found UTF-16BE, expected UTF-8; save it so, .*`iconv -f UTF-16BE -t",
    ),
    "a.jsonl": (b'{"a": 1}\n\n[1, 2]\n', r"a\.jsonl:3: found a list, expected an object"),
    "b.jsonl": (b'{"a": 1}\n{"a": "\xe9"}\n', r"b\.jsonl:2: not UTF-8"),
    "c.jsonl": (b"\n \n", r"c\.jsonl: holds no rows"),
    "d.jsonl": (b"", r"d\.jsonl: holds no rows"),
    "e.jsonl": (b'{"a": 1, "b": 2, "a": 3}', r"e\.jsonl:1: found `a` twice in one object, expected each name once"),
    "f.jsonl": ('{"a": 1}\n{"a": 2}'.encode("utf-16"), r"f\.jsonl: found UTF-16, expected UTF-8"),
    "a.csv": (b"a,b\n1,2\n3\n", r"a\.csv:3: found 1 cells, expected 2, one for each column"),
    "b.csv": (b"a,a\n1,2\n", r"b\.csv:1: found the columns `a`, `a`, expected a name for each, and each only once"),
    "c.csv": (b'a,b\n1,"2\n', r"c\.csv:2: broken CSV \(unexpected end of data\); check the quotes"),
    "d.csv": (b"a,b\n", r"d\.csv: holds no rows"),
    "e.csv": (b"a,\n1,2\n", r"e\.csv:1: found the columns `a`, ``, expected a name for each"),
    "f.csv": (b"a,\xff\n1,2\n", r"f\.csv:1: not UTF-8"),
    "a.parquet": (b"no parquet at all", r"a\.parquet: not a readable Parquet file \(.*\); write it again"),
    "b.parquet": (parquet(prompt=TIMES), r"b\.parquet:row 2: `prompt` cannot be read \(.*\); take this value away"),
    "c.parquet": (
        parquet(prompt=NOT_UTF8),
        r"c\.parquet:row 2: `prompt` is not UTF-8; write the file again with its texts",
    ),
    "d.parquet": (parquet([[1], [2]], ["a", "a"]), r"d\.parquet: found the columns `a`, `a`, expected each only once"),
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


def test_only_the_columns_of_a_parquet_file_that_are_used_are_read(tmp_path):
    """What Python cannot hold stands in the way of nobody who does not want it, and is named all the same."""
    path = tmp_path / "a.parquet"
    answers = [{"text": "one", "time": 1}, {"text": "two", "time": 2}]
    path.write_bytes(
        parquet(
            made=TIMES, prompt=["p", "q"], answer=answers, note=NOT_UTF8, __index_level_0__=[0, 1], margin=[1.0, 2.0]
        )
    )
    rows = [row for _, row in rows_of(path=str(path), fields={"completion": "answer.text"})]
    assert rows == [
        {"prompt": "p", "answer": {"text": "one"}, "margin": 1.0, "made": ..., "note": ...},
        {"prompt": "q", "answer": {"text": "two"}, "margin": 2.0, "made": ..., "note": ...},
    ]
    path.write_bytes(parquet(made=TIMES))
    assert [row for _, row in rows_of(path=str(path))] == [{"made": ...}] * 2


@pytest.mark.parametrize("index", ["", "Unnamed: 0", "__index_level_0__"])
def test_the_column_of_a_pandas_index_is_left_out(tmp_path, index):
    path = tmp_path / "a.csv"
    path.write_text(f"{index},text\n0,a\n1,b\n")
    assert [row for _, row in read(path)] == [{"text": "a"}, {"text": "b"}]


def test_a_file_with_a_name_that_is_no_text_is_refused(folder):
    Path(os.fsdecode(b"raw/caf\xe9.jsonl")).write_text('{"n": 1}')
    with pytest.raises(UserError, match=r"raw/caf\\udce9\.jsonl: the name of this file is not UTF-8; rename it"):
        rows_of(path="raw")


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no\.jsonl: not found; correct its path in `data\.sources`, relative to"):
        read(tmp_path / "no.jsonl")


def test_a_hub_source_is_loaded_by_datasets_at_its_revision(tmp_path, monkeypatch):
    """`load_dataset` reads a local folder like a repository, so this needs no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    hub = str(tmp_path / "hub")
    rows = rows_of(hub=hub, revision="abc")
    assert rows == [(f"{hub}[train]:row {n}", row) for n, row in enumerate(ROWS, 1)]
    with pytest.raises(UserError, match=r"could not load split `test` at revision `abc`: .*; check the three"):
        rows_of(hub=hub, revision="abc", split="test")


def test_the_first_rows_of_a_hub_source_are_streamed(tmp_path, monkeypatch):
    """Streaming writes no copy of the data set into the cache."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    hub = str(tmp_path / "hub")
    assert rows_of(hub=hub, revision="abc", rows=2) == [(f"{hub}[train]:row {n}", ROWS[n - 1]) for n in (1, 2)]
    assert not list(cache.rglob("*.arrow"))
    assert len(rows_of(hub=hub, revision="abc")) == 3
    assert list(cache.rglob("*.arrow"))
