"""`rlhf doctor`: what can be known of a run before hours are spent on it, from params.yaml and the checkpoints.

Each check is a function that returns a finding: ok, or what to change. Those that need a model load the checkpoints of
the workspace and look at the very prompts and draws of the first PPO iteration.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from rlhf_tasks import engine, versioning
from rlhf_tasks.config import Params
from rlhf_tasks.data.batching import Batch, pad_rows
from rlhf_tasks.data.encoding import choose_template
from rlhf_tasks.data.encoding import load_tokenizer as load_base_tokenizer
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.errors import UserError
from rlhf_tasks.models import load_score_statistics, load_tokenizer, position_ids, response_logits
from rlhf_tasks.ppo.experience import Episodes, Experience, per_token, response_values
from rlhf_tasks.ppo.functional import actor_loss, gae, kl_per_token, masked_mean, response_logprobs
from rlhf_tasks.ppo.iteration import evaluate, roll_out
from rlhf_tasks.ppo.optimization import gradients
from rlhf_tasks.ppo_stage import Trainer
from rlhf_tasks.reward import Pairs, wilson_interval
from rlhf_tasks.reward_function import load_reward_function
from rlhf_tasks.seeds import permutation
from rlhf_tasks.stages import STAGES, Stage

EPISODES = 32
PAIRS = 512
#: how far float32 may be off: log-probabilities in nats, gradients relative to their norm
LOGPROB_GAP, GRADIENT_GAP = 1e-4, 1e-3
STATES = 4  # the two that are kept, the one being written, the stage's result


@dataclass(frozen=True)
class Finding:
    """What a check found; `ok` is None where it has to wait for a checkpoint."""

    name: str
    ok: bool | None
    text: str


def examine(root: Path, params: Params) -> Iterator[Finding]:
    """Every finding, as soon as it is there: of the configuration, the tokenizers, the models, the Reward."""
    fit = True
    for name, check in _BEFORE_MODELS.items():
        finding = _found(name, check, root, params)
        fit = fit and not (name in ("checkpoints", "lengths") and finding.ok is False)
        yield finding
    if not all((root / f"checkpoints/{stage}/config.json").exists() for stage in ("sft", "reward")):
        yield Finding("models", None, "no checkpoints yet: `rlhf run --until reward`, then ask again")
        return
    if not fit:
        yield Finding("models", None, "not looked at: mend the above first")
        return
    try:
        batch = FirstBatch.load(root, params)
    except Exception as error:  # whatever damaged files make their readers raise
        yield Finding("models", False, _told(error))
        return
    for name, look in _OF_MODELS.items():
        yield _found(name, look, root, batch)


def _found(name: str, check: Callable[[Path, Any], Finding], root: Path, subject: Any) -> Finding:
    """What a check finds; that it cannot look is a finding too."""
    try:
        return check(root, subject)
    except Exception as error:
        return Finding(name, False, _told(error))


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}; `rlhf run` makes it again"


# The configuration ---------------------------------------------------------------------------------------------------


def _sampling(root: Path, params: Params) -> Finding:
    on = [f"generation.{name}" for name in ("top_k", "top_p") if getattr(params.generation, name) is not None]
    if on:
        text = "what is sampled is not what ratios and KL are of; set it to null"
        return Finding("sampling", False, f"{', '.join(on)}: {text}")
    return Finding("sampling", True, "top-k and top-p are off: PPO's ratios are of what is sampled")


def _estimator(root: Path, params: Params) -> Finding:
    kind = params.ppo.kl.estimator
    if kind != "k1":
        text = f"the policy gradient of {kind} in the reward is not the KL's; use k1, unless a peer is to be matched"
        return Finding("KL estimator", False, f"ppo.kl.estimator: {text}")
    return Finding("KL estimator", True, "k1, whose policy gradient is the KL's")


def _coefficient(root: Path, params: Params) -> Finding:
    kl = params.ppo.kl
    if kl.coef == 0:
        return Finding("KL coefficient", False, "ppo.kl.coef: 0, so nothing holds the Actor near SFT; try 0.05 to 0.2")
    text = f"β is {kl.coef}" if kl.controller == "fixed" else f"β starts at {kl.coef}, towards {kl.target} nats"
    return Finding("KL coefficient", True, text)


def _device(root: Path, params: Params) -> Finding:
    runtime, cores = params.runtime, len(os.sched_getaffinity(0))
    if runtime.device == "cuda":
        found = torch.cuda.is_available()
        text = torch.cuda.get_device_name() if found else "runtime.device: cuda, but torch sees no GPU; set it to cpu"
        return Finding("device", found, text)
    if runtime.threads > cores:
        return Finding("device", False, f"runtime.threads: {runtime.threads}, but this process has {cores} cores")
    return Finding("device", True, f"cpu, {runtime.threads} of {cores} cores")


def _evaluation_prompts(root: Path, params: Params) -> Finding:
    count, heldout = params.evaluate.prompts, root / "data/prepared/prompts/heldout.arrow"
    if not heldout.exists():
        return Finding("evaluation", None, f"{count} held-out prompts, if prepare finds as many")
    have = len(TokenColumn(read_table(heldout), "input_ids"))
    if count > have:
        return Finding("evaluation", False, f"evaluate.prompts: {count}, but there are {have} held-out prompts")
    if count < 100:
        text = f"{count}, so a gain is known to about ±{2 / count**0.5:.2f} sd; take 400 or more if there are"
        return Finding("evaluation", False, f"evaluate.prompts: {text}")
    return Finding("evaluation", True, f"{count} held-out prompts")


def _checkpoints(root: Path, params: Params) -> Finding:
    """Whether SFT and Reward are those of the present parameters, data and code."""
    workspace = engine.Workspace(root, params)
    engine.check_sources(params, root, [STAGES["prepare"], STAGES["sft"]])
    stages = [STAGES[name] for name in ("sft", "reward")]
    if not all((root / f"checkpoints/{stage.name}").exists() for stage in stages):
        return Finding("checkpoints", None, "there are none yet")
    for stage in stages:
        job = engine.plan(workspace, stage)
        entry = workspace.store.find(job.key)
        if not (entry and engine.exported(workspace, entry)) and not _vouched(workspace, stage):
            text = f"checkpoints/{stage.name} is of other parameters, data or code; `rlhf run --until reward` first"
            return Finding("checkpoints", False, text)
    return Finding("checkpoints", True, "SFT and Reward are those of params.yaml, data and code")


def _vouched(workspace: engine.Workspace, stage: Stage) -> bool:
    """Whether dvc.lock says so, as in a clone that pulled."""
    try:
        return engine.adoptable(workspace, stage) and stage.name not in versioning.outdated_stages(workspace.root)
    except UserError:  # no DVC here
        return False


def _lengths(root: Path, params: Params) -> Finding:
    data, sft = params.data, root / "checkpoints/sft"
    longest = data.max_prompt_tokens + max(params.generation.max_new_tokens, data.max_response_tokens)
    folder = sft if sft.exists() else root / params.model.base
    if not folder.exists():
        return Finding("lengths", None, f"prompt and response have at most {longest} tokens")
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    have = getattr(settings, "max_position_embeddings", None)
    if have is not None and longest > have:
        text = f"prompt and response may have {longest} tokens, the model has {have} positions"
        return Finding("lengths", False, f"{text}; lower data.max_prompt_tokens or generation.max_new_tokens")
    return Finding("lengths", True, f"prompt and response have at most {longest} tokens, the model {have} positions")


class _Words:
    """Stands in for a tokenizer where only texts are wanted: a row is its own text."""

    def batch_decode(self, rows: list[list[str]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(row) for row in rows]


def _reward_function(root: Path, params: Params) -> Finding:
    """That it can be imported and called, before there is any model."""
    score = load_reward_function(params.reward_function, _Words())
    if score is None:
        return Finding("reward function", True, "none is named")
    prompts: Any = [["The", "film", "is"], ["A", "film"]]
    responses: Any = [["good", "!"], ["that", "is", "bad"]]
    first, again = (score(prompts, responses).tolist() for _ in range(2))
    if first != again:
        text = f"{params.reward_function.name}: other scores for the same texts, so no run could be made again"
        return Finding("reward function", False, text)
    return Finding("reward function", True, f"{params.reward_function.name}: scores two texts {first}")


# Tokenizers ----------------------------------------------------------------------------------------------------------

_WAITS = "prepare trains the tokenizer: `rlhf run --until prepare`, then ask again"


def _tokenizer_folders(root: Path) -> list[Path]:
    folders = (root / f"checkpoints/{name}" for name in ("sft", "reward", "actor", "critic"))
    return [folder for folder in folders if folder.exists()]


def _tokenizer(root: Path, params: Params) -> Any:
    """SFT's, or, before SFT, the base model's; None where it has still to be trained."""
    if folders := _tokenizer_folders(root):
        return load_tokenizer(folders[0])
    return None if params.model.base == "scratch" else load_base_tokenizer(root / params.model.base)


def _pad_and_eos(root: Path, params: Params) -> Finding:
    if (tokenizer := _tokenizer(root, params)) is None:
        return Finding("pad and EOS", None, _WAITS)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        text = f"pad is {pad}, EOS is {eos}: with one token for both, no answer learns to end; give it a pad token"
        return Finding("pad and EOS", False, text)
    return Finding("pad and EOS", True, f"two tokens: {tokenizer.pad_token!r} and {tokenizer.eos_token!r}")


def _template(root: Path, params: Params) -> Finding:
    if (tokenizer := _tokenizer(root, params)) is None:
        return Finding("template", None, _WAITS)
    template = choose_template(params.data.template, tokenizer)
    if tokenizer.chat_template and template != "chat":
        text = "data.template: the tokenizer has a chat template that is not used; set it to chat or auto"
        return Finding("template", False, text)
    return Finding("template", True, f"prompts are written with {template}")


def _one_tokenizer(root: Path, params: Params) -> Finding:
    folders = _tokenizer_folders(root)
    if len(folders) < 2:
        return Finding("one tokenizer", None, "the four models are not there yet")
    different = [f.name for f in folders[1:] if _vocabulary(f) != _vocabulary(folders[0])]
    if different:
        text = f"checkpoints/{different[0]} has another tokenizer than {folders[0].name}; run `rlhf run` again"
        return Finding("one tokenizer", False, text)
    return Finding("one tokenizer", True, f"the same in {', '.join(f.name for f in folders)}")


def _vocabulary(folder: Path) -> tuple[Any, ...]:
    tokenizer = load_tokenizer(folder)
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    return whole, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template


# The models, on the first iteration's own episodes -------------------------------------------------------------------


@dataclass(frozen=True)
class FirstBatch:
    """The four models before the first update, and what they make of the first prompts."""

    params: Params
    trainer: Trainer
    tokenizer: Any
    episodes: Episodes
    experience: Experience

    @classmethod
    def load(cls, root: Path, params: Params) -> FirstBatch:
        """From the SFT and Reward checkpoints of the workspace, whatever the Actor has learned since."""
        trainer = Trainer.load(
            seed=params.seed,
            runtime=params.runtime,
            generation=params.generation,
            reward_function=params.reward_function,
            ppo=params.ppo,
            prompts=root / "data/prepared/prompts",
            sft=root / "checkpoints/sft",
            reward=root / "checkpoints/reward",
            parent=None,
        )
        state, fixed = trainer.state, trainer.fixed
        count = min(EPISODES, params.ppo.batch, len(fixed.prompts))
        episodes = roll_out(state, fixed, count, params.seed)
        experience, _ = evaluate(state, fixed, params.ppo, episodes)
        return cls(params, trainer, load_tokenizer(root / "checkpoints/sft"), episodes, experience)

    def logprobs(self, micro_batch_tokens: int) -> Tensor:
        """The Actor's own, `[B, T]`, by forward passes over micro-batches of this size."""

        def measure(batch: Batch) -> tuple[Tensor, ...]:
            logits = response_logits(self.actor, batch.input_ids, batch.attention_mask, batch.tokens.shape[1])
            return (response_logprobs(logits, batch.tokens, self.params.generation.temperature),)

        return self.over(measure, self.episodes, micro_batch_tokens)

    def over(self, measure: Callable[[Batch], tuple[Tensor, ...]], episodes: Episodes, tokens: int) -> Tensor:
        """What `measure` gives for every response token, `[B, T]`."""
        (result,) = per_token(measure, episodes, tokens, self.pad_id, self.experience.mask.device)
        return result

    @property
    def actor(self) -> Any:
        return self.trainer.state.actor.model

    @property
    def pad_id(self) -> int:
        return self.trainer.fixed.sampling.pad_id


def _prompts(root: Path, batch: FirstBatch) -> Finding:
    have, ppo = len(batch.trainer.fixed.prompts), batch.params.ppo
    if ppo.batch > have:
        return Finding("prompts", False, f"ppo.batch: {ppo.batch}, but there are {have} prompts; lower it or add some")
    passes = ppo.batch * ppo.iterations / have
    return Finding("prompts", True, f"{have}; {ppo.iterations} iterations of {ppo.batch} are {passes:.2g} passes")


def _disk(root: Path, batch: FirstBatch) -> Finding:
    models = (batch.actor, batch.trainer.state.critic.model)
    state = sum(3 * 4 * p.numel() for model in models for p in model.parameters())  # weights and two moments, float32
    free = shutil.disk_usage(root).free
    text = f"{STATES * state / 1e9:.2g} GB for states of PPO, {free / 1e9:.2g} GB free"
    return Finding("disk", free > STATES * state, text if free > STATES * state else f"{text}: make room")


def _dropout(root: Path, batch: FirstBatch) -> Finding:
    models = {"Actor": batch.actor, "Critic": batch.trainer.state.critic.model}
    models |= {"Ref": batch.trainer.fixed.ref, "Reward": batch.trainer.fixed.reward}
    active = [name for name, model in models.items() if any(module.training for module in model.modules())]
    one, other = batch.logprobs(4096), batch.logprobs(4096)
    if not one.isfinite().all():
        return Finding("dropout", False, "the Actor's log-probabilities are not finite: its checkpoint is damaged")
    if active or not torch.equal(one, other):
        return Finding("dropout", False, f"on in {', '.join(active) or 'Actor'}: two passes differ, so no ratio is 1")
    return Finding("dropout", True, "off in all four models: two passes agree to the bit")


@torch.no_grad()
def _decoding(root: Path, batch: FirstBatch) -> Finding:
    """Token by token with a cache, as in the rollout, against one forward pass, as in the update."""
    prompts, responses = batch.episodes.prompts, batch.episodes.responses
    device, temperature = batch.experience.mask.device, batch.params.generation.temperature
    ids, mask = (tensor.to(device) for tensor in pad_rows(prompts, batch.pad_id, left=True))
    tokens, counted = (tensor.to(device) for tensor in pad_rows(responses, batch.pad_id))
    positions, cache, found = position_ids(mask), DynamicCache(config=batch.actor.config), []
    for place in range(tokens.shape[1]):
        logits = batch.actor(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        ids, positions = tokens[:, place : place + 1], positions[:, -1:] + 1
        found.append(response_logprobs(logits, ids, temperature))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    gap = _largest(torch.cat(found, dim=1) - batch.experience.old_logprobs, counted)
    return _within("rollout", gap, LOGPROB_GAP, "nats between decoding with a cache and one forward pass")


def _padding(root: Path, batch: FirstBatch) -> Finding:
    """In a micro-batch of its own, an episode has no padding."""
    gap = _largest(batch.logprobs(1) - batch.experience.old_logprobs, batch.experience.mask)
    return _within("padding", gap, LOGPROB_GAP, "nats between an episode alone and in its batch")


def _first_step(root: Path, batch: FirstBatch) -> Finding:
    """Before the first optimizer step the policy is the one that sampled: ratio 1, nothing clipped, loss -mean(A)."""
    x, ppo = batch.experience, batch.params.ppo
    logprobs = batch.logprobs(max(1, ppo.micro_batch_tokens // 2))
    gap = _largest(logprobs - x.old_logprobs, x.mask)
    result = actor_loss(logprobs, x.old_logprobs, x.advantages, x.mask, ppo.clip)
    loss = (result.loss + masked_mean(x.advantages, x.mask)).abs().item()
    clipped = result.clip_fraction.item()
    if not (gap <= LOGPROB_GAP and clipped == 0 and loss <= LOGPROB_GAP):  # NaN is not
        text = f"|log ratio| up to {gap:.1e}, clip fraction {clipped:.2g}, policy loss off by {loss:.1e}, expected 0"
        return Finding("first step", False, f"{text}: forward passes of this model do not repeat")
    return Finding("first step", True, f"|log ratio| at most {gap:.1e}, clip fraction 0, policy loss off by {loss:.1e}")


def _reward_sum(root: Path, batch: FirstBatch) -> Finding:
    x, ppo = batch.experience, batch.params.ppo
    if ppo.whiten_rewards or ppo.kl.estimator == "full":
        return Finding("rewards", True, "whitened, or with the full KL: no plain sum to compare with")
    kl = kl_per_token(x.old_logprobs, x.ref_logprobs, ppo.kl.estimator)
    kl = torch.where(x.mask.bool(), kl, 0.0).sum(1)
    wanted = x.scores - batch.trainer.state.kl_control.coef * kl
    gap = ((x.rewards.sum(1) - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    return _within("rewards", gap, LOGPROB_GAP, "between an episode's rewards and score - β·KL")


def _returns(root: Path, batch: FirstBatch) -> Finding:
    """Without discount, a return is the sum of the rewards to come, whatever the Critic says."""
    x = batch.experience
    _, returns = gae(x.old_values, x.rewards, x.mask, gamma=1.0, lam=1.0)
    to_come = torch.where(x.mask.bool(), x.rewards.flip(1).cumsum(1).flip(1), 0.0)
    gap = ((returns - to_come).abs() / to_come.abs().clamp(min=1)).max().item()
    return _within("returns", gap, LOGPROB_GAP, "between returns at γ = λ = 1 and the rewards to come")


def _order(root: Path, batch: FirstBatch) -> Finding:
    """An episode's numbers do not depend on which others stand before it."""
    e = batch.episodes
    turned = replace(batch, episodes=Episodes(e.prompts[::-1], e.responses[::-1], e.ended[::-1]))
    tokens = batch.params.ppo.micro_batch_tokens
    gap = _largest(turned.logprobs(tokens).flip(0) - batch.experience.old_logprobs, batch.experience.mask)
    return _within("order", gap, LOGPROB_GAP, "nats between a batch and the same one backwards")


def _micro_batches(root: Path, batch: FirstBatch) -> Finding:
    """Both models' gradients of a minibatch, in one piece and in single episodes."""
    whole, cut = (_gradients(batch, tokens) for tokens in (1 << 30, 1))
    gap = ((whole - cut).norm() / whole.norm().clamp(min=1e-12)).item()
    return _within("micro-batches", gap, GRADIENT_GAP, "of the gradient's norm between one micro-batch and many")


def _gradients(batch: FirstBatch, micro_batch_tokens: int) -> Tensor:
    state, params = batch.trainer.state, batch.params
    ppo = params.ppo.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    rows, temperature = list(range(len(batch.episodes.responses))), params.generation.temperature
    gradients(rows, batch.episodes, batch.experience, state.actor, state.critic, ppo, temperature, True, batch.pad_id)
    learners = (state.actor, state.critic)
    found = torch.cat([p.grad.flatten() for m in learners for p in m.model.parameters() if p.grad is not None])
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)
    return found


def _value_and_action(root: Path, batch: FirstBatch) -> Finding:
    """V of a place must not change with the token that is chosen there."""
    prompts, responses, stopped = batch.episodes.prompts, batch.episodes.responses, batch.episodes.ended
    other = [[*r[:-1], (r[-1] + 1) % batch.actor.config.vocab_size] for r in responses]
    critic = batch.trainer.state.critic.model
    values = batch.over(lambda part: (response_values(critic, part),), Episodes(prompts, other, stopped), 4096)
    gap = _largest(values - batch.experience.old_values, batch.experience.mask)
    return _within("values", gap, LOGPROB_GAP, "between V with one last token and with another")


def _largest(difference: Tensor, mask: Tensor) -> float:
    return torch.where(mask.bool(), difference, 0.0).abs().max().item()


def _within(name: str, gap: float, limit: float, what: str) -> Finding:
    if not gap <= limit:  # NaN is not within
        text = "the numbers of this model are not to be trusted: try another version of its code or weights"
        return Finding(name, False, f"{gap:.1e} {what}, expected at most {limit:.0e}; {text}")
    return Finding(name, True, f"{gap:.1e} {what}")


# The Reward ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _reward_sign(root: Path, batch: FirstBatch) -> Finding:
    """Known pairs: what people chose has to score higher, more often than chance would have it."""
    pairs = Pairs(root / "data/prepared/pairs/heldout.arrow", batch.pad_id)
    rows = permutation(len(pairs.lengths), batch.params.seed, "doctor", "pairs")[:PAIRS]
    right = 0
    for start in range(0, len(rows), EPISODES):
        part = rows[start : start + EPISODES]
        chosen, rejected = pairs.scores(batch.trainer.fixed.reward, part, batch.experience.mask.device)
        right += int((chosen > rejected).sum())
    low, high = wilson_interval(right, len(rows))
    text = f"the chosen text scores higher in {right} of {len(rows)} held-out pairs"
    if high < 0.5:
        return Finding("reward sign", False, f"{text}: chosen and rejected are swapped in the data")
    if low <= 0.5:
        return Finding("reward sign", False, f"{text}: no better than chance; more pairs, or more reward.epochs")
    return Finding("reward sign", True, text)


def _reward_scale(root: Path, batch: FirstBatch) -> Finding:
    params = batch.params
    mean, std = load_score_statistics(root / "checkpoints/reward")
    text = f"scores of SFT answers: mean {mean:.2f}, standard deviation {std:.2f}"
    if params.ppo.score.kind == "raw" and not (0.2 < std < 5 and abs(mean) < 5 * std):
        return Finding("reward scale", False, f"{text}: β is relative to it; set ppo.score.kind to normalised")
    return Finding("reward scale", True, f"{text}; PPO sees them {params.ppo.score.kind}")


def _reward_spread(root: Path, batch: FirstBatch) -> Finding:
    settings = batch.params.reward_function
    score = load_reward_function(settings, batch.tokenizer)
    if score is None:
        return Finding("reward spread", True, "no reward function is named")
    found = score(batch.episodes.prompts, batch.episodes.responses)
    text = f"{settings.name}: from {found.min():.2f} to {found.max():.2f} on {len(found)} SFT answers"
    if found.min() == found.max():
        return Finding("reward spread", False, f"{text}: the same for all, so there is nothing to learn from it")
    return Finding("reward spread", True, text)


_BEFORE_MODELS: dict[str, Callable[[Path, Params], Finding]] = {
    "sampling": _sampling,
    "KL estimator": _estimator,
    "KL coefficient": _coefficient,
    "device": _device,
    "evaluation": _evaluation_prompts,
    "reward function": _reward_function,
    "checkpoints": _checkpoints,
    "lengths": _lengths,
    "pad and EOS": _pad_and_eos,
    "template": _template,
    "one tokenizer": _one_tokenizer,
}
_OF_MODELS: dict[str, Callable[[Path, FirstBatch], Finding]] = {
    "prompts": _prompts,
    "disk": _disk,
    "dropout": _dropout,
    "rollout": _decoding,
    "padding": _padding,
    "order": _order,
    "first step": _first_step,
    "rewards": _reward_sum,
    "returns": _returns,
    "micro-batches": _micro_batches,
    "values": _value_and_action,
    "reward sign": _reward_sign,
    "reward scale": _reward_scale,
    "reward spread": _reward_spread,
}
