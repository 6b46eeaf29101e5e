"""What Prefect, MLflow, DVC and Hugging Face read from the environment when they are imported: set it before that."""

import logging
import os
from pathlib import Path

# Nothing phones home. (DVC's daily look for a new version has no variable: `core.check_update` in .dvc/config.)
PRIVATE = {
    "DO_NOT_TRACK": "true",  # MLflow takes "true" only; Prefect's client and huggingface_hub take it too
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",  # any value counts
    "ITERATIVE_DO_NOT_TRACK": "1",  # gto, which comes with DVC
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

# Quiet for what is harmless. Errors, and Prefect's and our own warnings, still show.
QUIET = {
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # our modules also log outside a flow run
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # else a warning at every fork after the first use
}


# Threads that wait for each other spin for a while, then sleep. On two cores a training step took 0.27 s so and 0.82 s
# by default while one core was busy elsewhere (never spinning: 0.37 s); alone, 0.24 s so and by default (never
# spinning: 0.44 s). Read by libgomp when torch is imported.
FAST = {"GOMP_SPINCOUNT": "50000"}

# A tracking server that is gone is noticed after 14 s, not after 4 minutes, and one that accepts and never answers
# after 2 minutes: the run goes on without it, and what it missed is recorded by the next one.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def configure_libraries() -> None:
    """Set what MLflow, DVC, Hugging Face and torch read on import. What the user has set stays."""
    for name, value in {**PRIVATE, **QUIET, **FAST, **IMPATIENT}.items():
        os.environ.setdefault(name, value)
    # What it retries is said in the end, in a sentence.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # Prefect gives its extra loggers a handler, but not a level: they would stay at the root's WARNING.
    logging.getLogger("rlhf_tasks").setLevel(logging.INFO)


def configure_prefect(state: Path) -> None:
    """Set what Prefect reads on import, for a run of a project whose folder `.rlhf` is `state`. What the user has set
    stays.

    A worker runs deployments with the user's own settings, and with those of prefect.toml.
    """
    state = state.resolve()  # relative paths would follow the working folder
    ours = {
        "PREFECT_HOME": str(state / "prefect"),  # its database and profiles belong to the project, not to the user
        "PREFECT_LOCAL_STORAGE_PATH": str(state / "results"),
    }
    # The handler's level, not PREFECT_LOGGING_LEVEL, which would keep INFO from the server too. Who sets the latter
    # wants to see it.
    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        ours["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "WARNING"
    for name, value in ours.items():
        os.environ.setdefault(name, value)
    # The server on this machine is not reached through a proxy.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if "127.0.0.1" not in direct:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (direct, "127.0.0.1")))
