"""A workload of the race: the model, the prompts and the shape of a PPO iteration, as a JSON file says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """What both sides run.

    Attributes:
        model: a Hugging Face folder; with `config`, its tokenizer alone is used.
        config: settings of a randomly drawn Llama, in place of the folder's weights.
        prompts: texts, gone through in a circle.
        stop_token: ends a response; without one every response has `response_length` tokens.
    """

    name: str
    model: str
    batch: int
    minibatches: int
    epochs: int
    response_length: int
    learning_rate: float
    seed: int
    stop_token: str | None
    prompts: list[str]
    config: dict[str, Any] | None

    @classmethod
    def load(cls, path: Path, model: str | None = None) -> Workload:
        """Read a workload file; `model` in place of the one that it names."""
        found = json.loads(path.read_text())
        lines = (path.parent / found["prompts"]).read_text().splitlines()
        beside = path.parent / found["model"]
        return cls(
            name=found["name"],
            model=model or str(beside if beside.exists() else found["model"]),
            batch=found["batch"],
            minibatches=found["minibatches"],
            epochs=found["epochs"],
            response_length=found["response_length"],
            learning_rate=found["learning_rate"],
            seed=found["seed"],
            stop_token=found.get("stop_token"),
            prompts=[json.loads(line)["prompt"] for line in lines],
            config=found.get("config"),
        )

    @property
    def optimizer_steps(self) -> int:
        """Of each model, in an iteration."""
        return self.epochs * self.minibatches

    def llama(self, tokenizer: Any) -> dict[str, Any]:
        """Settings of the Llama that `config` describes."""
        return {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "tie_word_embeddings": True,
            **(self.config or {}),
        }
