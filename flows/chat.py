"""`rlhf chat`: SFT and the champion side by side in the terminal, or of lines through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.table import Table
from rich.text import Text

from flows.console import console
from flows.serve import Found, registered
from rlhf_tasks.config import Params
from rlhf_tasks.errors import UserError
from rlhf_tasks.workspace import Workspace

if TYPE_CHECKING:
    from rlhf_tasks.chat import Speaker
    from rlhf_tasks.chat_template import Trained

WHAT_IT_DOES = {
    "none": "Both continue what you type, each line by itself.",
    "alpaca": "Both answer each line by itself, as an instruction.",
    "chat": "Each goes on with its own conversation.",
    "transcript": "Each goes on with its own conversation.",
}


def chat(root: Path, params: Params, uri: str) -> None:
    """Answer line after line, until Ctrl-D or the last one."""
    with registered(root, params, uri) as found:
        speakers = _speakers(Workspace(root, params), found, params)
        console.print(
            f"SFT and {found.name.partition('@')[0]} version {found.version}, with the same draws. "
            f"{WHAT_IT_DOES[speakers[0].template]} Ctrl-D ends it.",
            soft_wrap=True,
            markup=False,
        )
        try:
            for turn, line in enumerate(_lines()):
                _answer(speakers, line, (params.seed, "chat", turn))
        except KeyboardInterrupt:
            sys.exit(130)


def _speakers(workspace: Workspace, found: Found, params: Params) -> list[Speaker]:
    """SFT and the version that came from it, both asked as they were trained."""
    from rlhf_tasks.chat import SFT, Speaker, find_sft, sampling_of
    from rlhf_tasks.models import load_actor, load_tokenizer, set_up_torch
    from rlhf_tasks.registry import INPUT

    sft = find_sft(workspace, found.tags.get(f"{INPUT}{SFT}", ""), f"{found.name} (version {found.version})")
    device, tokenizer = set_up_torch(params.runtime), load_tokenizer(found.folder)
    template = cast("Trained", found.template or ("chat" if tokenizer.chat_template else "none"))
    sampling = sampling_of(found.folder, tokenizer)
    return [
        Speaker(name, load_actor(folder, device), load_tokenizer(folder), template, sampling)
        for name, folder in (("SFT", sft), (found.name, found.folder))
    ]


def _answer(speakers: list[Speaker], line: str, seed_names: tuple[str | int, ...]) -> None:
    """Both answers to a line, or what is wrong with it."""
    try:
        answers = [speaker.answer(line, seed_names) for speaker in speakers]
    except UserError as error:
        console.print(f"rlhf: {error}", soft_wrap=True, markup=False)
        return
    table = Table(show_edge=False, pad_edge=False, expand=True)
    for speaker in speakers:
        table.add_column(speaker.name, ratio=1, overflow="fold")
    table.add_row(*map(Text, answers))  # as it is: an answer may hold what looks like markup
    console.print(table)
    console.print()


def _lines() -> Iterator[str]:
    """What a person types, or a pipe brings."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  # arrow keys and earlier lines in `input`
    else:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> " if typed else "")
        except EOFError:
            return
        if line.strip():
            if not typed:
                console.print(f"> {line}", soft_wrap=True, markup=False)
            yield line
