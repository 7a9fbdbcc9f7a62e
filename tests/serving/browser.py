"""Headless Chromium that is driven by its DevTools protocol: real clicks, taps and keys, other screens, dark and light, and what went wrong in it."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.components.chromium import BROWSER, FLAGS

_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page. `faults`: uncaught exceptions, errors on the console and blocked resources so far; `asked`: every address it requested."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.faults: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._heard(message)

    def _heard(self, message: dict[str, Any]) -> None:
        name, told = message.get("method"), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.faults.append(details.get("exception", {}).get("description", details["text"]))
        elif name == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.faults.append(str([argument.get("value") for argument in told["args"]]))
        elif name == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.faults.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif name == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 15) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.js(expression):
                return found
            time.sleep(0.03)
        raise AssertionError(f"never true: {expression}\n{self.faults}\n{self.js('document.body.innerText')[:1500]}")

    def go(self, address: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def screen(self, width: int, height: int, *, dark: bool = False, calm: bool = True) -> None:
        """A screen of this size; below 600 px a phone, with touch. `calm`: people who asked for less motion."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce" if calm else "no-preference"}
        self.call("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()])

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled to where it can be hit; what would be hit there must be it or in it."""
        quoted = json.dumps(selector)
        found = self.js(
            f"""(() => {{ const one = document.querySelector({quoted}); if (!one) return null;
            one.scrollIntoView({{ block: "center" }}); const box = one.getBoundingClientRect();
            const x = box.left + box.width / 2, y = box.top + box.height / 2, hit = document.elementFromPoint(x, y);
            return {{ x, y, hit: one.contains(hit) || Boolean(hit?.contains(one)), over: hit?.outerHTML.slice(0, 200) }}; }})()"""
        )
        assert found is not None, f"no {selector}"
        assert found["hit"], (selector, found)
        return found["x"], found["y"]

    def hover(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def tap(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name: str, *, shift: bool = False, times: int = 1) -> None:
        for _ in range(times):
            text = {"text": "\r"} if name == "Enter" else {}
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=_KEYS[name], modifiers=8 if shift else 0, **text
                )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, out: Path, *, whole: bool = False) -> Path:
        """A PNG of the screen, or of the `whole` page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        out.write_bytes(base64.b64decode(taken["data"]))
        return out


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Its profile goes into `folder`; ended, with all its helpers, at the end."""
    profile = folder / "profile"
    command = [str(BROWSER), *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        address = _address(process, profile / "DevToolsActivePort")
        with connect(address, max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        shutil.rmtree(profile, ignore_errors=True)


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    """Of the page's own socket."""
    import httpx

    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and (lines := file.read_text().splitlines()):
            pages = httpx.get(f"http://127.0.0.1:{lines[0]}/json/list", trust_env=False).json()
            if found := [page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"]:
                return found[0]
        time.sleep(0.05)
    raise AssertionError("Chromium did not open its DevTools port")
