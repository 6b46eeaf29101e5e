"""Keys: what a stage's result depends on: parameters, inputs by content, code, and what else changes numbers."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_tasks.base import NOT_FOUND
from rlhf_tasks.closure import PACKAGE, SOURCE_ROOT, foreign_sources, import_closure, libraries_of, user_closure
from rlhf_tasks.config import Params, load_params
from rlhf_tasks.data.files import source_files, watched_path
from rlhf_tasks.digests import digest_file, remember_in
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import STAGES, Stage, producer
from rlhf_tasks.store import digest_json, digest_path
from rlhf_tasks.workspace import Workspace, state_folder

_SIMD = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
#: variables that make torch's libraries choose other instructions or other orders of summing
_SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def _code_digests() -> dict[str, str]:
    """Digest of every module of the work, as it is on disk."""
    modules = (SOURCE_ROOT / PACKAGE).rglob("*.py")
    return {path.relative_to(SOURCE_ROOT).as_posix(): digest_file(path) for path in modules}


#: the code that this process runs, taken before its modules are imported: an edit on disk is for the next run
_CODE = _code_digests()


@dataclass(frozen=True)
class Job:
    """A piece of work, and the key that says everything its result depends on."""

    stage: str
    key: str
    identity: dict[str, Any]

    @classmethod
    def of(cls, identity: dict[str, Any]) -> Job:
        """The job whose result depends on this and nothing else."""
        return cls(identity["stage"], digest_json(identity), identity)


def lineage_text(identity: dict[str, Any]) -> str:
    """The text of `lineage.json`."""
    return json.dumps(identity, indent=1, sort_keys=True) + "\n"


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """The names whose values are not the same in both."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def plan(workspace: Workspace, stage: Stage, coming: Mapping[str, str] = MappingProxyType({})) -> Job:
    """The stage's job for the workspace as it is.

    Args:
        coming: digests, by path, of inputs that will be there when the stage's turn comes.

    Raises:
        UserError: an input is missing; the message says which stage makes it.
    """
    return Job.of(identity(workspace, stage, parameters(workspace.params, stage), coming))


def identity(
    workspace: Workspace,
    stage: Stage,
    settings: dict[str, Any],
    coming: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that the result of a stage with these parameters depends on."""
    return {
        "stage": stage.name,
        "parameters": settings,
        "inputs": _input_digests(workspace, stage, coming),
        "code": {file: _CODE[file] for file in import_closure(stage.module)} | _foreign_code(workspace, stage),
        "environment": _environment(stage, workspace.params.runtime.device) | _libraries_of_settings(workspace, stage),
    }


def parameters(params: Params, stage: Stage) -> dict[str, Any]:
    """The slice of params.yaml that a stage reads."""
    sections = {name: params.section(name) for name in stage.sections}
    return {k: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for k, v in sections.items()}


def external_inputs(params: Params, root: Path, stage: Stage) -> list[str]:
    """Files and folders from outside the pipeline that a stage reads: of a source's folder or pattern, each file.

    Raises:
        UserError: a source's folder or pattern names no file.
    """
    return _external(params, root, stage, source_files)


def external_dependencies(params: Params, root: Path, stage: Stage) -> list[str]:
    """The same as DVC watches them: of a source's folder or pattern, the folder, where a new file is a change."""
    return list(dict.fromkeys(_external(params, root, stage, lambda path, root: [watched_path(path, root)])))


def _external(params: Params, root: Path, stage: Stage, named: Callable[[str, Path], list[str]]) -> list[str]:
    paths = [source.path for source in params.data.sources if source.path] if stage.name == "prepare" else []
    sources = [name for path in paths for name in named(path, root)]
    model = params.model
    local = model.base != "scratch" and model.revision is None  # a commit of the Hub is a digest itself
    base = [model.base] if stage.name in ("prepare", "sft") and local else []
    module = _function_module(params, stage)
    return sources + base + list(user_closure(module, root.resolve()) if module else ())


def check_sources(params: Params, root: Path, stages: list[Stage]) -> None:
    """Look at what comes from outside these stages before anything else does: DVC, say, would wait for ever at a pipe.

    Raises:
        UserError: a file or folder that params.yaml names, or that an earlier stage should have made, is missing, or is
            neither, or holds what the pipeline writes.
    """
    made = {path for stage in stages for path in stage.outs.values()}
    remember_in(state_folder(root))
    for stage in stages:
        for path in (source.path for source in params.data.sources if source.path and stage.name == "prepare"):
            _refuse_own_outs(root, watched_path(path, root))
        for path in external_inputs(params, root, stage):
            if path == params.model.base and not (root / path).exists():
                raise UserError(f"`model.base: {path}`: {NOT_FOUND}")
            _digest_input(root, path, stage)
        for path in stage.inputs.values():
            if path not in made and not (root / path).exists():
                raise _missing(path, stage)


def _function_module(params: Params, stage: Stage) -> str:
    """The module of the reward function that a stage calls; empty if it calls none."""
    function = params.reward_function.name if "reward_function" in stage.sections else None
    return function.partition(":")[0] if function else ""


def _libraries_of_settings(workspace: Workspace, stage: Stage) -> dict[str, str]:
    """Versions of what only some parameters bring in; where it is missing, the stage itself says so."""
    module = _function_module(workspace.params, stage)
    found = libraries_of(module, workspace.root.resolve()) if module else {}
    if stage.name in ("prepare", "sft") and (workspace.root / workspace.params.model.base).is_file():  # a GGUF file
        with suppress(PackageNotFoundError):
            found |= {"gguf": version("gguf")}
    return found


def _foreign_code(workspace: Workspace, stage: Stage) -> dict[str, str]:
    """Digests of what a reward function runs from elsewhere; its files in the project are inputs."""
    module = _function_module(workspace.params, stage)
    sources = foreign_sources(module, workspace.root.resolve()) if module else {}
    return {f"installed: {name}": digest_file(path) for name, path in sources.items()}


def _refuse_own_outs(root: Path, path: str) -> None:
    """A watched folder with results in it would make its own stage out of date, for ever."""
    folder = (root / path).resolve()
    own = [state_folder(root), *(root / out for stage in STAGES.values() for out in stage.outs.values())]
    inside = next((out for out in own if folder in out.resolve().parents), None)
    if inside is not None:
        raise UserError(
            f"{path}: a folder that also holds what the pipeline writes ({os.path.relpath(inside, root)}); "
            "put the files of `data.sources` into a folder of their own, such as data/raw"
        )


def _input_digests(
    workspace: Workspace, stage: Stage, coming: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    paths = [*stage.inputs.values(), *external_inputs(workspace.params, workspace.root, stage)]
    return {path: coming.get(path) or _digest_input(workspace.root, path, stage) for path in paths}


def _digest_input(root: Path, path: str, stage: Stage) -> str:
    try:
        return digest_path(root / path)
    except FileNotFoundError:
        raise _missing(path, stage) from None


def _missing(path: str, stage: Stage) -> UserError:
    remedy = "correct the path in params.yaml or put the file there"
    if path in stage.inputs.values():
        maker = producer(path).name
        remedy = f"it is made by the stage {maker}: run `rlhf run --from {maker}` or `dvc repro {stage.name}`"
    return UserError(f"{path}: not found, but the stage {stage.name} reads it; {remedy}")


@cache
def _environment(stage: Stage, device: str) -> dict[str, Any]:
    """What changes numbers beside code and parameters. Python too: its `sum` of floats is another from 3.12 on."""
    facts: dict[str, Any] = {"python": ".".join(platform.python_version_tuple()[:2])}
    facts |= {name: version(name) for name in stage.libraries}
    if "runtime" in stage.sections:
        facts |= {"machine": platform.machine(), "cpu": _cpu_vendor(), "simd": _simd(), "dtype": "float32"}
        facts |= {name: os.environ[name] for name in _SWITCHES if name in os.environ}
        facts |= _gpu() if device == "cuda" else {}
    return facts


def _gpu() -> dict[str, str | None]:
    """The GPU that torch would use; none is an answer that the stage itself gives."""
    import torch  # slow, and most commands need no more of it

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _simd() -> list[str]:
    flags = set(_cpuinfo().split())
    return [name for name in _SIMD if name in flags]


def _cpu_vendor() -> str:
    """Who made the CPU: MKL and oneDNN look at that too when they choose their code."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", _cpuinfo(), re.MULTILINE)
    return found[1] if found else "unknown"


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def present(workspace: Workspace, job: Job) -> bool:
    """Whether the workspace holds the very inputs that a job was planned with."""
    try:
        return _input_digests(workspace, STAGES[job.stage]) == job.identity["inputs"]
    except UserError:
        return False


def changed_since(workspace: Workspace, job: Job) -> bool:
    """Whether parameters, inputs or code on disk are no longer what a job was planned with."""
    now, stage = Workspace(workspace.root, load_params(workspace.root / "params.yaml")), STAGES[job.stage]
    return _edited(stage) or plan(now, stage).key != job.key


def _edited(stage: Stage) -> bool:
    """Whether the code of a stage is no longer what this process took its keys from."""
    files = import_closure(stage.module)
    return any(
        not (SOURCE_ROOT / file).exists() or digest_file(SOURCE_ROOT / file) != _CODE.get(file) for file in files
    )


@contextmanager
def nothing_changes(workspace: Workspace, stage: Stage, job: Job) -> Iterator[Callable[[], None]]:
    """Watch what a job of a stage was planned with: yields a check to make before its result is stored.

    Code is looked at once the stage's module has been imported, which may be long after this process began, and again
    at the end; inputs by content, and by what changes when a file is replaced and put back.

    Raises:
        UserError: here or in the check: nothing is stored under a key of what may not have been read.
    """
    importlib.import_module(stage.module)

    def check() -> None:
        if _edited(stage) or _input_digests(workspace, stage) != job.identity["inputs"] or _facts() != facts:
            raise UserError(
                f"{stage.name}: its inputs or its code changed while it ran, so its result was dropped; run again"
            )

    def _facts() -> list[tuple[str, int, int]]:
        paths = [workspace.root / path for path in job.identity["inputs"]]
        files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        return [(str(file), (seen := file.stat()).st_ino, seen.st_mtime_ns) for file in files if file.is_file()]

    facts = _facts()
    check()
    yield check
