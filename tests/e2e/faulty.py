"""`rlhf`, killed with its whole process group at a named point: `python faulty.py POINT run ...`, in a checkout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.getcwd())  # the checkout's own code, as `rlhf` there runs it

from flows import cli
from rlhf_tasks import ppo_stage, registry, training, versioning
from rlhf_tasks.store import Store


def die(*_: object, **__: object) -> Any:
    os.killpg(0, signal.SIGKILL)


def after(original: Callable[..., Any], due: Callable[..., bool]) -> Callable[..., Any]:
    """The function, and death when it has done what is due."""

    def done(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if due(*arguments, **named):
            die()
        return result

    return done


def middle_of_an_sft_epoch() -> None:
    """The third state of unfinished training has been written."""
    training.next_save = lambda *_: 0.0
    training.save_training_state = after(
        training.save_training_state, lambda partial, model, optimizer, step: step == 3
    )


def middle_of_writing_a_state() -> None:
    """Actor and Critic are there, their optimizers are not."""
    ppo_stage.save_file = die


def between_writing_and_recording() -> None:
    """The second iteration is in the store; neither Prefect nor MLflow has heard of it."""
    Store.commit = after(  # type: ignore[method-assign]
        Store.commit, lambda store, key, payload, identity, **record: identity.get("iteration") == 2
    )


def middle_of_dvc_commit() -> None:
    """DVC is writing ppo's result into its cache and its lock file."""
    original = versioning._dvc

    def dvc(root: Any, *arguments: str) -> str:
        if "commit" in arguments and "ppo" in arguments:
            subprocess.Popen([sys.executable, "-m", "dvc", *arguments], cwd=root)
            time.sleep(0.6)
            die()
        return original(root, *arguments)

    versioning._dvc = dvc


def between_version_and_alias() -> None:
    """The Actor is a version of the registered model, and not yet champion."""
    registry.promote = die


POINTS = (
    middle_of_an_sft_epoch,
    middle_of_writing_a_state,
    between_writing_and_recording,
    middle_of_dvc_commit,
    between_version_and_alias,
)

if __name__ == "__main__":
    point = sys.argv.pop(1)
    next(function for function in POINTS if function.__name__ == point)()
    cli.main()
