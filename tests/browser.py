"""A headless Chromium, spoken to over a pipe in the DevTools protocol, and what is asked of a page in it.

The command is what `CHROMIUM` names, else the first of the usual names that is on the path.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = [
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--hide-scrollbars", "--force-color-profile=srgb"),
]
SECONDS = 600.0  # for one answer; a busy machine is no fault
MOST_TABS = 4000
KEYS = {"Tab": 9, "Enter": 13}
# Chromium reads commands from descriptor 3 and answers on 4. Not by `sh`, which knows descriptors of one digit alone.
START = """import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
PROBE = Path(__file__).with_suffix(".js")


def command() -> str | None:
    """What starts Chromium here; None where there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Found:
    """What a page showed.

    Args:
        errors: of the console, and files that did not load. width: of the whole page, in pixels.
        faint: texts whose contrast is below WCAG's AA, with their ratio. unreached: controls that Tab does not come to.
        unseen: controls that look the same with the focus on them. lost: what takes the focus and is not to be seen.
        controls, texts: how many were looked at.
    """

    errors: list[str]
    width: int
    faint: list[str]
    unreached: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    controls: int = 0
    texts: int = 0


class Browser:
    """One Chromium with one tab."""

    def __init__(self, process: subprocess.Popen, write: int, read: int):
        self._process, self._write, self._read = process, write, read
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self._dark: bool | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        # What a page notes, such as the scheme that it was seen in, is not to be known to the next.
        self.call("Page.addScriptToEvaluateOnNewDocument", source="try { localStorage.clear() } catch {}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a script's last expression, promises kept."""
        given = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **given)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description"))
        return answer["result"].get("value")

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium gave no answer.")
            piece = os.read(self._read, 2**16)
            if not piece:
                raise RuntimeError("Chromium has gone.")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int, height: int, dark: bool = False) -> None:
        """Load a page, in a window of so many pixels, and wait for it."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])
        # The first page of another scheme may run its scripts before it is told of the scheme: it is loaded twice.
        for _ in range(1 if dark == self._dark else 2):
            self.call("Page.navigate", url="about:blank")
            self._events.clear()
            self.call("Page.navigate", url=address)
            self.until("document.readyState === 'complete' && location.href !== 'about:blank'", SECONDS)
        self._dark = dark
        self.evaluate(PROBE.read_text())
        self.evaluate("probe.settled()")

    def until(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until an expression holds on the page.

        Raises:
            TimeoutError: it did not within so many seconds.
        """
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"Not so after {seconds:g} s: {expression}")
            time.sleep(0.02)

    def look(self, keyboard: bool = True) -> Found:
        """What the page that is open shows; with `keyboard`, Tab is pressed until it comes round."""
        self.evaluate("scrollTo(0, 0)")
        width = self.evaluate("document.documentElement.scrollWidth")
        texts = self.evaluate("probe.texts()")
        found = Found([], width, self.evaluate("probe.faint()"), texts=texts)
        if keyboard:
            found.controls = self.evaluate("probe.watch()")
            for _ in range(MOST_TABS // 20):
                for _ in range(20):
                    self.press("Tab")
                if self.evaluate("probe.round()"):
                    break
            found.unreached, found.unseen = self.evaluate("probe.unreached()"), self.evaluate("probe.unseen()")
            found.lost = self.evaluate("probe.lost()")
        found.errors = list(self._errors())
        return found

    def press(self, key: str) -> None:
        """Press and release a key: `"Tab"` or `"Enter"`."""
        given = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def _errors(self) -> Iterator[str]:
        for event in self._events:
            given, method = event.get("params", {}), event.get("method")
            if method == "Runtime.exceptionThrown":
                yield str(given["exceptionDetails"].get("exception", {}).get("description", given))
            elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "assert"):
                yield str([argument.get("value") for argument in given["args"]])
            elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
                yield f"{given['entry']['text']} {given['entry'].get('url', '')}"

    def picture(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium whose profile lies in a folder; ended with the context."""
    their_read, write = os.pipe()
    read, their_write = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (their_read, their_write)]  # clear of 3 and 4
    own = [str(command()), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, ends), *own],
        pass_fds=ends,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (their_read, their_write, *ends):
        os.close(end)
    try:
        yield Browser(process, write, read)
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(write)
        os.close(read)
