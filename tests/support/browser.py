"""A headless Chromium, where there is one, driven by its DevTools protocol."""

import asyncio
import base64
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page in a window of its own.

    Args:
        folder: For what the browser writes.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1280, 800)):
        self.folder, self.size = folder, size
        self.messages: list[str] = []  # errors of the page, and what it logs
        self._number = 0

    async def __aenter__(self) -> "Browser":
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--no-first-run",
        ]
        command += [f"--user-data-dir={self.folder}", f"--window-size={self.size[0]},{self.size[1]}", "about:blank"]
        command += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._session = aiohttp.ClientSession()
        try:
            port = await self._port()
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
                (page,) = [each for each in await response.json() if each["type"] == "page"]
            self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
            for domain in ("Page", "Runtime", "Log"):
                await self.call(f"{domain}.enable")
            await self.resize(*self.size)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _port(self, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        file = self.folder / "DevToolsActivePort"
        while not (file.exists() and file.read_text().strip()):
            assert self._process.poll() is None and time.monotonic() < end, "the browser did not start"
            await asyncio.sleep(0.05)
        return file.read_text().split()[0]

    async def __aexit__(self, *exception: object) -> None:
        await self._session.close()
        self._process.terminate()
        self._process.wait(30)

    async def call(self, method: str, **parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), 60)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.messages.append(str(message["params"]))

    async def resize(self, width: int, height: int, scale: float = 1, is_phone: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=is_phone
        )

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)

    async def evaluate(self, script: str):
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str, seconds: float = 60):
        """Waits until a script gives something true, and returns it."""
        end = time.monotonic() + seconds
        while not (value := await self.evaluate(script)):
            assert time.monotonic() < end, f"{script} is not true; {self.messages}"
            await asyncio.sleep(0.05)
        return value

    async def picture(self, path: Path) -> None:
        shown = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shown["data"]))
