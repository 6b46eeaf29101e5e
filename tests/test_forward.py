"""Texts in one line, read by our own attention: each says what the model itself says of that text alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, write_shape
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from rlhf_tasks import forward, head
from rlhf_tasks.data.batching import Batch, Line
from rlhf_tasks.forward import IN_LINE, Cache, hidden_states, states_before
from rlhf_tasks.head import Head
from rlhf_tasks.models import load_actor, load_scorer, new_scorer

CPU = torch.device("cpu")
LENGTHS = (1, 13, 4, 30, 9)
"""Of texts: two of them go far beyond a sliding window of 8."""
PROMPTS, ANSWERS = (3, 11, 1, 9, 20), (12, 2, 5, 9, 2)
CAPPED = "gemma2, closely capped"
NAMES = [*SHAPES, CAPPED]
EXACT = [(torch.float32, 1e-4), (torch.float64, 1e-9)]


def texts(*lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 280, (length,), generator=random).tolist() for length in lengths]


def close(actual: Tensor, expected: Tensor, gap: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=gap, atol=gap)


def read(model: Any, line: Line, cache: Cache | None = None) -> Tensor:
    """Our logits, `[N, V]`."""
    return Head.of(model).logits(hidden_states(model, line, cache))


def alone(model: Any, text: Sequence[int]) -> Tensor:
    """The model's own logits of one text, `[L, V]`."""
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes the model of a shape. Where scores are softly capped, the model's own attention is the one that does so.

    That takes its softmax in float32 whatever the model's precision, as Gemma's norms take their weights: here they do
    not, so that float64 has its digits.
    """
    softmax, to_float = torch.nn.functional.softmax, Tensor.float
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    monkeypatch.setattr(Tensor, "float", lambda x: x if isinstance(x, Parameter) else to_float(x))
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
    gemma = SHAPES["gemma2"]
    monkeypatch.setitem(shapes.SHAPES, CAPPED, replace(gemma, settings=gemma.settings | caps))

    def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
        folder = tmp_path_factory.mktemp("shape")
        model = write_shape(name, folder)
        if name.startswith("gemma2"):
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return model.to(dtype).eval()

    return made


# A line --------------------------------------------------------------------------------------------------------------

rows = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=5)


@given(rows)
def test_a_line_is_texts_end_to_end(of: list[list[int]]) -> None:
    line = Line.of(of, CPU)
    assert line.ids.tolist() == [token for text in of for token in text]
    assert line.positions.tolist() == [place for text in of for place in range(len(text))]
    assert line.ends.tolist() == [end - 1 for end in accumulate(map(len, of))]
    assert [part.tolist() for part in line.ids.split(line.lengths)] == of


def test_a_text_may_go_on_where_it_was() -> None:
    line = Line(torch.tensor([5, 6, 7]), (1, 2), (4, 0))
    assert line.positions.tolist() == [4, 0, 1]
    assert line.ends.tolist() == [0, 2]


@given(rows, st.randoms(use_true_random=False))
def test_a_batch_knows_its_responses(prompts: list[list[int]], random: Any) -> None:
    responses = [[random.randrange(10, 20) for _ in range(random.randrange(1, 5))] for _ in prompts]
    batch = Batch.of(prompts, responses, CPU)
    assert batch.line.ids.tolist() == [
        t for pair in zip(prompts, responses, strict=True) for side in pair for t in side
    ]
    assert batch.tokens.tolist() == [token for response in responses for token in response]


# Logits and scores ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "gap"), EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_each_text_in_a_line_says_what_it_says_alone(make: Any, name: str, dtype: torch.dtype, gap: float) -> None:
    model, of = make(name, dtype), texts(*LENGTHS)
    logits = read(model, Line.of(of, CPU)).split(LENGTHS)
    for text, found in zip(of, logits, strict=True):
        assert found.dtype == dtype
        close(found, alone(model, text), gap)
    assert torch.cat(logits).std() > 0.3, "the model is sharp enough for this to say something"


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(1,), (30,), (1, 1, 1), (12, 12), (9, 1)])
@pytest.mark.parametrize("name", ["mistral", "gpt2", CAPPED])
def test_lines_of_one_text_and_of_equal_texts(make: Any, name: str, lengths: tuple[int, ...]) -> None:
    model, of = make(name, torch.float64), texts(*lengths)
    for text, found in zip(of, read(model, Line.of(of, CPU)).split(lengths), strict=True):
        close(found, alone(model, text), 1e-9)


@torch.no_grad()
def test_caps_and_windows_are_there_to_be_seen(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them these models would say something else of these texts."""
    (text,) = texts(30)
    capped = make(CAPPED, torch.float64)
    before = alone(capped, text)
    capped.set_attn_implementation("sdpa")  # which knows no cap
    assert (alone(capped, text) - before).abs().max() > 1e-3
    models = [make(name, torch.float64) for name in ("mistral", "gemma2", "gemma3")]
    narrow = [read(model, Line.of([text], CPU)) for model in models]
    allowed = forward._Reading._allowed
    monkeypatch.setattr(forward._Reading, "_allowed", lambda self, width, window: allowed(self, width, None))
    for model, logits in zip(models, narrow, strict=True):
        assert (read(model, Line.of([text], CPU)) - logits).abs().max() > 1e-3


@pytest.fixture(params=["tiny_actor", "absolute_actor"])
def architecture(request: pytest.FixtureRequest) -> Path:
    """A checkpoint with rotary positions, and one with learned ones."""
    return request.getfixturevalue(request.param)


@torch.no_grad()
def test_states_before_responses_do_not_depend_on_the_rest_of_the_line(architecture: Path) -> None:
    """Row by row against all rows in one line, and against the model's own plain call."""
    actor = load_actor(architecture, CPU)
    prompts, responses = [[9], [17, 40, 60, 21, 33], [25, 80]], [[70, 31, 52, 1], [44, 1], [11, 12, 13]]

    def logits(*of: int) -> Tensor:
        batch = Batch.of([prompts[i] for i in of], [responses[i] for i in of], CPU)
        return Head.of(actor).logits(states_before(actor, batch))

    together = logits(0, 1, 2).split([len(response) for response in responses])
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        close(together[row], logits(row))
        close(together[row], alone(actor, [*prompt, *response])[len(prompt) - 1 : -1])
    assert (together[0][0] - together[1][0]).abs().max() > 0.5  # sharp enough for this to say something


@torch.no_grad()
def test_token_scores_do_not_depend_on_neighbours(architecture: Path, tokenizer: Any) -> None:
    scorer, of = new_scorer(architecture, tokenizer, 0, "reward", CPU), texts(*LENGTHS)
    together = scorer.score(hidden_states(scorer, Line.of(of, CPU))).squeeze(-1)
    assert together.shape == (sum(LENGTHS),)
    for text, found in zip(of, together.split(LENGTHS), strict=True):
        trunk = getattr(scorer, scorer.base_model_prefix)
        close(found, scorer.score(trunk(input_ids=torch.tensor([text])).last_hidden_state)[0, :, 0])
    assert together.std() > 0.01


@torch.no_grad()
def test_the_last_token_score_is_what_the_class_itself_says(tiny_scorer: Path) -> None:
    """So a Reward folder means the same to everybody who loads it with transformers, and pads."""
    scorer, of = load_scorer(tiny_scorer, CPU), texts(*LENGTHS)
    line = Line.of(of, CPU)
    ids = pad_sequence([torch.tensor(text) for text in of], batch_first=True, padding_value=scorer.config.pad_token_id)
    own = scorer(input_ids=ids, attention_mask=(ids != scorer.config.pad_token_id).long()).logits[:, 0]
    close(scorer.score(hidden_states(scorer, line)[line.ends]).squeeze(-1), own)


# Decoding ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model: Any, of: list[list[int]], prompts: Sequence[int]) -> list[Tensor]:
    """Logits after each prompt and each token but the last of what follows; a text that is at its end leaves."""
    found: list[list[Tensor]] = [[] for _ in of]
    rows, cache = list(range(len(of))), Cache(max(map(len, of)))
    line = Line.of([text[:prompt] for text, prompt in zip(of, prompts, strict=True)], CPU)
    while rows:
        for row, logits in zip(rows, read(model, line, cache)[line.ends], strict=True):
            found[row].append(logits)
        assert cache.lengths == [prompts[row] + len(found[row]) - 1 for row in rows]
        going_on = [i for i, row in enumerate(rows) if cache.lengths[i] + 1 < len(of[row])]
        cache.keep(going_on, torch.tensor(going_on, dtype=torch.long))
        rows = [rows[i] for i in going_on]
        tokens = torch.tensor([of[row][length] for row, length in zip(rows, cache.lengths, strict=True)])
        line = Line(tokens, (1,) * len(rows), tuple(cache.lengths))
    return [torch.stack(logits) for logits in found]


def check_decoding(model: Any, prompts: Sequence[int], answers: Sequence[int], gap: float) -> None:
    of = texts(*(prompt + answer for prompt, answer in zip(prompts, answers, strict=True)))
    for text, prompt, found in zip(of, prompts, decode(model, of, prompts), strict=True):
        assert len(found) == len(text) - prompt
        close(found, alone(model, text)[prompt - 1 : -1].detach(), gap)


@pytest.mark.parametrize(("dtype", "gap"), EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_token_by_token_is_whole_passes(make: Any, name: str, dtype: torch.dtype, gap: float) -> None:
    check_decoding(make(name, dtype), PROMPTS, ANSWERS, gap)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2", CAPPED])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(of=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 12)), min_size=1, max_size=5))
def test_decoding_of_any_prompts_and_answers(make: Any, name: str, of: list[tuple[int, int]]) -> None:
    check_decoding(make(name, torch.float64), *zip(*of, strict=True), 1e-9)


# Gradients -----------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check_gradients(ours: dict[str, Tensor], own: dict[str, Tensor], gap: float) -> None:
    assert ours.keys() == own.keys()
    for name, gradient in ours.items():
        most = own[name].abs().max().clamp(min=1).item()
        torch.testing.assert_close(
            gradient, own[name], rtol=gap, atol=gap * most, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("dtype", "gap"), EXACT)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameters_gradient_is_that_of_the_plain_call(
    make: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, gap: float
) -> None:
    """Of a loss of log-probabilities and entropies, in pieces that cut through texts."""
    model, temperature = make(name, dtype), 0.7
    monkeypatch.setattr(head, "PIECE_ELEMENTS", 4 * model.config.vocab_size)
    prompts, answers = texts(*PROMPTS), texts(*ANSWERS)
    batch = Batch.of(prompts, answers, CPU)
    weights = torch.linspace(-1, 1, len(batch.tokens), dtype=dtype)

    def loss_of(piece: slice, logprobs: Tensor, entropies: Tensor) -> Tensor:
        return (weights[piece] * logprobs).sum() + 0.3 * entropies.sum()

    head.learn(Head.of(model), states_before(model, batch), batch.tokens, temperature, loss_of, with_entropy=True)
    ours = gradients(model)
    logits = [alone(model, [*p, *a])[len(p) - 1 : -1] for p, a in zip(prompts, answers, strict=True)]
    logp = (torch.cat(logits) / temperature).log_softmax(-1)
    chosen = logp.gather(1, batch.tokens[:, None])[:, 0]
    loss_of(slice(None), chosen, -(logp.exp() * logp).sum(-1)).backward()
    own = gradients(model)
    check_gradients(ours, own, gap)
    assert own.keys() == {name for name, _ in model.named_parameters()}
    assert sum(gradient.norm() for gradient in own.values()) > 1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_through_every_state(make: Any, name: str) -> None:
    """As the Reward's and the Critic's do, from each token of the line."""
    model, of = make(name, torch.float64), texts(*LENGTHS)
    trunk = getattr(model, model.base_model_prefix)

    def loss_of(states: Tensor) -> Tensor:
        return (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum()

    loss_of(hidden_states(model, Line.of(of, CPU))).backward()
    ours = gradients(model)
    loss_of(torch.cat([trunk(input_ids=torch.tensor([text])).last_hidden_state[0] for text in of])).backward()
    check_gradients(ours, gradients(model), 1e-9)


# The model itself ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_the_model_has_its_own_attention_again(make: Any, name: str) -> None:
    """After a line was read, and after reading one failed."""
    model, (text,) = make(name), texts(20)
    usual, before = model.config._attn_implementation, alone(model, text)
    assert usual == ("eager" if name == "gemma2" else "sdpa")
    hidden_states(model, Line.of([text], CPU))
    assert model.config._attn_implementation == usual
    assert torch.equal(alone(model, text), before)
    with pytest.raises(IndexError):
        hidden_states(model, Line.of([text, [10**6]], CPU))
    assert model.config._attn_implementation == usual
    assert forward._READING.get(None) is None
    assert torch.equal(alone(model, text), before)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_what_was_read_is_saved_as_it_was(make: Any, name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "before")
    hidden_states(model, Line.of(texts(*LENGTHS), CPU))
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / when / "config.json").read_text() for when in ("before", "after"))
    assert after == before
    assert IN_LINE not in after
    assert IN_LINE not in json.dumps(model.config.to_dict(), default=str)
