"""`rlhf plan`: what a configuration needs before it is run, by stage: memory, floating-point work, time.

The pipeline's own functions are run on tensors without data (meter.py), for one batch of each kind; the number of
batches follows from the data. Time is a roofline: operations at the machine's rate of matrix products, bytes at its
bandwidth, and a cost for every operation.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_tasks import evaluate as evaluation
from rlhf_tasks.ahead import prepared_so
from rlhf_tasks.base import find_base, load_settings
from rlhf_tasks.config import Params
from rlhf_tasks.data.batching import Batch, Line
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import scratch_settings
from rlhf_tasks.forward import Cache, hidden_states
from rlhf_tasks.gradients import GradientMemory
from rlhf_tasks.head import Head
from rlhf_tasks.meter import Meter, Need, without_data
from rlhf_tasks.ppo.experience import Experience, policy_logprobs, response_scores, response_values, whole_kl
from rlhf_tasks.ppo.optimization import actor_gradient, critic_gradient
from rlhf_tasks.ppo.rollout import Sampling, sample
from rlhf_tasks.reward import SCORING_BATCH_TOKENS, pairwise_loss, score_texts
from rlhf_tasks.sft import learn_rows
from rlhf_tasks.training import adamw, clipped_step
from rlhf_tasks.trunk import freeze_trunk, learning, share_trunk

FLOAT = 4  # bytes of a weight, a gradient, each of Adam's two moments
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Amounts:
    """How much text there is, in rows and tokens; of what `prepare` wrote, or as much as the parameters allow.

    Attributes:
        prompt, response: mean tokens.
        longest: tokens of the longest row.
        longest_prompt: of the longest prompt, as long as which a rollout makes its cache.
        heldout_prompts: how many there are; None where it is not known.
    """

    sft_rows: float
    pair_rows: float
    prompt: float
    response: float
    longest: int
    longest_prompt: int
    known: bool
    heldout_prompts: int | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a stage. `need` is of all of it, with the stage's models in memory."""

    stage: str
    name: str
    need: Need
    tokens: float


@dataclass(frozen=True)
class Sizes:
    """Weights of the Actor and of a scorer, of the Actor's embeddings, and all that learn in PPO."""

    actor: int
    scorer: int
    embeddings: int
    learning: int


def amounts_of(root: Path, params: Params) -> Amounts:
    """What `prepare` counted, if it has run here with these parameters; else upper bounds, and no rows."""
    path, data = root / "metrics/prepare.json", params.data
    bound = data.max_prompt_tokens + data.max_response_tokens
    if not path.exists() or not prepared_so(root, params):
        most = data.max_prompt_tokens
        return Amounts(0, 0, most, data.max_response_tokens, bound, most, known=False)
    try:
        document = json.loads(path.read_text())
        tokens = document["details"]["tokens"]["sft_train"]
        prompt, response = tokens["prompt"], tokens["response"]
        longest = math.ceil(prompt["max"] + response["max"])
        rows, means = (document["sft_train"], document["pairs_train"]), (prompt["mean"], response["mean"])
        return Amounts(*rows, *means, longest, math.ceil(prompt["max"]), True, int(document["prompts_heldout"]))
    except (KeyError, TypeError, ValueError):
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


def sizes_of(settings: Any, trainable_layers: int | None) -> Sizes:
    """How many weights the models of a Hugging Face configuration have; `trainable_layers` as of PPO."""
    with without_data():
        actor, scorer = _actor(settings), _scorer(settings)
        if trainable_layers:
            for model in (actor, scorer):
                freeze_trunk(model, trainable_layers, "ppo.trainable_layers")
        embeddings = actor.get_input_embeddings().weight.numel()
        return Sizes(_weights(actor), _weights(scorer), embeddings, _learning(actor) + _learning(scorer))


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


def largest_micro_batch(
    params: Params, settings: Any, amounts: Amounts, room: float, known: Sequence[Phase] = ()
) -> int | None:
    """The largest `ppo.micro_batch_tokens` with which PPO stays within `room` bytes of tensors; None if none does.

    Found by halving, for memory grows with the rows of a micro-batch. More than the batch is of no use.

    Args:
        known: what `phases` gives for the same configuration: if its micro-batch is the batch, and fits, it is that.
    """
    width = max(1, round(amounts.prompt)) + params.generation.max_new_tokens
    whole = params.ppo.micro_batch_tokens // width >= params.ppo.batch
    needs = [phase.need.memory for phase in known if phase.stage == "ppo" and phase.name != "saving"]
    if whole and needs and max(needs) <= room:
        return width * params.ppo.batch
    with without_data() as meter:
        four = _FourModels(meter, params, settings, amounts)

        def fits(rows: int) -> bool:
            return max(need.memory for need in (four.judged(rows), *four.learned(rows))) <= room

        if four.drawn().memory > room:
            return None
        return width * most_that_fit(params.ppo.batch, fits) or None


def most_that_fit(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1 to `rows` that fits, where all that are smaller fit too; 0 if none does."""
    low, high = 0, rows + 1
    while high - low > 1:
        middle = rows if high > rows else (low + high) // 2  # all of them, most often
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _sft(params: Params, settings: Any, amounts: Amounts) -> Iterator[Phase]:
    rows, length = _cut(params.sft.batch_tokens, amounts.longest)
    with without_data() as meter:
        actor = _actor(settings)
        optimizer, memory = adamw(actor.parameters(), params.sft.learning_rate), GradientMemory()
        prompt = min(round(amounts.prompt), length - 1)
        batch = _batch(rows, prompt, length - prompt)

        def step() -> None:
            with memory.lent_to(actor):
                learn_rows(actor, batch)
                clipped_step(optimizer, memory.norm(), 1.0)

        need = _second(meter, step)
    tokens = params.sft.epochs * amounts.sft_rows * (amounts.prompt + amounts.response)
    yield Phase("sft", "training", need.times(tokens / (rows * length)), tokens)


def _reward(params: Params, settings: Any, amounts: Amounts) -> Iterator[Phase]:
    rows, length = _cut(params.reward.batch_tokens // 2, amounts.longest)
    with without_data() as meter:
        scorer = _scorer(settings)
        if params.reward.trainable_layers:
            freeze_trunk(scorer, params.reward.trainable_layers, "reward.trainable_layers")
        optimizer, memory = adamw(learning(scorer).values(), params.reward.learning_rate), GradientMemory()

        def step() -> None:
            with memory.lent_to(scorer):
                scores = score_texts(scorer, [[1] * length] * 2 * rows, CPU)
                pairwise_loss(scores[:rows], scores[rows:]).backward()
                clipped_step(optimizer, memory.norm(), 1.0)

        need = _second(meter, step)
        tokens = params.reward.epochs * amounts.pair_rows * 2 * (amounts.prompt + amounts.response)
        yield Phase("reward", "training", need.times(tokens / (2 * rows * length)), tokens)
        actor, samples = _actor(settings), params.reward.statistics_samples
        drawn = _rollout(meter, actor, samples, params, amounts)
        text = min(amounts.longest, round(amounts.prompt) + params.generation.max_new_tokens)
        scored = _forward(meter, lambda: score_texts(scorer, _texts(SCORING_BATCH_TOKENS, text), CPU))
        tokens = samples * text
        yield Phase("reward", "statistics", drawn + scored.times(tokens / SCORING_BATCH_TOKENS), tokens)


def _ppo(params: Params, settings: Any, amounts: Amounts, budget: int) -> Iterator[Phase]:
    ppo, width = params.ppo, max(1, round(amounts.prompt)) + params.generation.max_new_tokens
    rows, tokens = max(1, min(ppo.batch, budget // width)), ppo.batch * width * ppo.iterations
    with without_data() as meter:
        four = _FourModels(meter, params, settings, amounts)
        yield Phase("ppo", "rollout", four.drawn().times(ppo.iterations), tokens)
        yield Phase("ppo", "evaluation", four.judged(rows).times(ppo.iterations * ppo.batch / rows), tokens)
        passes, need = ppo.iterations * ppo.epochs, Need()
        learned = four.learned(rows)
        for micro, whole in (learned[:2], learned[2:]):
            need += micro.times(ppo.batch / rows * passes)
            need += _difference(whole, micro).times(ppo.minibatches * passes)
        yield Phase("ppo", "optimization", need, tokens * ppo.epochs)
        largest = 2 * FLOAT * max(_learning(four.actor), _learning(four.critic))
        yield Phase("ppo", "saving", Need(meter.held + largest, held=meter.held + largest), 0)


class _FourModels:
    """PPO's models and optimizers, and what each of its phases needs."""

    def __init__(self, meter: Meter, params: Params, settings: Any, amounts: Amounts) -> None:
        self.meter, self.params, self.amounts = meter, params, amounts
        self.actor, self.ref, self.reward, self.critic = (make(settings) for make in (_actor, _actor, _scorer, _scorer))
        self.trunk = None  # what a rollout keeps of it
        if params.ppo.trainable_layers:
            for model in (self.actor, self.ref, self.reward, self.critic):
                freeze_trunk(model, params.ppo.trainable_layers, "ppo.trainable_layers")
                share_trunk(model, self.actor)
            width = max(1, round(amounts.prompt)) + params.generation.max_new_tokens
            self.trunk = torch.zeros(params.ppo.batch, width, settings.hidden_size)
        self.optimizers = [adamw(learning(model).values(), 1e-4) for model in (self.actor, self.critic)]
        self.memory = GradientMemory()
        self.learned(1)  # Adam has its moments from now on

    def drawn(self) -> Need:
        """An iteration's rollout."""
        return _rollout(self.meter, self.actor, self.params.ppo.batch, self.params, self.amounts)

    def judged(self, rows: int) -> Need:
        """A micro-batch of the evaluation."""
        batch = self._batch(rows)

        def judge() -> None:
            if self.params.ppo.kl.estimator == "full":
                whole_kl(self.actor, self.ref, batch, 1.0)
            policy_logprobs(self.ref, batch, 1.0)
            response_values(self.critic, batch)
            response_scores(self.reward, batch)

        return _forward(self.meter, judge)

    def learned(self, rows: int) -> list[Need]:
        """A micro-batch of the optimization, and with the optimizer's step: of the Actor and of the Critic."""
        batch, part = self._batch(rows), _experience(rows * self.params.generation.max_new_tokens)
        count, ppo, found = torch.ones(()), self.params.ppo, []
        learn = (
            partial(actor_gradient, self.actor, batch, part, count, ppo=ppo, temperature=1.0),
            partial(critic_gradient, self.critic, batch, part, count, ppo=ppo),
        )
        for model, optimizer, gradient in zip((self.actor, self.critic), self.optimizers, learn, strict=True):
            with self.memory.lent_to(model), self.meter.measure() as micro:
                gradient()
            with self.meter.measure() as whole, self.memory.lent_to(model):
                gradient()
                clipped_step(optimizer, self.memory.norm(), 1.0)
            found += [micro[0], whole[0]]
        return found

    def _batch(self, rows: int) -> Batch:
        prompt, new = max(1, round(self.amounts.prompt)), self.params.generation.max_new_tokens
        return _batch(rows, prompt, new, None if self.trunk is None else list(self.trunk[:rows]))


def _evaluate(params: Params, settings: Any, amounts: Amounts) -> Iterator[Phase]:
    prompt, new = max(1, round(amounts.prompt)), params.generation.max_new_tokens
    questions = params.evaluate.prompts
    answers = (1 + params.evaluate.best_of) * questions
    with without_data() as meter:
        sft, actor, reward = _actor(settings), _actor(settings), _scorer(settings)
        rows = min(questions, evaluation.ROLLOUT_ROWS)
        drawn = _rollout(meter, actor, rows, params, amounts).times(answers / rows)
        texts = _texts(evaluation.BATCH_TOKENS, prompt + new)
        scored = _forward(meter, lambda: score_texts(reward, texts, CPU)).times(answers / len(texts))
        batch = _batch(len(texts), prompt, new)
        compared = _forward(meter, lambda: [policy_logprobs(m, batch, 1.0) for m in (actor, sft)])
        compared = compared.times(questions / len(texts))
        yield Phase("evaluate", "both models", drawn + scored + compared, float(answers) * (prompt + new))


def _rollout(meter: Meter, actor: Any, rows: int, params: Params, amounts: Amounts) -> Need:
    """A batch of responses, none of which ends early: the prompts at once, then token by token."""
    prompt, new = max(1, round(amounts.prompt)), params.generation.max_new_tokens
    sampling, head = Sampling.of(params.generation, (1,)), Head.of(actor)

    def read(width: int, cache: Cache) -> Tensor:
        start = cache.lengths[0] if cache.lengths else 0
        line = Line(torch.ones(rows * width, dtype=torch.long), (width,) * rows, (start,) * rows)
        return head.logits(hidden_states(actor, line, cache)[line.ends])

    def draw(logits: Tensor) -> None:
        sample(logits, torch.ones(rows, dtype=torch.double), sampling)

    room = max(prompt, amounts.longest_prompt) + new
    first = _forward(meter, lambda: draw(read(prompt, Cache(room))))
    cache = Cache(room)
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


def _difference(one: Need, other: Need) -> Need:
    flops, moved, operations = (getattr(one, name) - getattr(other, name) for name in ("flops", "moved", "operations"))
    return Need(one.peak, flops, moved, operations, one.held)


def _cut(budget: int, longest: int) -> tuple[int, int]:
    """The worst batch of a token budget: as many of the longest rows as fit. Rows and their length."""
    length = max(2, longest)
    return max(1, budget // length), length


def _texts(budget: int, length: int) -> list[list[int]]:
    return [[1] * length] * max(1, budget // length)


def _batch(rows: int, prompt: int, new: int, trunk: list[Tensor] | None = None) -> Batch:
    return Batch.of([[1] * prompt] * rows, [[1] * new] * rows, CPU, trunk)


def _experience(tokens: int) -> Experience:
    floats = [torch.zeros(tokens) for _ in range(8)]
    return Experience(torch.ones(tokens, dtype=torch.bool), torch.zeros(1), *floats)


def _actor(settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def _scorer(settings: Any) -> Any:
    labelled = copy.deepcopy(settings)
    labelled.num_labels, labelled.pad_token_id = 1, 0
    return AutoModelForSequenceClassification.from_config(labelled, dtype=torch.float32).eval()


def _weights(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _learning(model: Any) -> int:
    return sum(p.numel() for p in learning(model).values())
