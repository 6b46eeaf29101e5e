"""The pairs that `rlhf label` shows: two answers to one prompt a row, of a file or drawn for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_tasks.config import Params
from rlhf_tasks.data.formats import Compared, parse_compared
from rlhf_tasks.data.json_files import read_jsonl
from rlhf_tasks.errors import UserError

MODELS = ("sft", "actor")


@dataclass(frozen=True)
class Pairs:
    """What is to be judged, by the digest of each pair; `left_out` rows had nothing to compare, or came before."""

    pairs: dict[str, Compared]
    left_out: int


def read_pairs(path: Path) -> Pairs:
    """The pairs of a `.jsonl` file: rows of samples/evaluate.jsonl, or `prompt` and `answers`, a list of two.

    Rows with an empty answer, with the same answer twice and with a pair that came before are left out.

    Raises:
        UserError: the file is missing, or holds no pair, or a row that is none.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: not found; `rlhf run --until evaluate` makes samples/evaluate.jsonl, or name another file with "
            "`--pairs`"
        )
    found, rows = dict[str, Compared](), 0
    with path.open("rb") as file:
        for where, row in read_jsonl(path, file):
            rows += 1
            if isinstance(row, UserError):
                raise row
            row = _as_compared(row)
            if _nothing_to_compare(row.get("answers")):
                continue
            compared = parse_compared(where, row)
            found.setdefault(compared.pair, compared)
    if not found:
        raise UserError(
            f"{path}: found {rows} rows, expected one at least with two different answers; name another file"
        )
    return Pairs(found, rows - len(found))


def draw_pairs(params: Params, root: Path, count: int, out: Path, progress: Callable[..., None]) -> None:
    """Have SFT and the Actor answer `count` training prompts, or all; leave rows as of samples/evaluate.jsonl in `out`.

    The same checkpoints give the same rows, a greater count more.

    Raises:
        UserError: the pipeline has not come so far.
    """
    inputs = {name: root / f"checkpoints/{name}" for name in ("sft", "actor", "reward")}
    table = root / "data/prepared/prompts/train.arrow"
    for path in (*inputs.values(), table):
        if not path.exists():
            raise UserError(f"{path.relative_to(root)}: not found; `rlhf run --until ppo` makes it, then draw again")
    from rlhf_tasks import evaluate, models  # they import torch, which showing pairs needs not

    device, tokenizer = models.set_up_torch(params.runtime), models.load_tokenizer(inputs["sft"])
    questions = evaluate.read_questions(table, count, (params.seed, "label", "prompts"))
    scorer = models.load_scorer(inputs["reward"], device)
    policies, answers = {name: models.load_actor(inputs[name], device) for name in MODELS}, {}
    for done, (name, model) in enumerate(policies.items()):
        progress(done=done, total=len(policies))
        episodes = evaluate.answer(model, questions.encoded, tokenizer, params.generation, params.seed)
        answers[name] = evaluate.measure(episodes, scorer, tokenizer, judge=None)
    temperature = params.generation.temperature
    kl = evaluate.sequence_kl(policies["actor"], policies["sft"], answers["actor"].episodes, temperature)
    out.parent.mkdir(parents=True, exist_ok=True)
    evaluate.save_samples(out, questions, answers, kl, tokenizer)
    progress(done=len(policies), total=len(policies))


def _as_compared(row: dict[str, Any]) -> dict[str, Any]:
    """A row of samples/evaluate.jsonl as a pair; any other row as it is."""
    if not all(name in row for name in MODELS):
        return row
    fields = {"answers": [row[name] for name in MODELS], "models": list(MODELS)}
    if all(f"{name}_score" in row for name in MODELS):
        fields["scores"] = [row[f"{name}_score"] for name in MODELS]
    asked = row.get("asked")
    return (asked if isinstance(asked, dict) else {"prompt": row.get("prompt")}) | fields


def _nothing_to_compare(answers: Any) -> bool:
    texts = [answer.strip() if isinstance(answer, str) else answer for answer in answers or ()]
    return len(texts) == 2 and (texts[0] == texts[1] or "" in texts)
