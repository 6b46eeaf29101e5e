"""What the small project of the tests is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_tasks.store import Entry
from rlhf_tasks.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SENTENCES = [
    "A warm and funny film, and a rare one.",
    "The film is dull, the jokes are old and the ending is a mess.",
    "An old story, told with warmth and with a rare sense of fun.",
    "The acting is fine, but the story is a mess.",
    "A dull and overlong mess of a film.",
]
PARAMS = """\
seed: 0
runtime:
  threads: 1
data:
  sources:
    - kind: ratings
      path: data/raw/ratings.jsonl  # the first of the shipped ones
  template: none
  heldout: 0.3
  max_prompt_tokens: 16
  max_response_tokens: 40
model:
  scratch: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
generation:
  max_new_tokens: 6
sft: {epochs: 1, learning_rate: 2.0e-3, batch_tokens: 1024}
reward: {epochs: 1, learning_rate: 1.0e-3, batch_tokens: 1024, statistics_samples: 16}
ppo:
  iterations: 2
  batch: 8
  epochs: 2
  minibatches: 2
  micro_batch_tokens: 128
  actor_learning_rate: 1.0e-3
  critic_learning_rate: 1.0e-3
evaluate: {prompts: 16, judge: vader, bootstrap: 200}
"""


@dataclass(frozen=True)
class Finished:
    """A project with every stage but register done, and the entries of the stages."""

    workspace: Workspace
    entries: dict[str, Entry]
