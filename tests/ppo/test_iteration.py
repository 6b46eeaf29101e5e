"""A whole iteration: a pure function of the state before it, with finite numbers and its schedule's learning rates."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_tasks import config
from rlhf_tasks.ppo.experience import Episodes, Experience, policy_measures
from rlhf_tasks.ppo.functional import AdaptiveKL, FixedKL, LengthControl
from rlhf_tasks.ppo.iteration import (
    Fixed,
    PPOState,
    distinct_bigrams,
    iterate,
    pick_prompts,
    roll_out,
    rollout_metrics,
    schedule_factor,
    set_learning_rates,
)
from rlhf_tasks.ppo.optimization import Learner
from rlhf_tasks.ppo.rollout import Sampling, sample_responses
from rlhf_tasks.reward import score_texts
from rlhf_tasks.training import adamw, optimizer_tensors

PROMPTS = [[10 + i, 20 + i, 30][: 1 + i % 3] for i in range(10)]
SAMPLING = Sampling(length=6, temperature=0.9, top_k=None, top_p=None, stop_ids=tuple(range(1, 300, 8)))


def ppo(**settings: Any) -> config.PPO:
    small = {"batch": 12, "minibatches": 3, "epochs": 2, "micro_batch_tokens": 64}
    rates = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    return config.PPO(**(small | rates | settings))


def start(four: Any, settings: config.PPO, kl: FixedKL | AdaptiveKL | None = None) -> tuple[PPOState, Fixed]:
    """The state before the first iteration, and what stays."""
    models = copy.deepcopy(four)
    state = PPOState(
        actor=Learner(models.actor, adamw(models.actor.parameters(), settings.actor_learning_rate)),
        critic=Learner(models.critic, adamw(models.critic.parameters(), settings.critic_learning_rate)),
        kl_control=kl or FixedKL(0.05),
    )
    return state, Fixed(models.ref, models.reward, PROMPTS, SAMPLING, (0.0, 1.0))


def bits(state: PPOState) -> dict[str, Tensor]:
    """All of a state's tensors."""
    tensors: dict[str, Tensor] = {}
    for name, learner in (("actor", state.actor), ("critic", state.critic)):
        tensors |= {f"{name}.{key}": value.detach().clone() for key, value in learner.model.state_dict().items()}
        tensors |= {key: value.clone() for key, value in optimizer_tensors(learner.optimizer, f"{name}_adam.").items()}
    return tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> bool:
    names = [name for name in one if name.startswith(prefix)]
    return bool(names) and all(torch.equal(one[name], other[name]) for name in names)


def test_an_iteration_is_a_function_of_the_state_before_it(four: Any) -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # no generator's state has a say
        state, fixed = start(four, ppo())
        metrics = [iterate(state, fixed, ppo(), seed=5)[0] for _ in range(2)]
        results.append((metrics, bits(state)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    other, fixed = start(four, ppo())
    assert iterate(other, fixed, ppo(), seed=6)[0] != results[0][0][0]


def test_what_the_rollout_knows_spares_a_forward_pass_and_changes_nothing(
    four: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iteration with the log-probabilities from the drawing, and one that works them out again."""
    settings, results, asked = ppo(entropy_coef=0.01), [], []

    def measures(policy: Any, *others: Any) -> tuple[Tensor, Tensor]:
        asked.append(policy)
        return policy_measures(policy, *others)

    monkeypatch.setattr("rlhf_tasks.ppo.experience.policy_measures", measures)
    for forgets in (False, True):
        state, fixed = start(four, settings)
        before = bits(state)
        if forgets:
            monkeypatch.setattr("rlhf_tasks.ppo.iteration.roll_out", lambda *of: replace(roll_out(*of), drawn=None))
        metrics, _ = iterate(state, fixed, settings, seed=5)
        assert any(policy is state.actor.model for policy in asked) is forgets
        results.append((metrics, {name: x for name, x in bits(state).items() if name in before}))
        assert all((results[-1][1][name] - x).abs().max() > 1e-3 for name, x in before.items())
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-5)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], rtol=1e-5, atol=1e-5)


def test_it_changes_actor_critic_and_the_count_alone(four: Any) -> None:
    state, fixed = start(four, ppo())
    frozen = copy.deepcopy((fixed.ref.state_dict(), fixed.reward.state_dict()))
    before = bits(state)
    iterate(state, fixed, ppo(), seed=0)
    assert state.iteration == 1
    assert not same(before, bits(state), "actor.")
    assert not same(before, bits(state), "critic.")
    assert same(frozen[0], fixed.ref.state_dict())
    assert same(frozen[1], fixed.reward.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl": config.KL(estimator="full"), "entropy_coef": 0.01, "dual_clip": 3.0, "whiten_rewards": True},
        {"clip": None, "value_clip": None, "whiten_advantages": False, "score": config.Score(kind="sigmoid")},
        {"critic_warmup": 1, "target_kl": 0.01},
        {"batch": 1, "minibatches": 1},
    ],
)
def test_every_number_is_finite_and_has_its_group(four: Any, settings: dict[str, Any]) -> None:
    state, fixed = start(four, ppo(**settings))
    metrics, timings = iterate(state, fixed, ppo(**settings), seed=0)
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert {name.split("/")[0] for name in metrics} == {"objective", "advantage", "policy", "value", "response"}
    phases = ("rollout", "evaluation", "experience", "optimization")
    assert set(timings) == {*(f"{phase}_seconds" for phase in phases), "response_tokens"}


def test_one_temperature_samples_scores_and_updates(four: Any) -> None:
    """Else the first step's ratio is not 1, and the KL is another distribution's."""
    settings = ppo(epochs=1, minibatches=1)
    state, fixed = start(four, settings)
    fixed = replace(fixed, sampling=replace(SAMPLING, temperature=0.7))
    kls = []
    episodes = roll_out(state, fixed, settings.batch, seed=5)
    for prompt, response in zip(episodes.prompts, episodes.responses, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        own, ref = (
            (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)[range(len(response)), response]
            for model in (four.actor, four.ref)
        )
        kls.append(float((own - ref).detach().sum()))
    metrics, _ = iterate(state, fixed, settings, seed=5)
    assert metrics["objective/kl"] == pytest.approx(fmean(kls), abs=1e-4)
    assert metrics["policy/approx_kl"] < 1e-8
    assert metrics["policy/clip_fraction"] == 0


def test_the_actor_waits_while_the_critic_warms_up(four: Any) -> None:
    settings = ppo(critic_warmup=2)
    state, fixed = start(four, settings)
    before = bits(state)
    for iteration in (1, 2, 3):
        iterate(state, fixed, settings, seed=0)
        assert same(before, bits(state), "actor.") is (iteration <= 2)
        assert not same(before, bits(state), "critic.")


def test_beta_is_steered_after_the_iteration(four: Any) -> None:
    """β ← β·(1 + clip(KL/target - 1, ±0.2)·n/horizon) of Ziegler et al. 2019, with n = 12 episodes."""
    settings = ppo()
    state, fixed = start(four, settings, AdaptiveKL(0.05, target=0.01, horizon=100))
    metrics, _ = iterate(state, fixed, settings, seed=0)
    error = max(-0.2, min(0.2, metrics["objective/kl"] / 0.01 - 1))
    assert metrics["objective/kl_coef"] == pytest.approx(0.05)
    assert abs(error) == 0.2
    assert state.kl_control.coef == pytest.approx(0.05 * (1 + error * 12 / 100))
    used = state.kl_control.coef
    assert iterate(state, fixed, settings, seed=0)[0]["objective/kl_coef"] == pytest.approx(used)


def test_prices_wait_while_the_critic_warms_up(four: Any) -> None:
    """The Actor does not move then: that its KL is small says nothing of β, nor its length of the price of a cut."""
    settings = ppo(critic_warmup=1, kl=config.KL(controller="adaptive", target=50.0, horizon=100))
    state, fixed = start(four, settings, AdaptiveKL(0.05, target=50.0, horizon=100))
    state.length_control = LengthControl(price=0.1, rate=3.0, target=50.0)
    iterate(state, fixed, settings, seed=0)
    assert (state.kl_control.coef, state.length_control.price) == (0.05, 0.1)
    iterate(state, fixed, settings, seed=0)
    assert state.kl_control.coef < 0.05
    assert state.length_control.price < 0.1


def test_a_cut_costs_more_while_answers_are_longer_than_sfts() -> None:
    """By hand: rate 3, first price 0.1; SFT's answers have 20 tokens."""
    control = LengthControl(price=0.1, rate=3.0, target=20.0)
    control.update(20.0)
    assert control.price == pytest.approx(0.1)
    control.update(22.0)  # a tenth longer
    assert (control.slow, control.price) == (pytest.approx(0.12), pytest.approx(0.42))
    control.update(16.0)  # a fifth shorter
    assert (control.slow, control.price) == (pytest.approx(0.08), pytest.approx(-0.52))


def test_steering_reaches_the_scores_and_the_metrics(four: Any) -> None:
    settings = ppo(missing_eos=config.MissingEOS(mode="steer"))
    state, fixed = start(four, settings)
    state.length_control = LengthControl(price=0.25, rate=3.0, target=5.0)
    found = [iterate(state, fixed, settings, seed=0)[0] for _ in range(2)]
    assert found[0]["objective/cut_price"] == 0.25
    error = found[0]["response/length"] / 5 - 1
    assert found[1]["objective/cut_price"] == pytest.approx(0.25 + 3 * error * (1 + 1 / 15))
    plain, fixed = start(four, ppo())
    unsteered = iterate(plain, fixed, ppo(), seed=0)[0]
    assert "objective/cut_price" not in unsteered
    cut = unsteered["objective/shaped_score"] - found[0]["objective/shaped_score"]
    assert cut == pytest.approx(0.25 * unsteered["response/truncation_rate"], abs=1e-6)


def test_the_actor_learns_what_the_reward_likes(four: Any) -> None:
    settings = ppo(batch=32, actor_learning_rate=1e-2, critic_learning_rate=3e-3)
    state, fixed = start(four, settings, FixedKL(0.0))

    @torch.no_grad()
    def mean_score() -> float:
        questions = PROMPTS * 20
        answers = sample_responses(state.actor.model, questions, SAMPLING, (0, "before and after")).responses
        texts = [[*question, *answer] for question, answer in zip(questions, answers, strict=True)]
        return score_texts(fixed.reward, texts, torch.device("cpu")).mean().item()

    before = mean_score()
    for _ in range(6):
        iterate(state, fixed, settings, seed=0)
    assert mean_score() > before + 0.15


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 5, 7, 10, 23])
def test_every_pass_has_every_prompt_once(batch: int) -> None:
    """Also where a batch spans the end of a pass, or several passes."""
    drawn = [prompt for iteration in range(1, 71) for prompt in pick_prompts(PROMPTS, batch, 0, iteration)]
    assert all(len(pick_prompts(PROMPTS, batch, 0, iteration)) == batch for iteration in (1, 2))
    passes = [drawn[i : i + len(PROMPTS)] for i in range(0, 70, len(PROMPTS))]
    for one_pass in passes:
        assert Counter(map(tuple, one_pass)) == Counter(map(tuple, PROMPTS))
    assert len({str(one_pass) for one_pass in passes}) > 1


def test_prompts_belong_to_seed_and_iteration() -> None:
    assert pick_prompts(PROMPTS, 4, 0, 2) == pick_prompts(PROMPTS, 4, 0, 2)
    assert pick_prompts(PROMPTS, 10, 0, 1) != pick_prompts(PROMPTS, 10, 1, 1)


# Learning rates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "total", "factors"),
    [
        ("constant", None, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [1, 1, 1, 1, 1, 1]),
        ("linear", 4, [1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", 4, [1, 0.8535533905932737, 0.5, 0.1464466094067262, 0, 0]),
    ],
)
def test_schedules_have_a_length_of_their_own(kind: str, total: int | None, factors: list[float]) -> None:
    assert [schedule_factor(kind, done, total) for done in range(6)] == pytest.approx(factors)


@pytest.mark.parametrize("iterations", [3, 30])
def test_both_rates_follow_the_schedule_whatever_the_number_of_iterations(four: Any, iterations: int) -> None:
    settings = ppo(iterations=iterations, schedule=config.Schedule(kind="linear", total=4), critic_learning_rate=2e-3)
    state, fixed = start(four, settings)
    shown = []
    for done in range(3):
        set_learning_rates(state, settings)
        rates = [learner.optimizer.param_groups[0]["lr"] for learner in (state.actor, state.critic)]
        assert rates == pytest.approx([1e-3 * (1 - done / 4), 2e-3 * (1 - done / 4)])
        shown.append(iterate(state, fixed, settings, seed=0)[0]["policy/learning_rate"])
    assert shown == pytest.approx([1e-3, 0.75e-3, 0.5e-3])


# Metrics -------------------------------------------------------------------------------------------------------------


def test_rollout_metrics_are_their_formulas() -> None:
    """Two responses, of 2 and 1 tokens, worked out by hand; what is outside the mask must not count."""
    garbage = 1e6
    x = Experience(
        mask=torch.tensor([[1, 1], [1, 0]]),
        scores=torch.tensor([1.0, -0.5]),
        old_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, garbage]]),
        ref_logprobs=torch.tensor([[-1.5, -2.5], [-2.5, 0.0]]),
        entropy=torch.tensor([[1.0, 2.0], [6.0, garbage]]),
        old_values=torch.tensor([[1.0, 2.0], [3.0, garbage]]),
        rewards=torch.tensor([[-0.25, 0.75], [-0.75, garbage]]),
        raw_advantages=torch.tensor([[0.0, 3.0], [-1.5, garbage]]),
        advantages=torch.tensor([[0.0, 2.0], [-1.0, garbage]]),
        returns=torch.tensor([[1.0, 5.0], [0.0, garbage]]),
    )
    episodes = Episodes([[5], [5]], [[7, 1], [7]], [True, False])
    assert rollout_metrics(episodes, x, torch.tensor([2.0, 4.0]), kl_coef=0.5) == pytest.approx(
        {
            "objective/score": 3.0,
            "objective/score_std": 1.0,
            "objective/score_min": 2.0,
            "objective/score_max": 4.0,
            "objective/shaped_score": 0.25,
            "objective/kl": 0.25,  # (0.5 + 0.5) and -0.5
            "objective/kl_per_token": 0.5 / 3,
            "objective/kl_coef": 0.5,
            "objective/non_score_reward": -0.375,  # 0.5 - 1 and -0.75 + 0.5
            "objective/rlhf_reward": -0.125,
            "objective/entropy": 3.0,
            "advantage/mean": 0.5,
            "advantage/std": 3.5**0.5,
            "advantage/min": -1.5,
            "advantage/max": 3.0,
            "advantage/used_mean": 1 / 3,
            "advantage/used_std": 14**0.5 / 3,
            "advantage/explained_variance": 1 - 9 / 7,  # var(0, 3, -3) / var(1, 5, 0)
            "value/mean": 2.0,
            "value/return_mean": 2.0,
            "value/return_std": (14 / 3) ** 0.5,
            "response/length": 1.5,
            "response/length_std": 0.5,
            "response/length_min": 1.0,
            "response/length_max": 2.0,
            "response/eos_rate": 0.5,
            "response/truncation_rate": 0.5,
            "response/distinct_bigrams": 1.0,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("responses", "share"),
    [([[1, 2, 1, 2]], 2 / 3), ([[1, 2], [1, 2]], 0.5), ([[1, 2], [2, 1]], 1.0), ([[1], [2]], 0.0)],
)
def test_distinct_bigrams_are_counted_over_all_responses(responses: list[list[int]], share: float) -> None:
    assert distinct_bigrams(responses) == pytest.approx(share)
