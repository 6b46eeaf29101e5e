"""Keys and work: what a stage's result depends on, whether it is there, and making it where it is not.

Both doors come through here. Inputs are read from the workspace (`data/prepared`, `checkpoints/...`), results go into
the store under their key, and from there back into the workspace. Whoever runs a stage, its result is the same files.
"""

from __future__ import annotations

import csv
import fcntl
import importlib
import inspect
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_tasks.base import not_found
from rlhf_tasks.closure import PACKAGE, SOURCE_ROOT, foreign_sources, import_closure, libraries_of, user_closure
from rlhf_tasks.config import Params, load_params
from rlhf_tasks.data.files import source_files, watched_path
from rlhf_tasks.digests import digest_file, remember_in
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import LINEAGE, STAGES, Stage, producer
from rlhf_tasks.store import Entry, Store, digest_json, digest_path, place

log = logging.getLogger(__name__)

#: told of every step of a stage: a row of its series, and how many steps there are
Watch = Callable[[dict[str, Any], int], None]

STORE_VARIABLE = "RLHF_STORE"  # a folder that several clones may share
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


@dataclass
class Workspace:
    """A checkout to work in: its parameters and the store that it uses."""

    root: Path
    params: Params
    store: Store = field(init=False)
    live_trainer: tuple[str, Any] | None = None

    def __post_init__(self) -> None:
        remember_in(state_folder(self.root))
        shared = os.environ.get(STORE_VARIABLE)
        self.store = Store(Path(shared).resolve() if shared else state_folder(self.root) / "store")


def project_folder(root: Path) -> Path:
    """The checkout, or, of a DVC experiment beside it, the repository that it came from (DVC sets DVC_ROOT)."""
    owner = os.environ.get("DVC_ROOT") if os.environ.get("DVC_STAGE") else None
    return Path(owner or root)


def state_folder(root: Path) -> Path:
    """`.rlhf` of the project: the store, Prefect's database, the server's record."""
    return project_folder(root) / ".rlhf"


# Planning ------------------------------------------------------------------------------------------------------------


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
                raise UserError(f"`model.base: {path}`: {not_found(path)}")
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


# Work ----------------------------------------------------------------------------------------------------------------


def forget(workspace: Workspace, job: Job) -> None:
    """Drop what the store has of a job, finished, adopted for it or begun: it will be done from its start."""
    workspace.store.discard(job.key)
    while entry := find(workspace, job):
        workspace.store.discard(entry.folder.name)
    workspace.store.forget_partial(job.key)


def perform(workspace: Workspace, job: Job, watch: Watch) -> Entry:
    """Do a stage's work and store it, unless another process has just done so."""
    stage, params, store = STAGES[job.stage], workspace.params, workspace.store
    with store.lock(job.key):
        entry = find(workspace, job)
        if entry and entry.has_payload():
            return entry
        arguments = {("register_" if n == "register" else n): params.section(n) for n in stage.sections}
        arguments |= {name: workspace.root / path for name, path in stage.inputs.items()}
        partial, started = store.partial(job.key), time.time()
        with (
            nothing_changes(workspace, stage, job) as check,
            store.writing(job.key) as out,
            Recorder(watch, partial / "series.jsonl") as recorder,
        ):
            run = importlib.import_module(stage.module).run
            offered = {"partial": partial, "progress": recorder}
            wanted = {name: value for name, value in offered.items() if name in inspect.signature(run).parameters}
            metrics = run(**arguments, **wanted, out=out)
            save_curve(stage, out, recorder.series)
            save_lineage(job, out)
            perf = {"seconds": time.time() - started}
            check()
            return store.commit(job.key, out, job.identity, metrics=metrics, series=recorder.series, perf=perf)


class Recorder:
    """A stage's progress: shown at once, and kept as its series, also over a kill and a second start."""

    def __init__(self, watch: Watch, path: Path) -> None:
        self._watch, self._path = watch, path
        self.series: list[dict[str, Any]] = []

    def __enter__(self) -> Recorder:
        if self._path.is_dir():
            shutil.rmtree(self._path)
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        try:
            for line in lines:
                row = json.loads(line)
                if not all(isinstance(n, int | float) for n in (row["step"], row["time_ms"], *row["values"].values())):
                    raise ValueError("no numbers")
                self._keep({name: row[name] for name in ("step", "time_ms", "values")})
        # a power cut leaves zeros, and others on the same store anything: the steps go on, their record has a gap
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.warning("%s: damaged; what follows of it is lost, the training is not", self._path)
        rewritten = self._path.with_suffix(".new")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in self.series))
        rewritten.replace(self._path)
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __call__(self, *, done: int, total: int, **values: float) -> None:
        row = {"step": done, "time_ms": int(time.time() * 1000), "values": values}
        if values:
            self._keep(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._watch(row, total)

    def _keep(self, row: dict[str, Any]) -> None:
        while self.series and self.series[-1]["step"] >= row["step"]:  # steps that are done again after a kill
            self.series.pop()
        self.series.append(row)


def save_curve(stage: Stage, out: Path, series: list[dict[str, Any]]) -> None:
    """The series as `curve.csv` for DVC's plots: no times, only what is a function of the inputs."""
    if "curve.csv" not in stage.outs:
        return
    with (out / "curve.csv").open("w", newline="") as file:
        columns = dict.fromkeys(name for row in series for name in row["values"])  # a warm-up row has fewer
        writer = csv.DictWriter(file, fieldnames=["step", *columns])
        writer.writeheader()
        writer.writerows({"step": row["step"], **row["values"]} for row in series)


def save_lineage(job: Job, out: Path) -> None:
    """What the result depends on, beside it: so that git and DVC alone can tell."""
    (out / LINEAGE).write_text(lineage_text(job.identity))


def lineage_text(identity: dict[str, Any]) -> str:
    """The text of `lineage.json`."""
    return json.dumps(identity, indent=1, sort_keys=True) + "\n"


# Workspace -----------------------------------------------------------------------------------------------------------


def export(workspace: Workspace, entry: Entry) -> None:
    """Put a stage's result into the workspace, where it is not there already.

    Raises:
        DamagedEntry: the payload is not what was written.
    """
    stage = STAGES[entry.manifest["identity"]["stage"]]
    stale = {part: path for part, path in stage.outs.items() if not _holds(workspace.root / path, entry.parts[part])}
    if stale:
        entry.verify()
    for part, path in stale.items():
        place(entry.payload / part, workspace.root / path)


def exported(workspace: Workspace, entry: Entry) -> bool:
    """Whether the workspace holds the result already."""
    stage = STAGES[entry.manifest["identity"]["stage"]]
    return all(_holds(workspace.root / path, entry.parts[part]) for part, path in stage.outs.items())


def find(workspace: Workspace, job: Job) -> Entry | None:
    """A job's result in the store: made of this very key, or adopted for it. Its payload may have been pruned."""
    entry = workspace.store.find(job.key)
    if entry is None:
        entry = next((entry for entry in workspace.store.entries() if entry.answers == job.key), None)
    if entry and entry.parts.keys() != STAGES[job.stage].outs.keys():
        log.warning(
            "%s: holds %s, not what the stage makes; ignored", entry.folder, ", ".join(entry.parts) or "nothing"
        )
        return None
    return entry


def adoptable(workspace: Workspace, job: Job) -> bool:
    """Whether the workspace's outs of a stage, if DVC vouches for them, may be taken for a job's result.

    DVC knows files and params.yaml, not library versions or instruction sets. What it vouches for may have been made on
    another machine, so of what they say of themselves only the environment may differ. Where the store holds these very
    outs under another key, they were made here, of something else than is asked for now: they are not adopted.
    """
    stage = STAGES[job.stage]
    try:
        present = {part: digest_path(workspace.root / path) for part, path in stage.outs.items()}
        made_of = _own_identity(workspace, stage)
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(made_of, dict) or made_of | {"environment": {}} != job.identity | {"environment": {}}:
        return False
    known = (entry for entry in workspace.store.entries() if entry.manifest["identity"]["stage"] == stage.name)
    return not any(entry.parts == present for entry in known)


def adopt(workspace: Workspace, job: Job) -> Entry | None:
    """Make the workspace's outs of a stage, which DVC vouches for, an entry of the store, as in a clone that pulled.

    Its key is that of what it was made of, which may be another machine's; it answers this job beside it, and says so.
    """
    stage, store = STAGES[job.stage], workspace.store
    if not adoptable(workspace, job):
        return None
    maker = Job.of(_own_identity(workspace, stage))
    with store.lock(maker.key), store.writing(maker.key) as out:
        for part, path in stage.outs.items():
            place(workspace.root / path, out / part)
        document = json.loads((out / "metrics.json").read_text())
        metrics = {k: v for k, v in document.items() if isinstance(v, float | int) and not isinstance(v, bool)}
        differs = sorted(differing(maker.identity["environment"], job.identity["environment"]))
        elsewhere = f", made elsewhere (other {', '.join(differs)})" if differs else ""
        log.info("%s: adopted from the workspace, which dvc.lock vouches for%s", stage.name, elsewhere)
        return store.commit(
            maker.key, out, maker.identity, metrics=metrics, series=_load_curve(out), perf={}, adopted=job.key
        )


def _own_identity(workspace: Workspace, stage: Stage) -> Any:
    """What the workspace's outs of a stage say that they were made of."""
    return json.loads((workspace.root / stage.lineage).read_text())


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """The names whose values are not the same in both."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def _load_curve(out: Path) -> list[dict[str, Any]]:
    """The series that `curve.csv` was made of; its times are not in it, so every row is of now."""
    path, now = out / "curve.csv", int(time.time() * 1000)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [{"step": int(row.pop("step")), "time_ms": now, "values": row} for row in rows]


def _holds(path: Path, digest: str) -> bool:
    try:
        return digest_path(path) == digest
    except FileNotFoundError:
        return False


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Be the only pipeline in this checkout: two with different parameters would overwrite each other's outs.

    Raises:
        UserError: another one is running here.
    """
    path = root / ".rlhf" / "workspace.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{root}: another run (process {file.read().strip() or 'unknown'}) works in this checkout; "
                "wait for it, or use a second clone"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
