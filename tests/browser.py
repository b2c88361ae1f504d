"""Chromium, driven by its DevTools protocol."""

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. Use it in a `with` block."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900, dark: bool = False):
        self.numbers = itertools.count(1)
        self.stack = contextlib.ExitStack()
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--remote-debugging-port=0",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder}",
             "about:blank"], stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"DevTools listening on ws://([\w.:]+)/", line):
                break
        with urllib.request.urlopen(f"http://{found[1]}/json") as reply:
            page = next(target for target in json.load(reply) if target["type"] == "page")
        self.socket = self.stack.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.stack.close()

    def call(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv(60))).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def run(self, script: str):
        """Evaluate JavaScript, and wait for it if it is a promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> None:
        """Until JavaScript is true."""
        end = time.monotonic() + 60
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def type(self, selector: str, text: str) -> None:
        """As a user: focus it, replace its text."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus();"
                 f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def drop(self, selector: str, file: Path) -> None:
        """Drag a file of this machine onto an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
                        f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def picture(self, path: Path) -> None:
        """A screenshot of all of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
