"""A model of the Hub at a pinned commit: from the cache, or fetched into it, with huggingface_hub itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, NAME, environment, serve, write_cache
from shapes import write_shape

from rlhf_tasks import config, keying
from rlhf_tasks.config import parse_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parent.parent
FIND = """
import sys
from rlhf_tasks.base import find_base
from rlhf_tasks.config import Model
from rlhf_tasks.errors import UserError

try:
    print(find_base(Model(base=sys.argv[1], revision=sys.argv[2])))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    write_shape("llama", folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def find(home: Path, **options: Any) -> tuple[int, str]:
    """What a process of its own finds with this cache: its exit status, and the folder or the sentence."""
    done = subprocess.run(
        [sys.executable, "-c", FIND, NAME, COMMIT],
        env=environment(home, **options), cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, (done.stdout or done.stderr).strip()


def test_what_the_cache_has_is_found_offline(tmp_path: Path, llama: Path) -> None:
    snapshot = write_cache(tmp_path, llama)
    assert find(tmp_path, offline=True) == (0, str(snapshot))


def test_what_the_cache_lacks_is_a_sentence(tmp_path: Path) -> None:
    for options, reason in (({"offline": True}, "offline mode is enabled"), ({}, "refused")):
        status, said = find(tmp_path, **options)
        assert status == 1
        assert said.startswith(
            f"`model.base: {NAME}` at `model.revision: {COMMIT}`: not in the cache and not to be had"
        )
        assert reason in said
        assert "HF_HUB_OFFLINE" in said
        assert "\n" not in said


def test_what_is_fetched_once_is_asked_for_no_more(tmp_path: Path, llama: Path) -> None:
    with serve(llama) as (endpoint, asked):
        status, folder = find(tmp_path, endpoint=endpoint)
        assert status == 0, folder
        first = len(asked)
        assert find(tmp_path, endpoint=endpoint) == (0, folder)
        assert len(asked) == first
    names = {file.name for file in Path(folder).iterdir()}
    assert names == {file.name for file in llama.iterdir()} - {"pytorch_model.bin"}, "no pickle is fetched"
    assert (Path(folder) / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert find(tmp_path) == find(tmp_path, offline=True) == (0, folder)


def test_half_a_model_in_the_cache_is_completed_or_told(tmp_path: Path, llama: Path) -> None:
    with serve(llama) as (endpoint, _):
        _, folder = find(tmp_path, endpoint=endpoint)
        (Path(folder) / "tokenizer.json").unlink()
        status, said = find(tmp_path, offline=True)
        assert status == 1
        assert "not to be had from the Hub" in said
        assert find(tmp_path, endpoint=endpoint) == (0, folder)
        assert (Path(folder) / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"base": NAME, "revision": "main"}, r"`revision: main` can move; expected the full commit, 40 hexadecimal"),
        ({"base": NAME, "revision": COMMIT[:12]}, r"can move; expected the full commit"),
        ({"base": "scratch", "revision": COMMIT}, r"but `base: scratch` is none; expected `owner/name`"),
        ({"base": "./models/own", "revision": COMMIT}, r"but `base: \./models/own` is none"),
    ],
)
def test_a_revision_pins_a_commit_of_a_hub_model(model: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: `model`: .*" + said):
        parse_params({"data": {"sources": [{"kind": "sft", "path": "x"}]}, "model": model})


def test_the_commit_is_in_the_keys_and_the_model_is_no_input(sketch: Workspace) -> None:
    def keys(commit: str) -> dict[str, Any]:
        model = config.Model(base=NAME, revision=commit)
        project = Workspace(sketch.root, sketch.params.model_copy(update={"model": model}))
        return {name: keying.plan(project, STAGES[name]) for name in ("prepare", "sft", "reward")}

    one, other = keys(COMMIT), keys(COMMIT[::-1])
    assert {name for name, job in one.items() if job.key != other[name].key} == {"prepare", "sft"}
    assert not [path for job in one.values() for path in job.identity["inputs"] if NAME in path]


def test_a_hub_model_goes_through_sft(
    workspace: Callable[..., Workspace],
    run_stages: Callable[..., Any],
    tmp_path: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bits as from the folder."""
    write_cache(tmp_path, llama)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = run_stages(workspace(f"model.base={NAME}", f"model.revision='{COMMIT}'"), "prepare", "sft")
    folder = run_stages(workspace(f"model.base={llama}"), "prepare", "sft")
    assert hub["sft"].parts["checkpoint"] == folder["sft"].parts["checkpoint"]
