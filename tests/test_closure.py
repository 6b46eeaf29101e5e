"""Import closures, and who may import what."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_tasks import closure
from rlhf_tasks.closure import foreign_sources, import_closure, libraries_of, user_closure
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import STAGES

REPOSITORY = Path(__file__).resolve().parent.parent
TRAINING = ("rlhf_tasks.sft", "rlhf_tasks.reward", "rlhf_tasks.ppo_stage", "rlhf_tasks.evaluate")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty package in the place of ours."""
    monkeypatch.setattr(closure, "SOURCE_ROOT", tmp_path)
    import_closure.cache_clear()
    (tmp_path / "rlhf_tasks/ppo").mkdir(parents=True)
    for name in ("__init__", "a", "b", "c", "ppo/__init__", "ppo/d"):
        (tmp_path / f"rlhf_tasks/{name}.py").write_text("")
    yield tmp_path / "rlhf_tasks"
    import_closure.cache_clear()


def modules(name: str = "rlhf_tasks.a") -> list[str]:
    return [file.removeprefix("rlhf_tasks/").removesuffix(".py") for file in import_closure(name)]


@pytest.mark.parametrize(
    ("code", "reached"),
    [
        ("import json, torch\nfrom collections import abc", []),
        ("import rlhf_tasks.b", ["b"]),
        ("from rlhf_tasks.b import f", ["b"]),
        ("from rlhf_tasks import b, c as d", ["b", "c"]),
        ("from rlhf_tasks import VERSION", []),
        ("from rlhf_tasks.ppo import d", ["ppo/__init__", "ppo/d"]),
        ("from rlhf_tasks.ppo.d import f", ["ppo/__init__", "ppo/d"]),
        ("from rlhf_tasks.ppo import f", ["ppo/__init__"]),
        ("def f():\n    from rlhf_tasks.b import g", ["b"]),
        ("try:\n    import rlhf_tasks.b\nexcept ImportError:\n    import rlhf_tasks.c", ["b", "c"]),
        ("if TYPE_CHECKING:\n    from rlhf_tasks import b\nimport rlhf_tasks.c", ["c"]),
        ("import typing\nif typing.TYPE_CHECKING:\n    import rlhf_tasks.b", []),
        ("if TYPE_CHECKING:\n    import rlhf_tasks.b\nelse:\n    import rlhf_tasks.c", ["c"]),
        ("if not TYPE_CHECKING:\n    import rlhf_tasks.b", ["b"]),
        ("import rlhf_tasks.a", []),
    ],
)
def test_what_an_import_reaches(package: Path, code: str, reached: list[str]) -> None:
    (package / "a.py").write_text(code)
    assert modules() == sorted(["__init__", "a", *reached])


def test_a_users_module_may_have_the_name_of_a_folder(tmp_path: Path) -> None:
    """Python takes the file, unless the folder is a package."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics.py").write_text("import data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data.py").write_text("")
    assert user_closure("metrics", tmp_path) == ("data.py", "metrics.py")
    (tmp_path / "data/__init__.py").write_text("")
    assert user_closure("metrics", tmp_path) == ("data/__init__.py", "metrics.py")


def test_what_no_version_tells_apart_counts_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper on PYTHONPATH, beside a library with a version and Python's own."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/loose.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    (tmp_path / "mine.py").write_text("import json\nimport loose\nimport pytest\n")
    assert foreign_sources("mine", tmp_path) == {"loose.py": tmp_path / "elsewhere/loose.py"}
    assert libraries_of("mine", tmp_path) == {"pytest": pytest.__version__}


def test_an_expression_without_end_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = " + "+".join(["1"] * 20_000))
    with pytest.raises(UserError, match=r"mine.py:1: not readable as Python"):
        user_closure("mine", tmp_path)


def test_imports_are_followed_to_the_end_also_in_circles(package: Path) -> None:
    (package / "a.py").write_text("from rlhf_tasks.ppo.d import f")
    (package / "ppo/__init__.py").write_text("import rlhf_tasks.c")
    (package / "ppo/d.py").write_text("import rlhf_tasks.b")
    (package / "b.py").write_text("import rlhf_tasks.a")
    assert modules() == ["__init__", "a", "b", "c", "ppo/__init__", "ppo/d"]


@pytest.mark.parametrize("module", TRAINING)
def test_an_edit_of_the_machinery_retrains_nothing(module: str) -> None:
    files = import_closure(module)
    assert f"{module.replace('.', '/')}.py" in files
    assert "rlhf_tasks/models.py" in files
    machinery = ["config", "store", "engine", "keying", "workspace", "stages", "registry", "versioning", "closure"]
    assert not {f"rlhf_tasks/{name}.py" for name in machinery} & set(files)


def test_no_stage_reads_the_code_of_the_stages_after_it() -> None:
    files = {name: set(import_closure(stage.module)) for name, stage in STAGES.items()}
    assert not any(file.startswith("rlhf_tasks/ppo/iteration") for name in ("sft", "reward") for file in files[name])
    assert not any("training" in file or "/ppo" in file for file in files["prepare"])


IMPORTS_IN_TURN = """
import importlib, json, sys
loaded = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded[name] = sorted(sys.modules)
print(json.dumps(loaded))
"""


def test_training_runs_on_a_bare_machine_and_closures_miss_nothing() -> None:
    """A process that imports the training core alone: what it loads is in the closures, and no orchestration is."""
    names = ["rlhf_tasks.ppo.iteration", *TRAINING]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_IN_TURN, *names], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    expected: set[str] = set()
    for name, loaded in json.loads(done.stdout).items():
        assert {"prefect", "mlflow", "dvc"}.isdisjoint(loaded), name
        expected |= set(import_closure(name))
        assert {file_of(module) for module in loaded if module.split(".")[0] == "rlhf_tasks"} <= expected, name


def file_of(module: str) -> str:
    name = module.replace(".", "/")
    return f"{name}/__init__.py" if (REPOSITORY / name).is_dir() else f"{name}.py"


def importers(library: str) -> set[str]:
    """Files of this project that import a library, at any depth of their code."""
    found = set()
    for path in [*REPOSITORY.glob("rlhf_tasks/**/*.py"), *REPOSITORY.glob("flows/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == library for name in names):
                found.add(path.relative_to(REPOSITORY).as_posix())
    return found


def test_each_outside_system_has_its_own_room() -> None:
    rooms = ("tracking", "registry", "champion", "logged_models", "score_model")
    assert importers("mlflow") == {f"rlhf_tasks/{room}.py" for room in rooms}
    prefect = importers("prefect")
    assert prefect
    assert all(file.startswith("flows/") for file in prefect)
    assert not importers("dvc")  # it is run, not imported
    assert not importers("pickle")


@pytest.mark.parametrize("folder", ["rlhf_tasks", "rlhf_tasks/ppo", "rlhf_tasks/data"])
def test_arrows_point_one_way(folder: str) -> None:
    """flows → rlhf_tasks → (ppo, data): nothing below imports from above."""
    above = {"rlhf_tasks": ["flows"], "rlhf_tasks/ppo": ["flows"], "rlhf_tasks/data": ["flows", "rlhf_tasks.ppo"]}
    for path in (REPOSITORY / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith(tuple(above[folder])), path
