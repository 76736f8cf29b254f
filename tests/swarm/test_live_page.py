"""The live page on a real swarm with a load: in a browser where there is one, and as what it asks for anywhere."""

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import pytest
from support.browser import CHROMIUM, Browser

import hf_layershuffle as ls
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.swarm.demonstration import PacedTransport
from hf_layershuffle.swarm.local_transport import LocalTransport
from hf_layershuffle.swarm.request_inputs import RequestInputs
from hf_layershuffle.swarm.service_runner import Address, run_service


FOLDER = ls.example_model()
WORKERS = ["worker-0", "worker-1", "worker-2"]


class SlowToStart(LocalTransport):
    """Workers that take a second to come back, so that their absence can be seen."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.started = set()

    async def start_worker(self, name, layers):
        if name in self.started:
            await asyncio.sleep(1)
        self.started.add(name)
        return await super().start_worker(name, layers)


async def visited(visit, folder: Path) -> None:
    """Runs a service for show, lets `visit` look at it, and ends it as Ctrl-C does."""
    inputs = RequestInputs.from_pretrained(FOLDER)
    items = inputs.labelled(load_image_datasets("digits")["test"], max_samples=40)
    paced = PacedTransport(SlowToStart(FOLDER), 0.01)
    swarm = ls.Swarm.from_pretrained(FOLDER, workers=len(WORKERS), transport=paced, max_skips=2, skip_after=1.0)
    address = asyncio.get_running_loop().create_future()
    service = asyncio.ensure_future(
        run_service(swarm, inputs, Address(port=0), items=items, rate=10.0, paced=paced, announce=address.set_result)
    )
    await asyncio.wait({service, address}, return_when=asyncio.FIRST_COMPLETED)
    try:
        await asyncio.wait_for(visit(await address, folder), 120)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        await service


async def asks_as_the_page_does(address: str, folder: Path) -> None:
    async with aiohttp.ClientSession(address) as session, session.get("/") as page:
        assert "<h1>Layers on workers</h1>" in await page.text()
        async with session.get("/events") as stream:

            async def until(is_it):
                async for line in stream.content:
                    for event in json.loads(line[6:]) if line.startswith(b"data: ") else []:
                        if is_it(event):
                            return event

            begin = await until(lambda event: event["type"] == "beginning")
            assert [worker["name"] for worker in begin["status"]["workers"]] == WORKERS
            assert begin["settings"] == {"rate": 10.0, "max_skips": 2} and begin["without_worker"] == []
            hop = await until(lambda event: event["type"] == "hop_ended" and event["reason"] is None)
            assert hop["worker"] in WORKERS and hop["layer"] in range(6)
            await until(lambda event: event["type"] == "classified" and event["is_right"] and not event["skipped"])
            async with session.post("/workers/worker-1/kill") as killed:
                assert killed.status == 202
            await until(lambda event: event["type"] == "status" and event["without_worker"] == [1, 4])
            answer = await until(lambda event: event["type"] == "classified" and len(event["skipped"]) == 2)
            assert {skip["layer"] for skip in answer["skipped"]} == {1, 4}
            assert sorted(answer["execution_order"]) == [0, 2, 3, 5] and "worker-1" in answer["skipped"][0]["reason"]
            await until(lambda event: event["type"] == "second" and event["without_worker"] == [])
            await until(lambda event: event["type"] == "classified" and not event["skipped"])


async def looks_at_the_page(address: str, folder: Path) -> None:
    card = "document.querySelector('[aria-label=\"worker-1\"]')"
    banner = "document.querySelector('#banner').textContent"
    async with Browser(folder) as browser:
        await browser.open(address)
        await browser.until("document.querySelectorAll('.worker.healthy, .worker.busy').length === 3")
        await browser.until(f"{banner} === 'All 6 layers have a worker.'")
        await browser.until("document.querySelectorAll('#answers .right').length === 7")
        await browser.until("document.querySelector('.token img')?.src.startsWith('data:image/png')")
        await browser.evaluate(f"{card}.querySelector('[aria-label=\"Kill worker-1\"]').click()")
        await browser.until(f"['starting', 'dead'].includes({card}.querySelector('.state').textContent)")
        assert await browser.until(f"{banner}.startsWith('Layers 1, 4') && {banner}") == (
            "Layers 1, 4 have no worker. Answers go on without them."
        )
        await browser.until("document.querySelectorAll('#answers .chip.out').length >= 2")
        await browser.until(f"['ready', 'busy'].includes({card}.querySelector('.state').textContent)")
        await browser.until("document.querySelectorAll('#answers .chip.out').length === 0")
        assert float(await browser.evaluate("document.querySelector('#accuracy').textContent.split(' ')[0]")) > 50
        await browser.evaluate("document.querySelector('[aria-label^=\"Let worker-0 take\"]').click()")
        await browser.until("document.querySelector('[aria-label^=\"Let worker-0 take\"]').ariaPressed === 'true'")
        for width in (1280, 390):  # nothing is wider than the window
            await browser.resize(width, 800)
            assert await browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.messages == []


@pytest.mark.parametrize("visit", [asks_as_the_page_does, *([looks_at_the_page] if CHROMIUM else [])])
def test_a_worker_is_killed_and_comes_back_while_answers_go_on(visit, tmp_path):
    asyncio.run(visited(visit, tmp_path))


TOKEN = "a-token-of-this-service"


async def ended_and_started_again(first, second) -> None:
    """Runs a service with a token for one visit, and after its end another at the same port."""
    inputs = RequestInputs.from_pretrained(FOLDER)
    port = 0
    for visit in (first, second):
        swarm = ls.Swarm.from_pretrained(FOLDER, workers=1, transport="local")
        told = asyncio.get_running_loop().create_future()
        service = asyncio.ensure_future(
            run_service(swarm, inputs, Address(port=port, token=TOKEN), announce=told.set_result)
        )
        await asyncio.wait({service, told}, return_when=asyncio.FIRST_COMPLETED)
        port = int((await told).rpartition(":")[2])
        try:
            await asyncio.wait_for(visit(await told), 120)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await service


async def who_watches_hears_the_end_and_comes_back(folder: Path) -> None:
    async with aiohttp.ClientSession() as session:
        streams = []

        async def watch(address):
            async with session.get(f"{address}/events", headers={"Authorization": "Bearer other"}) as response:
                assert response.status == 401
            streams.append(await session.get(f"{address}/events", headers={"Authorization": f"Bearer {TOKEN}"}))
            assert b'"beginning"' in await streams[-1].content.readline()

        await ended_and_started_again(watch, watch)
        for stream in streams:
            async for _ in stream.content:  # each has an end
                pass


async def the_page_says_so_and_comes_back(folder: Path) -> None:
    banner = "document.querySelector('#banner').textContent"
    enter = "document.querySelector('#token').value = '{}'; document.querySelector('#sign-in').requestSubmit()"
    async with Browser(folder) as browser:

        async def signs_in(address):
            await browser.open(address)
            await browser.until("document.querySelector('#sign-in')?.hidden === false")
            assert await browser.evaluate("document.querySelector('#not-it').hidden")
            await browser.evaluate(enter.format("other"))
            await browser.until(
                "!document.querySelector('#sign-in').hidden && !document.querySelector('#not-it').hidden"
            )
            await browser.evaluate(enter.format(TOKEN))
            await browser.until(f"{banner} === 'All 6 layers have a worker.'")

        async def comes_back(address):
            await browser.until("!document.querySelector('#page').classList.contains('lost')")
            await browser.until(f"{banner} === 'All 6 layers have a worker.'")

        await ended_and_started_again(signs_in, comes_back)
        await browser.until("document.querySelector('#page').classList.contains('lost')")
        assert (await browser.evaluate(banner)).endswith("Trying again …")


@pytest.mark.parametrize(
    "watching", [who_watches_hears_the_end_and_comes_back, *([the_page_says_so_and_comes_back] if CHROMIUM else [])]
)
def test_who_watches_is_told_of_the_end_and_comes_back(watching, tmp_path):
    asyncio.run(watching(tmp_path))
