"""The sft stage: supervised fine-tuning on the responses of the SFT rows; prompts are read, not learned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from rlhf_tasks.data.batching import pad_rows
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.models import load_tokenizer, response_logits, save_model, set_up_torch
from rlhf_tasks.training import BatchLoss, Progress, adamw, fit, length_batches

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
    train, heldout = (Rows(sft_data / f"{split}.arrow", words.pad_token_id) for split in ("train", "heldout"))

    def loss_of(batch: list[int]) -> BatchLoss:
        total, count = train.negative_logprob(actor, batch, device)
        loss = total / count
        return BatchLoss(loss, {"perplexity": math.exp(min(loss.item(), 50.0))})

    optimizer = adamw(actor.parameters(), sft.learning_rate, sft.weight_decay)
    fit(actor, optimizer, loss_of, train.lengths, sft, seed_names=(seed, "sft"), partial=partial, progress=progress)
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


IGNORED = -100


class Rows:
    """The encoded rows of one split."""

    def __init__(self, path: Path, pad_id: int) -> None:
        table = read_table(path, ["prompt_ids", "response_ids"])
        self.prompts = TokenColumn(table, "prompt_ids")
        self.responses = TokenColumn(table, "response_ids")
        self.lengths: list[int] = (self.prompts.lengths() + self.responses.lengths()).tolist()
        self.pad_id = pad_id

    def negative_logprob(self, actor: Any, rows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed negative log-probability of the rows' response tokens, and their count.

        Rows are padded on the right only: nothing here needs responses to start in one column, and aligning them cost a
        quarter of the tokens.
        """
        texts = [np.concatenate([self.prompts[i], self.responses[i]]) for i in rows]
        ids, attention = (tensor.to(device) for tensor in pad_rows(texts, self.pad_id))
        starts = torch.tensor([len(self.prompts[i]) for i in rows], device=device)
        is_response = attention.bool() & (torch.arange(ids.shape[1], device=device) >= starts[:, None])
        labels = ids.masked_fill(~is_response, IGNORED)[:, 1:]
        logits = response_logits(actor, ids, attention, labels.shape[1])
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, (labels != IGNORED).sum()


@torch.no_grad()
def heldout_loss(actor: Any, rows: Rows, batch_tokens: int, device: torch.device) -> float:
    """Mean negative log-probability a response token, in nats."""
    total, count = 0.0, 0
    for batch in length_batches(rows.lengths, batch_tokens):
        loss, tokens = rows.negative_logprob(actor, batch, device)
        total, count = total + loss.item(), count + int(tokens)
    return total / max(1, count)
