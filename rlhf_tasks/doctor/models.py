"""Checks of the four models: what a run of them needs, and what holds of any PPO, on the first iteration's episodes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_tasks.doctor.finding import Finding, advice
from rlhf_tasks.doctor.first_batch import FirstBatch
from rlhf_tasks.ppo.experience import Episodes, response_values
from rlhf_tasks.ppo.functional import actor_loss, gae, kl_per_token, masked_mean
from rlhf_tasks.ppo.optimization import actor_gradient, critic_gradient, gradients
from rlhf_tasks.trunk import learning

#: how far float32 may be off: log-probabilities in nats, gradients relative to their norm
LOGPROB_GAP, GRADIENT_GAP = 1e-4, 1e-3
WHITENED_GAP = 1e-2  # the variance has 1e-8 added
STATES = 3  # the two that are kept, the one being written


def prompts(root: Path, batch: FirstBatch) -> Finding:
    have, ppo = len(batch.trainer.fixed.prompts), batch.params.ppo
    if ppo.batch > have:
        text = f"ppo.batch: {ppo.batch}, but there are {have} prompts, so an iteration has some twice"
        return advice("prompts", f"{text}; lower it, or add some")
    passes = ppo.batch * ppo.iterations / have
    return Finding("prompts", True, f"{have}; {ppo.iterations} iterations of {ppo.batch} are {passes:.2g} passes")


def disk(root: Path, batch: FirstBatch) -> Finding:
    models = (batch.actor, batch.trainer.state.critic.model)
    state = sum(3 * 4 * p.numel() for model in models for p in learning(model).values())  # with two moments, float32
    need = STATES * state + sum(4 * p.numel() for model in models for p in model.parameters())
    free = shutil.disk_usage(root).free
    text = f"{need / 1e9:.2g} GB for states of PPO and its result, {free / 1e9:.2g} GB free"
    return Finding("disk", free > need, text if free > need else f"{text}: make room")


def dropout(root: Path, batch: FirstBatch) -> Finding:
    models = {"Actor": batch.actor, "Critic": batch.trainer.state.critic.model}
    models |= {"Ref": batch.trainer.fixed.ref, "Reward": batch.trainer.fixed.reward}
    active = [name for name, model in models.items() if any(module.training for module in model.modules())]
    one, other = batch.logprobs(4096), batch.logprobs(4096)
    if not one.isfinite().all():
        return Finding("dropout", False, "the Actor's log-probabilities are not finite: its checkpoint is damaged")
    if active or not torch.equal(one, other):
        return Finding("dropout", False, f"on in {', '.join(active) or 'Actor'}: two passes differ, so no ratio is 1")
    return Finding("dropout", True, "off in all four models: two passes agree to the bit")


def decoding(root: Path, batch: FirstBatch) -> Finding:
    """Token by token with a cache, as in the rollout, against one forward pass, as in the update."""
    gap = _largest(batch.logprobs(4096) - batch.experience.old_logprobs, batch.experience.mask)
    return _within("rollout", gap, LOGPROB_GAP, "nats between decoding with a cache and one forward pass")


def neighbours(root: Path, batch: FirstBatch) -> Finding:
    """An episode's numbers do not depend on those that it shares a line with."""
    gap = _largest(batch.logprobs(1) - batch.logprobs(4096), batch.experience.mask)
    return _within("neighbours", gap, LOGPROB_GAP, "nats between an episode alone and among others")


def stop_tokens(root: Path, batch: FirstBatch) -> Finding:
    """Those of the tokenizer, of the model's generation settings and of params.yaml together."""
    stops = batch.trainer.fixed.sampling.stop_ids
    if batch.tokenizer.pad_token_id in stops:
        text = f"pad, {batch.tokenizer.pad_token_id}, is among the tokens that end a response, {list(stops)}"
        return Finding("stop tokens", False, f"{text}: mend eos_token_id in the base model's generation_config.json")
    return Finding("stop tokens", True, f"{', '.join(repr(batch.tokenizer.decode(i)) for i in stops)} end a response")


def reference(root: Path, batch: FirstBatch) -> Finding:
    """Before the first step Actor and Ref are the same model."""
    x = batch.experience
    gap = _largest(x.old_logprobs - x.ref_logprobs, x.mask)
    return _within("reference", gap, LOGPROB_GAP, "nats between Actor and Ref before the first step")


def first_step(root: Path, batch: FirstBatch) -> Finding:
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


def reward_sum(root: Path, batch: FirstBatch) -> Finding:
    x, ppo = batch.experience, batch.params.ppo
    if ppo.whiten_rewards or ppo.kl.estimator == "full":
        return Finding("rewards", True, "whitened, or with the full KL: no plain sum to compare with")
    kl = kl_per_token(x.old_logprobs, x.ref_logprobs, ppo.kl.estimator)
    wanted = torch.where(x.mask.bool(), -batch.trainer.state.kl_control.coef * kl, 0.0)
    for row, response in enumerate(batch.episodes.responses):
        wanted[row, len(response) - 1] += x.scores[row]
    gap = _relative(x.rewards - wanted, wanted)
    return _within("rewards", gap, LOGPROB_GAP, "between a token's reward and -β·KL, plus the score at the last one")


def returns(root: Path, batch: FirstBatch) -> Finding:
    """GAE's recursion on what the update will use; and without discount a return is the sum of the rewards to come."""
    x, ppo = batch.experience, batch.params.ppo

    def after(v: Tensor) -> Tensor:
        return torch.nn.functional.pad(v[:, 1:], (0, 1))

    a, v = x.raw_advantages, x.old_values * x.mask
    delta = x.rewards + ppo.gamma * after(v) - v
    gap = max(_relative(a - ppo.gamma * ppo.lam * after(a) - delta, delta), _relative(x.returns - (a + v), v))
    _, plain = gae(x.old_values, x.rewards, x.mask, gamma=1.0, lam=1.0)
    to_come = torch.where(x.mask.bool(), x.rewards.flip(1).cumsum(1).flip(1), 0.0)
    gap = max(gap, _relative(plain - to_come, to_come))
    return _within("returns", gap, LOGPROB_GAP, "between advantages and GAE's recursion, returns and what they add up")


def advantages(root: Path, batch: FirstBatch) -> Finding:
    """Whitened over the response tokens of the whole batch, and over nothing else."""
    x, counted = batch.experience, batch.experience.mask.bool()
    used, raw = x.advantages[counted], x.raw_advantages[counted]
    if not batch.params.ppo.whiten_advantages:
        return _within("advantages", _relative(used - raw, raw), LOGPROB_GAP, "between raw advantages and those used")
    spread = 1.0 if raw.max() > raw.min() else 0.0
    gap = max(abs(used.mean().item()), abs(used.std().item() - spread) if len(used) > 1 else 0.0)
    return _within("advantages", gap, WHITENED_GAP, "off mean 0 and standard deviation 1 over the response tokens")


def order(root: Path, batch: FirstBatch) -> Finding:
    """An episode's numbers do not depend on which others stand before it."""
    e = batch.episodes
    turned = replace(batch, episodes=Episodes(e.prompts[::-1], e.responses[::-1], e.ended[::-1]))
    tokens = batch.params.ppo.micro_batch_tokens
    gap = _largest(turned.logprobs(tokens).flip(0) - batch.experience.old_logprobs, batch.experience.mask)
    return _within("order", gap, LOGPROB_GAP, "nats between a batch and the same one backwards")


def micro_batches(root: Path, batch: FirstBatch) -> Finding:
    """Both models' gradients of a minibatch, in one piece and in single episodes."""
    whole, cut = (_gradients(batch, tokens) for tokens in (1 << 30, 1))
    gap = ((whole - cut).norm() / whole.norm().clamp(min=1e-12)).item()
    return _within("micro-batches", gap, GRADIENT_GAP, "of the gradient's norm between one micro-batch and many")


def _gradients(batch: FirstBatch, micro_batch_tokens: int) -> Tensor:
    state, params = batch.trainer.state, batch.params
    rows, temperature = list(range(len(batch.episodes.responses))), params.generation.temperature
    for learn in (
        partial(actor_gradient, state.actor.model, ppo=params.ppo, temperature=temperature),
        partial(critic_gradient, state.critic.model, ppo=params.ppo),
    ):
        gradients(rows, batch.episodes, batch.experience, micro_batch_tokens, learn)
    learners = (state.actor, state.critic)
    found = torch.cat([p.grad.flatten() for m in learners for p in m.model.parameters() if p.grad is not None])
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)
    return found


def value_and_action(root: Path, batch: FirstBatch) -> Finding:
    """V of a place must not change with the token that is chosen there."""
    prompts, responses, stopped = batch.episodes.prompts, batch.episodes.responses, batch.episodes.ended
    other = [[*r[:-1], (r[-1] + 1) % batch.actor.config.vocab_size] for r in responses]
    critic = batch.trainer.state.critic.model
    values = batch.over(lambda part: (response_values(critic, part),), Episodes(prompts, other, stopped), 4096)
    gap = _largest(values - batch.experience.old_values, batch.experience.mask)
    return _within("values", gap, LOGPROB_GAP, "between V with one last token and with another")


def _relative(difference: Tensor, size: Tensor) -> float:
    return (difference.abs() / size.abs().clamp(min=1)).max().item()


def _largest(difference: Tensor, mask: Tensor) -> float:
    return torch.where(mask.bool(), difference, 0.0).abs().max().item()


def _within(name: str, gap: float, limit: float, what: str) -> Finding:
    if not gap <= limit:  # NaN is not within
        text = "the numbers of this model are not to be trusted: try another version of its code or weights"
        return Finding(name, False, f"{gap:.1e} {what}, expected at most {limit:.0e}; {text}")
    return Finding(name, True, f"{gap:.1e} {what}")
