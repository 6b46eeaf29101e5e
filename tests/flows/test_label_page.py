"""The page of `rlhf label` in a real browser, from the first click to the pairs that are trained on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browsing
from changes import with_params
from label_server import labelling

from rlhf_tasks import keying
from rlhf_tasks.data.judgements import standing
from rlhf_tasks.data.tables import read_table
from rlhf_tasks.label_file import LabelFile
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

NASTY = "</span><img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
HEBREW = "שלום, מה שלומך?\nHello"


@pytest.fixture
def project(workspace: Callable[..., Workspace]) -> Workspace:
    """A small project with samples of twelve prompts, the first ones hard to show."""
    made = workspace()
    samples = made.root / "samples/evaluate.jsonl"
    samples.parent.mkdir()
    with samples.open("w") as file:
        for n in range(12):
            answers = {0: (f" {NASTY}", " fine"), 1: (HEBREW, "word" * 200)}.get(n, (f" sft {n}", f" actor {n}"))
            row = {"prompt": HEBREW if n == 1 else f"Prompt {n}", "sft": answers[0], "actor": answers[1]}
            file.write(json.dumps(row | {"sft_score": 0.0, "actor_score": 1.0}) + "\n")
    return made


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path / "profile") as tab:
        yield tab


def shown(browser: Browser) -> tuple[str, str, str]:
    """The prompt and both answers as they stand on the page."""
    return (
        browser.text("#prompt"),
        browser.text(".answer:nth-child(1) .text"),
        browser.text(".answer:nth-child(2) .text"),
    )


def act(browser: Browser, how: Callable[[], None], done: int) -> None:
    """Do something, and wait until the page says how many are judged."""
    how()
    browser.wait(f"document.querySelector('#progress')?.textContent == '{done} of 12 judged'")


def prepared(run_stages: Any, project: Workspace) -> tuple[str, dict[str, str], set[tuple[str, ...]]]:
    """Run `prepare`: its key, the digests of what it made, and its pairs of both sides."""
    (entry,) = run_stages(project, "prepare").values()
    tables = [read_table(project.root / f"data/prepared/pairs/{side}.arrow") for side in ("train", "heldout")]
    pairs = {
        (row["prompt"], row["chosen"], row["rejected"])
        for table in tables
        for row in table.select(["prompt", "chosen", "rejected"]).to_pylist()
    }
    return keying.plan(project, STAGES["prepare"]).key, entry.parts, pairs


def test_ten_pairs_are_labelled_survive_a_kill_and_are_trained_on(
    project: Workspace, browser: Browser, run_stages: Any
) -> None:
    key, parts, pairs = prepared(run_stages, project)
    said = list[tuple[str, str, str, str]]()

    def say(how: Callable[[], None], choice: str) -> None:
        said.append((*shown(browser), choice))
        act(browser, how, len(said))

    with labelling(project.root) as server:
        browser.open(server.url)
        browser.write(" Ada  Lovelace ")
        act(browser, lambda: browser.press("Enter"), 0)
        assert browser.text("#who") == "Ada Lovelace"

        assert NASTY in " ".join(shown(browser))
        assert browser.js("[window.hacked, document.querySelectorAll('#desk img, #desk script').length]") == [None, 0]
        say(lambda: browser.press("1"), "first")
        prompt = "getComputedStyle(document.querySelector('#prompt')).direction"
        assert browser.js(f"[document.querySelector('#prompt').dir, {prompt}]") == ["auto", "rtl"]
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        say(lambda: browser.press("ArrowRight"), "second")
        say(lambda: browser.click(".answer:nth-child(1)"), "first")
        say(lambda: browser.click(".answer:nth-child(2) .text"), "second")
        say(lambda: browser.press("t"), "tie")
        say(lambda: browser.press("B"), "both bad")
        say(lambda: browser.click("[data-choice=skip]"), "skip")
        say(lambda: browser.press("2"), "second")
        undone = said.pop()
        act(browser, lambda: browser.press("u"), len(said))
        assert shown(browser) == undone[:3]
        say(lambda: browser.press("ArrowLeft"), "first")
        browser.js("window.before = location.reload() || 1")
        browser.wait("!window.before")
        act(browser, lambda: None, 8)
        say(lambda: browser.click("[data-choice=tie]"), "tie")
        say(lambda: browser.press("2"), "second")
        assert "The reward model agrees with raters in" in browser.text("#reward")
        assert len(said) == 10
        assert all(url.startswith((server.url, "data:")) for url in browser.asked())
        assert browser.complaints() == []

        server.end(signal.SIGKILL)
        waiting = shown(browser)
        browser.press("1")
        browser.wait("document.querySelector('#message').textContent.includes('does not answer')")
        assert shown(browser) == waiting

    file = LabelFile(project.root / "data/labels.jsonl")
    kept = standing(file.judged())
    assert [(one.prompt, *one.answers, one.choice) for one in kept] == said
    assert {one.rater for one in kept} == {"Ada Lovelace"}

    sources = "[{kind: ratings, path: data/raw/ratings.jsonl}, {kind: labels, path: data/labels.jsonl}]"
    trained_on = with_params(project, f"data.sources={sources}")
    new_key, new_parts, new_pairs = prepared(run_stages, trained_on)
    decided = {
        (p, *((a, b) if choice == "first" else (b, a))) for p, a, b, choice in said if choice in ("first", "second")
    }
    assert len(decided) == 6
    assert new_pairs - pairs == decided
    assert pairs <= new_pairs
    assert new_key != key
    assert {name for name, part in new_parts.items() if parts[name] != part} == {
        "pairs",
        "metrics.json",
        "lineage.json",
    }
    assert keying.plan(trained_on, STAGES["prepare"]).key == new_key

    with labelling(project.root, "--port", str(server.port)) as again:  # the tab that was open goes on
        act(browser, lambda: browser.press("1"), 11)
        act(browser, lambda: browser.press("s"), 12)
        browser.wait("!document.querySelector('#end').hidden")
        assert again.ask("/state?rater=Ada%20Lovelace")["done"] == 12
    assert keying.plan(trained_on, STAGES["prepare"]).key != new_key


def test_it_fits_on_a_phone_and_asks_for_a_name(project: Workspace, browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    with labelling(project.root) as server:
        browser.open(server.url)
        browser.press("1")  # is the name's first letter, no judgement
        browser.click("#name button")
        browser.wait("document.querySelector('#who').textContent == '1'")
        act(browser, lambda: browser.press("s"), 1)
        assert browser.js("document.documentElement.scrollWidth") == 360
        tops = "[...document.querySelectorAll('.answer')].map(e => Math.round(e.getBoundingClientRect().left))"
        assert len(set(browser.js(tops))) == 1, "one above the other"
        browser.click("#other")
        browser.write(" ")
        browser.press("Enter")
        browser.wait("document.querySelector('#message').textContent.startsWith('name: found')")
        browser.press("u")
        assert browser.js("document.querySelector('#rater').value") == " u"
    assert [one.choice for one in LabelFile(project.root / "data/labels.jsonl").judged()] == ["skip"]
