"""The command line: `rlhf run`, `rlhf stage`, `rlhf status`. It starts flows and turns mistakes into sentences."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows import environment
from flows.run import Stopped, run_here
from flows.server import forced_by_dvc
from rlhf_tasks.closure import SOURCE_ROOT
from rlhf_tasks.config import changed_params, load_params, parse_assignments, set_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.keying import check_sources
from rlhf_tasks.presets import PRESETS, preset_values
from rlhf_tasks.profiles import use_profile
from rlhf_tasks.stages import STAGES, stages_between
from rlhf_tasks.workspace import alone, state_folder

STAGE_NAMES = ", ".join(STAGES)

app = typer.Typer(
    name="rlhf",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"""
From human feedback to a registered, PPO-tuned model: {" → ".join(STAGES)}.

What runs is what `params.yaml` says. Finished work is found again by its content: a second `rlhf run` trains nothing,
a changed parameter runs what depends on it, and a run that was killed goes on where it was.

* `rlhf run`: everything that is out of date
* `rlhf run --set ppo.kl.coef=0.2`: change a parameter in params.yaml, then the same
* `rlhf run --refresh`: do it all again, and see whether it comes out the same
* `rlhf run --from ppo --until evaluate`: only these stages, on what the earlier ones left
* `rlhf preset trl`: write another convention of PPO into params.yaml
* `rlhf use smollm2`: make a profile, a file in profiles/, the params.yaml
* `rlhf status`: what is done, what is out of date; `rlhf why ppo`: what changed, from what to what
* `rlhf lineage models:/rlhf-actor@champion`: where it came from, down to the raw data
* `rlhf reproduce HEAD`: do it again in a clean folder: do all digests agree?
* `rlhf promote 3 --why "..."`, `rlhf rollback --why "..."`: another version becomes @champion
* `rlhf serve`: the champion behind OpenAI's API
* `rlhf chat`: talk to the champion and to SFT, side by side
* `rlhf plan`: memory, work and time of every part, on this machine or on a GPU that you name
* `rlhf gc`: what the store holds that nothing needs any more
* `rlhf data check`: is anything wrong with the data, file by file and row by row?
* `rlhf label`: a page on which people say which of two answers is better, to learn from
* `rlhf doctor`: is anything wrong with the configuration or the checkpoints?
* `dvc repro`: the same work through DVC; `mlflow ui`: every run's curves and the registered models
""",
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Write a parameter into params.yaml first, e.g. ppo.kl.coef=0.2."),
]
SetForNow = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="As if params.yaml said so; it is left as it is."),
]


@app.command()
def run(
    start: Annotated[str, typer.Option("--from", metavar="STAGE", help=f"First stage: {STAGE_NAMES}.")] = "prepare",
    until: Annotated[str, typer.Option(metavar="STAGE", help="Last stage.")] = "register",
    set_: Set = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Do it all again, whatever is stored.")] = False,
) -> None:
    """Run the pipeline: every stage that is out of date, and nothing else."""
    root = Path.cwd()
    stages, values = stages_between(start, until), parse_assignments(set_ or [])
    params = changed_params(root / "params.yaml", values)  # looked at before anything slow is imported
    check_sources(params, root, stages)
    environment.configure_prefect(state_folder(root))
    run_here(root, start, until, values, refresh=refresh)
    from flows.console import say_report
    from rlhf_tasks.report import make_report

    if until in ("evaluate", "register"):
        say_report(make_report(root, params.evaluate.examples, until))


@app.command()
def stage(name: Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {STAGE_NAMES}.")]) -> None:
    """Run one stage, on what the earlier ones left. This is what `dvc repro` calls."""
    root = Path.cwd()
    check_sources(load_params(root / "params.yaml"), root, stages_between(name, name))
    environment.configure_prefect(state_folder(root))
    run_here(root, name, name, refresh=forced_by_dvc())


@app.command()
def preset(name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(PRESETS)}.")]) -> None:
    """Write a known convention of PPO into params.yaml (docs/presets.md), and say what changed."""
    root, values = Path.cwd(), preset_values(name)
    with alone(root):  # another run in this checkout would go on with what is written here
        changes = set_params(root / "params.yaml", values)
    for change in changes:
        print(f"params.yaml: {change}")


@app.command()
def use(name: Annotated[str, typer.Argument(metavar="PROFILE", help="The name of a file in profiles/.")]) -> None:
    """Make a profile, such as `smollm2`, the params.yaml, and say what changed; `rlhf use previous` goes back."""
    root = Path.cwd()
    with alone(root):
        changes = use_profile(root, name)
    for change in changes:
        print(f"params.yaml: {change}")


@app.command()
def status() -> None:
    """Say of every stage whether its result is there, and what it waits for."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    from flows.status import say_status

    say_status(root, params)


@app.command()
def why(
    name: Annotated[str, typer.Argument(metavar="[STAGE]", help=f"One of {STAGE_NAMES}, or nothing: all.")] = "",
) -> None:
    """Say why a stage would run again: what of its inputs changed since its last result, from what to what."""
    root = Path.cwd()
    if name:
        stages_between(name, name)
    params = load_params(root / "params.yaml")
    from flows.status import say_why

    say_why(root, params, name)


@app.command()
def lineage(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="models:/NAME@ALIAS, a git revision, or nothing: this checkout.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print where an Actor came from: every stage, its parameters, code and inputs, down to the raw data."""
    from flows.lineage import say_lineage

    say_lineage(Path.cwd(), name, as_json=as_json)


@app.command()
def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="models:/NAME@ALIAS or a git revision with its dvc.lock.")
    ],
    into: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to; by default a new temporary folder.")
    ] = None,
) -> None:
    """Do it all again in a clean folder, from git and DVC alone: exit 0 if every digest agrees, else 1."""
    root = Path.cwd()
    from flows import reproduce as reproduction

    sys.exit(0 if reproduction.reproduce(root, name, into) else 1)


Why = Annotated[str, typer.Option("--why", metavar="REASON", help="Kept with the version and its run.")]


@app.command()
def promote(
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Of the registered Actor, as MLflow counts.")],
    why: Why,
) -> None:
    """Make a version @champion, whatever the gate said of it."""
    from flows import champion

    champion.promote(Path.cwd(), version, why)


@app.command()
def rollback(why: Why) -> None:
    """Make the version @champion that was it before the present one."""
    from flows import champion

    champion.roll_back(Path.cwd(), why)


@app.command()
def serve(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="models:/NAME@ALIAS or models:/NAME/VERSION; else the champion.")
    ] = "",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; other machines reach 0.0.0.0.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0: one that is free.")] = 8000,
) -> None:
    """Answer OpenAI's API, /v1/chat/completions and /v1/completions, from a registered Actor."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    from flows import serve as serving

    serving.serve(root, params, name, host, port)


@app.command()
def chat(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="models:/NAME@ALIAS or models:/NAME/VERSION; else the champion.")
    ] = "",
) -> None:
    """Talk to a registered Actor and the SFT model that it came from, side by side; Ctrl-D ends it."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    from flows import chat as talk

    talk.chat(root, params, name)


@app.command()
def plan(
    gpu: Annotated[str, typer.Option(metavar="GPU", help="On a GPU, such as H100, 2xA100 or 1x24GB.")] = "",
    set_: SetForNow = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what the configuration needs before it is run: weights, memory, work and time of every part."""
    root = Path.cwd()
    params = changed_params(root / "params.yaml", parse_assignments(set_ or []))
    from flows.plan import say_plan

    say_plan(root, params, gpu, as_json=as_json)


@app.command()
def gc(yes: Annotated[bool, typer.Option("--yes", help="Delete it.")] = False) -> None:
    """Show what the store holds that nothing needs: no lock file, tag, branch, registered version, nor the next run."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    from flows.status import say_unneeded

    with alone(root):
        say_unneeded(root, params, delete=yes)


@app.command()
def doctor() -> None:
    """Check params.yaml and the checkpoints before hours are spent: a line each, ✓ or what to change. `!` is advice;
    with a `✗`, which stops a run or makes its numbers wrong, it exits with 1."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    from flows.console import say_finding
    from rlhf_tasks.doctor import examine

    findings = []
    for finding in examine(root, params):
        say_finding(finding)
        findings.append(finding)
    sys.exit(1 if any(finding.fault for finding in findings) else 0)


@app.command()
def label(
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt and two answers a row; samples/evaluate.jsonl.")
    ] = None,
    draw: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="First have SFT and the Actor answer N training prompts.")
    ] = None,
    into: Annotated[Path, typer.Option(metavar="FILE", help="What is said is added to it.")] = Path(
        "data/labels.jsonl"
    ),
    host: Annotated[str, typer.Option(help="Where to listen; any other than this machine is for all who reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Its port; 0 takes a free one.")] = 8765,
) -> None:
    """Show people a prompt and two answers, on a page on this machine, and keep what they say (docs/label.md)."""
    root = Path.cwd()
    if pairs and draw:
        raise UserError("--draw: shows what it draws; leave --pairs out, or give its file later as --pairs")
    params = load_params(root / "params.yaml")
    from flows import label as labelling

    shown = labelling.draw(root, params, draw) if draw else pairs or Path(STAGES["evaluate"].outs["samples.jsonl"])
    labelling.serve(root, params, shown, into, host, port)


data = typer.Typer(no_args_is_help=True, help="Look at the data of `data.sources`.")
app.add_typer(data, name="data")


@data.command("check")
def data_check(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Say all that is wrong with the data, file by file and row by row, before any training; then exit with 2."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    from flows.data import check_data

    sys.exit(0 if check_data(root, params, as_json=as_json) else 2)


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit status 2, Ctrl-C is 130."""
    _run_this_checkout()
    try:
        app(prog_name="rlhf")
    except UserError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Stopped):
        print("rlhf: stopped; what is finished is kept, `rlhf run` goes on from there", file=sys.stderr)
        sys.exit(130)


def _run_this_checkout() -> None:
    """Run the code of the checkout that one stands in: a second clone, say, or a DVC experiment."""
    here = Path.cwd()
    if (here / "rlhf_tasks").is_dir() and not here.samefile(SOURCE_ROOT) and not sys.flags.safe_path:
        os.execv(sys.executable, [sys.executable, "-m", "flows.cli", *sys.argv[1:]])


if __name__ == "__main__":
    main()
