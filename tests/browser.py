"""A real headless Chromium, driven by its DevTools protocol over a pipe: clicks, keys, screenshots."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys

OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
]
LAUNCH = (  # Chromium reads commands from descriptor 3 and answers on 4
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
    "os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 120  # seconds for one answer: Chromium starts slowly on a busy machine
CODES = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37}
CODES |= {"ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "+": 187, "-": 189, "0": 48}


def find_chromium():
    """Return the path of an installed Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def make_pipe():
    """Return the two ends of a pipe (to read, to write), neither of them descriptor 3 or 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved


class Browser:
    """`with Browser(program, folder) as browser`: a process of its own that ends with the block."""

    def __init__(self, program, folder):
        theirs_in, self.writes = make_pipe()
        self.reads, theirs_out = make_pipe()
        ends = (theirs_in, theirs_out)
        words = [sys.executable, "-c", LAUNCH, *map(str, ends), program, *OPTIONS]
        self.process = subprocess.Popen(
            [*words, f"--user-data-dir={folder}"],
            pass_fds=ends,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self.calls, self.buffer, self.events = 0, b"", []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.writes)
        os.close(self.reads)

    def call(self, method, session=None, **params):
        """Return the result of one command; events that come before it are kept."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.calls:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def receive(self):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reads], [], [], PATIENCE)
            assert ready, f"Chromium gave no answer within {PATIENCE} s"
            part = os.read(self.reads, 1 << 16)
            assert part, "Chromium ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url, **options):
        return Tab(self, url, **options)


class Tab:
    """A page in a tab of its own, loaded when this returns. errors: complaints of its console."""

    def __init__(self, browser, url, width=1200, height=900, scheme="light", script=True):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=width < 500)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        browser.events = [
            event for event in browser.events if event.get("sessionId") != self.session
        ]
        self.call("Page.navigate", url=str(url))
        while not self.heard("Page.loadEventFired"):
            browser.events.append(browser.receive())

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def heard(self, *methods):
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        return [event["params"] for event in mine if event["method"] in methods]

    @property
    def errors(self):
        self.call("Runtime.evaluate", expression="0")  # what was under way has come by now
        console = self.heard("Runtime.consoleAPICalled")
        complaints = [event for event in console if event["type"] in ("error", "warning")]
        return [*self.heard("Runtime.exceptionThrown", "Log.entryAdded"), *complaints]

    @property
    def requests(self):
        urls = [event["request"]["url"] for event in self.heard("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def value(self, expression):
        """Return what an expression of JavaScript gives, as JSON can hold it."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, *keys):
        for key in keys:
            text = {"Enter": "\r"}.get(key, key)
            typed = {"text": text} if len(text) == 1 else {}
            event = {"key": key, "windowsVirtualKeyCode": CODES.get(key, 0)}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **typed)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def mouse(self, kind, x, y, **options):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def move(self, x, y):
        self.mouse("mouseMoved", x, y)

    def drag(self, start, end):
        pressed = {"button": "left", "buttons": 1, "clickCount": 1}
        self.mouse("mousePressed", *start, **pressed)
        self.mouse("mouseMoved", *end, **pressed)
        self.mouse("mouseReleased", *end, **pressed | {"buttons": 0})

    def click(self, selector, index=0):
        place = self.middle(selector, index)
        self.drag(place, place)

    def tap(self, x, y):
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def middle(self, selector, index=0):
        """Return the middle of an element, scrolled into view, in CSS pixels of the window."""
        return self.value(
            f"(() => {{ const element = document.querySelectorAll({json.dumps(selector)})[{index}];"
            "element.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = element.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )

    def screenshot(self, path, whole=True):
        image = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)
