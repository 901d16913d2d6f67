"""A headless Chromium and its DevTools protocol, over two pipes, for which no package is needed."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
# The browser reads descriptor 3 and writes descriptor 4; `subprocess` hands on descriptors under their own numbers.
LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """A browser with one page.

    Args:
        program: its path.
        folder: of its profile.
    Attributes:
        events: all messages of the page so far that answer no call.
    """

    def __init__(self, program: str, folder: Path, size: tuple[int, int] = (1280, 900)):
        self.numbers, self.events, self.buffer = itertools.count(1), [], b""
        ours, theirs = [], []
        for pair in (os.pipe(), os.pipe()[::-1]):  # They read the first and write the second.
            theirs.append(fcntl.fcntl(pair[0], fcntl.F_DUPFD, 10))
            os.close(pair[0])
            ours.append(pair[1])
        self.writing, self.reading = ours
        options = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        command = [sys.executable, "-c", LAUNCH, *map(str, theirs), program, *options]
        self.process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for descriptor in theirs:
            os.close(descriptor)
        self.session = ""
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
            target = next(info["targetId"] for info in targets if info["type"] == "page")
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.process.kill()
            raise

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method. Raises: RuntimeError: the browser refuses it; TimeoutError: it does not answer."""
        message = {"id": next(self.numbers), "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            answer = self.receive(until - time.monotonic())
            if answer is not None and answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
        raise TimeoutError(f"no answer to {method}")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, which is kept if it is an event; None: none came."""
        while b"\0" not in self.buffer:
            if not select.select([self.reading], [], [], max(seconds, 0))[0]:
                return None
            if not (part := os.read(self.reading, 1 << 16)):
                raise ConnectionError("the browser has ended")
            self.buffer += part
        content, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(content)
        if "method" in message:
            self.events.append(message)
        return message

    def wait(self, seconds: float) -> None:
        """Collect events for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.receive(left)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, also of one that it promises. Raises: RuntimeError: it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", expression))
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression once it is true. Raises: TimeoutError: it is not in time."""
        until = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"still not true: {expression}")
            self.receive(0.1)
        return value

    def press(self, text: str, selector: str = "button") -> None:
        """Click the visible element of this text, once it is there. Raises: TimeoutError: it does not come."""
        self.wait_for(f"""(() => {{
            const visible = [...document.querySelectorAll({json.dumps(selector)})].filter(e => e.offsetParent);
            const element = visible.find(e => e.textContent.trim() == {json.dumps(text)});
            element?.click();
            return Boolean(element);
        }})()""")

    def choose(self, value: str, label: str) -> None:
        """Type a value into the visible dropdown whose label begins so, and confirm it, as `press`."""
        self.wait_for(f"""(() => {{
            const inputs = [...document.querySelectorAll("input[aria-label]")].filter(e => e.offsetParent);
            const input = inputs.find(e => e.getAttribute("aria-label").startsWith({json.dumps(label)}));
            if (input) {{
                input.focus();
                input.select();
            }}
            return Boolean(input);
        }})()""")
        self.call("Input.insertText", text=value)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    def screenshot(self, file: Path) -> None:
        """Write the page as a PNG, all of it, not the window alone."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(image["data"]))

    def messages(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of the events of some kinds so far."""
        return [event["params"] for event in self.events if event["method"] in methods]

    def errors(self) -> list[str]:
        """Errors of the console, exceptions that nobody caught, and requests that failed."""
        found = [message["exceptionDetails"]["text"] for message in self.messages("Runtime.exceptionThrown")]
        for message in self.messages("Runtime.consoleAPICalled"):
            if message["type"] in ("error", "assert"):
                found.append(" ".join(str(item.get("value", item.get("description"))) for item in message["args"]))
        for message in self.messages("Log.entryAdded"):
            if message["entry"]["level"] == "error":
                found.append(f"{message['entry']['text']} {message['entry'].get('url', '')}")
        return found

    def addresses(self) -> list[str]:
        """The addresses of all requests, those of web sockets too."""
        sent = [message["request"]["url"] for message in self.messages("Network.requestWillBeSent")]
        return sent + [message["url"] for message in self.messages("Network.webSocketCreated")]

    def close(self) -> None:
        """End the browser with its processes."""
        try:
            self.session = ""
            self.call("Browser.close")
            self.process.wait(20)
        except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait(20)
        os.close(self.writing)
        os.close(self.reading)
