"""What a registered version holds: the Actor as `mlflow.transformers`, the Reward as a pyfunc from code; no pickle.

MLflow's `log_model` takes server and experiment from globals that all threads share; here ids are explicit.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from rlhf_tasks.errors import UserError, without_secrets

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature

    from rlhf_tasks import config
    from rlhf_tasks.model_card import Facts
    from rlhf_tasks.registry import TrackingContext

CARD = "model_card.md"
SCORE_MODEL = Path(__file__).with_name("score_model.py")
CHAT = "llm/v1/chat"


def log_model(
    name: str,
    kind: str,
    *,
    uri: str,
    run_id: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    save: Callable[[Path, Model], None],
) -> int:
    """Log a model of a run and register it as a new version, with tags. Returns the version.

    Args:
        kind: MLflow's word for what it does.
        params, metrics: what MLflow shows with the model.
        save: writes the folder that becomes its artifacts; MLflow's description of it has the right ids.
    """
    client = MlflowClient(uri)
    tags, params = dict(tags), {key: str(value) for key, value in params.items()}
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name, run_id, tags, params, kind)
    try:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / "model", _description(logged, run_id))
            client.log_model_artifacts(logged.model_id, f"{folder}/model")
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    now = time.time_ns() // 1_000_000
    points = [Metric(key, value, now, 0, model_id=logged.model_id) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=points)
    _ensure_model(client, name)
    # The source `models:/m-…` would be looked up on the global server; the tag is the link that it would have made.
    source, model_id = logged.artifact_location, logged.model_id
    version = int(client.create_model_version(name, source, run_id, tags, model_id=model_id).version)
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([{"name": name, "version": version}])})
    return version


def save_actor(
    actor: Path,
    folder: Path,
    description: Model,
    *,
    generation: config.Generation,
    card: str,
    facts: Facts,
    tracking: TrackingContext,
) -> None:
    """Write the Actor as `mlflow.transformers` has it.

    It goes in as a path: nothing loads its weights, so neither memory nor a warning is spent on it. Where it was
    trained with a template, its task is chat, and its tokenizer has that template.
    """
    import mlflow.transformers
    from huggingface_hub import ModelCard

    settings, chats, example = _generation_settings(actor, generation), facts.template != "none", tracking.example
    options: dict[str, Any] = {"return_full_text": False, "clean_up_tokenization_spaces": False}
    if chats:
        options["add_special_tokens"] = False  # the template has them
    mlflow.transformers.save_model(
        str(actor.resolve()),
        str(folder),
        task=CHAT if chats else "text-generation",
        signature=None if chats else _signature(settings),  # MLflow has its own for chat
        input_example={"messages": [{"role": "user", "content": example}]} if chats else [example],
        pip_requirements=_requirements("torch", "transformers"),
        model_config=options,
        model_card=ModelCard(card),
        mlflow_model=description,
    )
    # mlflow takes the folder for a Hub repository and writes where its licence should be looked for.
    (folder / "LICENSE.txt").unlink(missing_ok=True)
    _replace(folder / "model/generation_config.json", json.dumps(settings, indent=2) + "\n")
    for tokenizer in ("model", "components/tokenizer") if chats else ():
        _replace(folder / tokenizer / "chat_template.jinja", facts.chat_template)


def save_reward(
    reward: Path, folder: Path, description: Model, *, card: str, facts: Facts, tracking: TrackingContext
) -> None:
    """Write the Reward as a pyfunc whose code is score_model.py, and whose checkpoint is the folder as it is."""
    import mlflow.pyfunc

    statistics = json.loads((reward / "score_statistics.json").read_text())
    settings = {"template": facts.template, "chat_template": facts.chat_template}
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(SCORE_MODEL),
        artifacts={"checkpoint": str(reward.resolve())},
        signature=_score_signature(),
        input_example=[{"prompt": tracking.example, "response": " good."}],
        pip_requirements=_requirements("mlflow", "torch", "transformers"),
        model_config=settings | {"mean": statistics["mean"], "std": statistics["std"]},
        mlflow_model=description,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def fetch_actor(name: str, version: int, uri: str, target: Path) -> Path:
    """The Actor's Hugging Face folder of a version: where it lies, or, from elsewhere, copied below `target`.

    Raises:
        UserError: it cannot be read.
    """
    import mlflow.artifacts

    source = MlflowClient(uri).get_model_version_download_uri(name, str(version))
    here = None if source.startswith("file:") else str(target)
    try:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=f"{source}/model", dst_path=here, tracking_uri=uri)
    except Exception as error:  # every kind of artifact store has its own
        reason = without_secrets(" ".join(str(error).split()))[:200] or type(error).__name__
        raise UserError(
            f"models:/{name}/{version}: its files cannot be read ({reason}); make the place that the server keeps them "
            "in reachable, then try again"
        ) from None
    return Path(folder)


def _description(logged: Any, run_id: str) -> Model:
    from mlflow.models import Model

    return Model(
        artifact_path=logged.artifact_location, model_uuid=logged.model_id, model_id=logged.model_id, run_id=run_id
    )


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # a copy of a read-only file
    path.write_text(text, encoding="utf-8")


def _generation_settings(actor: Path, generation: config.Generation) -> dict[str, Any]:
    """A generation_config.json that samples as training did: the Actor's special tokens, our way of drawing.

    `top_k: 0` must be said: left out, transformers cuts to the 50 likeliest tokens.
    """
    path = actor / "generation_config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    settings = {name: value for name, value in found.items() if name.endswith("_token_id")}
    if generation.stop is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(actor, local_files_only=True, trust_remote_code=False)
        own = settings.get("eos_token_id", tokenizer.eos_token_id)
        stop = tokenizer.encode(generation.stop, add_special_tokens=False)
        settings["eos_token_id"] = sorted({*(own if isinstance(own, list) else [own]), *stop} - {None})
    return settings | {
        "do_sample": True,
        "temperature": generation.temperature,
        "top_k": generation.top_k or 0,
        "top_p": 1.0 if generation.top_p is None else generation.top_p,
        "max_new_tokens": generation.max_new_tokens,
    }


def _signature(settings: Mapping[str, Any]) -> ModelSignature:
    """Text in, text out, and the generation parameters that a caller may set; without it MLflow ignores them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {"max_new_tokens": "long", "do_sample": "boolean", "temperature": "double", "top_k": "long"}
    params = [ParamSpec(name, kind, settings[name]) for name, kind in (kinds | {"top_p": "double"}).items()]
    text = Schema([ColSpec("string")])
    return ModelSignature(text, text, ParamSchema(params))


def _score_signature() -> ModelSignature:
    """Prompts and responses in, scores out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    texts = Schema([ColSpec("string", "prompt"), ColSpec("string", "response")])
    scores = Schema([ColSpec("double", "score"), ColSpec("double", "normalised")])
    return ModelSignature(texts, scores, ParamSchema([ParamSpec("ended", "boolean", True)]))


def _requirements(*libraries: str) -> list[str]:
    """What using the model needs, pinned; a local suffix such as `+cpu` is on no index."""
    return [f"{library}=={installed_version(library).partition('+')[0]}" for library in libraries]


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
