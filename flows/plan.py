"""`rlhf plan`: what the configuration needs, printed before anything is run."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from flows.console import console
from rlhf_tasks.config import Params
from rlhf_tasks.machine import GB, Machine, named_gpu, this_machine
from rlhf_tasks.plan import FLOAT, Amounts, Phase, Sizes, amounts_of, largest_micro_batch, phases, settings_of, sizes_of


def say_plan(root: Path, params: Params, gpu: str, *, as_json: bool) -> None:
    """Print parameters, memory, work and time of every part of the pipeline, on this machine or on a named GPU."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    count, machine = named_gpu(gpu) if gpu else (1, this_machine(params.runtime.threads))
    settings, amounts = settings_of(root, params), amounts_of(root, params)
    sizes, found = sizes_of(settings, params.ppo.trainable_layers), list(phases(params, settings, amounts))
    largest = largest_micro_batch(params, settings, amounts, machine.memory - machine.baseline, found)
    if as_json:
        print(json.dumps(_document(machine, count, sizes, amounts, found, largest), indent=1))
        return
    _say(params, machine, count, sizes, amounts, found, largest)


def _say(
    params: Params,
    machine: Machine,
    count: int,
    sizes: Sizes,
    amounts: Amounts,
    found: list[Phase],
    largest: int | None,
) -> None:
    shared = ""
    if params.ppo.trainable_layers:
        text = f"top {params.ppo.trainable_layers} layers and heads: {_millions(sizes.learning)} weights in both"
        shared = f" Actor and Critic learn in their {text}; all four share what lies below."
    console.print(
        f"Actor and Ref: {_millions(sizes.actor)} weights each ({_millions(sizes.embeddings)} in embeddings); "
        f"Reward and Critic: {_millions(sizes.scorer)} each. All in float32.{shared}",
        soft_wrap=True,
    )
    if not amounts.known:
        console.print(
            "The data is not prepared with these parameters, so its size is not known: `rlhf run --until prepare`."
        )
    table = Table(title=f"On {machine.name}", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("stage")
    table.add_column("part")
    for column in ("tokens", "TFLOP", "memory", "time"):
        table.add_column(column, justify="right")
    for phase in found:
        table.add_row(phase.stage, phase.name, *_cells(phase, machine))
    console.print(table)
    peak = machine.baseline + max(phase.need.memory for phase in found)
    fits = "fits" if peak <= machine.memory else "DOES NOT FIT"
    console.print(f"Memory at most {_gigabytes(peak)} of {_gigabytes(machine.memory)}: {fits}.")
    now = params.ppo.micro_batch_tokens
    room = f"{largest:,}" if largest else "none: not even one row fits"
    console.print(f"Largest `ppo.micro_batch_tokens` that fits and is of use: {room} (now {now:,}).", soft_wrap=True)
    state = FLOAT * 3 * sizes.learning
    console.print(f"On disk: {_gigabytes(state)} for each of PPO's states, of which two are kept.")
    if count > 1:
        console.print(f"{count} GPUs: a run uses one of them.")


def _cells(phase: Phase, machine: Machine) -> tuple[str, str, str, str]:
    seconds = machine.seconds(phase.need) if phase.need.flops else None
    return (
        f"{phase.tokens:,.0f}" if phase.tokens else "",
        f"{phase.need.flops / 1e12:,.1f}" if phase.need.flops else "",
        _gigabytes(machine.baseline + phase.need.memory),
        "" if seconds is None else _duration(seconds),
    )


def _document(
    machine: Machine, count: int, sizes: Sizes, amounts: Amounts, found: list[Phase], largest: int | None
) -> dict[str, Any]:
    parts = [
        asdict(phase) | {"memory": machine.baseline + phase.need.memory, "seconds": machine.seconds(phase.need)}
        for phase in found
    ]
    return {
        "machine": asdict(machine),
        "gpus": count,
        "weights": asdict(sizes),
        "data": asdict(amounts),
        "phases": parts,
        "largest_micro_batch_tokens": largest,
    }


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _gigabytes(size: float) -> str:
    return f"{size / GB:,.2f} GB"


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
