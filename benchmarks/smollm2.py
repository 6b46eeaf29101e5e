"""What the profile `smollm2` learns, beside bags of words on the same pairs: a section of docs/results.md.

    git clone . ../smollm2 && cd ../smollm2 && rlhf use smollm2 && rlhf run && cd -
    python benchmarks/smollm2.py ../smollm2

Nothing is trained here but the bags of words.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from results import REPOSITORY, Texts, agreement, bag_of_words_accuracy, vader_accuracy
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV

from rlhf_tasks.models import load_tokenizer

PAGE, TITLE = REPOSITORY / "docs/results.md", "## SmolLM2-135M-Instruct, on the same ratings"
WORDS = 6  # a text is found by its first words
READING = """
One run, seed 0, with the settings of the profile `smollm2` as they are now, on the code of revision f524b75; sums have
been rounded otherwise since, so another run draws other answers. The settings were chosen before it and not since.
A model of 135 million weights that has read much orders the pairs far better than bags of words do, and than the tiny
model above. The Actor gains what the tiny one gains, at like KL, and with shorter answers. Where both answers are cut
to the shorter one's length, which takes the ends of sentences away, nearly all of the Reward's gain is gone and all of
VADER's stays: this Reward, which has seen whole sentences only, is a poor judge of cut ones.

It took 5,700 s of CPU time, 48 minutes of both cores: SFT 31, reward 37, PPO 29 and evaluation 2 in a hundred. By the
clock it was 88 minutes, of which it stood still for about a third while other measurements ran. Peak memory: SFT 4.7,
reward 4.9, PPO 7.2, evaluation 2.8 GB.
""".strip().split("\n")


def ridge_accuracy(clone: Path, train: Texts, heldout: Texts) -> float:
    """Ridge regression of the mean rating of a training text on its words and word pairs: does it order the pairs?"""
    with gzip.open(clone / "data/raw/movie_reviews.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ratings = {key(row["text"]): float(np.mean(row["ratings"])) for row in rows}
    texts = sorted({text for text in (*train.chosen, *train.rejected) if key(text) in ratings})
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit(texts)
    model = RidgeCV(alphas=(0.3, 1.0, 3.0, 10.0)).fit(vectors.transform(texts), [ratings[key(text)] for text in texts])
    chosen, rejected = (model.predict(vectors.transform(side)) for side in (heldout.chosen, heldout.rejected))
    return agreement(chosen - rejected)


def key(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def section(clone: Path) -> str:
    """The page's section."""
    of = {stage: json.loads((clone / f"metrics/{stage}.json").read_text()) for stage in ("sft", "reward", "evaluate")}
    tokenizer = load_tokenizer(clone / "checkpoints/sft")
    train, heldout = (Texts(clone, split, tokenizer) for split in ("train", "heldout"))
    vader, (low, high) = vader_accuracy(heldout)
    reward, found = of["reward"], of["evaluate"]
    lines = [
        TITLE,
        "",
        *READING,
        "",
        "| accuracy on the same held-out pairs | |",
        "| --- | --- |",
        f"| Reward | {interval(reward, 'accuracy', '.3f')} |",
        f"| ridge regression of ratings on words and word pairs | {ridge_accuracy(clone, train, heldout):.3f} |",
        f"| logistic regression of preferences on words and word pairs | {bag_of_words_accuracy(train, heldout):.3f} |",
        f"| VADER | {vader:.3f} [{low:.3f}, {high:.3f}] |",
        "",
        "| SFT against Actor | |",
        "| --- | --- |",
        f"| SFT's held-out perplexity a token | {of['sft']['heldout_perplexity']:.1f} |",
        f"| score gain, sd | {interval(found, 'score_gain', '+.2f')} |",
        f"| score gain at equal length, sd | {interval(found, 'equal_length_score_gain', '+.2f')} |",
        f"| VADER gain | {interval(found, 'judge_gain', '+.3f')} |",
        f"| VADER gain at equal length | {interval(found, 'equal_length_judge_gain', '+.3f')} |",
        f"| KL to SFT, nats a response | {interval(found, 'kl_sequence', '.2f')} |",
        f"| win rate over SFT | {found['win_rate']:.3f} |",
        f"| length of the Actor's answers / SFT's | {found['length_ratio']:.2f} |",
        f"| EOS rate, SFT and Actor | {both(found, 'eos_rate', '.2f')} |",
        f"| distinct bigrams, SFT and Actor | {both(found, 'distinct_bigrams', '.3f')} |",
        "",
        "The first prompts of the evaluation:",
        "",
        "| prompt | SFT | Actor |",
        "| --- | --- | --- |",
        *samples(clone, 8),
    ]
    return "\n".join(lines) + "\n"


def interval(metrics: dict[str, Any], name: str, form: str) -> str:
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{metrics[name]:{form}} [{low:{form}}, {high:{form}}]"


def both(metrics: dict[str, Any], name: str, form: str) -> str:
    return f"{metrics[f'sft_{name}']:{form}}, {metrics[f'actor_{name}']:{form}}"


def samples(clone: Path, count: int) -> list[str]:
    path = next((clone / "samples").glob("*.jsonl"))
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    cells = ([row[name].replace("\n", " ").replace("|", "\\|") for name in ("prompt", "sft", "actor")] for row in rows)
    return [f"| {' | '.join(row)} |" for row in cells]


def main() -> None:
    before = PAGE.read_text().split(TITLE)[0].rstrip()
    PAGE.write_text(f"{before}\n\n{section(Path(sys.argv[1]).resolve())}")


if __name__ == "__main__":
    main()
