"""Checks of params.yaml and of what lies around it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig

from rlhf_tasks import engine, keying, versioning
from rlhf_tasks.ahead import high_rates, prepared_so
from rlhf_tasks.base import check_lengths, known_positions
from rlhf_tasks.config import Params
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.doctor.finding import Finding, advice
from rlhf_tasks.errors import UserError
from rlhf_tasks.limits import check_heldout_prompts, positions
from rlhf_tasks.models import check_device
from rlhf_tasks.reward_function import try_reward_function
from rlhf_tasks.stages import STAGES, Stage
from rlhf_tasks.workspace import Workspace


def sampling(root: Path, params: Params) -> Finding:
    on = [f"generation.{name}" for name in ("top_k", "top_p") if getattr(params.generation, name) is not None]
    if on:
        text = "what is sampled is not what ratios and KL are of; set it to null"
        return advice("sampling", f"{', '.join(on)}: {text}")
    return Finding("sampling", True, "top-k and top-p are off: PPO's ratios are of what is sampled")


def estimator(root: Path, params: Params) -> Finding:
    kind = params.ppo.kl.estimator
    if kind != "k1":
        text = f"the policy gradient of {kind} in the reward is not the KL's; use k1, unless a peer is to be matched"
        return advice("KL estimator", f"ppo.kl.estimator: {text}")
    return Finding("KL estimator", True, "k1, whose policy gradient is the KL's")


def coefficient(root: Path, params: Params) -> Finding:
    kl = params.ppo.kl
    if kl.coef == 0:
        return advice("KL coefficient", "ppo.kl.coef: 0, so nothing holds the Actor near SFT; try 0.05 to 0.2")
    text = f"β is {kl.coef}" if kl.controller == "fixed" else f"β starts at {kl.coef}, towards {kl.target} nats"
    return Finding("KL coefficient", True, text)


def schedule(root: Path, params: Params) -> Finding:
    """That the Actor learns, and for as long as there are iterations."""
    ppo = params.ppo
    if ppo.critic_warmup >= ppo.iterations:
        text = f"ppo.critic_warmup: {ppo.critic_warmup} of {ppo.iterations} iterations, so the Actor never learns"
        return advice("schedule", f"{text}; lower it, or raise ppo.iterations")
    total = ppo.schedule.total
    if ppo.schedule.kind != "constant" and total is not None and total < ppo.iterations:
        text = f"ppo.schedule.total: the rates are 0 after {total} of {ppo.iterations} iterations"
        return advice("schedule", f"{text}; set it to {ppo.iterations}")
    return Finding("schedule", True, f"the Actor learns in {ppo.iterations - ppo.critic_warmup} iterations")


def device(root: Path, params: Params) -> Finding:
    runtime, cores = params.runtime, len(os.sched_getaffinity(0))
    if runtime.device == "cuda":
        check_device(runtime)
        return Finding("device", True, torch.cuda.get_device_name())
    if runtime.threads > cores:
        text = f"runtime.threads: {runtime.threads}, but this process has {cores} cores, so it is slow; set it to that"
        return advice("device", text)
    return Finding("device", True, f"cpu, {runtime.threads} of {cores} cores")


def rates(root: Path, params: Params) -> Finding:
    if warning := high_rates(params, list(STAGES.values())):
        return advice("learning rates", warning)
    return Finding("learning rates", True, "as a model of this kind learns at")


def evaluation_prompts(root: Path, params: Params) -> Finding:
    count, heldout = params.evaluate.prompts, root / "data/prepared/prompts/heldout.arrow"
    if not (heldout.exists() and prepared_so(root, params)):
        return Finding("evaluation", None, f"{count} held-out prompts, if prepare finds as many")
    have = len(TokenColumn(read_table(heldout, ["input_ids"]), "input_ids"))
    check_heldout_prompts(count, have)
    if count < 100:
        text = f"{count}, so a gain is known to about ±{2 / count**0.5:.2f} sd; take 400 or more if there are"
        return advice("evaluation", f"evaluate.prompts: {text} (there are {have})")
    return Finding("evaluation", True, f"{count} held-out prompts")


def checkpoints(root: Path, params: Params) -> Finding:
    """Whether SFT and Reward are those of the present parameters, data and code."""
    workspace = Workspace(root, params)
    keying.check_sources(params, root, [STAGES["prepare"], STAGES["sft"]])
    stages = [STAGES[name] for name in ("sft", "reward")]
    if not all((root / f"checkpoints/{stage.name}").exists() for stage in stages):
        return Finding("checkpoints", None, "there are none yet")
    for stage in stages:
        job = keying.plan(workspace, stage)
        entry = engine.find(workspace, job)
        if not (entry and engine.exported(workspace, entry)) and not _vouched(workspace, stage, job):
            text = f"checkpoints/{stage.name} is of other parameters, data or code; `rlhf run --until reward` first"
            return advice("checkpoints", text)
    return Finding("checkpoints", True, "SFT and Reward are those of params.yaml, data and code")


def _vouched(workspace: Workspace, stage: Stage, job: keying.Job) -> bool:
    """Whether dvc.lock says so, as in a clone that pulled."""
    try:
        return engine.adoptable(workspace, job) and stage.name not in versioning.outdated_stages(workspace.root)
    except UserError:  # no DVC here
        return False


def lengths(root: Path, params: Params) -> Finding:
    data, sft, limit = params.data, root / "checkpoints/sft", params.generation.max_new_tokens
    if sft.exists():
        have = positions(AutoConfig.from_pretrained(sft, local_files_only=True, trust_remote_code=False))
    else:
        have = known_positions(params.model, root)
    check_lengths(params.model.base, have, data, limit)
    longest = f"prompt and response have at most {data.max_prompt_tokens + max(limit, data.max_response_tokens)} tokens"
    if have is None:
        return Finding("lengths", None, longest)
    return Finding("lengths", True, f"{longest}, the model {have} positions")


def reward_function(root: Path, params: Params) -> Finding:
    """That it can be imported and called, before there is any model."""
    scores = try_reward_function(params.reward_function)
    if scores is None:
        return Finding("reward function", True, "none is named")
    return Finding("reward function", True, f"{params.reward_function.name}: scores two texts {scores}")
