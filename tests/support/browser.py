"""A real browser that a test drives: headless Chromium over its DevTools protocol, on this machine alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Any, Self

import aiohttp

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")
PATIENCE_S = 120.0
LOOK_S = 0.05
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13}


class Browser:
    """One page; `complaints` are what its console says and what it asks of others than its server."""

    def __init__(self, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        self.complaints: list[str] = []
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._is_dark = is_dark
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._stack = contextlib.AsyncExitStack()
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._origin = ""

    async def __aenter__(self) -> Self:
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                    f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]  # fmt: skip
        process = subprocess.Popen([BROWSER, *switches], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        told = Path(profile) / "DevToolsActivePort"
        async with asyncio.timeout(PATIENCE_S):
            while not told.is_file() or not told.read_text().strip():  # noqa: ASYNC110  # a file tells nobody
                await asyncio.sleep(LOOK_S)
        session = await self._stack.enter_async_context(aiohttp.ClientSession())
        async with session.get(f"http://127.0.0.1:{told.read_text().split()[0]}/json/list") as response:
            pages = await response.json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = await session.ws_connect(address, max_msg_size=1 << 27)
        listening = asyncio.create_task(self._listen())
        self._stack.callback(listening.cancel)
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Emulation.setDeviceMetricsOverride", **self._size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _listen(self) -> None:
        assert self._socket is not None
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif (method := told.get("method")) in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.complaints.append(str(told["params"]))
            elif method == "Log.entryAdded" and "ERR_CONNECTION" not in told["params"]["entry"]["text"]:
                self.complaints.append(str(told["params"]["entry"]["text"]))
            elif method == "Network.requestWillBeSent":
                address = told["params"]["request"]["url"]
                if not address.startswith((self._origin, "about:", "data:")):
                    self.complaints.append(f"asks {address}")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        assert self._socket is not None
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE_S):
            answer = await self._answers[number]
        assert "error" not in answer, answer
        return answer["result"]

    async def open(self, address: str) -> None:
        """Open an address."""
        self._origin = "/".join(address.split("/")[:3])
        await self.call("Page.navigate", url=address)

    async def value(self, expression: str) -> Any:
        """Return the value of an expression on the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression on the page is true and return its value."""
        loaded = "location.href !== 'about:blank' && document.readyState === 'complete'"
        async with asyncio.timeout(PATIENCE_S):
            while not (found := await self.value(f"{loaded} && ({expression})")):  # noqa: ASYNC110  # a page tells nobody
                await asyncio.sleep(LOOK_S)
        return found

    async def press(self, key: str) -> None:
        """Press a key as a person does."""
        text = {} if key in KEYS and key != "Enter" else {"text": "\r" if key == "Enter" else key}
        code = KEYS.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                            **(text if kind == "keyDown" else {}))  # fmt: skip

    async def write(self, text: str) -> None:
        """Type a text where the focus is."""
        await self.call("Input.insertText", text=text)

    async def picture(self) -> bytes:
        """Return a screenshot."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])
