"""What `rlhf data check` shows: a line a source and table, then what is wrong, file by file, then what is remarked."""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.markup import escape

from flows.console import Bar, console
from rlhf_tasks.config import Params
from rlhf_tasks.data.check import Problem, Report, check
from rlhf_tasks.data.texts import printable
from rlhf_tasks.workspace import state_folder

SHOWN = 20
"""Problems of a file, and places of a remark, that the terminal shows; `--json` has them all."""
SHOWN_PLACES = 3


def check_data(root: Path, params: Params, *, as_json: bool) -> bool:
    """Check the data of `params`, print what was found, and return whether nothing is wrong."""
    scratch = state_folder(root)
    scratch.mkdir(parents=True, exist_ok=True)
    examine = partial(check, seed=params.seed, data=params.data, model=params.model, scratch=scratch)
    if as_json:
        report = examine(progress=lambda **step: None)
        print(json.dumps(report.document(), indent=1, ensure_ascii=False))
    else:
        with Bar("check") as bar:
            report = examine(progress=lambda *, done, total: bar(done, total, {}))
        say_check(report)
    return not report.problems


def say_check(report: Report) -> None:
    """Print a report for a person."""
    for source, rows in report.rows.items():
        _say(f"  {source}: {rows:,} good rows")
    for table, numbers in report.tables.items():
        tokens = ", ".join(
            f"{column} {found['mean']:.0f} (95 % to {found['p95']:.0f}, longest {numbers[f'longest_{column}']})"
            for column, found in numbers.get("tokens", {}).items()
        )
        share = numbers.get("balance", {}).get("share_chosen_longer")
        bias = "" if share is None else f"; the chosen answer is longer in {share:.0%}"
        _say(f"  {table}: {numbers['rows']:,} rows; tokens: {tokens or 'none'}{bias}")
    for file, group in groupby(report.problems, lambda problem: problem.file):
        _say_problems(file, list(group))
    for remark in report.remarks:
        _say(f"{remark.rows:,} {remark.message}", "[yellow]![/yellow] ")
        if len(remark.files) > 1:
            _say("    " + ", ".join(f"{file}: {rows:,}" for file, rows in remark.files.items()))
        _say_some(remark.places, remark.rows, SHOWN_PLACES)
    if report.problems:
        _say(f"{len(report.problems):,} problems; nothing was trained")
    else:
        _say("the data can be prepared", "[green]✓[/green] ")


def _say_problems(file: str, problems: list[Problem]) -> None:
    _say(f"{file}: {len(problems):,} problem{'s' * (len(problems) > 1)}", "[red]✗[/red] ")
    _say_some([problem.message for problem in problems], len(problems), SHOWN)


def _say_some(lines: list[str], count: int, shown: int) -> None:
    for line in lines[:shown]:
        _say(f"    {line}")
    if lines and count > shown:
        _say(f"    and {count - shown:,} more; `--json` lists them")


def _say(line: str, mark: str = "") -> None:
    """Print a line as it is: what a terminal would take for orders is escaped, be it in the name of a file."""
    console.print(mark + escape(printable(line)), soft_wrap=True)
