"""Rows of token ids as tensors without padding: the one batch layout of SFT, reward, PPO and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: the token ids of one text
TokenRow = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """B texts end to end, N tokens together: what every forward pass reads.

    Attributes:
        ids: the tokens, `[N]`.
        lengths: tokens of each text, B of them.
        starts: the position of each text's first token; above 0 where a text goes on that was begun before.
        trunk: what a frozen trunk (trunk.py) makes of the tokens, `[N, d]`, where that is known already.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    trunk: Tensor | None = None

    @classmethod
    def of(cls, texts: Sequence[TokenRow], device: torch.device, trunk: Sequence[Tensor] | None = None) -> Line:
        """B whole texts; `trunk` of each, `[L, d]`."""
        ids = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
        known = torch.cat(list(trunk)) if trunk is not None else None
        return cls(torch.from_numpy(ids).to(device), tuple(map(len, texts)), (0,) * len(texts), known)

    @cached_property
    def positions(self) -> Tensor:
        """Where in its text each token is, `[N]`."""
        places = [np.arange(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        return torch.from_numpy(np.concatenate(places)).to(self.ids.device)

    @cached_property
    def ends(self) -> Tensor:
        """Where in the line each text's last token is, `[B]`."""
        return torch.from_numpy(np.cumsum(self.lengths) - 1).to(self.ids.device)


@dataclass(frozen=True)
class Batch:
    """Prompts, each with its response: B texts, n response tokens together.

    Attributes:
        line: all tokens.
        places: where in the line the response tokens are, `[n]`.
    """

    line: Line
    places: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenRow],
        responses: Sequence[TokenRow],
        device: torch.device,
        trunk: Sequence[Tensor] | None = None,
    ) -> Batch:
        """Join B prompts and B responses; `trunk` as in `Line.of`."""
        texts = [np.concatenate([prompt, answer]) for prompt, answer in zip(prompts, responses, strict=True)]
        ends = np.cumsum([len(text) for text in texts])
        places = [np.arange(end - len(answer), end) for end, answer in zip(ends, responses, strict=True)]
        return cls(Line.of(texts, device, trunk), torch.from_numpy(np.concatenate(places)).to(device))

    @property
    def tokens(self) -> Tensor:
        """The response tokens, `[n]`."""
        return self.line.ids[self.places]

    @cached_property
    def before(self) -> Line:
        """The line without each text's last token, from which nothing is predicted."""
        line = self.line
        places = np.delete(np.arange(sum(line.lengths)), np.cumsum(line.lengths) - 1)
        kept = torch.from_numpy(places).to(line.ids.device)
        trunk = None if line.trunk is None else line.trunk[kept]
        return Line(line.ids[kept], tuple(length - 1 for length in line.lengths), line.starts, trunk)

    @property
    def places_before(self) -> Tensor:
        """Where in `before` the token to the left of each response token is, `[n]`."""
        return self.places - 1 - torch.searchsorted(self.line.ends, self.places)
