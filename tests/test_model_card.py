"""What a model card says, of a pipeline that ran, and of numbers that are no praise."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import CPU

from rlhf_tasks import facts, lineage, registry
from rlhf_tasks.digests import digest_file
from rlhf_tasks.model_card import HUB, NOT_STATED, Facts, Origin, actor_card, actor_limits, reward_card
from rlhf_tasks.models import load_actor
from rlhf_tasks.registry import TrackingContext
from rlhf_tasks.source import Source
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

PROMPT = "An old | story"
EVALUATION = {
    "prompts": 64.0, "kl_sequence": 7.0, "judge_gain": 0.1, "judge_gain_low": 0.02, "equal_length_score_gain_low": 0.3,
    "sft_distinct_bigrams": 0.8, "actor_distinct_bigrams": 0.6, "sft_eos_rate": 0.5, "actor_eos_rate": 0.9,
    "sft_length": 20.0, "actor_length": 15.5,
}  # fmt: skip


@pytest.fixture
def registering(finished_copy: Workspace) -> Workspace:
    """A finished project whose gate has spoken too, with a licence beside its data."""
    workspace, stage = finished_copy, STAGES["register"]
    out = workspace.root / "out"
    out.mkdir()
    inputs = {name: workspace.root / path for name, path in stage.inputs.items()}
    registry.run(register_=workspace.params.register_, **inputs, out=out)
    (workspace.root / stage.metrics).parent.mkdir(exist_ok=True)
    (out / "metrics.json").rename(workspace.root / stage.metrics)
    (workspace.root / stage.lineage).write_text((workspace.root / STAGES["evaluate"].lineage).read_text())
    (workspace.root / "data/raw/LICENSE.txt").write_text("\n  CC BY 4.0 \nmore\n")
    return workspace


@pytest.fixture
def gathered(registering: Workspace) -> Facts:
    document = lineage.lineage_here(registering, Source("", b""))
    return facts.gather_facts(registering, document, PROMPT)


def context(**changes: Any) -> TrackingContext:
    known = {"uri": "", "run_id": "", "actor_digest": "a" * 64, "reward_digest": "b" * 64, "lock": Path()}
    return TrackingContext(**(known | {"tags": {"rlhf.dvc_lock": "c" * 64}, "example": PROMPT} | changes))


def test_a_card_says_what_was_measured_on_what_and_how(registering: Workspace, gathered: Facts) -> None:
    params, root = registering.params, registering.root
    outcomes = [registry.Outcome("gain", True, 0.5, 0.0)]
    card = actor_card("reviews", params.generation, outcomes, gathered, context())
    for part in ("Data", "Results", "Limits", "Recipe", "Lineage"):
        assert card.count(f"\n## {part}\n") == 1
    data = digest_file(root / "data/raw/ratings.jsonl")
    assert f"| `data/raw/ratings.jsonl` | ratings | `{data}` | LICENSE.txt: CC BY 4.0 |" in card
    evaluation, reward = gathered.metrics["evaluate"], gathered.metrics["reward"]
    gain = "{score_gain:+.3f} [{score_gain_low:+.3f}, {score_gain_high:+.3f}] sd".format_map(evaluation)
    assert gain in card
    assert "{accuracy:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]".format_map(reward) in card
    assert "| gain | 0.5 | 0 | passed |" in card
    assert "ppo.iterations=2" in card
    assert "torch 2." in card
    assert f"| actor_digest | `{'a' * 64}` |" in card
    assert f"| rlhf.dvc_lock | `{'c' * 64}` |" in card
    assert f"| key of ppo | `{gathered.keys['ppo']}` |" in card
    assert f"{gathered.weights:,} weights" in card
    other = reward_card("rlhf-reward", "b" * 64, PROMPT, {}, gathered)
    assert f"| reward_digest | `{'b' * 64}` |" in other
    assert "reward.epochs=1" in other
    assert not [word for word in ("ppo.iterations", "key of ppo", "SFT against Actor") if word in other]
    for text in (card, other):  # a row of a table stays a row, whatever a sample says
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
        assert min(widths) >= 3
        assert "None" not in text
        assert str(root) not in text


def test_weights_are_counted_in_files(registering: Workspace, gathered: Facts) -> None:
    model = load_actor(registering.root / "checkpoints/actor", CPU)
    assert gathered.weights == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "distinct bigrams 0.800 to 0.600"),
        ({}, "Distance from SFT: 7.00 nats"),
        ({"equal_length_score_gain_low": -0.1}, "Cut to equal length, the gain in reward score may be none"),
        ({"judge_gain_low": -0.1}, "By a judge that training never saw, the gain may be none"),
        ({"judge_gain": None}, "No judge but the reward model"),
    ],
)
def test_limits_follow_the_numbers(changes: dict[str, Any], said: str) -> None:
    measured = {name: value for name, value in (EVALUATION | changes).items() if value is not None}
    generation: Any = SimpleNamespace(max_new_tokens=24, temperature=1.0)
    limits = actor_limits(Facts(metrics={"evaluate": measured}), generation)
    assert [limit for limit in limits if said in limit]
    if changes:
        plain = actor_limits(Facts(metrics={"evaluate": EVALUATION}), generation)
        assert not [limit for limit in plain if said in limit]


def test_a_licence_is_the_datas_own(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Apache, of the project\n")
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("{}")
    assert facts.licence_beside(tmp_path, "rows.jsonl") == NOT_STATED
    assert facts.licence_beside(tmp_path, "data/rows.jsonl") == NOT_STATED
    (tmp_path / "data/COPYING").write_text("")
    (tmp_path / "data/licence-b.txt").write_bytes(b"\xff of B\n")
    assert facts.licence_beside(tmp_path, "data/rows.jsonl") == "COPYING: empty; licence-b.txt: \ufffd of B"


def test_a_base_of_the_hub_is_named(tmp_path: Path) -> None:
    found = Facts(origins=[Origin("owner/name", "base model", "0" * 40, HUB)])
    header = reward_card("r", "d", PROMPT, {}, found).split("---")[1]
    assert "base_model: owner/name" in header
