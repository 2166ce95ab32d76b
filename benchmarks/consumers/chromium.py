"""Headless Chromium, driven over two pipes with the DevTools protocol: no driver program, no further packages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Page:
    """One page of a running browser.

    Attributes:
        events: what the browser reported by itself, of the domains that were enabled.
    """

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._to, self._from, self._last = to_browser, from_browser, 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol and wait for its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(self._read())
            if "method" in answer:
                self.events.append(answer)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, url: str) -> None:
        """Go to an address and wait until the page and its scripts are loaded."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:1000])
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """Evaluate again and again until the expression is true; returns its value.

        Raises:
            TimeoutError: it was not in this time.
        """
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} was not true within {seconds} seconds")
            time.sleep(0.1)
        return value

    def type(self, selector: str, text: str) -> None:
        """Select all that an input field holds and type over it."""
        self.evaluate(f"(() => {{ const field = document.querySelector({json.dumps(selector)}); "
                      "field.focus(); field.select(); })()")  # fmt: skip
        self.call("Input.insertText", text=text)

    def show(self, width: int, height: int, dark: bool = False) -> None:
        """Give the window a size in CSS pixels, and the user a preference for light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path, width: int = 1000, height: int = 800, dark: bool = False) -> None:
        """Write what the page looks like as PNG."""
        self.show(width, height, dark)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed, with its colours, on A4."""
        printed = self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(printed["data"])

    def _read(self) -> bytes:
        message = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            message += byte
        return bytes(message)


@contextmanager
def browser_page(program: str) -> Iterator[Page]:
    """A page of a browser with a profile of its own, which ends with the block."""
    read_by_browser, to_browser = os.pipe()
    from_browser, written_by_browser = os.pipe()

    def hand_over() -> None:  # the browser reads from 3 and writes to 4
        spare = os.dup(written_by_browser)
        os.dup2(read_by_browser, 3)
        os.dup2(spare, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(3, 4), preexec_fn=hand_over, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_by_browser)
        os.close(written_by_browser)
        try:
            with os.fdopen(to_browser, "wb") as to, os.fdopen(from_browser, "rb") as answers:
                yield Page(to, answers)
        finally:
            process.terminate()
            process.wait(30)
