"""What a person sees in the terminal: live progress, a line a stage, the tables at the end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlhf_tasks.errors import UserError
from rlhf_tasks.report import Report

if TYPE_CHECKING:
    from rlhf_tasks.doctor import Finding
    from rlhf_tasks.registry import Settled

console = Console(highlight=False)

#: what the bar shows of a step's values, and how
SHOWN = {
    "loss": "loss {:.3f}",
    "perplexity": "perplexity {:.0f}",
    "accuracy": "accuracy {:.2f}",
    "objective/score": "score {:+.2f}",
    "objective/kl": "KL {:.2f}",
    "response/length": "length {:.1f}",
}
SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """A live bar on a terminal; elsewhere a line every so often."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._started = self._said = time.monotonic()
        self._first: int | None = None  # what was done before: a run that goes on did not do it now
        columns = (
            TextColumn("  {task.description:9}"), BarColumn(24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[values]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(stage, total=None, values="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, values: dict[str, float]) -> None:
        if self._first is None:
            self._first, self._started = done, time.monotonic()
            if values and done > 1:
                say_resumed(self.stage, "step", done - 1, total)
        text = "  ".join(form.format(values[name]) for name, form in SHOWN.items() if name in values)
        self._bar.update(self._task, completed=done, total=total, values=text)
        now = time.monotonic()
        if not console.is_terminal and values and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            took = now - self._started  # since the first step that was seen, which says nothing of its own
            left = f"  {took / (done - self._first) * (total - done):.0f} s left" if done > self._first else ""
            console.print(f"  {self.stage:9} {done}/{total}  {text}{left}", soft_wrap=True)


def say_resumed(stage: str, unit: str, done: int, total: int) -> None:
    """That work goes on where an earlier run left it."""
    console.print(f"  {stage:9} going on after {unit} {done} of {total}", soft_wrap=True)


def say_stage(stage: str, how: str, seconds: float, headline: str) -> None:
    """One line for a stage that is done: trained, made, or cached."""
    mark = "[dim]=[/dim]" if how == "cached" else "[green]✓[/green]"
    console.print(f"{mark} {stage:9} {how:7} {seconds:6.1f} s  [dim]{headline}[/dim]", soft_wrap=True)


def say_settled(name: str, settled: Settled | None) -> None:
    """Where the registry stands: this Actor's version, and which one is champion."""
    if settled is None:  # MLflow does not answer; that has been said
        return
    if settled.champion == settled.version:
        console.print(f"  {name} version {settled.version} is @champion: `models:/{name}@champion`", soft_wrap=True)
    else:
        champion = f"@champion stays version {settled.champion}" if settled.champion else "there is no @champion"
        how = f"; it was @champion once: `rlhf promote {settled.version} --why ...`" if settled.passed else ""
        console.print(
            f"  {name} version {settled.version} is registered, and not promoted: {champion}{how}", soft_wrap=True
        )


def say_report(report: Report) -> None:
    """The tables that a run ends with."""
    for title, columns, rows in report.tables:
        table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i == 0 or report.is_text(title) else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # as it is: a sample may hold what looks like markup
        console.print()
        console.print(table)
    console.print()
    for line in report.notes:
        console.print(line, soft_wrap=True)


def quiet_prefect() -> None:
    """Keep off the terminal what Prefect says of a user's mistake or Ctrl-C, which this program says itself, and of
    waiting for its own queue at the end. The server still gets it all."""
    quiet = _Quiet()
    for handler in (handler for name in ("prefect", "") for handler in logging.getLogger(name).handlers):
        if "API" not in type(handler).__name__:
            handler.addFilter(quiet)


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UserError | KeyboardInterrupt):
            return False
        message = record.getMessage()
        return not any(
            words in message for words in ("Finished in state", "Execution was aborted by", "Still processing")
        )


def say_finding(finding: Finding) -> None:
    """Print a line of `rlhf doctor`."""
    mark = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "–"}[finding.ok]
    mark = "[yellow]![/yellow]" if finding.advice else mark
    console.print(f"{mark} {finding.name:15} {escape(finding.text)}", soft_wrap=True)
