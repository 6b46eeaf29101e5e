"""Model cards: what was measured of a registered model, on what, how it was made, and what nobody has measured.

Pure functions of `Facts`, which facts.py gathers. A card is Markdown with a YAML header, as the Hub has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rlhf_tasks import config
    from rlhf_tasks.registry import Outcome, TrackingContext
    from rlhf_tasks.report import Table

T = TypeVar("T")

NOT_STATED = "not stated: no licence file lies beside it"


@dataclass(frozen=True)
class Origin:
    """Something from outside that a model was made of: a file of data, or the model that training began with.

    Attributes:
        digest: SHA-256, or the commit of what is on the Hub.
    """

    name: str
    kind: str
    digest: str
    licence: str = NOT_STATED


@dataclass(frozen=True)
class Facts:
    """What is known of how a pipeline's models were made.

    Attributes:
        template: how prompts were written (rlhf_tasks/chat_template.py).
        chat_template: the same in Jinja.
        origins: data and base.
        recipe: the parameters of each stage, by their dotted names.
        environment: libraries and hardware that numbers depend on.
        keys: each stage's key.
        metrics: each stage's `metrics.json`.
        results: the tables that a run which ends with a stage ends with, for reward and evaluate.
        weights: how many the Actor has.
    """

    template: str = "none"
    chat_template: str = ""
    origins: Sequence[Origin] = ()
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    results: Mapping[str, Sequence[Table]] = field(default_factory=dict)
    weights: int = 0


def actor_card(
    name: str, generation: config.Generation, outcomes: Sequence[Outcome], facts: Facts, tracking: TrackingContext
) -> str:
    """The Actor's card."""
    call = f"generate({tracking.example!r}, return_full_text=False)"
    if facts.template in ("chat", "alpaca", "transcript"):
        call = f'generate([{{"role": "user", "content": {tracking.example!r}}}], return_full_text=False)'
    return "\n".join(
        [
            *_header("text-generation", ["rlhf", "ppo"], facts),
            f"# {name}\n",
            "A language model tuned from human feedback: supervised fine-tuning (SFT), a reward model, PPO"
            f"{f', {facts.weights:,} weights' if facts.weights else ''}.\n",
            *_code("import mlflow", "", f'generate = mlflow.transformers.load_model("models:/{name}@champion")', call),
            f"It samples as it was trained: temperature {generation.temperature}, at most {generation.max_new_tokens} "
            f"new tokens. {_TEMPLATES[facts.template]}\n",
            *_data(facts),
            *_results(facts, "evaluate"),
            "The gate's rules, which a version must pass to become @champion by itself:\n",
            *_table(
                ["rule", "found", "limit", ""],
                ([o.name, f"{o.found:.4g}", f"{o.limit:.4g}", "passed" if o.passed else "failed"] for o in outcomes),
            ),
            "## Limits\n",
            *(f"- {limit}" for limit in actor_limits(facts, generation)),
            "",
            *_recipe(facts),
            *_lineage(name, {"actor_digest": tracking.actor_digest, **tracking.tags}, facts),
        ]
    )


def reward_card(name: str, digest: str, example: str, tags: Mapping[str, str], facts: Facts) -> str:
    """The reward model's card."""
    call = f'reward.predict([{{"prompt": {example!r}, "response": "..."}}])'
    return "\n".join(
        [
            *_header("text-classification", ["rlhf", "reward-model"], facts),
            f"# {name}\n",
            "A reward model: a number for how much people would like a response to a prompt, learnt from pairs of "
            "which they preferred one. Only differences between responses to one prompt mean anything.\n",
            *_code("import mlflow", "", f'reward = mlflow.pyfunc.load_model("models:/{name}/latest")', call),
            "`score` is the model's own number; `normalised` is that in standard deviations of SFT's answers, from "
            'their mean. A response counts as ended (EOS); with `params={"ended": False}` as cut.\n',
            *_data(facts),
            *_results(facts, "reward"),
            "## Limits\n",
            *(f"- {limit}" for limit in reward_limits(facts)),
            "",
            *_recipe(facts, until="reward"),
            *_lineage(name, {"reward_digest": digest, **tags}, facts, until="reward"),
        ]
    )


_TEMPLATES = {
    "chat": "It was trained with the tokenizer's own chat template.",
    "alpaca": "It was trained with the alpaca template, which the tokenizer here has as its chat template.",
    "transcript": "It was trained on transcripts (Human, Assistant), which the tokenizer here writes as its template.",
    "none": "It was trained to continue texts, without any template.",
}


def actor_limits(facts: Facts, generation: config.Generation) -> list[str]:
    """What the numbers do not say, and what became worse, each a sentence."""
    limits, m = [], facts.metrics.get("evaluate", {})
    if m:
        limits.append(
            f"Measured on {m['prompts']:.0f} held-out prompts of the same data, sampled as above: of other data, "
            "languages or temperatures nothing is known. The intervals are over prompts, not over training seeds."
        )
        limits += _what_changed(m)
    limits += reward_limits(facts)[:1]
    if data := facts.recipe.get("prepare"):
        limits.append(
            f"No prompt had more than {data['data.max_prompt_tokens']} tokens, and no answer more than "
            f"{generation.max_new_tokens}: longer ones are beyond what it was trained for."
        )
    return [*limits, "Nobody measured facts, harm, bias or safety. It may repeat what its data says."]


def reward_limits(facts: Facts) -> list[str]:
    """The same of the reward model; the first concerns whoever is trained with it."""
    m = facts.metrics.get("reward", {})
    if not m:
        return ["How often the reward model agrees with people is not known here."]
    percent = {name: 100 * value for name, value in m.items() if isinstance(value, float)}
    limits = [
        "The reward model agrees with people on {accuracy:.1f} % of held-out pairs (95 % interval {accuracy_low:.1f} "
        "to {accuracy_high:.1f}); training towards its score exploits what it gets wrong.".format_map(percent)
    ]
    if "scored_longer_higher_share" in m:
        limits.append(
            "Of two answers of different length it prefers the longer one in {scored_longer_higher_share:.0f} % of "
            "held-out pairs; people do so in {chosen_longer_share:.0f} % of all pairs.".format_map(percent)
        )
    return [*limits, "It knows texts like those of its data; elsewhere its score means little."]


def _what_changed(m: Mapping[str, Any]) -> list[str]:
    """What PPO changed beside the score."""
    found = [f"Distance from SFT: {m['kl_sequence']:.2f} nats a response."]
    pairs = (
        ("distinct_bigrams", "distinct bigrams", "{:.3f}"),
        ("eos_rate", "the share of answers that end by themselves", "{:.2f}"),
        ("length", "mean length in tokens", "{:.1f}"),
    )
    changes = [f"{text} {form.format(m[f'sft_{n}'])} to {form.format(m[f'actor_{n}'])}" for n, text, form in pairs]
    found.append(f"Beside the score, from SFT to the Actor: {'; '.join(changes)}.")
    if m.get("equal_length_score_gain_low", 1) <= 0:
        found.append("Cut to equal length, the gain in reward score may be none: its interval includes 0.")
    if m.get("judge_gain_low", 1) <= 0:
        found.append("By a judge that training never saw, the gain may be none: its interval includes 0.")
    if "judge_gain" not in m:
        found.append("No judge but the reward model that PPO trained towards was asked (`evaluate.judge`).")
    return found


def _header(task: str, tags: list[str], facts: Facts) -> list[str]:
    """The YAML header. What the weights' licence is, their maker must say."""
    base = next((origin for origin in facts.origins if origin.kind == "base model" and origin.licence == HUB), None)
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", f"tags: [{', '.join(tags)}]"]
    return [*lines, *([f"base_model: {base.name}"] if base else []), "---"]


HUB = "as its page on the Hub says"


def _code(*lines: str) -> list[str]:
    *body, last = lines
    return ["```python", *body, f"print({last})", "```", ""]


def _data(facts: Facts) -> list[str]:
    if not facts.origins:
        return []
    rows = ([f"`{o.name}`", o.kind, f"`{o.digest}`", o.licence] for o in facts.origins)
    counts = {k: v for k, v in facts.metrics.get("prepare", {}).items() if not isinstance(v, dict)}
    told = ", ".join(f"{name.replace('_', ' ')} {count:,.0f}" for name, count in counts.items())
    text = [f"Rows: {told}. No text is in two splits.\n"] if told else []
    return ["## Data\n", *_table(["what", "kind", "SHA-256 or commit", "licence"], rows), *text]


def _results(facts: Facts, stage: str) -> list[str]:
    tables = facts.results.get(stage, ())
    lines = ["## Results\n"] if tables else []
    for title, columns, rows in tables:
        lines += [f"{title}:\n", *_table(columns, rows)] if rows else []
    return lines


def _recipe(facts: Facts, until: str = "evaluate") -> list[str]:
    if not facts.recipe:
        return []
    rows = (
        [stage, ", ".join(f"{name}={json.dumps(v)}" for name, v in values.items() if v is not None)]
        for stage, values in _until(until, facts.recipe)
    )
    environment = ", ".join(f"{name} {_plain(value)}" for name, value in facts.environment.items())
    return ["## Recipe\n", *_table(["stage", "parameters"], rows), f"Made with {environment}.\n"]


def _lineage(name: str, tags: Mapping[str, str], facts: Facts, until: str = "evaluate") -> list[str]:
    rows = [[key, f"`{value}`"] for key, value in sorted(tags.items())]
    rows += [[f"key of {stage}", f"`{key}`"] for stage, key in _until(until, facts.keys)]
    return [
        "## Lineage\n",
        f"`rlhf lineage models:/{name}/VERSION` tells every stage down to the raw data, `rlhf reproduce` makes it "
        "again and compares digests.\n",
        *_table(["made from", ""], rows),
    ]


def _until(stage: str, by_stage: Mapping[str, T]) -> list[tuple[str, T]]:
    """What there is of the stages up to one: what comes later is no part of what that one made."""
    names = list(by_stage)
    return [(name, by_stage[name]) for name in names[: names.index(stage) + 1 if stage in names else None]]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, and the blank line after it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(map(_cell, line))} |" for line in lines), ""]


def _cell(text: str) -> str:
    """A text that ends neither its cell nor its row."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
