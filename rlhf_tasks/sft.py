"""The sft stage: supervised fine-tuning on the responses of the SFT rows; prompts are read, not learned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_tasks.data.batching import Batch
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.forward import states_before
from rlhf_tasks.head import Head, learn, measures
from rlhf_tasks.models import load_tokenizer, save_model, set_up_torch
from rlhf_tasks.training import Progress, adamw, fit, length_batches

if TYPE_CHECKING:
    from typing import Any

    from rlhf_tasks import config


def run(
    *,
    seed: int,
    runtime: config.Runtime,
    model: config.Model,
    sft: config.SFT,
    sft_data: Path,
    tokenizer: Path,
    out: Path,
    partial: Path,
    progress: Progress,
) -> dict[str, float]:
    """Train on `sft_data` and leave `checkpoint/` and `metrics.json` in `out`.

    Returns:
        The numbers of `metrics.json`: held-out loss (nats a token) and perplexity, parameters, tokens.
    """
    device = set_up_torch(runtime)
    words = load_tokenizer(tokenizer)
    actor = new_actor(model, words, seed).to(device)
    train, heldout = (Rows(sft_data / f"{split}.arrow") for split in ("train", "heldout"))

    def step(rows: list[int]) -> dict[str, float]:
        loss = learn_rows(actor, train.batch(rows, device))
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    optimizer = adamw(actor.parameters(), sft.learning_rate, sft.weight_decay)
    fit(actor, optimizer, step, train.lengths, sft, seed_names=(seed, "sft"), partial=partial, progress=progress)
    save_model(actor, out / "checkpoint", words)
    loss = heldout_loss(actor, heldout, sft.batch_tokens, device)
    metrics = {
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(min(loss, 50.0)),
        "parameters": float(sum(p.numel() for p in actor.parameters())),
        "train_rows": float(len(train.lengths)),
        "train_tokens": float(sum(train.lengths)),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def learn_rows(actor: Any, batch: Batch) -> float:
    """Add the gradient of the mean negative log-probability of the batch's response tokens, and return that."""
    found: list[float] = []

    def loss_of(piece: slice, logprobs: Tensor, entropies: Tensor) -> Tensor:
        loss = -logprobs.sum() / len(batch.tokens)
        found.append(loss.item())
        return loss

    learn(Head.of(actor), states_before(actor, batch), batch.tokens, 1.0, loss_of)
    return sum(found)


class Rows:
    """The encoded rows of one split."""

    def __init__(self, path: Path) -> None:
        table = read_table(path, ["prompt_ids", "response_ids"])
        self.prompts = TokenColumn(table, "prompt_ids")
        self.responses = TokenColumn(table, "response_ids")
        self.lengths: list[int] = (self.prompts.lengths() + self.responses.lengths()).tolist()

    def batch(self, rows: list[int], device: torch.device) -> Batch:
        """Some rows as tensors."""
        return Batch.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows], device)


@torch.no_grad()
def heldout_loss(actor: Any, rows: Rows, batch_tokens: int, device: torch.device) -> float:
    """Mean negative log-probability a response token, in nats."""
    total, count, head = 0.0, 0, Head.of(actor)
    for picked in length_batches(rows.lengths, batch_tokens):
        batch = rows.batch(picked, device)
        logprobs, _ = measures(head, states_before(actor, batch), batch.tokens, 1.0)
        total, count = total - logprobs.sum().item(), count + len(batch.tokens)
    return total / max(1, count)
