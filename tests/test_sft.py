"""Supervised fine-tuning: its loss and gradient are the cross-entropy of the responses' tokens, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf_tasks import head
from rlhf_tasks.data.encoder import SCHEMAS
from rlhf_tasks.data.tables import write_table
from rlhf_tasks.models import load_actor
from rlhf_tasks.sft import Rows, heldout_loss, learn_rows

CPU = torch.device("cpu")
PROMPTS = [[9], [17, 40, 60, 21, 33], [25, 80], [7, 7, 7]]
RESPONSES = [[70, 31, 52, 1], [44, 1], [11, 12, 13, 14, 15, 16, 17, 1], [1]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    cells = [
        {"prompt": "", "response": "", "prompt_ids": prompt, "response_ids": response}
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    write_table(tmp_path / "train.arrow", cells, SCHEMAS["sft"])
    return Rows(tmp_path / "train.arrow")


@pytest.fixture
def actor(tiny_actor: Path) -> Any:
    return load_actor(tiny_actor, CPU).double()


def plain(actor: Any, picked: list[int]) -> Tensor:
    """Negative log-probabilities of all response tokens, from the model's own call on each row alone."""
    found = []
    for prompt, response in ((PROMPTS[i], RESPONSES[i]) for i in picked):
        logits = actor(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        found.append(cross_entropy(logits, torch.tensor(response), reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize("piece", [1, 4, 10_000])
@pytest.mark.parametrize("picked", [[0, 1, 2, 3], [2], [3, 0]])
def test_loss_and_gradient_are_the_cross_entropys(
    actor: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch, picked: list[int], piece: int
) -> None:
    monkeypatch.setattr(head, "PIECE_ELEMENTS", piece * actor.config.vocab_size)
    expected = plain(actor, picked).mean()
    wanted = torch.autograd.grad(expected, list(actor.parameters()))
    assert learn_rows(actor, rows.batch(picked, CPU)) == pytest.approx(expected.item(), rel=1e-9)
    for parameter, gradient in zip(actor.parameters(), wanted, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-9
    assert sum(gradient.norm() for gradient in wanted) > 1


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_the_heldout_loss_is_a_mean_over_tokens(actor: Any, rows: Rows, budget: int) -> None:
    """Not over batches: a text's length is its weight, however rows are put together."""
    assert heldout_loss(actor, rows, budget, CPU) == pytest.approx(plain(actor, [0, 1, 2, 3]).mean().item(), rel=1e-9)


def test_rows_are_as_long_as_prompt_and_response(rows: Rows) -> None:
    assert rows.lengths == [5, 7, 10, 4]
