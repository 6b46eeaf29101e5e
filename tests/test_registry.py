"""The register stage against a real MLflow registry on SQLite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_tasks import config, registry
from rlhf_tasks.chat_template import Trained, jinja_of
from rlhf_tasks.data.encoding import encode_prompt, encode_response, render_prompt
from rlhf_tasks.errors import UserError
from rlhf_tasks.model_card import Facts
from rlhf_tasks.models import SCORE_STATISTICS, load_scorer, load_tokenizer, new_scorer, save_model
from rlhf_tasks.registry import Outcome, Settled, TrackingContext
from rlhf_tasks.report import headline
from rlhf_tasks.reward import score_texts
from rlhf_tasks.store import digest_path
from rlhf_tasks.tracking import Tracker

ALONE = """
import json, os, sys, tempfile

# an editable install is found by a hook: without it, and from elsewhere, there is no project
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
os.chdir(tempfile.mkdtemp())
for name in ("rlhf_tasks", "flows"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} can be imported")

import mlflow

mlflow.set_tracking_uri(sys.argv[1])
"""
USES = """
generate = mlflow.transformers.load_model("models:/rlhf-actor@champion")
settings = generate.generation_config
assert (settings.do_sample, settings.temperature, settings.top_k, settings.max_new_tokens) == (True, 0.7, 0, 5)
[answer] = generate("This film")
assert answer["generated_text"].startswith("This film")
model = mlflow.pyfunc.load_model("models:/rlhf-actor@champion")
[short] = model.predict(["This film"], params={"max_new_tokens": 1, "do_sample": False})
[long] = model.predict(["This film"], params={"do_sample": False})
assert long.startswith(short) and len(long) > len(short) and not long.startswith("This film"), (short, long)
reward = mlflow.pyfunc.load_model("models:/rlhf-reward/1")
rows = [{"prompt": "This film", "response": response} for response in (" is", " is not<eos> what I had hoped for")]
scores = [reward.predict(rows), reward.predict(rows, params={"ended": False})]

chat, messages = mlflow.transformers.load_model("models:/chatty@champion"), [{"role": "user", "content": "Who?"}]
[answer] = chat(messages)
assert answer["generated_text"][-1]["role"] == "assistant"
model = mlflow.pyfunc.load_model("models:/chatty@champion")
[answer] = model.predict({"messages": messages, "max_tokens": 3, "temperature": 1.0})
assert (answer["object"], answer["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
assert not {"rlhf_tasks", "flows"} & {name.partition(".")[0] for name in sys.modules}
tables = {f"{column} {i}": table[column].tolist() for i, table in enumerate(scores) for column in table}
print(json.dumps(tables | answer["usage"]))
"""
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
METRICS = {"score_gain_low": 0.5, "kl_sequence": 6.0, "length": 20, "note": "not a number", "vader": None}
GENERATION = config.Generation(max_new_tokens=5, temperature=0.7, stop=".")


def write_actor(folder: Path) -> None:
    """A random Llama of some thousand weights with a byte-level tokenizer, read-only as the store keeps it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>", pad_token="<pad>")
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o444)


def write_reward(folder: Path, actor: Path) -> None:
    """A Reward on that Llama's trunk, with a head that says different things of different texts."""
    tokenizer = load_tokenizer(actor)
    model = new_scorer(actor, tokenizer, 0, "reward", torch.device("cpu"))
    with torch.no_grad():
        model.score.weight.mul_(100)
    save_model(model, folder, tokenizer)
    (folder / SCORE_STATISTICS).write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    for file in folder.iterdir():
        file.chmod(0o444)


@dataclass
class Project:
    """A project's folder with an Actor, its evaluation and a tracker."""

    root: Path
    tracker: Tracker
    parent: str

    def context(self, digest: str, template: Trained = "none") -> TrackingContext:
        """A stage's run; the Reward is always the same."""
        facts = Facts(template=template, chat_template=jinja_of(template, load_tokenizer(self.root / "actor")))
        return TrackingContext(
            uri=self.tracker.uri,
            run_id=self.tracker.start_stage(self.parent, "register"),
            actor_digest=digest,
            reward_digest="reward-1",
            lock=self.root / "locks" / "registry",
            tags={"git.commit": "abc", "rlhf.input.checkpoints/sft": "s", "rlhf.input.checkpoints/actor": digest},
            facts=lambda: facts,
        )

    def arguments(
        self, digest: str, name: str = "rlhf-actor", template: Trained = "none", **gate: float
    ) -> dict[str, Any]:
        return {
            "register_": config.Register(name=name, gate=config.Gate(**gate)),
            "generation": GENERATION,
            "actor": self.root / "actor",
            "reward": self.root / "reward",
            "evaluation": self.root / "evaluate.json",
            "tracking": self.context(digest, template),
        }

    def versions(self, name: str) -> list[int]:
        return sorted(int(v.version) for v in self.tracker.client.search_model_versions(f"name = '{name}'"))

    def challenger(self, name: str) -> int:
        return int(self.tracker.client.get_model_version_by_alias(name, "challenger").version)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    write_actor(root / "actor")
    write_reward(root / "reward", root / "actor")
    (root / "evaluate.json").write_text(json.dumps(METRICS))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        # MLflow's own global server is this folder's mlflow.db: nothing here may use it.
        (root / "elsewhere").mkdir()
        patch.chdir(root / "elsewhere")
        tracker = Tracker(root)
        yield Project(root, tracker, tracker.start_pipeline({"seed": 0}, {}, "try"))
    assert list((root / "elsewhere").iterdir()) == []


JUDGED = ("register_", "actor", "evaluation")  # what `registry.run` reads


@pytest.fixture(scope="module")
def registered(project: Project) -> dict[str, Any]:
    """The arguments that settled `rlhf-actor` once."""
    arguments = project.arguments("digest-1")
    registry.settle(**arguments)
    return arguments


def test_the_verdict_is_a_function_of_the_inputs(project: Project) -> None:
    arguments = {name: value for name, value in project.arguments("digest-1").items() if name in JUDGED}
    for name in ("out", "again"):
        (project.root / name).mkdir()
        returned = registry.run(**arguments, out=project.root / name)
        assert returned == {"gate/passed": 1.0, "gate/gain": 0.5, "gate/kl": 6.0}
    written = (project.root / "out" / "metrics.json").read_bytes()
    assert written == (project.root / "again" / "metrics.json").read_bytes()
    assert json.loads(written) == {
        "name": "rlhf-actor",
        "actor_digest": digest_path(project.root / "actor"),
        "gate": {
            "gain": {"passed": True, "found": 0.5, "limit": 0.0},
            "kl": {"passed": True, "found": 6.0, "limit": 12.0},
        },
        "passed": True,
    }
    strict = arguments | {"register_": config.Register(gate=config.Gate(max_kl=5.0))}
    assert registry.run(**strict, out=project.root / "again")["gate/passed"] == 0.0


def test_an_actor_is_registered_once(project: Project, registered: Any) -> None:
    arguments = registered
    assert registry.ensure_registered(**arguments) == 1
    assert project.versions("rlhf-actor") == [1]
    assert registry.find_version("rlhf-actor", "digest-1", project.tracker.uri) == 1
    assert registry.find_version("rlhf-actor", "digest-2", project.tracker.uri) is None
    assert registry.find_version("unheard-of", "digest-1", project.tracker.uri) is None
    assert project.challenger("rlhf-actor") == 1


def test_a_version_leads_back(project: Project, registered: Any) -> None:
    arguments = registered
    client, run = project.tracker.client, arguments["tracking"].run_id
    version = client.get_model_version("rlhf-actor", "1")
    made = {
        "actor_digest": "digest-1",
        "git.commit": "abc",
        "rlhf.input.checkpoints/sft": "s",
        "rlhf.input.checkpoints/actor": "digest-1",
        "rlhf.template": "none",
        "rlhf.reward": "models:/rlhf-reward/1",
    }
    own = {name: value for name, value in version.tags.items() if not name.startswith("champion.")}
    assert own == made | {"gate": "passed", "gate_run": run}
    judge = client.get_model_version("rlhf-reward", "1")
    read = {"git.commit": "abc", "rlhf.input.checkpoints/sft": "s"}
    assert judge.tags == read | {"reward_digest": "reward-1", "rlhf.template": "none"}
    assert version.run_id == judge.run_id == run
    outputs = client.get_run(run).outputs
    assert outputs is not None
    models = {(m := client.get_logged_model(output.model_id)).name: m for output in outputs.model_outputs}
    assert models.keys() == {"rlhf-actor", "rlhf-reward"}
    model = models["rlhf-actor"]
    assert (model.status, model.source_run_id, model.name) == ("READY", run, "rlhf-actor")
    assert {m.key: m.value for m in model.metrics or []} == {"score_gain_low": 0.5, "kl_sequence": 6.0, "length": 20.0}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "rlhf-actor", "version": 1}]


def files_of(project: Project, name: str, version: str) -> dict[str, Path]:
    """What a version holds: names in its folder -> files."""
    source = project.tracker.client.get_model_version(name, version).source
    folder = Path(source.removeprefix("file://"))
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["rlhf-actor", "rlhf-reward"])
def test_what_is_registered_has_a_card_pins_and_no_pickle(project: Project, registered: Any, name: str) -> None:
    files = files_of(project, name, "1")
    assert {"model_card.md", "requirements.txt", "input_example.json"} <= files.keys()
    assert [path for path in files if path.endswith("/model.safetensors")]
    assert not [path for path in files if Path(path).suffix in (".pkl", ".pickle", ".bin", ".pt", ".joblib")]
    for library in (torch, transformers):
        pin = f"{library.__name__}=={library.__version__.partition('+')[0]}"
        assert pin in files["requirements.txt"].read_text().split()
    assert "signature:" in files["MLmodel"].read_text()
    assert files["model_card.md"].read_text().count(f"# {name}\n") == 1


def test_an_actor_samples_as_it_was_trained(project: Project, registered: Any) -> None:
    files = files_of(project, "rlhf-actor", "1")
    assert "| kl | 6 | 12 | passed |" in files["model_card.md"].read_text()
    settings = json.loads(files["model/generation_config.json"].read_text())
    assert settings["eos_token_id"] == [1, 2 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(".")]
    assert (settings["pad_token_id"], settings["top_k"], settings["top_p"]) == (0, 0, 1.0)


def test_champion_moves_through_the_gate_only(project: Project, registered: Any) -> None:
    name, uri = "gated", project.tracker.uri
    assert registry.champion(name, uri) is None
    first, worse = project.arguments("a", name), project.arguments("b", name, max_kl=5.0)
    # A registry that never saw the Actor: the stage's result came from elsewhere.
    assert registry.settle(**first) == Settled(version=1, previous=None, champion=1)
    assert registry.settle(**first) == Settled(version=1, previous=1, champion=1)

    kept = registry.settle(**worse)
    assert kept == Settled(version=2, previous=1, champion=1, passed=False)
    assert not kept.moved
    assert project.challenger(name) == 2

    assert registry.settle(**(worse | {"register_": first["register_"]})).moved
    assert registry.champion(name, uri) == 2
    assert registry.settle(**first) == Settled(version=1, previous=2, champion=2), "what was left stays left"


def test_a_version_that_is_not_there_is_told_from_those_that_are(project: Project) -> None:
    """Why no version is champion, too: the gate's verdict is a tag, which follows the rules."""
    name, uri = "failing", project.tracker.uri
    first, second = project.arguments("a", name, max_kl=5.0), project.arguments("b", name, max_kl=5.0, min_gain=1.0)
    registry.settle(**first)
    registry.settle(**second)
    told = "2 (@challenger, gate failed: gain 0.5, limit 1; kl 6, limit 5), 1 (gate failed: kl 6, limit 5)"
    for asked, missing in (("@champion", "alias champion"), ("/7", "version 7")):
        with pytest.raises(UserError) as caught:
            registry.find_registered(f"models:/{name}{asked}", uri)
        assert str(caught.value) == (
            f"models:/{name}{asked}: {name} has no {missing} in the MLflow registry, "
            f"expected one of its versions: {told}"
        )
    registry.settle(**(first | {"register_": config.Register(name=name)}))
    assert registry.find_registered(f"models:/{name}@champion", uri).version == 1
    assert project.tracker.client.get_model_version(name, "1").tags["gate"] == "passed"
    with pytest.raises(UserError, match="the MLflow registry has no versions of nothing; `rlhf run` registers one"):
        registry.find_registered("models:/nothing@champion", uri)


def test_rules_at_their_limits() -> None:
    rules = config.Gate(min_gain=0.1, max_kl=6.0)
    assert registry.gate({"score_gain_low": 0.1, "kl_sequence": 6.0}, rules) == [
        Outcome("gain", False, 0.1, 0.1),
        Outcome("kl", True, 6.0, 6.0),
    ]
    with pytest.raises(UserError, match=r"evaluate.json: `kl_sequence` is nan, expected a number"):
        registry.gate({"score_gain_low": 1.0, "kl_sequence": float("nan")}, rules)
    with pytest.raises(UserError, match="`score_gain_low` is None"):
        registry.gate({}, rules)


def test_an_actor_that_cannot_be_saved_leaves_no_version(project: Project, tmp_path: Path) -> None:
    arguments = project.arguments("broken", "broken") | {"actor": tmp_path, "generation": config.Generation()}
    with pytest.raises(Exception, match=r"does not contain a config\.json"):
        registry.ensure_registered(**arguments)
    assert project.versions("broken") == []
    [model] = project.tracker.client.search_logged_models([project.tracker.experiment_id], "name = 'broken'")
    assert model.status == "FAILED"


def test_both_models_work_where_there_is_no_project(project: Project, registered: Any) -> None:
    """The Actor generates, chats where it was trained with a template, and the Reward scores as PPO heard it."""
    assert registry.settle(**registered).champion == 1
    registry.settle(**project.arguments("chatty", "chatty", "alpaca"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET
    result = subprocess.run(
        [sys.executable, "-I", "-c", ALONE + USES, project.tracker.uri],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    found = json.loads(result.stdout)

    folder, device = registered["reward"], torch.device("cpu")
    tokenizer, scorer = load_tokenizer(folder), load_scorer(folder, device)
    prompt = encode_prompt(tokenizer, "This film", 99, markup=False)
    ended = [prompt + encode_response(tokenizer, text, 99) for text in (" is", " is not<eos> what I had hoped for")]
    for i, rows in enumerate((ended, [row[:-1] for row in ended])):
        with torch.no_grad():
            expected = score_texts(scorer, rows, device).tolist()
        assert found[f"score {i}"] == pytest.approx(expected, abs=1e-4)
        assert found[f"normalised {i}"] == pytest.approx([(score - 0.5) / 2 for score in expected], abs=1e-4)
    assert len({*found["score 0"], *found["score 1"]}) == 4

    asked = encode_prompt(tokenizer, render_prompt("Who?", "alpaca"), 999, markup=False)
    assert found["prompt_tokens"] == len(asked)
    assert found["completion_tokens"] <= 3


@pytest.mark.parametrize(("passed", "said"), [(1.0, "the gate passed"), (0.0, "the gate FAILED")])
def test_the_verdict_is_in_the_stages_line(passed: float, said: str) -> None:
    assert said in headline("register", {"gate/passed": passed})
    assert headline("register", {}) == "", "adopted: its metrics hold other numbers"
