"""The supervised loop: it resumes to the bit, and its batches are all rows, within the budget, in the seed's order."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from rlhf_tasks import config, training
from rlhf_tasks.errors import UserError
from rlhf_tasks.training import (
    ADAM_EPS,
    SAVE_EVERY_SECONDS,
    SAVING_SHARE,
    adamw,
    fit,
    length_batches,
    load_optimizer_tensors,
    load_training_state,
    next_save,
    optimizer_tensors,
    save_training_state,
    shuffled_batches,
    warmup_and_decay,
)

RATINGS = Path(__file__).resolve().parent.parent / "data/raw/movie_reviews.jsonl.gz"
SETTINGS = config.Supervised(epochs=2, learning_rate=0.05, weight_decay=0.1, warmup_fraction=0.2, batch_tokens=12)
LENGTHS = [1 + i * 7 % 6 for i in range(20)]
Steps = list[tuple[int, dict[str, float]]]


class Kill(BaseException):
    """As sudden as a signal."""


def work(partial: Path, *, kill_at: int | None = None) -> tuple[dict[str, Tensor], Steps]:
    """Fit a small network to numbers of the rows; at step `kill_at` the process ends. Weights, optimizer and steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(len(LENGTHS), 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = adamw([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], 0.05)
    steps: Steps = []

    def learn(rows: list[int]) -> dict[str, float]:
        error = model(torch.tensor(rows)).squeeze(1) - torch.tensor(rows) % 3
        loss = error.square().mean()
        loss.backward()
        return {"loss": loss.item(), "rows": float(len(rows))}

    def progress(*, done: int, total: int, **values: float) -> None:
        steps.append((done, values))
        if done == kill_at:
            raise Kill

    with contextlib.suppress(Kill):
        fit(model, optimizer, learn, LENGTHS, SETTINGS, seed_names=(0, "x"), partial=partial, progress=progress)
    return dict(model.named_parameters()) | optimizer_tensors(optimizer), steps


@pytest.fixture
def saves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "next_save", lambda *_: 0.0)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kills", [[2], [5], [3, 4], [2, 9, 9, 10]])
def test_training_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, saves_every_step: None, kills: list[int]
) -> None:
    expected, undisturbed = work(tmp_path / "undisturbed")
    assert len(undisturbed) > 12  # so that these kills fall into both epochs
    first_step = 1
    for kill_at in kills:
        _, steps = work(tmp_path / "killed", kill_at=kill_at)
        assert steps == undisturbed[first_step - 1 : kill_at]
        first_step = kill_at  # the step that was killed in had not been saved
    result, steps = work(tmp_path / "killed")
    assert steps == undisturbed[first_step - 1 :]
    assert same(result, expected)


def test_nothing_is_saved_after_the_last_step(tmp_path: Path, saves_every_step: None) -> None:
    _, steps = work(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{len(steps) - 1:08d}"]


def test_short_training_saves_nothing(tmp_path: Path) -> None:
    work(tmp_path)
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(save=st.floats(0.001, 40), steps=st.integers(10, 3000))
def test_saving_is_frequent_while_it_is_cheap_and_its_share_is_bounded(save: float, steps: int) -> None:
    """Steps of a second each, with saves that take `save` seconds: but for the first, they fit into their share."""
    now, saved_at, saves = 0.0, 0.0, list[float]()
    for _ in range(steps):
        now += 1
        if now >= next_save(0.0, saved_at, saves):
            now += save
            saved_at = now
            saves.append(save)
            assert len(saves) == 1 or sum(saves) <= SAVING_SHARE * now
    if save < SAVING_SHARE * SAVE_EVERY_SECONDS / 2:
        assert len(saves) >= steps // (SAVE_EVERY_SECONDS + 3)


def test_a_kill_while_saving_leaves_the_state_before(
    tmp_path: Path, saves_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = work(tmp_path / "undisturbed")
    saved = training.save_file

    def dies(tensors: dict[str, Tensor], path: Path) -> None:
        saved(tensors, path)
        if len(list((tmp_path / "killed").glob("step-00000004"))):
            raise Kill

    monkeypatch.setattr(training, "save_file", dies)
    work(tmp_path / "killed")
    monkeypatch.setattr(training, "save_file", saved)
    assert (tmp_path / "killed/writing").exists()
    result, steps = work(tmp_path / "killed")
    assert steps[0][0] == 5
    assert same(result, expected)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    model, rows = nn.Embedding(len(LENGTHS), 1), []

    def learn(batch: list[int]) -> dict[str, float]:
        rows.extend(batch)
        model(torch.tensor(batch)).sum().backward()
        return {}

    optimizer = adamw(model.parameters(), 0.1)
    fit(model, optimizer, learn, LENGTHS, SETTINGS, seed_names=(0,), partial=tmp_path, progress=lambda **values: None)
    first, second = rows[: len(LENGTHS)], rows[len(LENGTHS) :]
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS)))
    assert first != second


def test_a_death_at_any_step_of_saving_leaves_a_whole_state(tmp_path: Path) -> None:
    """A process dies at its first operation on files, another at its second, and so on to the end of saving."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = adamw(model.parameters(), 0.1)
    with torch.no_grad():
        model.weight.fill_(9.0)
    steps = []
    for last_operation in itertools.count(1):
        partial = tmp_path / str(last_operation)
        save_training_state(partial, model, optimizer, 9)
        if (child := os.fork()) == 0:
            with torch.no_grad():
                model.weight.fill_(10.0)
            die_at(last_operation)
            save_training_state(partial, model, optimizer, 10)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        loaded = nn.Linear(1, 1, bias=False)
        steps.append(load_training_state(partial, loaded, adamw(loaded.parameters(), 0.1), 100))
        assert loaded.weight.item() == steps[-1]
        if finished:
            break
    assert len(steps) > 8
    assert steps[0] == 9
    assert steps[-1] == 10
    assert steps == sorted(steps)


def die_at(operation: int) -> None:
    """End this process at its n-th operation on files from now on."""
    left = iter(range(operation - 1, -1, -1))

    def hook(event: str, arguments: object) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and next(left, 0) == 0:
            os._exit(1)

    sys.addaudithook(hook)


def test_a_state_is_replaced_by_the_next(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = adamw(model.parameters(), 0.1)
    assert load_training_state(tmp_path, model, optimizer, 100) == 0
    for step in (9, 10):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        save_training_state(tmp_path, model, optimizer, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    other = nn.Linear(2, 2)
    other_optimizer = adamw(other.parameters(), 0.1)
    assert load_training_state(tmp_path, other, other_optimizer, 100) == 10
    assert same(dict(other.named_parameters()), dict(model.named_parameters()))
    assert same(optimizer_tensors(other_optimizer), optimizer_tensors(optimizer))


def resealed(state: Path, name: str, content: bytes) -> None:
    """Another file in a state, whose digests agree with it."""
    (state / name).write_bytes(content)
    facts = json.loads((state / "state.json").read_text())
    facts["sha256"][name] = hashlib.sha256(content).hexdigest()
    (state / "state.json").write_text(json.dumps(facts))


def rewritten(state: Path, **facts: Any) -> None:
    path = state / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def moments(index: int = 0, **others: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter of 2 x 2, in parts another."""
    slots = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)} | others
    return {f"{index}.{name}": tensor for name, tensor in slots.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: (state / "state.json").write_text("[]"),
        lambda state: (state / "state.json").write_text('{"step": 9}'),
        lambda state: (state / "optimizer.safetensors").unlink(),
        lambda state: resealed(state, "model.safetensors", b"\xff" * 100),
        lambda state: resealed(state, "model.safetensors", save({"weight": torch.ones(3, 3)})),
        lambda state: resealed(state, "optimizer.safetensors", save({"no index": torch.ones(1)})),
        lambda state: resealed(state, "optimizer.safetensors", save(moments(exp_avg=torch.ones(1)))),
        lambda state: resealed(state, "optimizer.safetensors", save(moments(exp_avg=torch.ones(2, 2).double()))),
        lambda state: resealed(state, "optimizer.safetensors", save({"0.step": torch.tensor(1.0)})),
        lambda state: resealed(state, "optimizer.safetensors", save(moments(index=7))),
        lambda state: rewritten(state, step=-5),
        lambda state: rewritten(state, step=20),
        lambda state: rewritten(state, step=float("inf")),
        lambda state: (state / "state.json").write_text("[" * 100_000),
        lambda state: (state.parent / "step-00000009x").write_text("no folder"),
    ],
    ids=[
        "a list", "half", "a file less", "no header", "other shapes", "no optimizer", "an optimizer of other shapes",
        "an optimizer of another type", "half an optimizer", "an optimizer of more", "fewer steps than none",
        "more steps than there are", "no number of steps", "deep", "a file for a folder",
    ],
)  # fmt: skip
def test_a_state_that_is_not_ours_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    model = nn.Linear(2, 2)
    optimizer = adamw(model.parameters(), 0.1)
    save_training_state(tmp_path, model, optimizer, 9)
    damage(tmp_path / "step-00000009")
    other = nn.Linear(2, 2)
    before = {name: weight.detach().clone() for name, weight in other.named_parameters()}
    assert load_training_state(tmp_path, other, adamw(other.parameters(), 0.1), 20) == 0
    assert same(dict(other.named_parameters()), before)
    assert "training starts from its beginning" in caplog.text
    save_training_state(tmp_path, other, adamw(other.parameters(), 0.1), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_file_in_the_way_of_a_save_is_removed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    (tmp_path / "writing").touch()
    save_training_state(tmp_path, model, adamw(model.parameters(), 0.1), 3)
    assert load_training_state(tmp_path, model, adamw(model.parameters(), 0.1), 20) == 3


def test_an_optimizers_state_goes_under_a_prefix_and_keeps_the_rates_of_its_owner() -> None:
    model = nn.Linear(2, 2)
    one, two = adamw(model.parameters(), 0.1), adamw(model.parameters(), 0.2)
    model(torch.ones(1, 2)).sum().backward()
    one.step()
    tensors = optimizer_tensors(one, "actor.")
    assert all(name.startswith("actor.") for name in tensors)
    assert tensors.keys() == {f"actor.{i}.{slot}" for i in (0, 1) for slot in ("step", "exp_avg", "exp_avg_sq")}
    load_optimizer_tensors(two, tensors | {"critic.0.step": torch.tensor(5.0)}, "actor.")
    assert same(optimizer_tensors(two, "actor."), tensors)
    assert two.param_groups[0]["lr"] == 0.2


def test_adamw_has_the_eps_of_ppo_implementations() -> None:
    group = adamw(nn.Linear(1, 1).parameters(), 0.1, 0.01).param_groups[0]
    assert (group["eps"], ADAM_EPS, group["weight_decay"], group["lr"]) == (1e-5, 1e-5, 0.01, 0.1)


@pytest.mark.parametrize(
    ("total", "warmup", "factors"),
    [
        (4, 0.0, [1.0, 0.75, 0.5, 0.25]),
        (4, 0.5, [0.5, 1.0, 2 / 3, 1 / 3]),
        (4, 1.0, [0.25, 0.5, 0.75, 1.0]),
        (1, 0.05, [1.0]),
    ],
)
def test_rates_rise_and_fall(total: int, warmup: float, factors: list[float]) -> None:
    assert [warmup_and_decay(step, total, warmup) for step in range(total)] == pytest.approx(factors)


def test_a_gradient_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer, losses = adamw(model.parameters(), 0.1), iter([1.0, torch.inf])

    def learn(rows: list[int]) -> dict[str, float]:
        model(torch.full((1, 1), next(losses))).sum().backward()
        return {}

    settings = config.Supervised(epochs=2)
    with pytest.raises(UserError, match=r"diverged at step 2: the gradient is .*; lower learning_rate"):
        fit(model, optimizer, learn, [1], settings, seed_names=(0,), partial=tmp_path, progress=lambda **values: None)
    assert torch.isfinite(model.weight).all()


def test_the_gradient_is_clipped_and_its_norm_shown(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before, norms = model.weight.item(), []

    def learn(rows: list[int]) -> dict[str, float]:
        (100 * model.weight.sum()).backward()
        return {}

    def progress(*, done: int, total: int, **values: float) -> None:
        norms.append(values["grad_norm"])

    settings = config.Supervised(epochs=1, warmup_fraction=0.0, max_grad_norm=0.5)
    fit(model, optimizer, learn, [1], settings, seed_names=(0,), partial=tmp_path, progress=progress)  # type: ignore[arg-type]
    assert norms == [pytest.approx(100)]
    assert before - model.weight.item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_clipping_inside_the_step_is_clipping_before_it(decay: float) -> None:
    """Against torch's clip_grad_norm_ and a step of AdamW that is not fused, with norms below the limit and above."""
    ours, plain = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer = adamw(ours.parameters(), 0.05, decay)
    unfused = torch.optim.AdamW(plain.parameters(), lr=0.05, eps=ADAM_EPS, weight_decay=decay, fused=False)
    x, clipped = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), set()
    for step in range(8):
        for model in (ours, plain):
            (10 ** (step % 3) * (model(x) - x.sum(1, keepdim=True)).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 4.0)
        clipped.add(bool(norm > 4))
        unfused.step()
        unfused.zero_grad(set_to_none=True)
        training.clipped_step(optimizer, norm, 4.0)
        optimizer.zero_grad(set_to_none=True)
        for weight, expected in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert clipped == {True, False}


# Batches -------------------------------------------------------------------------------------------------------------

lengths_and_budget = given(st.lists(st.integers(1, 60), max_size=150), st.integers(1, 200), st.integers(0, 3))
law: Callable = settings(max_examples=100, deadline=None, derandomize=True)


@law
@lengths_and_budget
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    for batches in (length_batches(lengths, budget), shuffled_batches(lengths, budget, (seed, "order", 1))):
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) * max(lengths[row] for row in batch) <= budget or len(batch) == 1


@law
@lengths_and_budget
def test_no_two_neighbouring_batches_could_be_one(lengths: list[int], budget: int, seed: int) -> None:
    batches = length_batches(lengths, budget)
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[following[0]] > budget


def test_little_of_a_batch_is_padding() -> None:
    """On the lengths of the shipped texts, in tokens of about four characters."""
    with gzip.open(RATINGS, "rt", encoding="utf-8") as file:
        lengths = [2 + len(json.loads(line)["text"]) // 4 for line in file]
    batches = shuffled_batches(lengths, 2048, (0, "order", 0))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.1


def test_the_order_belongs_to_seed_and_epoch() -> None:
    lengths = [1 + i % 9 for i in range(200)]
    orders = [shuffled_batches(lengths, 40, names) for names in ((0, "order", 0), (0, "order", 1), (1, "order", 0))]
    assert shuffled_batches(lengths, 40, (0, "order", 0)) == orders[0]
    assert len({str(order) for order in orders}) == 3
    first_rows = [batch[0] for batch in orders[0]]
    assert first_rows != sorted(first_rows, key=lambda row: lengths[row])
