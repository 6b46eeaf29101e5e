"""A real browser to test pages with: Chromium without a window, by its DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}


class Browser:
    """One tab.

    Attributes:
        events: all that the browser told of the page: what it asked of which server, errors, what its policy refused.
    """

    def __init__(self, page: ClientConnection) -> None:
        self._page, self._last = page, 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._last += 1
        self._page.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while (answer := json.loads(self._page.recv(timeout=SECONDS))).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState == 'complete' && location.href.startsWith({json.dumps(url)})")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, (expression, found)
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        limit = time.monotonic() + SECONDS
        while not self.js(expression):
            assert time.monotonic() < limit, (expression, self.js("document.body.innerText"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What an element shows, to the character."""
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def press(self, key: str) -> None:
        """Press and release a key, named as JavaScript names it."""
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        code = KEYS.get(key) or ord(key.upper())
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, text: str) -> None:
        """Put text where the cursor is."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click into the middle of an element, where it is on the screen."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, x=box[0], y=box[1], button="left", clickCount=1)

    def asked(self) -> list[str]:
        """Every URL that the page asked for."""
        self.js("0")  # what was told until now
        requests = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in requests]

    def complaints(self) -> list[dict[str, Any]]:
        """Errors of the page's code, and what the browser says of it."""
        self.js("0")
        return [e for e in self.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]


def chromium() -> str:
    """The browser's program. Without one a developer's test is skipped; where `CI` is set, it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"no {NAMES[0]} found: `apt-get install chromium`, or the like, has the pages tested in a real browser")
    return str(found)


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in a folder."""
    command = [chromium(), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-gpu"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage", "about:blank"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # which root cannot have
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        limit = time.monotonic() + SECONDS
        while not (port.exists() and port.read_text().count("\n")):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            assert time.monotonic() < limit, f"{command} did not start in {SECONDS} s"
            time.sleep(0.05)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port.read_text().split()[0]}/json/list", timeout=SECONDS
        ) as said:
            pages = [target for target in json.load(said) if target["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as page:
            yield Browser(page)
    finally:
        process.kill()
        process.wait()
