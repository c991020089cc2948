"""A headless Chromium for tests, driven over the Chrome DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path

import websocket

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
)
PATIENCE = 60  # seconds
#: A script: the middle of an element brought into view; null if it moves for a while or something is over it.
CENTRE = """
(async () => {
  const one = document.querySelector(%s);
  one.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });
  const centre = () => {
    const box = one.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const before = centre();
  await new Promise((done) => setTimeout(() => requestAnimationFrame(done), 200));
  const now = centre();
  const lies_still = before.every((value, axis) => Math.abs(value - now[axis]) < 0.01);
  return lies_still && one.contains(document.elementFromPoint(...now)) ? now : null;
})()
"""


class Page:
    """One page of a browser of its own, whose files are under ``folder``; closes at the end of a ``with``.

    ``complaints`` are console errors and warnings, exceptions and refusals; ``requests`` all addresses asked
    for but those of files and data.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._number = 0

    def __enter__(self) -> Page:
        self.folder.mkdir(parents=True)
        with (self.folder / "log").open("wb") as log:
            command = [
                PROGRAM,
                *QUIET.split(),
                "--remote-debugging-port=0",
                f"--user-data-dir={self.folder}",
                "about:blank",
            ]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._socket = websocket.create_connection(
                self._address(), timeout=PATIENCE, suppress_origin=True
            )
            (target,) = [
                found for found in self.call("Target.getTargets")["targetInfos"] if found["type"] == "page"
            ]
            self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
                "sessionId"
            ]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._socket.close()
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()

    def _address(self) -> str:
        """Where the browser listens: it writes that to a file once it does."""
        note = self.folder / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE
        while not (note.is_file() and len(note.read_text().splitlines()) == 2):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{PROGRAM} did not start: {(self.folder / 'log').read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.05)
        port, path = note.read_text().splitlines()
        return f"ws://127.0.0.1:{port}{path}"

    def call(self, method: str, **parameters: object) -> dict:
        """The answer to one call of the protocol; what is reported meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while (answer := json.loads(self._socket.recv())).get("id") != self._number:
            self._note(answer.get("method"), answer.get("params", {}))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _note(self, event: str, report: dict) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(report["exceptionDetails"]["exception"].get("description", "exception"))
        elif event == "Runtime.consoleAPICalled" and report["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(report["args"]))
        elif event == "Log.entryAdded" and report["entry"]["level"] in ("error", "warning"):
            self.complaints.append(report["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not report["request"]["url"].startswith(
            ("file:", "data:")
        ):
            self.requests.append(report["request"]["url"])

    def open(self, what: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a file or an address in a window of that many CSS pixels, as a phone would below 600."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self._loaded = False
        self.call("Page.navigate", url=what if isinstance(what, str) else what.resolve().as_uri())
        while not self._loaded:
            self.call("Runtime.evaluate", expression="0")
            time.sleep(0.02)
        self.run("document.fonts.ready.then(() => new Promise(requestAnimationFrame))")

    def run(self, script: str) -> object:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = PATIENCE) -> None:
        """Until a JavaScript expression is true; an error if it is not in time."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {seconds} s: {script}")
            time.sleep(0.1)

    def click(self, selector: str) -> None:
        """Clicks the middle of the first element of that CSS selector, as a mouse does.

        Like someone who looks at it: once it lies still and nothing lies over it.
        """
        place = CENTRE % json.dumps(selector)
        deadline = time.monotonic() + PATIENCE
        while (centre := self.run(place)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"moving, or under something else, for {PATIENCE} s: {selector}")
        x, y = centre
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses a key (its name and Windows code) on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed
            )

    def screenshot(self, path: Path, whole: bool = False) -> None:
        path.write_bytes(b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))
