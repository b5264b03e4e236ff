"""A headless Chromium that tests look at, click and type in: its own debugging protocol over a pipe, nothing else."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --hide-scrollbars --remote-debugging-pipe"
)
PATIENCE = 60.0  # seconds for any one answer
SHIFT = 8
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9}


class Browser:
    """One tab. `errors`: what its console and its scripts complained of; `loaded`: the addresses that it asked for."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_browser, self.out = os.pipe()
        self.incoming, from_browser = os.pipe()

        def move() -> None:  # the protocol is spoken on descriptors 3 and 4
            low, high = os.dup(to_browser), os.dup(from_browser)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=move, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.session = 0, None
        self.buffer = b""
        self.errors: list[str] = []
        self.loaded: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.frames: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.incoming)

    # ------------------------------------------------------------------------------------------------------- protocol

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.note(answer)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.incoming, 1 << 20)
            assert part, "the browser ended"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:2000])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(parameters["args"])[:2000])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(parameters["entry"])[:2000])
        elif method == "Target.attachedToTarget" and parameters["targetInfo"]["type"] == "iframe":
            self.frames.append(parameters["sessionId"])
        elif method == "Network.requestWillBeSent":
            self.loaded.append(parameters["request"]["url"])

    # ---------------------------------------------------------------------------------------------------- what one does

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """Return the value of an expression in the page, awaited if it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        ends = time.monotonic() + PATIENCE
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < ends, f"still not: {expression}"
            time.sleep(0.02)

    @contextmanager
    def inner_frame(self) -> Iterator[None]:
        """Speak to the frame of another origin that the page has opened last."""
        self.until("document.querySelector('iframe')")
        outer, self.session = self.session, self.frames[-1]
        try:
            yield
        finally:
            self.session = outer

    def texts(self, selector: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def place(self, selector: str, number: int = 0) -> tuple[float, float]:
        """Scroll to an element, and return its middle."""
        self.until(f"document.querySelectorAll({json.dumps(selector)}).length > {number}")
        script = (
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}];"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getClientRects()[0];"
            "return new Promise((f) => requestAnimationFrame(() => {"
            "const c = e.getClientRects()[0] ?? b; f([c.x + c.width / 2, c.y + c.height / 2]); })); })()"
        )
        x, y = self.js(script)
        return x, y

    def mouse(self, kind: str, x: float, y: float, pressed: bool = False) -> None:
        button = "left" if pressed else "none"
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(pressed), clickCount=1)

    def hover(self, selector: str, number: int = 0) -> None:
        x, y = self.place(selector, number)
        self.mouse("mouseMoved", x - 1, y)
        self.mouse("mouseMoved", x, y)

    def click(self, selector: str, number: int = 0) -> None:
        x, y = self.place(selector, number)
        self.drag(x, y, x, y)

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.mouse("mouseMoved", x0, y0)
        self.mouse("mousePressed", x0, y0, pressed=True)
        if (x0, y0) != (x1, y1):
            self.mouse("mouseMoved", (x0 + x1) / 2, (y0 + y1) / 2, pressed=True)
            self.mouse("mouseMoved", x1, y1, pressed=True)
        self.mouse("mouseReleased", x1, y1, pressed=True)

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key: a letter, or a name of KEYS."""
        parameters: dict[str, Any] = {"key": key, "modifiers": SHIFT * shift}
        if key in KEYS:
            parameters |= {"windowsVirtualKeyCode": KEYS[key], "code": key}
            if key == "Enter":
                parameters["text"] = "\r"
        else:
            parameters["text"] = key
        self.send("Input.dispatchKeyEvent", type="keyDown", **parameters)
        self.send("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in parameters.items() if k != "text"})

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        scale = 2 if phone else 1
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def colours(self, scheme: str) -> None:
        """Prefer light or dark, as a system setting does."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path, whole: bool = False) -> Path:
        taken = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    one = Browser(profile)
    try:
        yield one
    finally:
        one.close()
