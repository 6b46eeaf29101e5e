"""Every random draw comes from a seed derived from what it is for, so no generator state is ever carried."""

from __future__ import annotations

import hashlib
import json

import torch


def derive_seed(*names: str | int) -> int:
    """A 63-bit seed for a purpose: `derive_seed(run_seed, "ppo", iteration, "minibatches", epoch)`."""
    text = json.dumps(names, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*names: str | int) -> torch.Generator:
    """A fresh CPU generator seeded for a purpose."""
    return torch.Generator().manual_seed(derive_seed(*names))


def permutation(count: int, *names: str | int) -> list[int]:
    """The numbers 0..count-1 in an order that belongs to a purpose."""
    return torch.randperm(count, generator=generator(*names)).tolist()
