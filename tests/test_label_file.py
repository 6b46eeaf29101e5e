"""The feedback file: nothing that was acknowledged is lost, whoever writes, whatever is killed, cut or full."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_tasks.data.formats import Compared
from rlhf_tasks.data.judgements import standing
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_file import LabelFile

FORK = multiprocessing.get_context("fork")


def pair(number: int) -> Compared:
    return Compared(f"Prompt {number} שלום\u2028", (f" one {number}", f" two {number}\n"), (1.0, 2.0), ("sft", "actor"))


def write(path: Path, rater: str, count: int) -> None:
    file = LabelFile(path)
    for number in range(count):
        file.add(pair(number), "first", rater)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is not there yet, nor is its folder."""
    return tmp_path / "data/labels.jsonl"


def test_a_judgement_is_a_line_that_holds_all_of_it(path: Path) -> None:
    LabelFile(path).add(pair(1), "second", "ada")
    (row,) = [json.loads(row) for row in path.read_text().split("\n") if row]
    assert row.pop("time").endswith("+00:00")
    assert len(row.pop("pair")) == len(row["digests"][0]) == 64
    assert row.pop("digests")
    assert row == {
        "prompt": "Prompt 1 שלום\u2028",
        "answers": [" one 1", " two 1\n"],
        "scores": [1.0, 2.0],
        "models": ["sft", "actor"],
        "choice": "second",
        "rater": "ada",
    }


def test_undoing_adds_a_line_and_takes_back_what_that_rater_said_last(path: Path) -> None:
    file = LabelFile(path)
    for rater, number, choice in (("ada", 1, "first"), ("ada", 2, "tie"), ("bob", 1, "second"), ("ada", 1, "tie")):
        file.add(pair(number), choice, rater)
    before = path.read_bytes()
    assert file.undo("ada", {pair(3).pair}) is None
    undone = [file.undo("ada", {pair(1).pair, pair(2).pair}) for _ in range(3)]
    assert [one and (one.pair, one.choice) for one in undone] == [
        (pair(1).pair, "tie"),
        (pair(2).pair, "tie"),
        None,
    ]
    assert path.read_bytes().startswith(before)
    assert [(one.rater, one.choice) for one in standing(LabelFile(path).judged())] == [("bob", "second")]


def test_several_processes_add_to_one_file_at_a_time(path: Path) -> None:
    """Each whole, none lost, none twice; the file that was open all the time sees them."""
    file = LabelFile(path)
    writers = [FORK.Process(target=write, args=(path, f"rater {n}", 40)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert Counter(one.rater for one in file.judged()) == {f"rater {n}": 40 for n in range(4)}
    file.add(pair(1), "tie", "ada")
    assert len(LabelFile(path).judged()) == 161


def test_several_threads_share_one_file(path: Path) -> None:
    file = LabelFile(path)

    def judge(rater: str) -> None:
        for number in range(30):
            file.add(pair(number), "tie", rater)
            if number % 3 == 0:
                file.undo(rater, {pair(number).pair})

    threads = [threading.Thread(target=judge, args=(f"rater {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.judged() == LabelFile(path).judged()
    assert Counter(one.rater for one in standing(file.judged())) == {f"rater {n}": 20 for n in range(4)}


def test_what_was_acknowledged_outlives_a_kill(path: Path) -> None:
    """A writer is killed at some moment, again and again: what it had said was kept is there, and at most one more."""
    told = 0
    for _ in range(8):
        read, wrote = os.pipe()

        def tell(wrote: int = wrote) -> None:
            file = LabelFile(path)
            while True:
                file.add(pair(1), "first", "ada")
                os.write(wrote, b".")

        writer = FORK.Process(target=tell)
        writer.start()
        os.close(wrote)
        told += len(os.read(read, 1))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        while got := os.read(read, 1 << 16):
            told += len(got)
        os.close(read)
        kept = len(LabelFile(path).judged())
        assert told <= kept <= told + 1
        told = kept


@given(st.integers(0, 10_000), st.integers(1, 400))
def test_a_torn_end_is_put_aside_and_every_line_before_it_is_kept(tmp_path_factory, lines, cut) -> None:  # type: ignore[no-untyped-def]
    """Of a file that was cut anywhere: no byte is lost, and it goes on."""
    path = tmp_path_factory.mktemp("torn") / "labels.jsonl"
    write(path, "ada", 1 + lines % 3)
    whole = path.read_bytes()
    left = whole[: max(0, len(whole) - cut)]
    path.write_bytes(left)
    file = LabelFile(path)
    aside = path.with_name("labels.jsonl.torn")
    torn = left[left.rfind(b"\n") + 1 :]
    if torn and torn + b"\n" == whole[-len(torn) - 1 :] and whole.count(b"\n") == left.count(b"\n") + 1:
        assert path.read_bytes() == whole, "only its line end was missing"
    else:
        assert path.read_bytes() == left[: len(left) - len(torn)]
        assert (aside.read_bytes() if torn else b"\n") == torn + b"\n"
    assert aside.exists() == (bool(torn) and path.read_bytes() != whole)
    kept = len(file.judged())
    file.add(pair(9), "tie", "bob")
    assert len(LabelFile(path).judged()) == kept + 1


def test_a_full_disk_is_a_sentence_and_leaves_no_half_line(path: Path) -> None:
    """A limit of file sizes stands for it: a write that fits in part only."""
    file = LabelFile(path)
    file.add(pair(1), "first", "ada")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            file.add(pair(2), "first", "ada")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    file.add(pair(2), "first", "ada")
    assert len(LabelFile(path).judged()) == 2


def test_a_file_that_somebody_replaced_is_read_again(path: Path) -> None:
    file = LabelFile(path)
    file.add(pair(1), "first", "ada")
    other = path.with_name("other.jsonl")
    write(other, "bob", 3)
    other.rename(path)
    file.add(pair(4), "tie", "ada")
    assert [one.rater for one in file.judged()] == ["bob", "bob", "bob", "ada"]
    assert file.judged() == LabelFile(path).judged()
    path.unlink()
    assert file.judged() == []


def test_a_file_with_other_names_is_left_alone(path: Path) -> None:
    """DVC keeps what it tracks as hard links, or links, into its cache: an added line would change that too."""
    write(path, "ada", 1)
    before = path.read_bytes()
    for name, link in (("hard", os.link), ("soft", os.symlink)):
        link(path, path.with_name(name))
        with pytest.raises(UserError, match=rf"{name}: found .*; if it is DVC's, `dvc unprotect .*{name}`, else copy"):
            LabelFile(path.with_name(name))
        path.with_name(name).unlink()
    assert path.read_bytes() == before
    assert len(LabelFile(path).judged()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n', r"labels.jsonl:1: no `answers`"),
        ("\n{broken\n", r"labels.jsonl:2: broken JSON"),
        ("[1]", r"labels.jsonl:1: found a list"),
    ],
)
def test_a_line_that_is_no_judgement_is_told(path: Path, content: str, message: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        LabelFile(path)


def test_a_place_where_nothing_can_be_written_is_told(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=r"labels.jsonl: cannot be written \(Is a directory\); name another .*`--into`"):
        LabelFile(path)
    (path / "file").write_text("")
    with pytest.raises(UserError, match=r"labels.jsonl: cannot be written"):
        LabelFile(path / "file/labels.jsonl")
