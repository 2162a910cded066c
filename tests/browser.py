"""A headless Chromium for tests, driven by the DevTools protocol over a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
WITHOUT_SIMD = "--js-flags=--no-enable-sse4-1"
"""WebAssembly's SIMD needs these instructions."""

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_SECONDS = 60.0


class Chromium:
    """A running browser; `listeners` are called with each event."""

    def __init__(self, profile: Path, *options: str):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # Chromium reads commands at 3 and writes answers at 4, which may be in use here.
        read, write = (_moved(descriptor) for descriptor in (read, write))
        shell = f'exec "$@" 3<&{read} 4>&{write}'
        command = ["bash", "-c", shell, "bash", BROWSER, *_OPTIONS, f"--user-data-dir={profile}", *options]
        self._process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self._number, self._rest = 0, b""
        self.listeners = []

    def close(self):
        """End the browser and its processes."""
        with contextlib.suppress(OSError, EOFError):
            self.call("Browser.close")
        self._process.wait(timeout=_SECONDS)
        os.close(self._write)
        os.close(self._read)

    def call(self, method, session=None, **params):
        """Carry out a command and return its result."""
        self._number += 1
        number = self._number
        self.send(number, method, session, **params)
        while (message := self._receive()).get("id") != number:
            for listener in self.listeners:
                listener(message)
        assert "error" not in message, (method, message)
        return message["result"]

    def send(self, number, method, session=None, **params):
        """Send a command; its answer is an event."""
        message = {"id": number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._write, json.dumps(message).encode() + b"\0")

    def _receive(self):
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._read, 2**20)
            if not part:
                raise EOFError("Chromium has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def _moved(descriptor):
    """The same pipe at a number of two digits."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


class Page:
    """A page of a browser, and what it and its workers request."""

    def __init__(self, browser, *, width=1200):
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)[
            "sessionId"
        ]
        self._sessions, self.requests, self.errors = {self._session}, [], []
        browser.listeners.append(self._hear)
        self._follow(self._session)
        self._call("Page.enable")
        self._call("Runtime.enable")
        self.resize(width)

    def resize(self, width, height=900):
        """Give the screen another size, in pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def close(self):
        """End the page and its process."""
        self._browser.listeners.remove(self._hear)
        self._browser.call("Target.closeTarget", targetId=self._target)

    def open(self, url):
        """Go to an address."""
        self._call("Page.navigate", url=url)

    def evaluate(self, expression):
        """The value of an expression of JavaScript, or of its promise."""
        options = {"awaitPromise": True, "returnByValue": True}
        result = self._call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, *, seconds=_SECONDS):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression}: {self.evaluate('document.body.innerText')}")
            time.sleep(0.05)

    def screenshot(self, path):
        """Write the whole page as a PNG."""
        picture = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def _call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def _follow(self, session):
        """Hear of the requests of a page or worker, and of its workers, which wait until then."""
        for method, params in (
            ("Network.enable", {}),
            ("Target.setAutoAttach", {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}),
            ("Runtime.runIfWaitingForDebugger", {}),
        ):
            self._browser.send(-1, method, session, **params)

    def _hear(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Target.attachedToTarget":
            self._sessions.add(params["sessionId"])
            self._follow(params["sessionId"])
        elif method == "Network.requestWillBeSent" and event["sessionId"] in self._sessions:
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown" and event["sessionId"] in self._sessions:
            self.errors.append(params["exceptionDetails"]["text"])


@contextlib.contextmanager
def chromium(profile: Path, *options: str) -> Iterator[Chromium]:
    """A browser as long as the body runs."""
    browser = Chromium(profile, *options)
    try:
        yield browser
    finally:
        browser.close()
