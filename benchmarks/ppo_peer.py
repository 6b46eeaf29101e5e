"""The peer's side of the race (benchmarks/ppo.py): TRL 1.12's PPOTrainer on a workload, as one JSON line.

It runs in a virtual environment of its own (peer_requirements.txt). What must be equal is: four separate models,
float32, batch, minibatches, epochs, optimizer steps, temperature 1, stop token, KL in the reward, GAE, clipped losses.
What is not: TRL clips no gradient although a limit is configured. Gradient accumulation is 1: with more, it takes fewer
optimizer steps than asked for. The time between two logged steps is an iteration; it cannot be told apart by phase.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TRANSFORMERS_VERBOSITY="error")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402
from workload import Workload  # noqa: E402  the folder of this file, not a package: TRL's environment knows no other

GIB = 2**30


class Clock(TrainerCallback):  # type: ignore[misc]
    """When training began, and when each iteration was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    workload, clock = Workload.load(given.workload, given.model), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer(workload, given.iterations, folder, clock).train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(json.dumps({"iterations": [{"total": s} for s in seconds], "peak_gib": peak}))


def trainer(workload: Workload, iterations: int, folder: str, clock: Clock) -> Any:
    """A PPOTrainer for so many iterations."""
    tokenizer = AutoTokenizer.from_pretrained(workload.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = "<|endoftext|>"
    count, texts = workload.batch * iterations, workload.prompts
    prompts = [tokenizer(texts[i % len(texts)])["input_ids"] for i in range(count)]
    data = Dataset.from_dict({"input_ids": prompts})
    settings = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=workload.batch,
        local_rollout_forward_batch_size=workload.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=workload.minibatches,
        num_ppo_epochs=workload.epochs,
        response_length=workload.response_length,
        stop_token_id=tokenizer.convert_tokens_to_ids(workload.stop_token) if workload.stop_token else None,
        total_episodes=count,
        learning_rate=workload.learning_rate,
        seed=workload.seed,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    actor, reward = models(workload, tokenizer)
    return PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=actor,
        ref_model=copy.deepcopy(actor),
        reward_model=reward,
        value_model=copy.deepcopy(reward),
        train_dataset=data,
        eval_dataset=data.select(range(workload.batch)),
        callbacks=[clock],
    )


def models(workload: Workload, tokenizer: Any) -> tuple[Any, Any]:
    """An Actor and a Reward."""
    torch.manual_seed(workload.seed)
    if workload.config:
        shape = workload.llama(tokenizer)
        actor = LlamaForCausalLM(LlamaConfig(**shape))
        reward = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **shape))
    else:
        actor = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
        reward = AutoModelForSequenceClassification.from_pretrained(workload.model, num_labels=1, dtype=torch.float32)
    for model in (actor, reward):
        model.config.pad_token_id = tokenizer.pad_token_id
    return actor, reward


if __name__ == "__main__":
    main()
