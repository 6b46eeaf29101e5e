"""Talking to two models at once: the same words to both, and the same draws for both of their answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_tasks.chat_template import Trained
from rlhf_tasks.data.encoding import encode_prompt, render_prompt
from rlhf_tasks.data.formats import Conversation, Message, Prompt
from rlhf_tasks.errors import UserError
from rlhf_tasks.ppo.rollout import Sampling, sample_responses
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import DamagedEntry, digest_path
from rlhf_tasks.workspace import Workspace

SFT = STAGES["sft"].outs["checkpoint"]
ANY_LENGTH = 1 << 20


@dataclass
class Speaker:
    """A model that is talked to.

    Attributes:
        template: how prompts were written for it.
        said: the conversation so far, where its template has conversations.
    """

    name: str
    model: Any
    tokenizer: Any
    template: Trained
    sampling: Sampling
    said: list[Message] = field(default_factory=list)

    def answer(self, text: str, seed_names: tuple[str | int, ...]) -> str:
        """Its answer to what a person says next.

        Args:
            seed_names: what the draws are derived from.

        Raises:
            UserError: nothing can be made of the text.
        """
        asked, remembers = [*self.said, Message("user", text)], self.template in ("chat", "transcript")
        prompt: Prompt = Conversation(tuple(asked)) if remembers else text
        written: Literal["chat", "alpaca", "none"] = "none" if self.template == "transcript" else self.template
        rendered = render_prompt(prompt, written, self.tokenizer)
        ids = encode_prompt(self.tokenizer, rendered, self._room(), markup=written == "chat")
        [response] = sample_responses(self.model, [ids], self.sampling, seed_names).responses
        answer = str(self.tokenizer.decode(response, skip_special_tokens=True))
        if remembers:
            self.said = [*asked, Message("assistant", answer.strip())]
        return answer

    def _room(self) -> int:
        """How many tokens it may be asked with; of more, the last ones count."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return ANY_LENGTH if positions is None else max(1, positions - self.sampling.length)


def sampling_of(folder: Path, tokenizer: Any) -> Sampling:
    """How a registered Actor samples: as it was trained."""
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = settings.get("eos_token_id", [])
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    length, top_k, top_p = settings["max_new_tokens"], settings["top_k"] or None, settings["top_p"]
    return Sampling(length, settings["temperature"], top_k, None if top_p == 1 else top_p, tuple(sorted(stops)))


def find_sft(workspace: Workspace, digest: str, name: str) -> Path:
    """The SFT checkpoint with this digest, in the workspace or in the store.

    Raises:
        UserError: it is in neither.
    """
    here = workspace.root / SFT
    if here.is_dir() and digest_path(here) == digest:
        return here
    for entry in workspace.store.entries():
        if entry.parts.get("checkpoint") == digest and entry.has_payload():
            try:
                entry.verify()
            except DamagedEntry:
                continue
            return entry.payload / "checkpoint"
    found = "another one" if here.is_dir() else "nothing"
    raise UserError(
        f"{SFT}: found {found}, expected the SFT model that {name} came from (digest {digest[:12]}); check out the "
        "commit that made it (`rlhf lineage` names it), then `dvc checkout` or `rlhf run`"
    )
