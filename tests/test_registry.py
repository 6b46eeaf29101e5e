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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_tasks import config, registry
from rlhf_tasks.errors import UserError
from rlhf_tasks.registry import Outcome, Settled, TrackingContext
from rlhf_tasks.report import headline
from rlhf_tasks.store import digest_path
from rlhf_tasks.tracking import Tracker

USES = """
import mlflow

generate = mlflow.transformers.load_model("models:/rlhf-actor@champion")
settings = generate.generation_config
assert (settings.do_sample, settings.temperature, settings.top_k, settings.max_new_tokens) == (True, 0.7, 0, 5)
[answer] = generate("This film")
assert answer["generated_text"].startswith("This film")
model = mlflow.pyfunc.load_model("models:/rlhf-actor@champion")
[short] = model.predict(["This film"], params={"max_new_tokens": 1, "do_sample": False})
[long] = model.predict(["This film"], params={"do_sample": False})
assert long.startswith(short) and len(long) > len(short) and not long.startswith("This film"), (short, long)
print("generated")
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


@dataclass
class Project:
    """A project's folder with an Actor, its evaluation and a tracker."""

    root: Path
    tracker: Tracker
    parent: str

    def context(self, digest: str) -> TrackingContext:
        run = self.tracker.start_stage(self.parent, "register")
        return TrackingContext(self.tracker.uri, run, digest, self.root / "locks" / "registry", {"git.commit": "abc"})

    def arguments(self, digest: str, name: str = "rlhf-actor", **gate: float) -> dict[str, Any]:
        return {
            "register_": config.Register(name=name, gate=config.Gate(**gate)),
            "generation": GENERATION,
            "actor": self.root / "actor",
            "evaluation": self.root / "evaluate.json",
            "tracking": self.context(digest),
        }

    def versions(self, name: str) -> list[int]:
        return sorted(int(v.version) for v in self.tracker.client.search_model_versions(f"name = '{name}'"))

    def challenger(self, name: str) -> int:
        return int(self.tracker.client.get_model_version_by_alias(name, "challenger").version)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    write_actor(root / "actor")
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


JUDGED = ("register_", "actor", "evaluation")


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
    assert version.tags == {"actor_digest": "digest-1", "git.commit": "abc", "gate": "passed", "gate_run": run}
    assert version.run_id == run
    outputs = client.get_run(run).outputs
    assert outputs is not None
    [output] = outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.status, model.source_run_id, model.name) == ("READY", run, "rlhf-actor")
    assert {m.key: m.value for m in model.metrics or []} == {"score_gain_low": 0.5, "kl_sequence": 6.0, "length": 20.0}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "rlhf-actor", "version": 1}]


def test_what_is_registered_has_a_card_pins_and_no_pickle(project: Project, registered: Any) -> None:
    files = {p.name: p for p in (project.root / "mlartifacts").rglob("*") if p.is_file()}
    assert {"model.safetensors", "model_card.md", "requirements.txt", "input_example.json"} <= files.keys()
    assert not [name for name in files if Path(name).suffix in (".pkl", ".pickle", ".bin", ".pt", ".joblib")]
    assert f"torch=={torch.__version__.partition('+')[0]}" in files["requirements.txt"].read_text().split()
    assert "| kl | 6 | 12 | passed |" in files["model_card.md"].read_text()
    settings = json.loads(files["generation_config.json"].read_text())
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
    assert kept == Settled(version=2, previous=1, champion=1)
    assert not kept.moved
    assert project.challenger(name) == 2

    assert registry.settle(**(worse | {"register_": first["register_"]})).moved
    assert registry.champion(name, uri) == 2
    assert registry.promote(name, 1, uri, project.root / "locks" / "registry") == 2


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


def test_the_champion_generates_in_a_fresh_process(project: Project, registered: Any) -> None:
    arguments = registered
    assert registry.settle(**arguments).champion == 1
    result = subprocess.run(
        [sys.executable, "-c", USES], cwd=project.root, env=os.environ | QUIET, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "generated\n", "")


@pytest.mark.parametrize(("passed", "said"), [(1.0, "the gate passed"), (0.0, "the gate FAILED")])
def test_the_verdict_is_in_the_stages_line(passed: float, said: str) -> None:
    assert said in headline("register", {"gate/passed": passed})
    assert headline("register", {}) == "", "adopted: its metrics hold other numbers"
