"""`rlhf plan`: what the configuration needs, printed before anything is run."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from flows.console import console
from rlhf_tasks.ahead import check_model, high_rates
from rlhf_tasks.config import Params
from rlhf_tasks.limits import check_heldout_prompts
from rlhf_tasks.machine import Machine, named_gpu, this_gpu, this_machine
from rlhf_tasks.plan import FLOAT, Amounts, Phase, Sizes, amounts_of, largest_micro_batch, phases, settings_of, sizes_of
from rlhf_tasks.stages import STAGES

PREFIXES = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}


def say_plan(root: Path, params: Params, gpu: str, *, as_json: bool) -> None:
    """Print parameters, memory, work and time of every part of the pipeline, on the machine that `runtime.device` means
    or on a named GPU.

    Args:
        root: the checkout, which is the working folder.

    Raises:
        UserError: the GPU is none, or not here; or the model and what is asked of it do not go together.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    count, machine = named_gpu(gpu) if gpu else (1, None)
    settings, amounts = settings_of(root, params), amounts_of(root, params)
    check_model(params)
    if amounts.heldout_prompts is not None:
        check_heldout_prompts(params.evaluate.prompts, amounts.heldout_prompts)
    if machine is None:
        machine = this_gpu() if params.runtime.device == "cuda" else this_machine(params.runtime.threads)
    sizes, found = sizes_of(settings, params.ppo.trainable_layers), list(phases(params, settings, amounts))
    largest = largest_micro_batch(params, settings, amounts, machine.memory - machine.baseline, found)
    if as_json:
        document = _document(machine, count, sizes, amounts, found, largest)
        print(json.dumps(document | {"warnings": warnings(params, machine, found)}, indent=1))
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
        text = f"top {params.ppo.trainable_layers} layers and heads: {in_units(sizes.learning)} weights in both"
        shared = f" Actor and Critic learn in their {text}; all four share what lies below."
    console.print(
        f"Actor and Ref: {in_units(sizes.actor)} weights each ({in_units(sizes.embeddings)} in embeddings); "
        f"Reward and Critic: {in_units(sizes.scorer)} each. All in float32.{shared}",
        soft_wrap=True,
    )
    if not amounts.known:
        console.print(
            "The data is not prepared with these parameters, so its size is not known: `rlhf run --until prepare`.",
            soft_wrap=True,
        )
    table = Table(title=f"On {machine.name}", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("stage")
    table.add_column("part")
    for column in ("tokens", "FLOP", "memory", "time"):
        table.add_column(column, justify="right")
    for phase in found:
        table.add_row(phase.stage, phase.name, *_cells(phase, machine))
    console.print(table)
    console.print(
        "Not planned: prepare, which trains nothing and takes what your data takes, whatever the model; and register.",
        soft_wrap=True,
    )
    peak = _peak(machine, found)
    fits = "fits" if peak <= machine.memory else "DOES NOT FIT"
    console.print(f"Memory at most {in_units(peak, 'B')} of {in_units(machine.memory, 'B')}: {fits}.")
    if machine.estimated:
        console.print(
            f"Of that, {in_units(machine.baseline, 'B')} are an estimate of what CUDA's context takes. Nothing here "
            "was measured on a GPU.",
            soft_wrap=True,
        )
    for warning in warnings(params, machine, found):
        console.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
    now = params.ppo.micro_batch_tokens
    room = f"{largest:,}" if largest else "none: not even one row fits"
    console.print(f"Largest `ppo.micro_batch_tokens` that fits and is of use: {room} (now {now:,}).", soft_wrap=True)
    state = FLOAT * 3 * sizes.learning
    console.print(f"On disk: {in_units(state, 'B')} for each of PPO's states, of which two are kept.")
    if count > 1:
        console.print(f"{count} GPUs: a run uses one of them.")


def warnings(params: Params, machine: Machine, found: list[Phase]) -> list[str]:
    """What speaks against a run that could be made all the same."""
    said, peak = [high_rates(params, list(STAGES.values()))], _peak(machine, found)
    if machine.free is not None and machine.free < peak <= machine.memory:
        said.append(
            f"Only {in_units(machine.free, 'B')} of the memory are free now: end other programs before the run."
        )
    return [warning for warning in said if warning]


def _peak(machine: Machine, found: list[Phase]) -> float:
    return machine.baseline + max(phase.need.memory for phase in found)


def _cells(phase: Phase, machine: Machine) -> tuple[str, str, str, str]:
    seconds = machine.seconds(phase.need) if phase.need.flops else None
    return (
        f"{phase.tokens:,.0f}" if phase.tokens else "",
        in_units(phase.need.flops) if phase.need.flops else "",
        in_units(machine.baseline + phase.need.memory, "B"),
        "" if seconds is None else duration(seconds),
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


def in_units(number: float, unit: str = "") -> str:
    """Three digits of a number, at least, with the prefix that fits it: `1.09 GB`, `453 G`, `26.2 k`."""
    scale = next((scale for scale in PREFIXES if number >= scale), 1.0)
    digits = 2 if number < 10 * scale else 1 if number < 100 * scale else 0
    digits = digits if scale > 1 else 0
    return f"{number / scale:,.{digits}f} {PREFIXES.get(scale, '')}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in the unit that fits them."""
    if seconds < 1:
        return f"{1e3 * seconds:,.0f} ms"
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
