"""PPO finds the optimum where it is known.

The best policy of the KL-regularised objective J(π) = E[r(x, y)] - β·KL(π ‖ π_ref) is
π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β) (Ziegler et al. 2019, section 2; Rafailov et al. 2023, eq. 4), with
J* = β·E_x log Σ_y π_ref(y|x)·exp(r(x, y)/β). On five tokens and three places all 85 responses to a prompt can be
enumerated, so everything below is exact, not sampled.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_tasks import config
from rlhf_tasks.models import freeze
from rlhf_tasks.ppo.experience import (
    Episodes,
    per_token,
    policy_measures,
    response_masks,
    response_scores,
    response_values,
)
from rlhf_tasks.ppo.functional import AdaptiveKL, FixedKL
from rlhf_tasks.ppo.iteration import Fixed, PPOState, iterate
from rlhf_tasks.ppo.optimization import Learner
from rlhf_tasks.ppo.rollout import Sampling
from rlhf_tasks.training import adamw

VOCABULARY, PLACES, EOS, PAD = 5, 3, 1, 0
PROMPTS = [[2], [3, 3], [4, 2], [0, 3, 4]]  # no prompt begins another: the Actor could not tell where an answer began


def all_responses() -> list[list[int]]:
    """Every response: up to and including the first EOS, or as long as may be."""
    found = []
    for length in range(1, PLACES + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == PLACES):
                found.append(list(tokens))
    return found


RESPONSES = all_responses()


@dataclass(frozen=True)
class Bandit:
    """Models of 5 tokens: an Actor to train, and a Reward whose scores differ by about 1."""

    ref: Any
    reward: Any
    critic: Any

    def every(self, measure: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A measure of every response's tokens: sums `[prompts, responses]`, values and mask `[pairs, T]`."""
        pairs = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]
        episodes = Episodes([p for p, _ in pairs], [r for _, r in pairs], [r[-1] == EOS for _, r in pairs])
        (values,) = per_token(lambda batch: (measure(batch),), episodes, 4096, torch.device("cpu"))
        mask = response_masks(episodes)
        return (values * mask).sum(1).double().view(len(PROMPTS), -1), values, mask

    @staticmethod
    def logprobs_of(actor: Any) -> Any:
        return lambda batch: policy_measures(actor, batch, 1.0)[0]

    def log_policy(self, actor: Any) -> Tensor:
        return self.every(self.logprobs_of(actor))[0]

    def scores(self) -> Tensor:
        _, values, mask = self.every(lambda batch: response_scores(self.reward, batch))
        last = values.gather(1, mask.sum(1, keepdim=True) - 1)
        return last.double().view(len(PROMPTS), -1)


@pytest.fixture(scope="module")
def bandit() -> Bandit:
    assert len(RESPONSES) == 85
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": PAD, "initializer_range": 0.3}
        settings = LlamaConfig(**shape, **heads, bos_token_id=None, eos_token_id=EOS)
        ref, reward = LlamaForCausalLM(settings), LlamaForSequenceClassification(_one_label(settings))
        critic = LlamaForSequenceClassification(_one_label(settings))
    bandit = Bandit(freeze(ref), freeze(reward), critic.eval())
    with torch.no_grad():
        reward.score.weight /= bandit.scores().std()
        critic.score.weight.zero_()
    return bandit


def _one_label(settings: LlamaConfig) -> LlamaConfig:
    settings = copy.deepcopy(settings)
    settings.num_labels = 1
    return settings


def train(
    bandit: Bandit, kl: FixedKL | AdaptiveKL, iterations: int = 100, **settings: Any
) -> tuple[Any, Any, list[dict[str, float]]]:
    """Run PPO with learning rates that fall to 0. Returns Actor, Critic and the metrics of every iteration."""
    ppo = config.PPO(
        batch=512,
        epochs=2,
        minibatches=4,
        micro_batch_tokens=8192,
        actor_learning_rate=2e-3,
        critic_learning_rate=3e-3,
        schedule=config.Schedule(kind="cosine", total=iterations),
        lam=1.0,
        value_clip=None,
        whiten_advantages=False,  # at the optimum advantages are 0, and whitening would blow up what noise is left
        kl=config.KL(estimator=settings.pop("estimator", "k1")),
        score=config.Score(kind="raw"),
        **settings,
    )
    actor, critic = copy.deepcopy(bandit.ref).requires_grad_(True), copy.deepcopy(bandit.critic)
    state = PPOState(
        actor=Learner(actor, adamw(actor.parameters(), 1.0)),
        critic=Learner(critic, adamw(critic.parameters(), 1.0)),
        kl_control=kl,
    )
    sampling = Sampling(length=PLACES, temperature=1.0, top_k=None, top_p=None, stop_ids=(EOS,))
    fixed = Fixed(bandit.ref, bandit.reward, PROMPTS, sampling, (0.0, 1.0))
    return actor, critic, [iterate(state, fixed, ppo, seed=0)[0] for _ in range(iterations)]


@dataclass(frozen=True)
class Distance:
    """How far a policy is from the best one, by enumeration; means over prompts."""

    total_variation: float
    regret: float  # β·KL(π ‖ π*), which is J* - J(π)
    best: float  # J*
    kl: tuple[float, float]  # to Ref: the policy's, the best one's
    reward: tuple[float, float]


def distance(bandit: Bandit, actor: Any, beta: float) -> Distance:
    log_pi, log_ref, r = bandit.log_policy(actor), bandit.log_policy(bandit.ref), bandit.scores()
    assert torch.allclose(log_ref.exp().sum(1), torch.ones(len(PROMPTS), dtype=torch.double), atol=1e-5)
    tilted = log_ref + r / beta
    log_z = tilted.logsumexp(1, keepdim=True)
    log_best = tilted - log_z
    pi, best = log_pi.exp(), log_best.exp()
    return Distance(
        total_variation=((pi - best).abs().sum(1) / 2).mean().item(),
        regret=beta * (pi * (log_pi - log_best)).sum(1).mean().item(),
        best=beta * log_z.mean().item(),
        kl=tuple((p * (log_p - log_ref)).sum(1).mean().item() for p, log_p in ((pi, log_pi), (best, log_best))),
        reward=tuple((p * r).sum(1).mean().item() for p in (pi, best)),
    )


def explained_by(critic: Any, bandit: Bandit, actor: Any, beta: float) -> float:
    """Share of the variance of E[return | prompt, prefix] under the policy that the Critic's values explain."""
    _, pi, mask = bandit.every(bandit.logprobs_of(actor))
    _, ref, _ = bandit.every(bandit.logprobs_of(bandit.ref))
    _, values, _ = bandit.every(lambda batch: response_values(critic, batch))
    likely = (pi * mask).sum(1).exp()
    to_come = ((pi - ref) * mask).flip(1).cumsum(1).flip(1)
    returns = bandit.scores().view(-1, 1) - beta * to_come
    texts = [(i, *response) for i in range(len(PROMPTS)) for response in RESPONSES]
    rows = [
        (text[: 1 + t], likely[row].item(), returns[row, t].item(), values[row, t].item())
        for row, text in enumerate(texts)
        for t in range(len(text) - 1)
    ]
    expected: dict[tuple[int, ...], list[float]] = {}
    for prefix, weight, total, value in rows:
        sums = expected.setdefault(prefix, [0.0, 0.0, value])
        sums[0] += weight
        sums[1] += weight * total
    weights, totals, found = torch.tensor(list(expected.values()), dtype=torch.double).T
    true, weights = totals / weights, weights / weights.sum()

    def variance(x: Tensor) -> Tensor:
        return (weights * (x - (weights * x).sum()).square()).sum()

    return 1 - (variance(true - found) / variance(true)).item()


@pytest.mark.parametrize("beta", [0.5, pytest.param(0.8, marks=pytest.mark.slow)])
def test_the_best_policy_is_reached(bandit: Bandit, beta: float) -> None:
    actor, critic, _ = train(bandit, FixedKL(beta))
    found = distance(bandit, actor, beta)
    print(found)
    assert found.total_variation <= 0.05
    assert found.regret <= 0.01 * abs(found.best) + 0.01
    assert found.kl[0] == pytest.approx(found.kl[1], rel=0.05)
    assert found.reward[0] == pytest.approx(found.reward[1], rel=0.05)
    assert explained_by(critic, bandit, actor, beta) > 0.9


def test_k2_in_the_reward_misses_it(bandit: Bandit) -> None:
    """Its policy gradient is another objective's: this is why k1 is the default."""
    actor, *_ = train(bandit, FixedKL(0.5), 50, estimator="k2")
    found = distance(bandit, actor, 0.5)
    print(found)
    assert found.total_variation > 0.15
    assert found.regret > 0.02 * abs(found.best) + 0.02


def test_an_adaptive_coefficient_settles_at_its_target(bandit: Bandit) -> None:
    target = 0.4
    actor, _, metrics = train(bandit, AdaptiveKL(0.3, target, horizon=2000), 60)
    log_pi, log_ref = bandit.log_policy(actor), bandit.log_policy(bandit.ref)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum(1).mean().item()
    last = [m["objective/kl"] for m in metrics[-10:]]
    print(exact, last)
    assert exact == pytest.approx(target, rel=0.1)
    assert sum(last) / len(last) == pytest.approx(target, rel=0.1)
