"""The Reward as an MLflow model: this file is copied into every version and run there, so it stands alone.

It needs mlflow, torch and transformers, reads safetensors and JSON, and writes texts for the Reward as training did:
prompt and response tokenized apart and joined, special tokens in them broken, EOS where the response ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROWS = 16  # of a batch


class Reward(PythonModel):
    """Scores of responses to prompts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint; `context.model_config` has how prompts are written and how SFT's answers score."""
        folder, self.settings = context.artifacts["checkpoint"], dict(context.model_config)
        options = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        self.tokenizer.chat_template = self.settings["chat_template"]
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, num_labels=1, **options
        ).eval()
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        strings = sorted((s for s in special if len(s) > 1), key=lambda s: (-len(s), s))
        self.special = re.compile("|".join(map(re.escape, strings)) or "(?!)")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """A `score` for each row's `prompt` and `response`, and the same `normalised` by SFT's mean and deviation."""
        ended = bool((params or {}).get("ended", True))
        pairs = zip(model_input["prompt"], model_input["response"], strict=True)
        rows = [self.encode(prompt, response, ended) for prompt, response in pairs]
        self.check_room(rows)
        scores = self.score(rows)
        normalised = [(score - self.settings["mean"]) / self.settings["std"] for score in scores]
        return pd.DataFrame({"score": scores, "normalised": normalised})

    def encode(self, prompt: str, response: str, ended: bool) -> list[int]:
        """The tokens of a prompt, written by the template, and of its response."""
        asked = [{"role": "user", "content": self.special.sub(self.broken, prompt)}]
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        lead = " " if self.settings["template"] == "transcript" else ""
        answer = self.tokenizer(lead + response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, *answer, *([self.tokenizer.eos_token_id] if ended else [])]

    def check_room(self, rows: list[list[int]]) -> None:
        """Raises an MlflowException, which a server answers with 400, for a row that is longer than the model."""
        have = getattr(self.model.config, "max_position_embeddings", None)
        for number, row in enumerate(rows, start=1):
            if have is not None and len(row) > have:
                problem = f"row {number}: found {len(row)} tokens, expected at most {have}, the model's positions"
                raise MlflowException.invalid_parameter_value(f"{problem}; shorten its prompt or its response")

    @staticmethod
    def broken(match: re.Match[str]) -> str:
        """A special token that somebody typed, as characters: with a zero-width space in it."""
        return f"{match[0][0]}\u200b{match[0][1:]}"

    @torch.inference_mode()
    def score(self, rows: list[list[int]]) -> list[float]:
        """The head's output at each row's last token; padded on the right, where no position moves."""
        scores: list[float] = []
        for batch in self.batches(rows):
            longest = max(map(len, batch))
            pad = self.tokenizer.pad_token_id
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
            scores += self.model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
        return scores

    @staticmethod
    def batches(rows: list[list[int]]) -> Iterable[list[list[int]]]:
        """The rows, some at a time."""
        return (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


set_model(Reward())
