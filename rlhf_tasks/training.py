"""The one supervised loop that SFT and reward training share, and the state on disk that PPO shares with it.

It resumes in the middle of an epoch to the bit: the data order is a function of the seed and the epoch, so weights,
optimizer and the number of the next step are all its state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_tasks.errors import UserError
from rlhf_tasks.gradients import GradientMemory
from rlhf_tasks.seeds import permutation
from rlhf_tasks.trunk import learning

if TYPE_CHECKING:
    from rlhf_tasks import config

log = logging.getLogger(__name__)

SAVE_EVERY_SECONDS = 30
SAVING_SHARE = 0.05  # of the time, at most, once it is known what a save takes
ADAM_EPS = 1e-5
CLIP_EPS = 1e-6  # as in torch's clip_grad_norm_
#: what reading a state raises that is not what was written
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SafetensorError)
BATCHES_A_WINDOW = 50


class Progress(Protocol):
    """Told of every step: `progress(done=3, total=10, loss=0.7)`. Calls with values become the stage's curve."""

    def __call__(self, *, done: int, total: int, **values: float) -> None: ...


def fit(
    model: Any,
    optimizer: torch.optim.Optimizer,
    learn: Callable[[list[int]], dict[str, float]],
    lengths: Sequence[int],
    settings: config.Supervised,
    *,
    seed_names: tuple[str | int, ...],
    partial: Path,
    progress: Progress,
) -> None:
    """Train for `settings.epochs` passes over rows of the given lengths, going on from `partial` if it holds a state.

    Args:
        learn: adds the gradient of the rows with the given numbers; returns what to show of them, `loss` first.
        lengths: tokens in each row.
        seed_names: what the data order's seeds are derived from.
        partial: where the state of unfinished training is kept; the caller deletes it when the result is safe.
    """
    plan = [
        (epoch, batch)
        for epoch in range(settings.epochs)
        for batch in shuffled_batches(lengths, settings.batch_tokens, (*seed_names, "order", epoch))
    ]
    base_rates = [group["lr"] for group in optimizer.param_groups]
    step, saves = load_training_state(partial, model, optimizer, len(plan)), list[float]()
    started = saved_at = time.monotonic()
    memory = GradientMemory()
    while step < len(plan):
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * warmup_and_decay(step, len(plan), settings.warmup_fraction)
        epoch, batch = plan[step]
        with memory.lent_to(model):
            shown = learn(batch)
            norm = memory.norm()
            if not torch.isfinite(norm):
                text = f"training diverged at step {step + 1}: the gradient is {norm.item()}; lower learning_rate"
                raise UserError(text)
            clipped_step(optimizer, norm, settings.max_grad_norm)
        step += 1
        values = {**shown, "grad_norm": norm.item(), "epoch": epoch + 1}
        progress(done=step, total=len(plan), **values, learning_rate=optimizer.param_groups[0]["lr"])
        now = time.monotonic()
        if step < len(plan) and now >= next_save(started, saved_at, saves):
            save_training_state(partial, model, optimizer, step)
            saved_at = time.monotonic()
            saves.append(saved_at - now)


def next_save(started: float, saved_at: float, saves: Sequence[float]) -> float:
    """When to save unfinished training again: `SAVE_EVERY_SECONDS` after the last time, but, with a large model, not
    before one more save, as dear as the last, leaves all of them within `SAVING_SHARE` of the time.

    Args:
        started: when training began, in seconds of some clock, as all times here.
        saved_at: when it was last saved; `started` if never.
        saves: how long each save took.
    """
    affordable = started + (sum(saves) + saves[-1]) / SAVING_SHARE if saves else started
    return max(saved_at + SAVE_EVERY_SECONDS, affordable)


def warmup_and_decay(step: int, total: int, warmup_fraction: float) -> float:
    """Learning-rate factor of a step: a linear rise over the first part, then a linear fall towards 0."""
    warmup = max(1, round(total * warmup_fraction))
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup + 1))


def shuffled_batches(lengths: Sequence[int], budget: int, seed_names: tuple[str | int, ...]) -> list[list[int]]:
    """Row numbers in batches as `length_batches` makes them, in an order that belongs to the seed.

    Rows of similar length meet within windows of the shuffled order, so batches are full, and still in random order.
    """
    order = permutation(len(lengths), *seed_names)
    mean = sum(lengths) / max(1, len(lengths))
    window = max(1, int(BATCHES_A_WINDOW * budget / max(1.0, mean)))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        batches.extend([rows[i] for i in batch] for batch in length_batches([lengths[r] for r in rows], budget))
    return [batches[i] for i in permutation(len(batches), *seed_names, "batches")]


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers by length, cut so that rows x longest row stays within `budget` tokens; one row always fits."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (lengths[r], r)):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def adamw(groups: Iterable[Any], learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW as PPO implementations use it: eps 1e-5 (Huang et al. 2024, detail 3.2)."""
    return torch.optim.AdamW(groups, lr=learning_rate, eps=ADAM_EPS, weight_decay=weight_decay, fused=True)


def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, most: float) -> None:
    """A step with the gradient cut to a norm of `most`.

    AdamW's fused step divides gradients by `grad_scale` as it reads them: clipping costs no pass of its own.
    """
    optimizer.grad_scale = ((norm + CLIP_EPS) / most).clamp(min=1).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "") -> dict[str, Tensor]:
    """An optimizer's state as named tensors: `0.exp_avg`, `0.exp_avg_sq`, `0.step`, ..."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{index}.{name}": tensor for index, slots in state.items() for name, tensor in slots.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Put `optimizer_tensors` back; hyper-parameters stay those the optimizer was made with.

    Raises:
        ValueError: they are another model's. Adam's fused step looks at no shapes: it would write past the end.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".")
            state.setdefault(int(index), {})[name] = tensor
    for number, slots in state.items():
        if not 0 <= number < len(parameters):
            raise ValueError(f"the optimizer's state has a parameter {number}, of {len(parameters)}")
        shape = parameters[number].shape
        if any(t.dtype != torch.float32 for t in slots.values()) or _shapes(slots) != _adam_shapes(shape):
            raise ValueError(f"the optimizer's state of parameter {number} is not one of shape {list(shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _adam_shapes(shape: torch.Size) -> dict[str, torch.Size]:
    """What Adam keeps of a parameter."""
    return {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}


def learned_tensors(model: Any) -> dict[str, Tensor]:
    """The weights of a model that learn, by name: with those that do not, they are the model."""
    return {name: weight.detach().contiguous() for name, weight in learning(model).items()}


def check_learned_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """See that tensors are a model's `learned_tensors`.

    Raises:
        ValueError: they are another's.
    """
    if _shapes(tensors) != _shapes(learning(model)):
        raise ValueError("these are the weights of another model")


@torch.no_grad()
def load_learned_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put `learned_tensors` back.

    Raises:
        ValueError: they are another model's.
    """
    check_learned_tensors(model, tensors)
    for name, weight in learning(model).items():
        weight.copy_(tensors[name])


def save_training_state(partial: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Replace the state of unfinished training; a kill at any moment leaves the old one or the new one."""
    folder = partial / f"step-{step:08d}"
    writing = partial / "writing"
    _remove(writing)
    writing.mkdir(parents=True)
    save_file(learned_tensors(model), writing / "model.safetensors")
    save_file(optimizer_tensors(optimizer), writing / "optimizer.safetensors")
    digests = {file.name: _sha256(file) for file in writing.glob("*.safetensors")}
    (writing / "state.json").write_text(json.dumps({"step": step, "sha256": digests}))
    writing.rename(folder)
    for old in partial.glob("step-*"):
        if old != folder:
            _remove(old)


def _remove(path: Path) -> None:
    """Delete a folder, or what lies in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_training_state(partial: Path, model: Any, optimizer: torch.optim.Optimizer, total: int) -> int:
    """Load the newest state of unfinished training, of `total` steps. Returns how many it has done, 0 without one."""
    folders = sorted(partial.glob("step-*"))
    if not folders:
        return 0
    try:
        return _load_training_state(folders[-1], model, optimizer, total)
    except (*DAMAGE, OSError) as error:
        log.warning("%s is damaged (%s); training starts from its beginning", folders[-1], error)
        return 0


def _load_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, total: int) -> int:
    """Load a state, of which all is looked at before anything is changed."""
    state = json.loads((folder / "state.json").read_text())
    step, files = int(state["step"]), ("model.safetensors", "optimizer.safetensors")
    if not 0 < step < total:
        raise ValueError(f"it has done {step} of {total} steps")
    for name in files:
        if _sha256(folder / name) != state["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    weights, tensors = (load_file(folder / name) for name in files)
    check_learned_tensors(model, weights)
    load_optimizer_tensors(optimizer, tensors)
    load_learned_tensors(model, weights)
    return step


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
