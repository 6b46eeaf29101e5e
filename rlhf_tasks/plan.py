"""`rlhf plan`: what a configuration needs before it is run, by stage: memory, floating-point work, time.

The pipeline's own functions are run on tensors without data (meter.py), for one batch of each kind; the number of
batches follows from the data. Time is a roofline: operations at the machine's rate of matrix products, bytes at its
bandwidth, and a cost for every operation.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from rlhf_tasks import evaluate as evaluation
from rlhf_tasks.base import find_base, load_settings
from rlhf_tasks.config import Params
from rlhf_tasks.data.batching import Batch
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import scratch_settings
from rlhf_tasks.meter import Meter, Need, without_data
from rlhf_tasks.models import position_ids
from rlhf_tasks.ppo.experience import Experience, policy_measures, response_scores, response_values
from rlhf_tasks.ppo.optimization import actor_gradient, critic_gradient
from rlhf_tasks.ppo.rollout import Sampling, sample
from rlhf_tasks.reward import SCORING_BATCH_TOKENS, pairwise_loss, score_texts
from rlhf_tasks.sft import Rows
from rlhf_tasks.training import adamw

FLOAT = 4  # bytes of a weight, a gradient, each of Adam's two moments
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Amounts:
    """How much text there is, in rows and tokens; of what `prepare` wrote, or as much as the parameters allow.

    Attributes:
        prompt, response: mean tokens.
        longest: tokens of the longest row.
    """

    sft_rows: float
    pair_rows: float
    prompt: float
    response: float
    longest: int
    known: bool


@dataclass(frozen=True)
class Phase:
    """A part of a stage. `need` is of all of it, with the stage's models in memory."""

    stage: str
    name: str
    need: Need
    tokens: float


@dataclass(frozen=True)
class Sizes:
    """Weights of the Actor and of a scorer, and of the Actor's embeddings."""

    actor: int
    scorer: int
    embeddings: int


def amounts_of(root: Path, params: Params) -> Amounts:
    """What `prepare` counted, if it has run here; else upper bounds, and no rows."""
    path, data = root / "metrics/prepare.json", params.data
    bound = data.max_prompt_tokens + data.max_response_tokens
    if not path.exists():
        return Amounts(0, 0, data.max_prompt_tokens, data.max_response_tokens, bound, known=False)
    document = json.loads(path.read_text())
    try:
        tokens = document["details"]["tokens"]["sft_train"]
        prompt, response = tokens["prompt"], tokens["response"]
        longest = math.ceil(prompt["max"] + response["max"])
        return Amounts(
            document["sft_train"], document["pairs_train"], prompt["mean"], response["mean"], longest, known=True
        )
    except (KeyError, TypeError):
        raise UserError(f"{path}: not what `prepare` writes; run `rlhf run --until prepare`") from None


def settings_of(root: Path, params: Params) -> Any:
    """The Hugging Face configuration of the model that SFT starts from.

    Raises:
        UserError: the base cannot be had, or is no causal language model.
    """
    base = find_base(params.model, root)
    if base:
        return load_settings(base)
    return scratch_settings(params.model.scratch, params.model.scratch.vocab_size, 1, 0)


def sizes_of(settings: Any) -> Sizes:
    """How many weights the models of a Hugging Face configuration have."""
    with without_data():
        actor, scorer = _actor(settings), _scorer(settings)
        embeddings = actor.get_input_embeddings().weight.numel()
        return Sizes(_weights(actor), _weights(scorer), embeddings)


def phases(params: Params, settings: Any, amounts: Amounts, micro_batch_tokens: int | None = None) -> Iterator[Phase]:
    """Every part of the pipeline that takes memory or time.

    Args:
        settings: the model's Hugging Face configuration.
        micro_batch_tokens: in place of `ppo.micro_batch_tokens`.
    """
    yield from _sft(params, settings, amounts)
    yield from _reward(params, settings, amounts)
    yield from _ppo(params, settings, amounts, micro_batch_tokens or params.ppo.micro_batch_tokens)
    yield from _evaluate(params, settings, amounts)


def largest_micro_batch(params: Params, settings: Any, amounts: Amounts, room: float) -> int | None:
    """The largest `ppo.micro_batch_tokens` with which PPO stays within `room` bytes of tensors; None if none does.

    Memory grows evenly with the rows of a micro-batch, so two sizes tell of all. More than the batch is of no use.
    """
    width = max(1, round(amounts.prompt)) + params.generation.max_new_tokens
    one, many = (
        max(phase.need.peak for phase in _ppo(params, settings, amounts, rows * width))
        for rows in (1, params.ppo.batch)
    )
    rows = rows_that_fit(one, many, params.ppo.batch, room)
    return width * rows if rows else None


def rows_that_fit(one: float, many: float, rows: int, room: float) -> int:
    """How many of `rows` fit into `room`, if one takes `one` and all take `many`; 0 if not even one does."""
    if one > room:
        return 0
    a_row = (many - one) / max(1, rows - 1)
    return rows if many <= room else 1 + int((room - one) / a_row)


def _sft(params: Params, settings: Any, amounts: Amounts) -> Iterator[Phase]:
    rows, length = _cut(params.sft.batch_tokens, amounts.longest)
    with without_data() as meter:
        actor = _actor(settings)
        optimizer = adamw(actor.parameters(), params.sft.learning_rate)
        prompt = min(round(amounts.prompt), length - 1)
        texts = SimpleNamespace(prompts=[[1] * prompt] * rows, responses=[[1] * (length - prompt)] * rows, pad_id=0)

        def step() -> None:
            total, count = Rows.negative_logprob(texts, actor, list(range(rows)), CPU)  # type: ignore[arg-type]
            _update(actor, optimizer, total / count)

        need = _second(meter, step)
    tokens = params.sft.epochs * amounts.sft_rows * (amounts.prompt + amounts.response)
    yield Phase("sft", "training", need.times(tokens / (rows * length)), tokens)


def _reward(params: Params, settings: Any, amounts: Amounts) -> Iterator[Phase]:
    rows, length = _cut(params.reward.batch_tokens // 2, amounts.longest)
    with without_data() as meter:
        scorer = _scorer(settings)
        optimizer = adamw(scorer.parameters(), params.reward.learning_rate)

        def step() -> None:
            scores = score_texts(scorer, [[1] * length] * 2 * rows, 0, CPU)
            _update(scorer, optimizer, pairwise_loss(scores[:rows], scores[rows:]))

        need = _second(meter, step)
        tokens = params.reward.epochs * amounts.pair_rows * 2 * (amounts.prompt + amounts.response)
        yield Phase("reward", "training", need.times(tokens / (2 * rows * length)), tokens)
        actor, samples = _actor(settings), params.reward.statistics_samples
        drawn = _rollout(meter, actor, samples, params, amounts)
        text = min(amounts.longest, round(amounts.prompt) + params.generation.max_new_tokens)
        scored = _forward(meter, lambda: score_texts(scorer, _texts(SCORING_BATCH_TOKENS, text), 0, CPU))
        tokens = samples * text
        yield Phase("reward", "statistics", drawn + scored.times(tokens / SCORING_BATCH_TOKENS), tokens)


def _ppo(params: Params, settings: Any, amounts: Amounts, budget: int) -> Iterator[Phase]:
    ppo, new = params.ppo, params.generation.max_new_tokens
    prompt = max(1, round(amounts.prompt))
    tokens = ppo.batch * (prompt + new)
    with without_data() as meter:
        actor, ref, reward, critic = _actor(settings), _actor(settings), _scorer(settings), _scorer(settings)
        learners = [(m, adamw(m.parameters(), 1e-4)) for m in (actor, critic)]
        rows = max(1, min(ppo.batch, budget // (prompt + new)))
        batch, part = _batch(rows, prompt, new), _experience(rows, new)
        count = torch.ones(())

        def gradients() -> None:
            actor_gradient(actor, batch, part, ppo, 1.0, count)
            critic_gradient(critic, batch, part, ppo, count)

        def update() -> None:
            gradients()
            for model, optimizer in learners:
                _clipped_step(model, optimizer, ppo.max_grad_norm)

        def judge() -> None:
            policy_measures(actor, ref, batch, 1.0, ppo.kl.estimator)
            response_values(critic, batch)
            response_scores(reward, batch)

        update()  # Adam has its moments from now on
        drawn = _rollout(meter, actor, ppo.batch, params, amounts).times(ppo.iterations)
        yield Phase("ppo", "rollout", drawn, tokens * ppo.iterations)
        judged = _forward(meter, judge).times(ppo.iterations * ppo.batch / rows)
        yield Phase("ppo", "evaluation", judged, tokens * ppo.iterations)
        with meter.measure() as micro:
            gradients()
        with meter.measure() as whole:
            update()
        stepped = _difference(whole[0], micro[0]).times(ppo.minibatches)
        passes = ppo.iterations * ppo.epochs
        need = micro[0].times(ppo.batch / rows * passes) + stepped.times(passes)
        yield Phase("ppo", "optimization", need, tokens * passes)
        largest = max(2 * FLOAT * _weights(actor), 2 * FLOAT * _weights(critic))
        yield Phase("ppo", "saving", Need(meter.held + largest), 0)


def _evaluate(params: Params, settings: Any, amounts: Amounts) -> Iterator[Phase]:
    prompt, new = max(1, round(amounts.prompt)), params.generation.max_new_tokens
    questions = params.evaluate.prompts
    with without_data() as meter:
        sft, actor, reward = _actor(settings), _actor(settings), _scorer(settings)
        rows = min(questions, evaluation.ROLLOUT_ROWS)
        drawn = _rollout(meter, actor, rows, params, amounts).times(2 * questions / rows)
        texts = _texts(evaluation.BATCH_TOKENS, prompt + new)
        scored = _forward(meter, lambda: score_texts(reward, texts, 0, CPU)).times(2 * questions / len(texts))
        batch = _batch(len(texts), prompt, new)
        compared = _forward(meter, lambda: policy_measures(actor, sft, batch, 1.0, "k1")).times(questions / len(texts))
        yield Phase("evaluate", "both models", drawn + scored + compared, 2.0 * questions * (prompt + new))


def _rollout(meter: Meter, actor: Any, rows: int, params: Params, amounts: Amounts) -> Need:
    """A batch of responses, none of which ends early: the prompts at once, then token by token."""
    prompt, new = max(1, round(amounts.prompt)), params.generation.max_new_tokens
    sampling = Sampling.of(params.generation, (1,), 0)

    def read(width: int, cache: DynamicCache) -> Tensor:
        seen = cache.get_seq_length()
        mask = torch.ones(rows, seen + width, dtype=torch.long)
        return actor(
            input_ids=torch.ones(rows, width, dtype=torch.long),
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -width:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def draw(logits: Tensor) -> None:
        sample(logits, torch.ones(rows, dtype=torch.double), sampling)

    first = _forward(meter, lambda: draw(read(prompt, DynamicCache(config=actor.config))))
    cache = DynamicCache(config=actor.config)
    with torch.no_grad():
        read(prompt + new - 1, cache)
    last = _forward(meter, lambda: draw(read(1, cache)))
    return first + last.times(new - 1)


def _forward(meter: Meter, work: Callable[[], object]) -> Need:
    with torch.no_grad(), meter.measure() as found:
        work()
    return found[0]


def _second(meter: Meter, step: Callable[[], None]) -> Need:
    """What a training step needs when Adam has its moments."""
    step()
    with meter.measure() as found:
        step()
    return found[0]


def _update(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    _clipped_step(model, optimizer, 1.0)


def _clipped_step(model: Any, optimizer: torch.optim.Optimizer, norm: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _difference(one: Need, other: Need) -> Need:
    return Need(one.peak, one.flops - other.flops, one.moved - other.moved, one.operations - other.operations)


def _cut(budget: int, longest: int) -> tuple[int, int]:
    """The worst batch of a token budget: as many of the longest rows as fit. Rows and their length."""
    length = max(2, longest)
    return max(1, budget // length), length


def _texts(budget: int, length: int) -> list[list[int]]:
    return [[1] * length] * max(1, budget // length)


def _batch(rows: int, prompt: int, new: int) -> Batch:
    ids = torch.ones(rows, prompt + new, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), ids[:, prompt:], torch.ones_like(ids)[:, prompt:])


def _experience(rows: int, new: int) -> Experience:
    tokens = [torch.zeros(rows, new) for _ in range(8)]
    return Experience(torch.ones(rows, new, dtype=torch.long), torch.zeros(rows), *tokens)


def _actor(settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def _scorer(settings: Any) -> Any:
    labelled = copy.deepcopy(settings)
    labelled.num_labels, labelled.pad_token_id = 1, 0
    return AutoModelForSequenceClassification.from_config(labelled, dtype=torch.float32).eval()


def _weights(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
