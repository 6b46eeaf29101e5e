"""What many tests start from: a tiny tokenizer, tiny models, and a small project in which the stages run in seconds."""

from __future__ import annotations

import contextlib
import copy
import gzip
import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, PARAMS, REPOSITORY, SENTENCES, Finished
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_tasks import chain, config, engine, keying
from rlhf_tasks.config import load_params, parse_assignments, set_params
from rlhf_tasks.data.encoding import train_tokenizer
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.models import SCORE_STATISTICS, load_actor, load_scorer, new_scorer, save_model
from rlhf_tasks.ppo.experience import Episodes
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import Entry
from rlhf_tasks.workspace import Workspace

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_dvc_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run under DVC, whose variables would move every store."""
    for name in ("DVC_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def own_mlflow() -> Iterator[None]:
    """MLflow is the project's own, whatever the shell says."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of 300 tokens at most: `<pad>` 0, `<eos>` 1."""
    return train_tokenizer(SENTENCES, 300, ())


@pytest.fixture(scope="session")
def tiny_actor(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of an Actor with 2 layers of 32, sharper than a fresh one, so that mistakes show."""
    scratch = config.Scratch(vocab_size=300, hidden_size=32, intermediate_size=64, layers=2, heads=2)
    folder = tmp_path_factory.mktemp("tiny-actor")
    save_model(_sharpened(new_actor(config.Model(scratch=scratch), tokenizer, seed=0)), folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_scorer(tiny_actor: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a Reward with the trunk of `tiny_actor`, and score statistics."""
    folder = tmp_path_factory.mktemp("tiny-scorer")
    model = new_scorer(tiny_actor, tokenizer, 0, "reward", CPU)
    with torch.no_grad():
        model.score.weight.mul_(10)
    save_model(model, folder, tokenizer)
    (folder / SCORE_STATISTICS).write_text(json.dumps({"mean": 0.5, "std": 2.0, "length": 6.0, "samples": 16}))
    return folder


@pytest.fixture(scope="session")
def absolute_actor(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Actor that learns positions by number: unlike a Llama's, its answers show a wrong position id."""
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("absolute-actor")
    save_model(_sharpened(GPT2LMHeadModel(shape)), folder, tokenizer)
    return folder


@dataclass
class Four:
    """The four models of PPO, each different from the others."""

    actor: Any
    ref: Any
    reward: Any
    critic: Any


@pytest.fixture(scope="session")
def _four(tiny_actor: Path, tiny_scorer: Path) -> Four:
    actor, ref = (load_actor(tiny_actor, CPU) for _ in range(2))
    reward, critic = (load_scorer(tiny_scorer, CPU) for _ in range(2))
    return Four(_disturbed(actor, 1), ref, reward, _disturbed(critic, 2))


@pytest.fixture
def four(_four: Four) -> Four:
    """Actor, Ref, Reward and Critic in memory, fresh for each test: the Actor has gone some way from Ref."""
    return copy.deepcopy(_four)


@pytest.fixture
def rollout() -> Episodes:
    """Twelve episodes: prompts of 1 to 5 tokens, responses of 1 to 7, most of which end with EOS."""
    random = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 300, (count,), generator=random).tolist()

    prompts = [tokens(1 + i % 5) for i in range(12)]
    responses = [[*tokens(i * 5 % 7), 1] if i % 4 else tokens(7) for i in range(12)]
    return Episodes(prompts, responses, [response[-1] == 1 for response in responses])


def pytest_configure() -> None:
    """Programs under test get Ctrl-C as in a terminal, also where the tests were started by `nohup … &`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, it would leave the other worker idle at the end."""
    items.sort(key=lambda item: item.path.name != "test_kills.py")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workspace]:
    """Makes small projects: `workspace("ppo.iterations=3")` is a new folder with a params.yaml and 400 rated texts."""

    def make(*assignments: str) -> Workspace:
        root = tmp_path_factory.mktemp("project")
        (root / "params.yaml").write_text(PARAMS)
        set_params(root / "params.yaml", parse_assignments(list(assignments)))
        (root / "data/raw").mkdir(parents=True)
        with gzip.open(REPOSITORY / "data/raw/movie_reviews.jsonl.gz", "rt", encoding="utf-8") as shipped:
            lines = itertools.islice(shipped, 400)
            (root / "data/raw/ratings.jsonl").write_text("".join(lines), encoding="utf-8")
        return Workspace(root, load_params(root / "params.yaml"))

    return make


@pytest.fixture
def sketch(workspace: Callable[..., Workspace]) -> Workspace:
    """A project in which every stage's outs lie as small stand-ins: enough to plan, nothing was trained."""
    project = workspace()
    for stage in STAGES.values():
        for path in stage.outs.values():
            target = project.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix:
                target.write_text(path)
            else:
                target.mkdir()
                (target / "file").write_text(path)
    return project


@pytest.fixture
def write_model(tiny_actor: Path) -> Callable[[Path], None]:
    """Writes a small model folder, safetensors and tokenizer."""
    return lambda folder: shutil.copytree(tiny_actor, folder)


@pytest.fixture(scope="session")
def run_stages() -> Callable[..., dict[str, Entry]]:
    """Runs stages as the flows do, without them: `run_stages(workspace, "prepare", "sft")` gives their entries."""

    def run(workspace: Workspace, *names: str, watch: engine.Watch = lambda row, total: None) -> dict[str, Entry]:
        entries = {}
        with contextlib.chdir(workspace.root):  # sources are named relative to the project's folder
            for name in names or [name for name in STAGES if name != "register"]:
                job = keying.plan(workspace, STAGES[name])
                if name == "ppo":
                    entries[name] = chain.finish(workspace, job, iterations(workspace))
                else:
                    entries[name] = engine.perform(workspace, job, watch)
                engine.export(workspace, entries[name])
        return entries

    def iterations(workspace: Workspace) -> list[Entry]:
        done = chain.usable(chain.known(workspace))
        while len(done) < workspace.params.ppo.iterations:
            done = chain.advance(workspace, done, lambda entry: None)
        return done

    return run


@pytest.fixture(scope="session")
def finished(workspace: Callable[..., Workspace], run_stages: Callable[..., dict[str, Entry]]) -> Finished:
    """One project for all tests that only read it."""
    project = workspace()
    return Finished(project, run_stages(project))


@pytest.fixture
def finished_copy(finished: Finished, tmp_path: Path) -> Workspace:
    """A copy of the finished project, store included, to change at will."""
    root = tmp_path / "copy"
    shutil.copytree(finished.workspace.root, root)
    return Workspace(root, finished.workspace.params)


def _sharpened(model: Any) -> Any:
    """Weights of a size at which tokens, positions and layers matter as in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def _disturbed(model: Any, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    return model
