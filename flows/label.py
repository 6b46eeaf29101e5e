"""`rlhf label`: people say on a page which of two answers is better; what the terminal shows of it."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn

from flows.console import Bar, console
from flows.label_page import application
from rlhf_tasks.agreement import Share, agreement
from rlhf_tasks.config import Params
from rlhf_tasks.data.contracts import is_heldout, prompt_text
from rlhf_tasks.data.files import source_files
from rlhf_tasks.data.judgements import standing
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_desk import Desk
from rlhf_tasks.label_file import LabelFile
from rlhf_tasks.to_label import Pairs, draw_pairs, read_pairs
from rlhf_tasks.workspace import alone

DRAWN = Path("samples/label.jsonl")


def draw(root: Path, params: Params, count: int) -> Path:
    """Have SFT and the Actor answer training prompts; where the answers are."""
    with alone(root), Bar("draw") as bar:  # a run would change the checkpoints meanwhile
        draw_pairs(params, root, count, root / DRAWN, lambda *, done, total: bar(done, total, {}))
    return DRAWN


def serve(root: Path, params: Params, pairs: Path, into: Path, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, then say what there is.

    Raises:
        UserError: there is nothing to judge, the file cannot be written, or the port cannot be had.
    """
    found, file = read_pairs(pairs), LabelFile(into)
    with _listen(host, port) as listener:
        _say_beginning(params, root, pairs, found, file)
        if not _is_loopback(host):
            _say("  whoever reaches this address can judge, under any name")
        _say(f"  http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}  (Ctrl-C ends it)")
        settings = uvicorn.Config(
            application(Desk(found.pairs, file), host),
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run([listener])
    _say_labels(file)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OverflowError:
        raise UserError(f"--port: found {port}, expected 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken; `--port {port + 1}` takes the next one") from None
        raise UserError(f"{host}:{port}: cannot be listened on ({error.strerror}); correct --host or --port") from None


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _say_beginning(params: Params, root: Path, path: Path, found: Pairs, file: LabelFile) -> None:
    held = sum(is_heldout(prompt_text(pair.prompt), params.data.heldout) for pair in found.pairs.values())
    left_out = f"; left out: {found.left_out}, with nothing to compare" if found.left_out else ""
    _say(f"  {path}: {len(found.pairs)} pairs to judge{left_out}")
    _say(f"  {len(found.pairs) - held} have prompts of the training side, {held} held-out ones, which train nothing")
    if held == len(found.pairs):
        _say("  `rlhf label --draw 100` has 100 training prompts answered, to learn from")
    _say(f"  judgements go to {file.path}: {len(file.judged())} lines so far")
    if not _is_source(params, root, file.path):
        _say(f"  to train on them, add to `data.sources` in params.yaml: - {{kind: labels, path: {file.path}}}")


def _is_source(params: Params, root: Path, path: Path) -> bool:
    files = list[str]()
    for source in params.data.sources:
        with suppress(UserError):
            files += source_files(source.path, root) if source.path and source.kind == "labels" else []
    return any((root / name).resolve() == path.resolve() for name in files)


def _say_labels(file: LabelFile) -> None:
    """What the file holds, and how far everybody agrees."""
    judged = standing(file.judged())
    found = agreement(judged)
    raters = len({one.rater for one in judged})
    _say(f"{file.path}: {len(judged)} judgements of {len({one.pair for one in judged})} pairs by {raters} raters")
    alpha = "" if found.alpha is None else f", Krippendorff's alpha {found.alpha:.2f}"
    for what, share, more in (
        ("raters agree", found.raters, f" on {found.pairs} pairs{alpha}"),
        ("the reward model agrees with raters", found.reward, ""),
        ("raters prefer the Actor's answer", found.actor, ""),
    ):
        if share.count:
            _say(f"  {what}: {_percent(share)}{more}")


def _percent(share: Share) -> str:
    return f"{share.part / share.count:.0%} ({share.part} of {share.count})"


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)
