"""The evaluate stage: SFT against Actor on held-out prompts, paired by prompt. Pure: it reads no registry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rlhf_tasks.best_of import Draws, best_of
from rlhf_tasks.data.batching import Batch
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.intervals import interval
from rlhf_tasks.limits import check_heldout_prompts
from rlhf_tasks.models import (
    load_actor,
    load_score_statistics,
    load_scorer,
    load_tokenizer,
    set_up_torch,
    stop_ids,
)
from rlhf_tasks.ppo.experience import Episodes, per_token, policy_logprobs
from rlhf_tasks.ppo.rollout import Sampling, distinct_bigrams, ended, sample_responses
from rlhf_tasks.reward import score_texts
from rlhf_tasks.reward_function import load_reward_function
from rlhf_tasks.seeds import derive_seed, permutation
from rlhf_tasks.training import Progress, length_batches

if TYPE_CHECKING:
    from rlhf_tasks import config

BATCH_TOKENS = 8192
ROLLOUT_ROWS = 128


class Questions(NamedTuple):
    """N prompts: their tokens, and as they were written, the fields of a row (docs/data.md)."""

    encoded: list[list[int]]
    asked: list[dict[str, Any]]


@dataclass(frozen=True)
class Answers:
    """One model's answers to the N held-out prompts, with what was measured of each."""

    episodes: Episodes
    texts: list[str]
    scores: np.ndarray
    judged: np.ndarray | None
    lengths: np.ndarray


def run(
    *,
    seed: int,
    runtime: config.Runtime,
    generation: config.Generation,
    reward_function: config.RewardFunction,
    evaluate: config.Evaluate,
    prompts: Path,
    sft: Path,
    reward: Path,
    actor: Path,
    out: Path,
    partial: Path,
    progress: Progress,
) -> dict[str, float]:
    """Compare the two models; leave `metrics.json` and `samples.jsonl` (every prompt with both answers) in `out`.

    Raises:
        UserError: there are fewer held-out prompts than `evaluate.prompts` asks for.
    """
    device, tokenizer = set_up_torch(runtime), load_tokenizer(sft)
    questions = heldout_prompts(prompts, evaluate.prompts, seed)
    scorer = load_scorer(reward, device)
    models = {"sft": load_actor(sft, device), "actor": load_actor(actor, device)}
    answers, total = {}, 1 + evaluate.best_of
    for done, (name, model) in enumerate(models.items()):
        progress(done=done, total=total)
        episodes = answer(model, questions.encoded, tokenizer, generation, seed)
        answers[name] = measure(episodes, scorer, tokenizer, evaluate.judge)
    kl = sequence_kl(models["actor"], models["sft"], answers["actor"].episodes, generation.temperature)
    _, score_std = load_score_statistics(reward)
    metrics = compare(answers["sft"], answers["actor"], kl, score_std, evaluate.bootstrap, seed)
    cut = cut_to_equal_length(answers["sft"].episodes, answers["actor"].episodes)
    sft_cut, actor_cut = (measure(episodes, scorer, tokenizer, evaluate.judge) for episodes in cut)
    equal = gains(sft_cut, actor_cut, score_std, evaluate.bootstrap, seed)
    metrics |= {f"equal_length_{name}": value for name, value in equal.items()}
    if score := load_reward_function(reward_function, tokenizer):
        own = {name: score(questions.encoded, a.episodes.responses).double().numpy() for name, a in answers.items()}
        metrics |= {f"{name}_function": float(values.mean()) for name, values in own.items()}
        metrics |= interval("function_gain", own["actor"] - own["sft"], evaluate.bootstrap, seed)
    draws = [answers["sft"]]
    for draw in range(1, evaluate.best_of):
        progress(done=1 + draw, total=total)
        others = derive_seed(seed, "evaluate", "best of", draw)
        episodes = answer(models["sft"], questions.encoded, tokenizer, generation, others)
        draws.append(measure(episodes, scorer, tokenizer, evaluate.judge))
    metrics |= best_of(together(draws), score_std, evaluate.bootstrap, seed)
    progress(done=total, total=total)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    save_samples(out / "samples.jsonl", questions, answers, kl, tokenizer)
    return metrics


def heldout_prompts(prompts: Path, count: int, seed: int) -> Questions:
    """`count` held-out prompts, in an order that belongs to the seed."""
    questions = read_questions(prompts / "heldout.arrow", count, (seed, "evaluate", "prompts"))
    check_heldout_prompts(count, len(questions.encoded))
    return questions


def read_questions(table: Path, count: int, order: tuple[str | int, ...]) -> Questions:
    """The first `count` prompts of a table, or all if there are fewer, in an order that belongs to some names."""
    rows = read_table(table, ["prompt", "asked", "input_ids"])
    column = TokenColumn(rows, "input_ids")
    chosen = permutation(len(column), *order)[:count]
    texts = rows.select(["prompt", "asked"]).take(chosen).to_pylist()
    asked = [json.loads(row["asked"]) if row["asked"] else {"prompt": row["prompt"]} for row in texts]
    return Questions([list(column[i]) for i in chosen], asked)


def answer(
    model: Any, questions: list[list[int]], tokenizer: Any, generation: config.Generation, seed: int
) -> Episodes:
    """Sample one response to each prompt, with the same draws for every model."""
    sampling = Sampling.of(generation, stop_ids(model, tokenizer, generation.stop))
    responses: list[list[int]] = []
    for start in range(0, len(questions), ROLLOUT_ROWS):
        chunk = questions[start : start + ROLLOUT_ROWS]
        responses += sample_responses(model, chunk, sampling, (seed, "evaluate", "sampling", start)).responses
    return Episodes(questions, responses, ended(responses, sampling.stop_ids))


def measure(episodes: Episodes, scorer: Any, tokenizer: Any, judge: str | None) -> Answers:
    """Score the responses with the Reward, and the whole texts with the judge."""
    rows = [[*prompt, *response] for prompt, response in zip(episodes.prompts, episodes.responses, strict=True)]
    device, scores = next(scorer.parameters()).device, np.zeros(len(rows))
    with torch.no_grad():
        for batch in length_batches([len(row) for row in rows], BATCH_TOKENS):
            scores[batch] = score_texts(scorer, [rows[i] for i in batch], device).cpu().numpy()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    judged = np.array([vader(text) for text in texts]) if judge == "vader" else None
    return Answers(episodes, texts, scores, judged, np.array([len(r) for r in episodes.responses], dtype=float))


def together(draws: list[Answers]) -> Draws:
    """Several answers to each prompt."""
    judged = [draw.judged for draw in draws if draw.judged is not None]
    scores, lengths = (np.stack([getattr(draw, name) for draw in draws]) for name in ("scores", "lengths"))
    return Draws(scores, np.stack(judged) if judged else None, lengths)


def cut_to_equal_length(one: Episodes, other: Episodes) -> tuple[Episodes, Episodes]:
    """Both models' responses, without their ends, each cut to the shorter of the two: what is gained is not length."""
    sides = (one, other)
    bodies = [[r[: len(r) - end] for r, end in zip(s.responses, s.ended, strict=True)] for s in sides]
    lengths = [min(len(a), len(b)) for a, b in zip(*bodies, strict=True)]
    cut = [[body[:n] for body, n in zip(side, lengths, strict=True)] for side in bodies]
    none = [False] * len(lengths)
    return Episodes(one.prompts, cut[0], none), Episodes(other.prompts, cut[1], none)


@torch.no_grad()
def sequence_kl(model: Any, anchor: Any, episodes: Episodes, temperature: float) -> np.ndarray:
    """k1 estimate of KL(model ‖ anchor) of each response, summed over its tokens, in nats, `[N]`."""
    device = next(model.parameters()).device

    def difference(batch: Batch) -> tuple[torch.Tensor]:
        own, other = (policy_logprobs(policy, batch, temperature) for policy in (model, anchor))
        return (own - other,)

    (kl,) = per_token(difference, episodes, BATCH_TOKENS, device)
    return kl.sum(1).cpu().numpy()


def compare(
    sft: Answers, actor: Answers, kl: np.ndarray, score_std: float, resamples: int, seed: int
) -> dict[str, float]:
    """All numbers of `metrics.json`; gains are paired by prompt, intervals are 95 % bootstrap."""
    metrics: dict[str, float] = {"prompts": float(len(kl))}
    for name, answers in (("sft", sft), ("actor", actor)):
        metrics |= {
            f"{name}_score": float(answers.scores.mean()),
            f"{name}_length": float(answers.lengths.mean()),
            f"{name}_eos_rate": float(np.mean(answers.episodes.ended)),
            f"{name}_distinct_bigrams": distinct_bigrams(answers.episodes.responses),
        }
        if answers.judged is not None:
            metrics[f"{name}_judge"] = float(answers.judged.mean())
    metrics |= gains(sft, actor, score_std, resamples, seed)
    better, same = actor.scores > sft.scores, actor.scores == sft.scores
    metrics |= interval("win_rate", better + same / 2, resamples, seed)
    metrics |= interval("kl_sequence", kl, resamples, seed)
    metrics["length_ratio"] = metrics["actor_length"] / metrics["sft_length"]
    return metrics


def gains(sft: Answers, actor: Answers, score_std: float, resamples: int, seed: int) -> dict[str, float]:
    """What the Actor gains by the Reward, in standard deviations, and by the judge, each with its interval."""
    found = interval("score_gain", (actor.scores - sft.scores) / score_std, resamples, seed)
    if sft.judged is not None and actor.judged is not None:
        found |= interval("judge_gain", actor.judged - sft.judged, resamples, seed)
    return found


def vader(text: str) -> float:
    """Compound sentiment of a text in -1 to 1, by the rules of Hutto and Gilbert 2014."""
    return _analyzer().polarity_scores(text)["compound"]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def save_samples(path: Path, questions: Questions, answers: dict[str, Answers], kl: np.ndarray, tokenizer: Any) -> None:
    """One JSON line a prompt, as the models read it and as it was asked: both answers, their scores and judgements, the
    Actor's KL.
    """
    prompts = tokenizer.batch_decode(questions.encoded, skip_special_tokens=True)
    with path.open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            row: dict[str, Any] = {"prompt": prompt, "asked": questions.asked[i]}
            for name, side in answers.items():
                row[name] = tokenizer.decode(side.episodes.responses[i], skip_special_tokens=True)
                row[f"{name}_score"] = round(float(side.scores[i]), 6)
                if side.judged is not None:
                    row[f"{name}_judge"] = float(side.judged[i])
            row["kl"] = round(float(kl[i]), 6)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
