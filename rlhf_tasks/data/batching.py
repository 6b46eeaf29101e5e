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
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    places = np.arange(lengths.max(initial=0))
    mask = places >= (places.size - lengths)[:, None] if left else places < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if len(rows) else []
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
