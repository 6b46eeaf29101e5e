"""From episodes to experience: scores, KL, rewards, values, and where on the time axis each belongs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_tasks import config, head
from rlhf_tasks.ppo.experience import (
    Episodes,
    Experience,
    evaluate_episodes,
    make_experience,
    response_masks,
    shape_scores,
)
from rlhf_tasks.ppo.functional import gae, masked_mean, masked_var
from rlhf_tasks.ppo.rollout import Rollout

CPU = torch.device("cpu")
STATISTICS = (0.5, 2.0)
BETA = 0.3


def experience(
    four: Any, rollout: Episodes, ppo: config.PPO | None = None, temperature: float = 1.0
) -> tuple[Experience, Tensor]:
    settings = ppo or config.PPO(micro_batch_tokens=24)
    evaluation = evaluate_episodes(
        rollout,
        actor=four.actor,
        ref=four.ref,
        reward=four.reward,
        critic=four.critic,
        ppo=settings,
        temperature=temperature,
    )
    made = make_experience(rollout, evaluation, settings, kl_coef=BETA, score_statistics=STATISTICS)
    return made, evaluation.raw_scores


def ppo(**settings: Any) -> config.PPO:
    return config.PPO(micro_batch_tokens=24, **settings)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_scores_and_values_are_those_of_each_episode_alone(
    four: Any, rollout: Episodes, temperature: float
) -> None:
    """Against the models' plain calls on one row alone: the right model, the right place, the right token."""
    x, raw = experience(four, rollout, temperature=temperature)
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids, start, n = torch.tensor([[*prompt, *response]]), len(prompt) - 1, len(response)
        for name, model in (("old_logprobs", four.actor), ("ref_logprobs", four.ref)):
            logp = (model(input_ids=ids).logits[0, start:-1] / temperature).log_softmax(-1)
            expected = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(getattr(x, name)[row, :n], expected, atol=1e-4, rtol=1e-4)
            if model is four.actor:
                entropy = -(logp.exp() * logp).sum(-1)
                torch.testing.assert_close(x.entropy[row, :n], entropy, atol=1e-4, rtol=1e-4)
        values = four.critic.score(four.critic.model(input_ids=ids).last_hidden_state)[0, :, 0]
        torch.testing.assert_close(x.old_values[row, :n], values[start:-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(raw[row], four.reward(input_ids=ids).logits[0, 0], atol=1e-4, rtol=1e-4)
    assert (x.old_logprobs - x.ref_logprobs).abs().max() > 0.05
    assert raw.std() > 0.1


def test_what_the_rollout_knows_is_taken_from_it(four: Any, rollout: Episodes) -> None:
    """Log-probabilities and entropies of the Actor's own tokens are not worked out again."""
    logprobs, entropies = ([[place / size for place in range(len(r))] for r in rollout.responses] for size in (-9, 7))
    known = replace(rollout, drawn=Rollout(rollout.responses, logprobs, entropies))
    x, _ = experience(four, known)
    for row, response in enumerate(rollout.responses):
        n = len(response)
        assert x.old_logprobs[row, :n].tolist() == pytest.approx(logprobs[row])
        assert x.entropy[row, :n].tolist() == pytest.approx(entropies[row])
        assert not x.old_logprobs[row, n:].any()
        assert not x.entropy[row, n:].any()
    kl = (x.old_logprobs - x.ref_logprobs) * x.mask
    torch.testing.assert_close(x.rewards.sum(1), x.scores - BETA * kl.sum(1), atol=1e-5, rtol=1e-5)


def test_experience_does_not_depend_on_micro_batches(four: Any, rollout: Episodes) -> None:
    """So that before the first update every log ratio is below 1e-4, however the update cuts its batches."""
    one, other = (experience(four, rollout, config.PPO(micro_batch_tokens=n))[0] for n in (1, 10_000))
    for name in ("old_logprobs", "ref_logprobs", "old_values", "scores", "advantages"):
        assert (getattr(one, name) - getattr(other, name)).abs().max() < 1e-4, name


def test_places_behind_a_response_carry_nothing(four: Any, rollout: Episodes) -> None:
    x, _ = experience(four, rollout)
    assert x.mask.sum(1).tolist() == [len(response) for response in rollout.responses]
    for name in (
        "old_logprobs",
        "ref_logprobs",
        "entropy",
        "old_values",
        "rewards",
        "raw_advantages",
        "advantages",
        "returns",
    ):
        assert not getattr(x, name)[x.mask == 0].any(), name
        assert getattr(x, name)[x.mask == 1].any(), name


def test_masks_are_as_long_as_the_responses() -> None:
    rollout = Episodes([[5], [5], [5]], [[7, 7, 1], [1], [7, 7]], [True, True, False])
    assert response_masks(rollout).tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_value_never_sees_its_action(four: Any, rollout: Episodes, place: int) -> None:
    """Another token at t changes no value at t or before, and every value after it."""
    row = max(range(12), key=lambda i: len(rollout.responses[i]))
    before = experience(four, rollout)[0].old_values[row]
    rollout.responses[row][place] = 299 - rollout.responses[row][place]
    after = experience(four, rollout)[0].old_values[row]
    same = torch.isclose(before, after, atol=1e-5, rtol=0)
    assert same.tolist() == [True] * (place + 1) + [False] * (len(same) - place - 1)


# Rewards -------------------------------------------------------------------------------------------------------------


def kl_of(x: Experience, estimator: str) -> Tensor:
    d = x.old_logprobs - x.ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_rewards_sum_to_the_score_less_the_kl(four: Any, rollout: Episodes, estimator: str) -> None:
    x, _ = experience(four, rollout, ppo(kl=config.KL(estimator=estimator)))  # type: ignore[arg-type]
    kl = kl_of(x, estimator) * x.mask
    torch.testing.assert_close(x.rewards.sum(1), x.scores - BETA * kl.sum(1), atol=1e-5, rtol=1e-5)
    last = x.mask.sum(1) - 1
    for row, end in enumerate(last.tolist()):  # the score stands at the last token, the KL at each
        torch.testing.assert_close(x.rewards[row, :end], -BETA * kl[row, :end], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x.rewards[row, end], x.scores[row] - BETA * kl[row, end], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("piece", [2, 10_000])
def test_the_full_kl_is_over_the_whole_vocabulary_at_the_temperature(
    four: Any, rollout: Episodes, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """However few tokens' logits there are at a time."""
    monkeypatch.setattr(head, "PIECE_ELEMENTS", piece * four.actor.config.vocab_size)
    rollout = Episodes(rollout.prompts[:2], rollout.responses[:2], rollout.ended[:2])
    x, _ = experience(four, rollout, ppo(kl=config.KL(estimator="full"), score=config.Score(kind="raw")), 0.7)
    ids = torch.tensor([[*rollout.prompts[0], *rollout.responses[0]]])
    p, q = (
        (model(input_ids=ids).logits[0, len(rollout.prompts[0]) - 1 : -1] / 0.7).log_softmax(-1)
        for model in (four.actor, four.ref)
    )
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(x.rewards[0, :-1], -BETA * kl[:-1], atol=1e-4, rtol=1e-3)


def test_advantages_and_returns_are_gae_of_the_rewards(four: Any, rollout: Episodes) -> None:
    x, _ = experience(four, rollout, ppo(gamma=0.9, lam=0.8))
    advantages, returns = gae(x.old_values, x.rewards, x.mask, 0.9, 0.8)
    assert torch.equal(x.raw_advantages, advantages)
    assert torch.equal(x.returns, returns)
    assert abs(masked_mean(x.advantages, x.mask)) < 1e-5
    assert masked_var(x.advantages, x.mask).sqrt() == pytest.approx(1, abs=1e-4)
    plain, _ = experience(four, rollout, ppo(gamma=0.9, lam=0.8, whiten_advantages=False))
    assert torch.equal(plain.advantages, advantages)
    assert torch.equal(plain.returns, returns)


def test_whitened_rewards_keep_their_mean(four: Any, rollout: Episodes) -> None:
    plain, _ = experience(four, rollout)
    whitened, _ = experience(four, rollout, ppo(whiten_rewards=True))
    assert masked_mean(whitened.rewards, whitened.mask) == pytest.approx(
        float(masked_mean(plain.rewards, plain.mask)), abs=1e-5
    )
    assert masked_var(whitened.rewards, whitened.mask).sqrt() == pytest.approx(1, abs=1e-4)


# Scores --------------------------------------------------------------------------------------------------------------

RAW = torch.tensor([-3.5, 0.5, 2.5, 10.5])
ENDED = [True, False, True, False]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"score": config.Score(kind="raw")}, [-3.5, 0.5, 2.5, 10.5]),
        ({}, [-2.0, 0.0, 1.0, 5.0]),
        ({"score": config.Score(kind="sigmoid")}, torch.sigmoid(RAW).tolist()),
        ({"score": config.Score(clip=1.5)}, [-1.5, 0.0, 1.0, 1.5]),
        ({"missing_eos": config.MissingEOS(mode="keep", value=9.0)}, [-2.0, 0.0, 1.0, 5.0]),
        ({"missing_eos": config.MissingEOS(mode="replace", value=-1.0)}, [-2.0, -1.0, 1.0, -1.0]),
        ({"missing_eos": config.MissingEOS(mode="subtract", value=1.0)}, [-2.0, -1.0, 1.0, 4.0]),
        ({"missing_eos": config.MissingEOS(mode="steer", value=1.0)}, [-2.0, -1.0, 1.0, 4.0]),
        (
            {"missing_eos": config.MissingEOS(mode="subtract", value=1.0), "score": config.Score(clip=2.0)},
            [-2, -1, 1, 2],
        ),
    ],
)
def test_scores_are_shaped_as_configured(settings: dict[str, Any], expected: list[float]) -> None:
    """Mean 0.5, standard deviation 2; the second and the fourth response did not end."""
    assert shape_scores(RAW, ENDED, ppo(**settings), STATISTICS).tolist() == pytest.approx(expected)


def test_the_present_price_of_a_cut_is_what_counts() -> None:
    settings = ppo(missing_eos=config.MissingEOS(mode="steer", value=1.0))
    found = shape_scores(RAW, ENDED, settings, STATISTICS, cut_price=-0.5)
    assert found.tolist() == pytest.approx([-2.0, 0.5, 1.0, 5.5])


def test_the_shaped_score_is_what_experience_holds(four: Any, rollout: Episodes) -> None:
    settings = ppo(missing_eos=config.MissingEOS(mode="replace", value=-7.0))
    x, raw = experience(four, rollout, settings)
    assert torch.equal(x.scores, shape_scores(raw, rollout.ended, settings, STATISTICS))
    assert (x.scores == -7).tolist() == [not ended for ended in rollout.ended]


def test_some_rows_of_experience_stand_in_the_order_of_a_batch_of_them(four: Any, rollout: Episodes) -> None:
    x, _ = experience(four, rollout)
    rows = [3, 1]
    part, batch = x.tokens(rows), rollout.batch(rows, CPU)
    assert part.mask.tolist() == [True] * len(batch.tokens)
    assert batch.tokens.tolist() == rollout.responses[3] + rollout.responses[1]
    assert torch.equal(part.scores, x.scores[rows])
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        whole = getattr(x, name)
        expected = torch.cat([whole[row, : len(rollout.responses[row])] for row in rows])
        assert torch.equal(getattr(part, name), expected), name
