"""Rows of token ids as padded tensors: the one batch layout of SFT, PPO and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: the token ids of one text
TokenRow = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, responses on the right, so that every response starts in the same column.

    Attributes:
        input_ids: prompt and response, `[B, P + T]`.
        attention_mask: 1 on real tokens, `[B, P + T]`.
        tokens: the response, `[B, T]`.
        mask: 1 on the response's real tokens, `[B, T]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    tokens: Tensor
    mask: Tensor

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.tokens.shape[1]


def collate(prompts: Sequence[TokenRow], responses: Sequence[TokenRow], pad_id: int, device: torch.device) -> Batch:
    """Join B prompts and B responses into one batch."""
    prompt_ids, prompt_mask = pad_rows(prompts, pad_id, left=True)
    tokens, mask = pad_rows(responses, pad_id)
    ids, attention = torch.cat([prompt_ids, tokens], dim=1), torch.cat([prompt_mask, mask], dim=1)
    return Batch(ids.to(device), attention.to(device), tokens.to(device), mask.to(device))


def pad_rows(rows: Sequence[TokenRow], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as `(input_ids [B, L], attention_mask [B, L])`, padded right or left."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.as_tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask
