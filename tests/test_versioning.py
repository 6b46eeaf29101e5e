"""What a clone takes from DVC: what git tracks, and nothing that a cache or a remote has been made to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_tasks.errors import UserError
from rlhf_tasks.versioning import pull_sources


def command(root: Path, *arguments: str) -> None:
    subprocess.run(arguments, cwd=root, check=True, capture_output=True)


def dvc(root: Path, *arguments: str) -> None:
    command(root, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository that tracks a folder with DVC."""
    root = tmp_path / "origin"
    (root / "raw").mkdir(parents=True)
    (root / "raw/rows.jsonl").write_text('{"text": "fine"}\n')
    command(root, "git", "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "add", "-q", "raw")
    command(root, "git", "add", "-A")
    command(root, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "data")
    return root


def clone_of(origin: Path) -> Path:
    command(origin.parent, "git", "clone", "-q", str(origin), "clone")
    return origin.parent / "clone"


def test_what_dvc_tracks_comes_from_the_origins_cache(origin: Path) -> None:
    clone = clone_of(origin)
    pull_sources(clone, origin)
    assert (clone / "raw/rows.jsonl").read_text() == (origin / "raw/rows.jsonl").read_text()


def test_what_a_patch_brought_comes_too_and_what_it_removed_is_not_asked_for(origin: Path) -> None:
    """A file that was tracked after the last commit, under a name that git would quote."""
    (origin / "é x.jsonl").write_text("{}\n")
    dvc(origin, "add", "-q", "é x.jsonl")
    clone = clone_of(origin)
    (clone / "é x.jsonl.dvc").write_bytes((origin / "é x.jsonl.dvc").read_bytes())
    (clone / "raw.dvc").unlink()
    pull_sources(clone, origin)
    assert (clone / "é x.jsonl").read_text() == "{}\n"
    assert not (clone / "raw").exists()


def test_a_listing_that_leads_out_of_the_clone_is_not_followed(origin: Path) -> None:
    (listing,) = (origin / ".dvc/cache").rglob("*.dir")
    files = json.loads(listing.read_text())
    listing.chmod(0o644)
    listing.write_text(json.dumps([*files, files[0] | {"relpath": "../../escaped"}]))
    clone = clone_of(origin)
    with pytest.raises(UserError, match=r"raw\.dvc: the listing of `raw` .* is not the one that git tracks"):
        pull_sources(clone, origin)
    assert not (origin.parent / "escaped").exists()
    assert not (clone / "raw").exists()
