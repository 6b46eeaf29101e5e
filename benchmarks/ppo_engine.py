"""Our side of the race (benchmarks/ppo.py), in a process of its own: PPO iterations of a workload, as one JSON line."""

from __future__ import annotations

import argparse
import copy
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from benchmarks.workload import Workload
from rlhf_tasks import config
from rlhf_tasks.models import freeze, set_up_torch
from rlhf_tasks.ppo.functional import FixedKL
from rlhf_tasks.ppo.iteration import Fixed, PPOState, iterate, pick_prompts
from rlhf_tasks.ppo.optimization import Learner
from rlhf_tasks.ppo.rollout import Sampling
from rlhf_tasks.ppo_stage import save_state
from rlhf_tasks.training import adamw
from rlhf_tasks.trunk import freeze_trunk, frozen_names, learning, share_trunk

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--trainable-layers", type=int)
    given = parser.parse_args()
    set_up_torch(config.Runtime(threads=given.threads))
    workload = Workload.load(given.workload, given.model)
    state, fixed, ppo = start(workload, given.trainable_layers)
    iterations = [one(state, fixed, ppo, workload) for _ in range(given.iterations)]
    peak = peak_gib()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        save_state(Path(folder), state)
        save = time.perf_counter() - started
    print(json.dumps({"iterations": iterations, "peak_gib": peak, "save_s": save, "sizes": sizes(state)}))


def start(workload: Workload, trainable_layers: int | None) -> tuple[PPOState, Fixed, config.PPO]:
    """The four models and the settings of a workload, as its peer has them; all on one trunk, if layers are told."""
    tokenizer, rate = AutoTokenizer.from_pretrained(workload.model), workload.learning_rate
    actor, reward = models(workload, tokenizer)
    if trainable_layers:
        for model in (actor, reward):
            freeze_trunk(model, trainable_layers, "--trainable-layers")
        share_trunk(reward, actor)
    critic, ref = (copy_above_trunk(model) for model in (reward, actor))
    ppo = config.PPO(
        batch=workload.batch,
        minibatches=workload.minibatches,
        epochs=workload.epochs,
        actor_learning_rate=rate,
        critic_learning_rate=rate,
        kl=config.KL(coef=0.05),
        score=config.Score(kind="raw"),
        missing_eos=config.MissingEOS(mode="keep"),
    )
    stops = [tokenizer.convert_tokens_to_ids(workload.stop_token)] if workload.stop_token else []
    fixed = Fixed(
        ref=freeze(ref),
        reward=freeze(reward),
        prompts=[tokenizer(text)["input_ids"] for text in workload.prompts],
        sampling=Sampling(workload.response_length, 1.0, None, None, tuple(stops)),
        score_statistics=(0.0, 1.0),
    )
    learners = [Learner(model, adamw(learning(model).values(), rate)) for model in (actor, critic)]
    return PPOState(*learners, FixedKL(ppo.kl.coef)), fixed, ppo


def copy_above_trunk(model: Any) -> Any:
    """A copy on the same trunk."""
    shared = {id(weight): weight for weight in (model.get_parameter(name) for name in frozen_names(model))}
    return copy.deepcopy(model, shared)


def models(workload: Workload, tokenizer: Any) -> tuple[Any, Any]:
    """An Actor and a Reward."""
    torch.manual_seed(workload.seed)
    if workload.config:
        shape = workload.llama(tokenizer)
        actor = LlamaForCausalLM(LlamaConfig(**shape))
        return actor.eval(), LlamaForSequenceClassification(LlamaConfig(num_labels=1, **shape)).eval()
    actor = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(workload.model, num_labels=1, dtype=torch.float32)
    return actor.eval(), reward.eval()


def one(state: PPOState, fixed: Fixed, ppo: config.PPO, workload: Workload) -> dict[str, float]:
    """An iteration: its seconds by phase, its tokens, and the peak of the memory so far."""
    metrics, timings = iterate(state, fixed, ppo, workload.seed)
    response = timings["response_tokens"]
    prompts = pick_prompts(fixed.prompts, ppo.batch, workload.seed, state.iteration)
    seconds = {name.removesuffix("_seconds"): value for name, value in timings.items() if name.endswith("_seconds")}
    return seconds | {
        "prompt_tokens": sum(map(len, prompts)),
        "response_tokens": response,
        "steps": metrics["response/length_max"],
        "peak_gib": peak_gib(),
    }


def peak_gib() -> float:
    """The most memory that the process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def sizes(state: PPOState) -> dict[str, int]:
    """Weights of the Actor's layers, of those among them that learn, of its head, and all that learn in both models."""
    actor, critic = state.actor.model, state.critic.model
    embeddings, head = actor.get_input_embeddings().weight, actor.get_output_embeddings().weight
    layers = [p for p in actor.base_model.parameters() if p is not embeddings]
    return {
        "layers": sum(p.numel() for p in layers),
        "learning_layers": sum(p.numel() for p in layers if p.requires_grad),
        "head": head.numel(),
        "head_learns": int(head.requires_grad),
        "learning": sum(p.numel() for model in (actor, critic) for p in learning(model).values()),
    }


if __name__ == "__main__":
    main()
