"""The forward pass of all four models, without padding: texts of different lengths stand in one line.

Nearly all that a transformer does it does token by token, and there a line of N tokens is as good as any layout. In
attention alone tokens meet: there queries, keys and values are spread out to `[B, H, L, D]`, each text from place 0 on,
where "not what comes later" also keeps a text from the padding behind it; what comes out is put in line again.

Models of transformers call the attention that their configuration names: while a line is read, that is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import ModuleList
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlhf_tasks.data.batching import Batch, Line

IN_LINE = "rlhf_line"


def hidden_states(model: Any, line: Line, cache: Cache | None = None) -> Tensor:
    """The trunk's output at every token of the line, `[N, d]`.

    Args:
        cache: keys and values of what the texts had before, to which this line's are added.
    """
    return _read(model, _Reading(line, cache))


def hidden_and_trunk_states(model: Any, line: Line, cache: Cache | None = None) -> tuple[Tensor, Tensor | None]:
    """`hidden_states`, and what the model's frozen trunk (trunk.py), if it has one, made of the tokens, `[N, d]`."""
    reading = _Reading(line, cache)
    return _read(model, reading), reading.trunk


def windows(model: Any, line: Line) -> list[int | None]:
    """How far back each layer's attention is told to look while the line is read; None: to the text's beginning."""
    reading = _Reading(line, None)
    _read(model, reading)
    return reading.windows


def _read(model: Any, reading: _Reading) -> Tensor:
    trunk, settings, line, cache = getattr(model, model.base_model_prefix), model.config, reading.line, reading.cache
    usual, before = settings._attn_implementation, _READING.set(reading)
    settings._attn_implementation = IN_LINE
    try:
        ids = line.ids[None]
        output = trunk(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=line.positions[None], use_cache=False
        )
    finally:
        settings._attn_implementation = usual
        _READING.reset(before)
    if cache is not None:
        cache.advance(line)
    return output.last_hidden_state[0]


def states_before(model: Any, batch: Batch) -> Tensor:
    """The trunk's output where each response token is predicted, the state before it: `[n, d]`."""
    return hidden_states(model, batch.before)[batch.places_before]


class Cache:
    """Keys and values of B texts that grow: for each layer `[B, H, room, D]`, a text's own from place 0 on."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.lengths: list[int] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._next = torch.empty(0), torch.empty(0)  # where each text goes on

    def _set_lengths(self, lengths: Iterable[int]) -> None:
        self.lengths = list(lengths)
        self._next = torch.arange(len(self.lengths)), torch.tensor(self.lengths)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new places, `[B, H, L, D]`: the first of each text, or one more each. Returns all there are by now."""
        if not self.lengths:
            keys, values = (new.new_zeros(*new.shape[:2], self.room, new.shape[3]) for new in (key, value))
            self._layers[layer] = (keys, values)
            for store, new in zip(self._layers[layer], (key, value), strict=True):
                store[:, :, : new.shape[2]] = new
            return key, value
        (rows, places), width = self._next, max(self.lengths) + 1
        for store, new in zip(self._layers[layer], (key, value), strict=True):
            store[rows, :, places] = new[:, :, 0]
        keys, values = self._layers[layer]
        return keys[:, :, :width], values[:, :, :width]

    def advance(self, line: Line) -> None:
        """A whole line has been read."""
        self._set_lengths(start + length for start, length in zip(line.starts, line.lengths, strict=True))

    def keep(self, rows: Sequence[int], picked: Tensor) -> None:
        """Forget all texts but these."""
        self._set_lengths(self.lengths[row] for row in rows)
        self._layers = {layer: (keys[picked], values[picked]) for layer, (keys, values) in self._layers.items()}


class _Reading:
    """What attention knows of the line that is read."""

    def __init__(self, line: Line, cache: Cache | None) -> None:
        self.line, self.cache = line, cache
        self.rows, self.width = len(line.lengths), max(line.lengths)
        self.even = self.rows * self.width == line.ids.shape[0]
        self.windows: list[int | None] = []
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self.trunk = line.trunk

    @cached_property
    def _cells(self) -> Tensor:
        """Which cell of `B x L` each token stands in, `[N]`."""
        cells = [row * self.width + np.arange(length) for row, length in enumerate(self.line.lengths)]
        return torch.from_numpy(np.concatenate(cells)).to(self.line.ids.device)

    @cached_property
    def _tokens(self) -> Tensor:
        """Which token stands in each cell, `[B * L]`; behind a text's end its last one again."""
        lengths = np.array(self.line.lengths)
        first = np.cumsum(lengths) - lengths
        places = np.minimum(np.arange(self.width), lengths[:, None] - 1)
        return torch.from_numpy((first[:, None] + places).ravel()).to(self.line.ids.device)

    def spread(self, x: Tensor) -> Tensor:
        """`[1, H, N, D] -> [B, H, L, D]`."""
        tokens = x[0].transpose(0, 1)
        cells = tokens if self.even else tokens.index_select(0, self._tokens)
        return cells.reshape(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """`[B, H, L, D] -> [1, N, H, D]`."""
        cells = x.transpose(1, 2).flatten(0, 1)
        return (cells if self.even else cells.index_select(0, self._cells))[None]

    def mask(self, width: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores of `width` keys, `[B or 1, 1, L, width]`; None: simply none that comes later is seen.

        It is made once for all layers.
        """
        if (width, window) not in self._masks:
            allowed = self._allowed(width, window)
            self._masks[width, window] = None if allowed is None else torch.where(allowed, 0.0, -torch.inf).to(dtype)
        return self._masks[width, window]

    def _allowed(self, width: int, window: int | None) -> Tensor | None:
        if self.cache is None or not self.cache.lengths:
            if window is None or window >= self.width:
                return None
            query = torch.arange(self.width)[:, None]
        else:
            query = torch.tensor(self.cache.lengths)[:, None, None, None]
        key = torch.arange(width)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        return seen.expand(self.rows if seen.dim() == 4 else 1, 1, -1, -1).to(self.line.ids.device)


_READING: ContextVar[_Reading | None] = ContextVar("reading", default=None)


class _Below:
    """A layer of a frozen trunk: it does nothing where what the trunk makes of the tokens is known."""

    def forward(self, *states: Any, **options: Any) -> Any:
        reading = _READING.get()
        return super().forward(*states, **options) if reading is None or reading.trunk is None else states[0]  # type: ignore[misc]


class _Last:
    """A frozen trunk's last layer: it notes what it makes of the tokens, and gives that where it is known."""

    def forward(self, *states: Any, **options: Any) -> Any:
        reading = _READING.get()
        if reading is None:
            return super().forward(*states, **options)  # type: ignore[misc]
        if reading.trunk is None:
            reading.trunk = super().forward(*states, **options)[0]  # type: ignore[misc]
        return reading.trunk[None]


def make_trunk(layers: ModuleList) -> None:
    """Have layers, a model's first, take what they make of a line from the line where it is known, and note it else."""
    for layer in layers:
        kind, own = _Last if layer is layers[-1] else _Below, type(layer)
        layer.__class__ = type(own.__name__, (kind, own), {})


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of a line, called by the layers of transformers: `[1, H, N, D] -> [1, N, H, D]`."""
    reading = _READING.get()
    assert reading
    reading.windows.append(sliding_window)
    query, key, value = (reading.spread(x) for x in (query, key, value))
    if reading.cache is not None:
        key, value = reading.cache.extend(module.layer_idx, key, value)
    mask = reading.mask(key.shape[2], sliding_window, query.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups, one = query.shape[1] // key.shape[1], query.shape[2] == 1
    if groups > 1 and one:  # decoding: the queries of a group stand in place of a text's
        query = query.reshape(query.shape[0], key.shape[1], groups, -1)
    if softcap is None:
        causal, grouped = mask is None and not one, groups > 1 and not one
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    else:
        out = _capped(query, key, value, mask, scale, softcap)
    return reading.gather(out.reshape(out.shape[0], -1, 1, out.shape[-1]) if one else out), None


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention whose scores are softly capped (Gemma 2), step by step: no fused kernel knows it."""
    if query.shape[1] > key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return (scores + mask).softmax(-1) @ value


AttentionInterface.register(IN_LINE, _attend)
