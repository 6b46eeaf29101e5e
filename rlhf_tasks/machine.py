"""What a machine can do: memory, and the rates that time is estimated from. Measured here, or from a data sheet."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaModel

from rlhf_tasks.errors import UserError
from rlhf_tasks.meter import Meter, Need

GB = 1e9
MATRIX, VECTOR, TRIES = 1024, 1 << 24, 5


@dataclass(frozen=True)
class Machine:
    """Rates may be unknown (None): then there is no time to tell.

    Attributes:
        memory: bytes that a run may use.
        free: bytes of them that nobody uses now; None where that is not known.
        baseline: bytes that the process needs beside its tensors.
        flops: floating-point operations a second, of float32 matrix products.
        bandwidth: bytes a second.
        operation: seconds that an operation costs however small it is.
    """

    name: str
    memory: float
    baseline: float = 0.0
    flops: float | None = None
    bandwidth: float | None = None
    operation: float = 0.0
    free: float | None = None
    estimated: bool = False  # by a data sheet: nothing was measured there

    def seconds(self, need: Need) -> float | None:
        """How long a piece of work takes, roughly: nothing overlaps, and the caches are of no help."""
        if self.flops is None or self.bandwidth is None:
            return None
        return need.flops / self.flops + need.moved / self.bandwidth + need.operations * self.operation


#: memory in GB, float32 TFLOP/s without tensor cores, TB/s: NVIDIA's data sheets
GPUS = {
    "T4": (16, 8.1, 0.32),
    "V100": (32, 15.7, 0.9),
    "A10": (24, 31.2, 0.6),
    "L4": (24, 30.3, 0.3),
    "RTX3090": (24, 35.6, 0.936),
    "RTX4090": (24, 82.6, 1.008),
    "L40S": (48, 91.6, 0.864),
    "A100-40": (40, 19.5, 1.555),
    "A100": (80, 19.5, 2.039),
    "H100": (80, 67.0, 3.35),
    "H200": (141, 67.0, 4.8),
}
IN_USE = 0.17e9  # bytes that Prefect's client, MLflow and a tokenizer take once they work; measured
LAUNCH = 10e-6  # seconds that a GPU waits for Python to launch an operation, about
#: bytes of a GPU that CUDA's context, its kernels and cuBLAS's workspace take beside the tensors: an estimate, about
#: what is usual with torch, not measured here
CONTEXT = 0.6e9
MOST_GPUS, MOST_GB = 1024, 1024.0
NO_LIMIT = 1 << 60  # bytes; version 1 of the control groups has a number for none


def this_machine(threads: int) -> Machine:
    """This machine's CPU, its rates measured now, in about two seconds."""
    torch.set_num_threads(threads)
    a, b = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    flops = 2 * MATRIX**3 / fastest(partial(torch.mm, a, b))
    x, y = torch.rand(VECTOR), torch.rand(VECTOR)
    bandwidth = 3 * x.nbytes / fastest(partial(torch.add, x, y))
    name = f"this machine, {threads} thread{'s' * (threads > 1)}"
    memory = psutil.virtual_memory()
    limit, free = within_container(memory.total, memory.available)
    if limit < memory.total:
        name += ", in a container with a limit of memory"
    return Machine(name, limit, _baseline(), flops, bandwidth, _operation_seconds(), free)


def within_container(total: float, free: float, root: Path = Path("/")) -> tuple[float, float]:
    """Bytes of memory that this process may have, and that are free of them, of what the machine has.

    A container, or a job of a cluster, has the limits of its control group and of all above it (version 2 or 1).

    Args:
        root: where `proc` and `sys` are.
    """
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total, free


def _limits(root: Path) -> Iterator[tuple[float, float]]:
    """The limit of each control group that this process is in, and what of it is used and cannot be given back."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # another system than Linux
        return
    for _, controllers, name in groups:
        if controllers == "":
            base, files = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, files = (
                "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        place = Path(name.lstrip("/"))
        for group in {place, *place.parents}:  # in a container the name may be that outside of it: then `.` is its own
            with suppress(OSError, ValueError, KeyError):  # the topmost has no limit
                yield _limit(root / base / group, *files)


def _limit(group: Path, limit: str, used: str, cached: str) -> tuple[float, float]:
    """A control group's limit and use, without what it holds of files that it can let go."""
    text = (group / limit).read_text().strip()
    most = float("inf") if text == "max" or int(text) >= NO_LIMIT else float(text)
    held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return most, int((group / used).read_text()) - int(held[cached])


def this_gpu() -> Machine:
    """The GPU that torch would use.

    Raises:
        UserError: it sees none.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "runtime.device: found `cuda`, but torch sees no GPU here; say which one the plan is for, as in `rlhf plan "
            "--gpu H100`, or plan for the CPU with `rlhf plan --set runtime.device=cpu`"
        )
    free, total = torch.cuda.mem_get_info()
    return gpu_of(torch.cuda.get_device_name(), total, free)


def gpu_of(name: str, memory: float, free: float) -> Machine:
    """A GPU by the name that its driver gives it, with the rates of the known one that it is, if it is one."""
    words = re.split(r"[\s-]", name.upper().replace("RTX ", "RTX"))
    known = [key for key in GPUS if key.partition("-")[0] in words]
    if not known:
        return Machine(name, memory, CONTEXT, free=free, estimated=True)
    key = min(known, key=lambda key: abs(GPUS[key][0] * GB - memory))
    return replace(named_gpu(key)[1], name=name, memory=memory, free=free)


def named_gpu(text: str) -> tuple[int, Machine]:
    """`H100`, `2xH100` or `1x24GB`: how many GPUs, and one of them.

    Raises:
        UserError: it is none of these, or no GPU that there could be.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+(?:\.\d+)?) ?GB|([\w-]+))", text.strip(), re.IGNORECASE)
    count = int(match[1] or 1) if match else 0
    if match is None or not count:
        raise UserError(f"--gpu {text}: expected a name or a size, such as H100, 2xA100 or 1x24GB")
    if count > MOST_GPUS or (match[2] and not 0 < float(match[2]) <= MOST_GB):
        raise UserError(
            f"--gpu {text}: expected at most {MOST_GPUS} GPUs, each of more than 0 and at most {MOST_GB:.0f} GB"
        )
    if match[2]:
        return count, Machine(f"a GPU of {match[2]} GB", float(match[2]) * GB, CONTEXT, estimated=True)
    names = {name.lower(): name for name in GPUS}
    if match[3].lower() not in names:
        near = difflib.get_close_matches(match[3].lower(), names, n=1)
        hint = f"did you mean {names[near[0]]}? " if near else ""
        raise UserError(f"--gpu {text}: {hint}Known are {', '.join(GPUS)}, or a size such as 24GB")
    name = names[match[3].lower()]
    memory, teraflops, terabytes = GPUS[name]
    return count, Machine(name, memory * GB, CONTEXT, teraflops * 1e12, terabytes * 1e12, LAUNCH, estimated=True)


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some tries."""
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _operation_seconds() -> float:
    """What an operation of a model costs in Python when there is next to nothing to compute."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=8, **tiny)).eval()
    ids = torch.ones(1, 2, dtype=torch.long)
    with torch.no_grad():
        with Meter() as meter, meter.measure() as found:
            model(ids)
        return fastest(partial(model, ids)) / found[0].operations


def _baseline() -> float:
    """Resident bytes of a process that has imported what a stage's does, and of what that takes when it is used."""
    code = (
        "import psutil, flows.pipeline, rlhf_tasks.ppo_stage, rlhf_tasks.evaluate, rlhf_tasks.data.prepare; "
        "print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) + IN_USE if done.returncode == 0 else 0.0
