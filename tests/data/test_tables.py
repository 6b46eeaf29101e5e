"""Arrow files: the same bytes from the same rows, in bounded memory, read lazily, and open to `datasets` as well."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_tasks.data.tables import BATCH_ROWS, TOKENS, TokenColumn, read_table, write_table
from rlhf_tasks.errors import UserError

SCHEMA = pa.schema({"text": pa.string(), "ids": TOKENS})


def rows(count):
    return ({"text": f"row {i} 🎬", "ids": list(range(i % 7))} for i in range(count))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "folder" / "rows.arrow"
    assert write_table(path, rows(2500), SCHEMA) == 2500
    return path


def test_the_same_rows_give_the_same_bytes(path, tmp_path):
    write_table(tmp_path / "again.arrow", list(rows(2500)), SCHEMA)
    assert (tmp_path / "again.arrow").read_bytes() == path.read_bytes()
    write_table(tmp_path / "other.arrow", rows(2499), SCHEMA)
    assert (tmp_path / "other.arrow").read_bytes() != path.read_bytes()


def test_rows_are_taken_a_batch_at_a_time(tmp_path):
    """A batch is on disk before the next one's rows are asked for."""
    path, sizes = tmp_path / "rows.arrow", []

    def watched():
        for i, row in enumerate(rows(3 * BATCH_ROWS)):
            if i % BATCH_ROWS == 0:
                sizes.append(path.stat().st_size)
            yield row

    write_table(path, watched(), SCHEMA)
    assert sizes[0] < sizes[1] < sizes[2]


def test_datasets_opens_the_same_file(path):
    assert datasets.Dataset.from_file(str(path)).to_list() == list(rows(2500))


def test_a_table_is_memory_mapped(path):
    before = pa.total_allocated_bytes()
    table = read_table(path)
    assert table.to_pylist() == list(rows(2500))
    column = TokenColumn(table, "ids")
    assert column[2047].tolist() == list(range(2047 % 7))
    assert pa.total_allocated_bytes() - before < 2500


def test_a_token_column_is_a_lazy_sequence_of_int64_rows(path):
    column, expected = TokenColumn(read_table(path), "ids"), [row["ids"] for row in rows(2500)]
    assert len(column) == 2500
    assert [row.tolist() for row in column] == expected
    assert column[3].dtype == np.int64
    assert column[-1].tolist() == expected[-1]
    assert [row.tolist() for row in column[1020:1030]] == expected[1020:1030]
    assert column.lengths().tolist() == [len(row) for row in expected]
    for index in (2500, -2501):
        with pytest.raises(IndexError, match=f"row {index} of 2500"):
            column[index]


def test_a_row_is_a_copy_that_may_be_changed(path):
    column = TokenColumn(read_table(path), "ids")
    column[3][0] = 99
    assert column[3].tolist() == [0, 1, 2]


def test_an_empty_table_and_a_sliced_one(path, tmp_path):
    assert write_table(tmp_path / "none.arrow", [], SCHEMA) == 0
    none = TokenColumn(read_table(tmp_path / "none.arrow"), "ids")
    assert (len(none), list(none), none.lengths().tolist()) == (0, [], [])
    table = read_table(path).slice(1000, 100)
    assert [row.tolist() for row in TokenColumn(table, "ids")] == [i["ids"] for i in table.to_pylist()]


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8))
def test_any_rows_come_back(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "any.arrow"
    write_table(path, ({"text": "", "ids": value} for value in values), SCHEMA)
    assert [row.tolist() for row in TokenColumn(read_table(path), "ids")] == values


# Somebody else's files -----------------------------------------------------------------------------------------------


def write_ids(path, offsets, values, **options):
    """A file that pyarrow writes without a look at the offsets."""
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32).tobytes())]
    ids = pa.ListArray.from_buffers(TOKENS, len(offsets) - 1, buffers, children=[pa.array(values, pa.int32())])
    schema = pa.schema({"ids": TOKENS})
    settings = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema, options=settings) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([ids], schema=schema))


@pytest.mark.parametrize("offsets", [[0, 2_000_000_000, 4], [0, -4, 4], [0, 4, 2, 4], [0, 5, 4]])
def test_offsets_that_point_elsewhere_are_refused(tmp_path, offsets):
    path = tmp_path / "hostile.arrow"
    write_ids(path, [0, 2, 4], [1, 2, 3, 4])
    assert len(read_table(path)) == 2
    write_ids(path, offsets, [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"hostile\.arrow: not a table that `prepare` wrote"):
        read_table(path)


def test_only_the_columns_that_are_asked_for_are_checked_and_there(path, tmp_path):
    """A million rows open at once because their texts are not read; nobody can get at what was not checked."""
    broken = tmp_path / "broken.arrow"
    content = path.read_bytes()
    at = content.index("row 700 🎬".encode()) + 8
    broken.write_bytes(content[:at] + b"\xff" + content[at + 1 :])  # no UTF-8
    with pytest.raises(UserError, match=r"broken\.arrow: not a table"):
        read_table(broken)
    table = read_table(broken, ["ids"])
    assert table.column_names == ["ids"]
    assert [row.tolist() for row in TokenColumn(table, "ids")] == [row["ids"] for row in rows(2500)]
    with pytest.raises(UserError, match=r"broken\.arrow: not a table .*none"):
        read_table(broken, ["none"])
    hostile = tmp_path / "hostile.arrow"
    write_ids(hostile, [0, 4, 2, 4], [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"hostile\.arrow: not a table"):
        read_table(hostile, ["ids"])


def test_a_few_bytes_do_not_fill_the_memory(tmp_path):
    path, count = tmp_path / "bomb.arrow", 1 << 22
    write_ids(path, [0, count], np.zeros(count, np.int32), compression="zstd")
    assert path.stat().st_size < 5000
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match="compressed, which nothing here writes"):
        read_table(path)
    assert pa.total_allocated_bytes() == before


@given(data=st.data())
def test_any_damage_is_a_sentence_or_a_whole_table(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.arrow"
    write_table(path, rows(7), SCHEMA)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        table = read_table(path)
    except UserError:
        return
    assert len(table.to_pylist()) == table.num_rows
