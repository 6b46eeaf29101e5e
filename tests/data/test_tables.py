"""Arrow files: the same bytes from the same rows, in bounded memory, read lazily, and open to `datasets` as well."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_tasks.data.tables import BATCH_ROWS, TOKENS, TokenColumn, read_table, write_table

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
