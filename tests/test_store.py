"""The store: nothing half-written looks whole, nothing damaged passes for whole, locks die with their process."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from changes import flip_bit

from rlhf_tasks import store as store_module
from rlhf_tasks.digests import digest_file
from rlhf_tasks.errors import UserError
from rlhf_tasks.store import (
    DamagedEntry,
    Entry,
    Ref,
    Store,
    canonical_json,
    digest_json,
    digest_path,
    place,
    remove,
)

REPOSITORY = Path(__file__).resolve().parent.parent
IDENTITY: dict[str, Any] = {"stage": "sft", "parameters": {}, "inputs": {}, "code": {}, "environment": {}}
KEY = digest_json(IDENTITY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(folder: Path) -> None:
    """A payload of a folder with two levels and a file."""
    (folder / "model/deep").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "model/deep/weights.bin").write_bytes(bytes(range(256)))
    (folder / "metrics.json").write_text('{"loss": 1.0}')


def commit(store: Store, fill: Callable[[Path], None] = fill, seed: int | None = None, **record: Any) -> Entry:
    """An entry of the key KEY, or, with a seed, of another."""
    identity = IDENTITY if seed is None else IDENTITY | {"seed": seed}
    with store.writing(key := digest_json(identity)) as payload:
        fill(payload)
        return store.commit(key, payload, identity, **({"metrics": {}, "series": [], "perf": {}} | record))


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has printed a line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


# Entries -------------------------------------------------------------------------------------------------------------


def test_what_was_committed_is_found_again(store: Store) -> None:
    made = commit(store, metrics={"loss": 1.0})
    found = Store(store.root).find(KEY)
    assert found == made
    assert found.has_payload()
    found.verify()
    assert found.ref == Ref("sft", KEY, made.digest)
    assert found.manifest["metrics"] == {"loss": 1.0}
    assert (found.payload / "model/deep/weights.bin").read_bytes() == bytes(range(256))


def test_the_digest_is_of_the_payload_alone(store: Store) -> None:
    first = commit(store, perf={"seconds": 1})
    assert commit(store, seed=1, perf={"seconds": 2}).digest == first.digest
    assert commit(store, lambda folder: (folder / "a").write_text("a"), seed=2).digest != first.digest


def test_leaving_without_a_commit_leaves_nothing(store: Store) -> None:
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(store, fill=interrupted)
    assert store.find(KEY) is None
    assert list((store.root / "tmp").iterdir()) == []


def test_a_commit_replaces_the_entry_and_drops_the_unfinished_work(store: Store) -> None:
    commit(store, fill=lambda folder: (folder / "old").write_text("old"))
    assert store.partial(KEY).is_dir()
    entry = commit(store)
    assert store.find(KEY) == entry
    assert not (entry.payload / "old").exists()
    assert not store.has_partial(KEY)
    assert list((store.root / "tmp").iterdir()) == []


def test_a_number_that_json_has_not_is_no_entry(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"):
        commit(store, metrics={"loss": float("nan")})
    assert store.find(KEY) is None


DIES_AT_EACH_STEP = """
import itertools, os, sys
from pathlib import Path
from rlhf_tasks.store import Store, digest_json

IDENTITY = {"stage": "sft", "parameters": {}, "inputs": {}, "code": {}, "environment": {}}
KEY = digest_json(IDENTITY)

def commit(store, text):
    with store.writing(KEY) as payload:
        (payload / "model").mkdir()
        for name in ("model/a", "model/b", "metrics.json"):
            (payload / name).write_text(text * 100)
        store.commit(KEY, payload, IDENTITY, metrics={text: 1.0}, series=[], perf={})

def die_at(step):
    left = itertools.count(step, -1)
    next(left)
    def hook(event, arguments):
        if event.split(".")[0] in ("open", "os", "shutil") and next(left) == 0:
            os._exit(1)
    sys.addaudithook(hook)

for step in itertools.count(1):
    store = Store(Path(sys.argv[1], str(step)))
    commit(store, "old")
    if (child := os.fork()) == 0:
        die_at(step)
        commit(store, "new")
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    entry = store.find(KEY)
    if entry:
        entry.verify()
    print(*(entry.manifest["metrics"] if entry else ["none"]), flush=True)
    commit(store, "after")
    assert not os.listdir(Store(store.root).root / "tmp"), "what the dead left is swept"
    if finished:
        break
"""


def test_a_death_at_any_step_leaves_a_whole_entry_or_none(tmp_path: Path) -> None:
    """A process dies at its first operation on files, another at its second, and so on to the end of a commit."""
    command = [sys.executable, "-c", DIES_AT_EACH_STEP, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    left = done.stdout.split()
    assert len(left) > 20
    assert left[0] == "old"
    assert left[-1] == "new"
    assert [state for state, _ in itertools.groupby(left)] in (["old", "none", "new"], ["old", "new"])


@pytest.mark.parametrize(
    ("change", "has_payload"),
    [
        (lambda payload: flip_bit(payload / "model/deep/weights.bin", 100), True),
        (lambda payload: (payload / "model/deep/weights.bin").unlink(), False),
        (lambda payload: os.truncate(payload / "model/deep/weights.bin", 255), False),
        (lambda payload: shutil.rmtree(payload), False),
    ],
    ids=["one bit", "a file missing", "a file cut", "nothing left"],
)
def test_damage_is_noticed(store: Store, change: Callable[[Path], None], has_payload: bool) -> None:
    change(commit(store).payload)
    entry = store.find(KEY)
    assert entry is not None
    assert entry.has_payload() is has_payload
    with pytest.raises(DamagedEntry, match=str(entry.payload)):
        entry.verify()
    commit(store).verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: (payload / "model/modeling.py").write_text("import os"),
        lambda payload: os.mkfifo(payload / "model/pipe"),
        lambda payload: (
            (payload / "model/deep/weights.bin").rename(payload.parent / "weights.bin")
            and (payload / "model/deep/weights.bin").symlink_to(payload.parent / "weights.bin")
        ),
        lambda payload: (
            (payload / "model").rename(payload.parent / "model")
            and (payload / "model").symlink_to(payload.parent / "model")
        ),
        lambda payload: payload.rename(payload.parent / "other") and payload.symlink_to(payload.parent / "other"),
    ],
    ids=["one file more", "a pipe", "a linked file", "a linked folder", "a linked payload"],
)
def test_what_was_never_written_is_not_taken(store: Store, change: Callable[[Path], None]) -> None:
    """Somebody else's entry, or one that was tampered with: no file of it reaches the workspace."""
    change(commit(store).payload)
    entry = store.find(KEY)
    assert entry is not None
    assert not entry.has_payload()
    with pytest.raises(DamagedEntry, match=str(entry.payload)):
        entry.verify()


def test_an_entry_that_is_a_link_to_another_place_is_ignored(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    folder = commit(store).folder
    folder.rename(elsewhere := store.root.parent / "elsewhere")
    folder.symlink_to(elsewhere)
    assert store.find(KEY) is None
    assert "a link to another place" in caplog.text


def test_pruning_keeps_the_manifest(store: Store) -> None:
    made = commit(store, metrics={"loss": 1.0})
    made.prune()
    made.prune()
    found = store.find(KEY)
    assert found == made
    assert not found.has_payload()
    assert found.manifest["metrics"] == {"loss": 1.0}


def test_discarding_removes_the_entry(store: Store) -> None:
    commit(store)
    store.discard(KEY)
    store.discard(KEY)
    assert store.find(KEY) is None
    assert list((store.root / "tmp").iterdir()) == []


def test_an_unknown_key_is_no_reason_to_warn(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert store.find(KEY) is None
    assert not caplog.records


def changed(**parts: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps(json.loads(text) | parts).encode()


def remade(**parts: Any) -> Callable[[bytes], bytes]:
    """Another identity, with the key that belongs to it."""

    def change(text: bytes) -> bytes:
        manifest = json.loads(text)
        identity = manifest["identity"] | parts
        return json.dumps(manifest | {"identity": identity, "key": digest_json(identity)}).encode()

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\xff\x00" + text,
        lambda text: b"[]",
        lambda text: b"null",
        lambda text: b"{}",
        changed(schema=0),
        changed(key="another"),
        changed(files={"../../params.yaml": {"size": 0, "sha256": ""}}),
        changed(files={"model/../../x": {"size": 0, "sha256": ""}}),
        changed(files={"/etc/hostname": {"size": 0, "sha256": ""}}),
        changed(files=None),
        changed(files={"model\0": {"size": 0, "sha256": ""}}),
        changed(files={"a": {"size": "0", "sha256": ""}}),
        changed(files={"a": {"size": 0}}),
        changed(metrics={"loss": "high"}),
        changed(series=[{"step": 1}]),
        changed(identity=IDENTITY | {"stage": "reward"}),
        changed(identity={"stage": "sft"}),
        remade(parent="../../escaped"),
        remade(parent=["0" * 64]),
        remade(parent="0" * 300),
        remade(iteration="one"),
        remade(more="than there is"),
        remade(parameters=json.loads('{"a": ' * 40 + "1" + "}" * 40)),
        changed(perf={"seconds": -1.0}),
        lambda text: text.replace(b'"metrics": {', b'"metrics": {"x": 1e999'),
        changed(digest="0" * 64),
        changed(parts={"model": "0" * 64}),
        changed(command="rm"),
        lambda text: text.replace(b'"metrics": {', b'"metrics": {"x": NaN'),
        lambda text: b"[" * 100_000,
        lambda text: b'{"schema": ' + b"1" * 10_000 + b"}",
        lambda text: text + b" " * store_module.MANIFEST_BYTES,
    ],
    ids=[
        "cut",
        "empty",
        "no text",
        "a list",
        "null",
        "no fields",
        "older",
        "renamed",
        "..",
        "a/..",
        "absolute",
        "no files",
        "a zero byte",
        "a size that is a text",
        "no digest",
        "a text for a number",
        "half a row",
        "another identity",
        "half an identity",
        "a parent that is a path",
        "a parent that is a list",
        "a long parent",
        "no number of an iteration",
        "an identity of more",
        "deep parameters",
        "time that runs backwards",
        "an infinite number",
        "another digest",
        "other parts",
        "more than there is",
        "no number",
        "deep",
        "a long number",
        "huge",
    ],
)
def test_a_manifest_that_is_not_ours_is_ignored_with_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture, change: Callable[[bytes], bytes]
) -> None:
    path = commit(store).folder / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.find(KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path.parent) in caplog.text
    assert commit(store) == store.find(KEY)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(store: Store) -> None:
    path = commit(store).folder / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    assert store.find(KEY) is None


def test_nothing_is_written_through_somebody_elses_links(store: Store, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (store.root / "locks" / KEY).symlink_to(victim)
    with pytest.raises(UserError, match="a link to another file, expected a lock"), store.lock(KEY):
        pass
    for place_of_link in (store.root / "partial" / KEY, store.root / "partial" / KEY / "series.new"):
        store.forget_partial(KEY)
        place_of_link.parent.mkdir(exist_ok=True)
        place_of_link.symlink_to(victim)
        assert list(store.partial(KEY).iterdir()) == []
    (store.root / "tmp").rmdir()
    (store.root / "tmp").symlink_to(tmp_path)
    with pytest.raises(UserError, match="a link to another place"):
        Store(store.root)
    assert victim.read_text() == "precious"


def test_a_scratch_folder_of_nobody_is_left_alone(store: Store) -> None:
    odd = store.root / "tmp" / f"a~{socket.gethostname()}~²~1~b"
    odd.mkdir()
    assert Store(store.root).find(KEY) is None
    assert odd.exists()


def test_a_name_with_dots_in_it_is_not_foreign(store: Store) -> None:
    entry = commit(store, fill=lambda folder: (folder / "a..b.json").write_text(""))
    assert store.find(KEY) == entry


# Digests -------------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_digest_wherever_and_in_whatever_order_it_was_made(tmp_path: Path) -> None:
    names = ["b/x", "a", "b/a/y", "c"]
    for place_, order in (("one", names), ("two/deeper", names[::-1])):
        for name in order:
            path = tmp_path / place_ / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    digest = digest_path(tmp_path / "one")
    assert digest_path(tmp_path / "two/deeper") == digest
    (tmp_path / "one/a").rename(tmp_path / "one/d")
    assert digest_path(tmp_path / "one") != digest


def test_parts_are_what_digest_path_says_of_them_in_the_workspace(store: Store, tmp_path: Path) -> None:
    entry = commit(store)
    assert set(entry.parts) == {"model", "metrics.json"}
    for name, digest in entry.parts.items():
        place(entry.payload / name, tmp_path / "workspace" / name)
        assert digest_path(tmp_path / "workspace" / name) == digest
    assert entry.parts["metrics.json"] == digest_file(entry.payload / "metrics.json")


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    before = digest_path(path)
    path.write_text("two")
    assert digest_path(path) != before
    assert digest_path(path) == digest_file(path)


def test_nothing_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digest_path(tmp_path / "nothing")


def test_json_has_one_text_for_a_value() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("inf")})


# Workspace -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["linked", "copied"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One with hard links, one without."""

    def refuse(source: str, target: str) -> None:
        raise OSError("no hard links here")

    if request.param == "copied":
        monkeypatch.setattr(store_module.os, "link", refuse)
    return request.param


def test_placing_replaces_what_was_there(store: Store, tmp_path: Path, file_system: str) -> None:
    entry, target = commit(store), tmp_path / "checkpoints/model"
    (target / "deep").mkdir(parents=True)
    (target / "deep/old").write_text("old")
    place(entry.payload / "model", target)
    assert digest_path(target) == entry.parts["model"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    same_file = os.path.samefile(target / "config.json", entry.payload / "model/config.json")
    assert same_file is (file_system == "linked")
    place(entry.payload / "metrics.json", target)  # a file where a folder was
    assert digest_path(target) == entry.parts["metrics.json"]


def test_replacing_what_was_placed_does_not_reach_into_the_store(store: Store, tmp_path: Path) -> None:
    first, second = commit(store), commit(store, lambda folder: (folder / "metrics.json").write_text("new"), seed=1)
    place(first.payload / "metrics.json", tmp_path / "metrics.json")
    place(second.payload / "metrics.json", tmp_path / "metrics.json")
    assert (tmp_path / "metrics.json").read_text() == "new"
    first.verify()


def test_removing_leaves_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


# Locks ---------------------------------------------------------------------------------------------------------------

HOLDS = """
import sys
from pathlib import Path
from rlhf_tasks.store import Store

with Store(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["released", "killed"])
def test_a_lock_makes_the_second_wait_until_the_first_is_done_or_dead(
    store: Store, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    got = threading.Event()

    def second() -> None:
        with store.lock(KEY):
            got.set()

    with process(HOLDS, store.root, KEY) as first:
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert not got.wait(0.3)
        assert "another process" in caplog.text
        if end == "killed":
            first.send_signal(signal.SIGKILL)
        else:
            assert first.stdin is not None
            first.stdin.write("\n")
            first.stdin.flush()
        assert got.wait(30)
        thread.join()


def test_locks_of_different_keys_do_not_meet(store: Store) -> None:
    with store.lock("one"), store.lock("two"):
        pass


def test_a_curve_that_is_too_long_for_a_manifest_is_thinned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    series = [{"step": step, "time_ms": 1, "values": {"loss": 0.5}} for step in range(1, 1001)]
    monkeypatch.setattr(store_module, "MANIFEST_BYTES", 20_000)
    found = commit(store, series=series)
    assert store.find(KEY) == found
    steps = [row["step"] for row in found.manifest["series"]]
    assert 100 < len(steps) < 500
    assert steps[-1] == 1000
    assert len({after - before for before, after in itertools.pairwise(steps)}) == 1


def test_what_a_kill_left_of_an_export_goes_with_the_next(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    left = tmp_path / f"out/.model.{'0' * 32}"
    left.mkdir()
    other = tmp_path / "out/.model.backup"
    other.touch()
    source = tmp_path / "source"
    source.write_text("x")
    place(source, tmp_path / "out/model")
    assert not left.exists()
    assert other.exists()


def test_a_file_changed_in_place_and_given_its_old_time_back_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    before, facts = digest_path(path), path.stat()
    with path.open("r+") as file:
        file.write("two")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert digest_path(path) != before


def test_a_file_in_place_of_unfinished_work_is_removed(store: Store) -> None:
    (store.root / "partial" / KEY).write_text("no folder")
    assert store.partial(KEY).is_dir()
