"""Gradients in memory that stays are PyTorch's own, for every kind of module that makes them in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import SHAPES, write_shape
from torch import Tensor, nn

from rlhf_tasks.gradients import ALIGNMENT, GradientMemory

IDS = torch.tensor([[3, 14, 15, 92, 3], [1, 1, 0, 2, 99]])


def loss(model: Any) -> Tensor:
    return (model(input_ids=IDS, use_cache=False).logits.log_softmax(-1) ** 2).mean()


@pytest.mark.parametrize("name", SHAPES)
def test_they_are_pytorchs_own(tmp_path: Path, name: str) -> None:
    """Of all weights: linear maps with and without bias, embeddings with a scale, a pad token, tied to the head."""
    ours = write_shape(name, tmp_path).double()
    plain, memory = copy.deepcopy(ours), GradientMemory()
    loss(plain).backward()
    for _ in range(2):  # what was there before does not count
        with memory.lent_to(ours):
            loss(ours).backward()
            norm = memory.norm()
            for (weight, mine), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
                assert mine.grad is not None
                own = torch.zeros_like(expected) if expected.grad is None else expected.grad
                torch.testing.assert_close(
                    mine.grad, own, rtol=1e-9, atol=1e-12, msg=lambda text, w=weight: f"{w}: {text}"
                )
            own = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
            torch.testing.assert_close(norm, own)


def test_micro_batches_add_up() -> None:
    layer, memory = nn.Linear(5, 3), GradientMemory()
    plain, x = copy.deepcopy(layer), torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    plain(x).square().sum().backward()
    with memory.lent_to(layer):
        for part in x.split(3):
            layer(part).square().sum().backward()
        for mine, expected in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, expected.grad)


def test_the_norm_of_many_weights_is_not_rounded_away() -> None:
    """Sums of squares in float32 stop growing at 16 million equal ones."""
    table, memory = nn.Embedding(50_000, 1000), GradientMemory()
    with memory.lent_to(table):
        table.weight.sum().backward()
        assert memory.norm().item() == pytest.approx(50_000_000**0.5, rel=1e-5)


def test_one_room_serves_models_of_any_size_in_turn() -> None:
    memory = GradientMemory()
    small, large = nn.Linear(3, 2), nn.Linear(40, 30)
    places = set()
    for model, scale in ((large, torch.inf), (small, torch.inf), (large, 1.0)):
        with memory.lent_to(model):
            (model(torch.ones(1, model.in_features)).sum() * scale).backward()
            assert memory.norm().item() == pytest.approx(scale * sum(p.numel() for p in model.parameters()) ** 0.5)
            places.add(model.weight.grad.data_ptr())  # type: ignore[union-attr]
            assert all(p.grad.data_ptr() % (4 * ALIGNMENT) == 0 for p in model.parameters() if p.grad is not None)
        assert all(p.grad is None for p in model.parameters())
    assert len(places) == 1


def test_what_pytorch_adds_itself_is_not_added_to_what_lay_there() -> None:
    """A linear map's weight that is used by another way as well, and one that nothing uses."""
    layer, memory = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)), GradientMemory()
    used, idle = layer[0], layer[1]
    for _ in range(2):
        with memory.lent_to(layer):
            (used(torch.ones(1, 3)).sum() + used.weight.sum()).backward()
            assert memory.norm().item() == pytest.approx((6 * 4 + 2) ** 0.5)
            assert idle.weight.grad is not None
            assert not idle.weight.grad.any()
            layer.get_parameter("1.weight").grad.fill_(torch.nan)  # type: ignore[union-attr]


def test_no_gradient_is_left_when_learning_fails() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), GradientMemory().lent_to(layer):
        raise KeyError
    assert all(weight.grad is None for weight in layer.parameters())


def test_frozen_weights_get_none() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    with GradientMemory().lent_to(layer):
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is None
        assert layer.bias.grad is not None
        assert layer.bias.grad.tolist() == [1, 1]


def test_embeddings_that_are_rescaled_in_reading_are_left_to_pytorch() -> None:
    table = nn.Embedding(6, 3, max_norm=0.1)
    with GradientMemory().lent_to(table):
        table(torch.tensor([2, 2])).sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad[2].tolist() == [2, 2, 2]
        assert table.weight[2].norm() <= 0.1001
