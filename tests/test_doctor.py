"""The doctor finds nothing in a healthy project, and each disease by its name."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import cli
from rlhf_tasks import config, doctor, forward
from rlhf_tasks.config import load_params, parse_assignments, set_params
from rlhf_tasks.data.batching import Line
from rlhf_tasks.doctor import Finding, FirstBatch, examine, models, reward
from rlhf_tasks.ppo.experience import response_scores
from rlhf_tasks.workspace import Workspace

FEW = {"evaluation"}  # the small project answers 16 prompts, which the doctor minds


def ill(root: Path, *assignments: str) -> dict[str, str]:
    """What is found wrong: name and text."""
    set_params(root / "params.yaml", parse_assignments(list(assignments)))
    findings = list(examine(root, load_params(root / "params.yaml")))
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding.text for finding in findings if not finding.ok}


def test_a_healthy_project(finished: Any, finished_copy: Workspace) -> None:
    findings = {f.name: f for f in examine(finished_copy.root, finished.workspace.params)}
    assert {name for name, f in findings.items() if not f.ok} <= FEW | {"reward sign"}  # which learns for a second
    assert {"pad and EOS", "one tokenizer", "dropout", "rollout", "first step", "reward sign"} <= set(findings)
    assert findings["one tokenizer"].text == "the same in sft, reward, actor, critic"


def test_before_anything_ran_it_says_what_waits(workspace: Callable[..., Workspace]) -> None:
    new = workspace()
    found = {f.name: f.ok for f in examine(new.root, new.params)}
    assert found["pad and EOS"] is found["models"] is None
    assert found["sampling"] is found["KL estimator"] is True


STOP = {"but the data has only", "no chat template", "has 2048 positions", "torch sees no GPU"}


@pytest.mark.parametrize(
    ("name", "assignment", "said"),
    [
        ("sampling", "generation.top_k=5", "generation.top_k"),
        ("KL estimator", "ppo.kl.estimator=k2", "k2 in the reward is not the KL's"),
        ("KL coefficient", "ppo.kl.coef=0", "nothing holds the Actor"),
        ("schedule", "ppo.critic_warmup=2", "the Actor never learns"),
        ("schedule", "ppo.schedule={kind: linear, total: 1}", "the rates are 0 after 1 of 2 iterations"),
        ("device", "runtime.threads=4096", "this process has"),
        ("evaluation", "evaluate.prompts=100000", "but the data has only"),
        ("evaluation", "evaluate.prompts=16", "take 400 or more if there are"),
        ("template", "data.template=chat", "no chat template"),
        ("lengths", "data.max_response_tokens=5000", "has 2048 positions"),
        ("prompts", "ppo.batch=5000", "prompts"),
        ("checkpoints", "seed=7", "is of other parameters"),
        ("learning rates", "model={base: base, scratch: {layers: 2}}", "high for a pretrained model"),
        ("device", "runtime.device=cuda", "torch sees no GPU"),
    ],
)
def test_settings_to_change(finished_copy: Workspace, name: str, assignment: str, said: str) -> None:
    """A run stops at some, and goes on with the others, which are advice."""
    if assignment == "runtime.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    set_params(finished_copy.root / "params.yaml", parse_assignments([assignment]))
    findings = examine(finished_copy.root, load_params(finished_copy.root / "params.yaml"))
    (finding,) = [finding for finding in findings if finding.name == name and finding.ok is False]
    assert said in finding.text
    assert finding.fault is (said in STOP)


def test_data_of_other_parameters_says_nothing_of_these(finished_copy: Workspace) -> None:
    """The next run prepares anew: there may be more held-out prompts then, or fewer."""
    set_params(finished_copy.root / "params.yaml", {"data.heldout": 0.5, "evaluate.prompts": 5000})
    findings = examine(finished_copy.root, load_params(finished_copy.root / "params.yaml"))
    (finding,) = [finding for finding in findings if finding.name == "evaluation"]
    assert finding.ok is None


@pytest.mark.parametrize(
    ("assignment", "mark", "status"),
    [("generation.top_k=5", "! sampling", 0), ("data.max_response_tokens=5000", "✗ lengths", 1)],
)
def test_only_what_stops_a_run_makes_the_exit_status(
    workspace: Callable[..., Workspace],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    assignment: str,
    mark: str,
    status: int,
) -> None:
    monkeypatch.chdir(workspace(assignment).root)
    with pytest.raises(SystemExit) as ended:
        cli.doctor()
    assert ended.value.code == status
    assert mark in capsys.readouterr().out


def test_pad_that_is_eos(finished_copy: Workspace) -> None:
    for path in (finished_copy.root / "checkpoints").glob("*/tokenizer_config.json"):
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    assert "with one token for both" in ill(finished_copy.root)["pad and EOS"]


def test_another_tokenizer(finished_copy: Workspace) -> None:
    path = finished_copy.root / "checkpoints/reward/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))
    assert "checkpoints/reward has another tokenizer than sft" in ill(finished_copy.root)["one tokenizer"]


@pytest.mark.parametrize(("right", "said"), [(1.0, None), (0.5, "no better than chance"), (0.0, "are swapped")])
def test_the_sign_of_the_reward(
    finished: Any, first: FirstBatch, monkeypatch: pytest.MonkeyPatch, right: float, said: str | None
) -> None:
    """A Reward that prefers what people chose in this share of the pairs."""

    def scores(self: Any, model: Any, rows: list[int], device: torch.device) -> tuple[Any, Any]:
        agrees = torch.arange(len(rows)) < right * len(rows)
        return agrees.float(), (~agrees).float()

    monkeypatch.setattr(reward.Pairs, "scores", scores)
    finding = reward.sign(finished.workspace.root, first)
    assert finding.ok is (said is None)
    assert finding.fault is (said == "are swapped")
    assert said is None or said in finding.text


def test_the_reward_is_asked_about_real_pairs(finished_copy: Workspace) -> None:
    path = finished_copy.root / "checkpoints/reward/model.safetensors"

    def agreeing() -> int:
        batch = FirstBatch.load(finished_copy.root, finished_copy.params)
        return int(reward.sign(finished_copy.root, batch).text.split(" in ")[1].split(" of ")[0])

    before, weights = agreeing(), load_file(path)
    save_file(weights | {"score.weight": -weights["score.weight"]}, path, metadata={"format": "pt"})
    pairs = reward.Pairs(finished_copy.root / "data/prepared/pairs/heldout.arrow")
    assert before + agreeing() == len(pairs.lengths)


@pytest.mark.parametrize(
    ("head", "said"), [(0.0, "the Reward learned nothing"), (math.nan, "have a score that is not finite")]
)
def test_a_reward_that_says_nothing(first: FirstBatch, finished: Any, head: float, said: str) -> None:
    with torch.no_grad():
        first.trainer.fixed.reward.score.weight.fill_(head)
    finding = reward.sign(finished.workspace.root, first)
    assert finding.ok is False
    assert said in finding.text


def test_a_raw_score_of_an_odd_scale(finished: Any, tmp_path: Path, first: FirstBatch) -> None:
    write_statistics(tmp_path, mean=40.0, std=0.01)
    scores = 40 + 0.01 * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    for kind, well in (("raw", False), ("normalised", True)):
        ppo = first.params.ppo.model_copy(update={"score": config.Score(kind=kind)})
        batch = replace(first, params=first.params.model_copy(update={"ppo": ppo}), raw_scores=scores)
        finding = reward.scale(tmp_path, batch)
        assert finding.ok is well
        assert well or "set ppo.score.kind to normalised" in finding.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"std": 0.0}, "no scale at all"),
        ({"std": math.nan}, "no scale at all"),
        ({"std": -1.0}, "no scale at all"),
        ({"std": 1e-9}, "is another model's"),
        ({"mean": 1e6}, "is another model's"),
        ({"length": 0.0}, "no length of SFT answers"),
    ],
)
def test_score_statistics_that_cannot_be(
    tmp_path: Path, first: FirstBatch, changed: dict[str, float], said: str | None
) -> None:
    scores = torch.tensor([-1.0, 0.0, 1.0, 0.0])
    write_statistics(tmp_path, **({"mean": 0.0, "std": 1.0, "length": 5.0} | changed))
    ppo = first.params.ppo.model_copy(update={"missing_eos": config.MissingEOS(mode="steer")})
    batch = replace(first, params=first.params.model_copy(update={"ppo": ppo}), raw_scores=scores)
    finding = reward.scale(tmp_path, batch)
    assert finding.ok is (said is None)
    assert said is None or said in finding.text


def write_statistics(root: Path, **statistics: float) -> None:
    (root / "checkpoints/reward").mkdir(parents=True)
    (root / "checkpoints/reward/score_statistics.json").write_text(json.dumps(statistics | {"samples": 16}))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("data/prepared/prompts/train.arrow", Path.unlink),
        ("data/prepared/pairs/heldout.arrow", Path.unlink),
        ("checkpoints/reward/score_statistics.json", Path.unlink),
        ("checkpoints/reward/score_statistics.json", damage),
        ("checkpoints/sft/model.safetensors", damage),
        ("checkpoints/sft/config.json", damage),
        ("checkpoints/reward/tokenizer.json", Path.unlink),
    ],
)
def test_what_is_missing_or_damaged_is_a_finding(
    finished_copy: Workspace, file: str, change: Callable[..., None]
) -> None:
    """Also where the damage was not noticed by the look at the whole."""
    before = ill(finished_copy.root)
    change(finished_copy.root / file)
    assert ill(finished_copy.root) != before
    healthy = Finding("checkpoints", True, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(doctor._BEFORE_MODELS, "checkpoints", lambda root, params: healthy)
        assert ill(finished_copy.root) != before


@pytest.mark.parametrize("assignment", ["seed=7", "model.scratch.vocab_size=320", "model.base=no/such"])
def test_checkpoints_of_other_parameters(finished_copy: Workspace, assignment: str) -> None:
    assert {"checkpoints", "models"} <= set(ill(finished_copy.root, assignment))


def test_numbers_that_are_none(first: FirstBatch) -> None:
    with torch.no_grad():
        for weight in first.actor.parameters():
            weight.fill_(torch.nan)
    for look in (models.dropout, models.decoding, models.neighbours, models.order, models.first_step):
        assert look(Path(), first).ok is False
    assert "not finite" in models.dropout(Path(), first).text


def test_a_reward_function_that_says_nothing(finished_copy: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished_copy.root / "says_nothing.py").write_text("def score(prompts, responses): return [1.0] * len(prompts)\n")
    monkeypatch.chdir(finished_copy.root)
    monkeypatch.syspath_prepend(str(finished_copy.root))
    found = ill(finished_copy.root, "reward_function.name=says_nothing:score")
    assert "the same for all" in found["reward spread"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "returned [1.0], expected 2 finite numbers"),
        ("return 1 / 0", "ZeroDivisionError"),
        ("import random; return [random.random() for _ in prompts]", "other scores for the same texts"),
        ("return [float(len(r)) for r in responses]", None),
    ],
)
def test_a_reward_function_is_tried_before_there_is_any_model(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, body: str, said: str | None
) -> None:
    new = workspace("reward_function.name=tried_early:score")
    (new.root / "tried_early.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    monkeypatch.chdir(new.root)
    monkeypatch.syspath_prepend(str(new.root))
    monkeypatch.delitem(sys.modules, "tried_early", raising=False)  # of another of these projects
    (finding,) = [f for f in examine(new.root, new.params) if f.name == "reward function"]
    assert finding.ok is (said is None)
    assert said is None or said in finding.text


# Models that are not what they were ----------------------------------------------------------------------------------


@pytest.fixture
def first(finished: Any) -> FirstBatch:
    return FirstBatch.load(finished.workspace.root, finished.workspace.params)


@torch.no_grad()
def disturb(model: Any) -> None:
    for weight in model.parameters():
        weight.mul_(1.01)


def test_dropout_that_is_on(first: FirstBatch) -> None:
    assert models.dropout(Path(), first).ok
    first.actor.train()
    assert not models.dropout(Path(), first).ok


@pytest.mark.parametrize("check", ["decoding", "order", "first_step"])
def test_an_actor_that_is_not_the_one_that_sampled(first: FirstBatch, check: str) -> None:
    assert getattr(models, check)(Path(), first).ok
    disturb(first.actor)
    assert not getattr(models, check)(Path(), first).ok


def test_texts_that_see_their_neighbours(first: FirstBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.neighbours(Path(), first).ok
    read = forward.hidden_states

    def as_one_text(model: Any, line: Line) -> torch.Tensor:
        return read(model, Line(line.ids, (sum(line.lengths),), (0,)))

    monkeypatch.setattr(forward, "hidden_states", as_one_text)
    assert not models.neighbours(Path(), first).ok


def test_values_that_see_more_than_they_should(first: FirstBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """All values of a text are read one place too late, also those of the experience."""
    assert models.value_and_action(Path(), first).ok
    late, critic = response_scores, first.trainer.state.critic.model
    values = first.over(lambda batch: (late(critic, batch),), first.episodes, 4096)
    monkeypatch.setattr(models, "response_values", late)
    assert not models.value_and_action(
        Path(), replace(first, experience=replace(first.experience, old_values=values))
    ).ok


def test_returns_that_know_of_the_critic(first: FirstBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.returns(Path(), first).ok
    real = models.gae
    monkeypatch.setattr(models, "gae", lambda v, r, m, gamma, lam: real(v, r, m, gamma=0.9, lam=lam))
    assert not models.returns(Path(), first).ok


def test_rewards_that_do_not_add_up(first: FirstBatch) -> None:
    assert models.reward_sum(Path(), first).ok
    twice = replace(first, experience=replace(first.experience, rewards=2 * first.experience.rewards))
    assert not models.reward_sum(Path(), twice).ok


@pytest.mark.parametrize(
    ("check", "field", "change"),
    [
        (models.reward_sum, "rewards", lambda x: x.rewards.roll(1, 1)),
        (models.returns, "returns", lambda x: x.returns + x.mask),
        (models.returns, "raw_advantages", lambda x: x.raw_advantages.roll(1, 0)),
        (models.advantages, "advantages", lambda x: 1.1 * x.advantages),
        (models.advantages, "advantages", lambda x: x.advantages + 0.1),
        (models.reference, "ref_logprobs", lambda x: x.ref_logprobs + 0.01),
    ],
)
def test_experience_that_was_made_otherwise(first: FirstBatch, check: Any, field: str, change: Any) -> None:
    x = first.experience
    assert check(Path(), first).ok
    assert not check(Path(), replace(first, experience=replace(x, **{field: change(x)}))).ok


def test_a_score_read_at_another_place(first: FirstBatch) -> None:
    assert reward.place(Path(), first).ok
    assert not reward.place(Path(), replace(first, raw_scores=first.raw_scores.roll(1))).ok


def test_pad_that_ends_a_response(first: FirstBatch) -> None:
    assert models.stop_tokens(Path(), first).ok
    sampling = replace(first.trainer.fixed.sampling, stop_ids=(0, 1))
    trainer = replace(first.trainer, fixed=replace(first.trainer.fixed, sampling=sampling))
    assert "pad, 0, is among" in models.stop_tokens(Path(), replace(first, trainer=trainer)).text


def test_a_gradient_that_depends_on_its_cut(first: FirstBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.micro_batches(Path(), first).ok
    real = models._gradients
    monkeypatch.setattr(models, "_gradients", lambda batch, tokens: real(batch, tokens) * (1 if tokens > 1 else 2))
    assert not models.micro_batches(Path(), first).ok
