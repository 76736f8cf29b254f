"""Workers in processes of Ray: as right as a local model, and as mortal as processes are."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import Architecture
from support.models import EXTRAS, randomize
from support.processes import descendants, is_running, listening, no_ray_left, until

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.layerwise import LayerwiseClassifier
from hf_layershuffle.swarm.answers import SwarmError
from hf_layershuffle.swarm.ray_transport import RayTransport
from hf_layershuffle.swarm.transport import LayerCall, WorkerFaultError, WorkerGoneError


SECONDS = 120.0  # after which something hangs


class Started:
    """A transport in an event loop of its own, with the workers "a" and "b"."""

    def __init__(self, folder):
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        self.transport = RayTransport(folder)

    def run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, SECONDS))

    async def start(self) -> None:
        await self.transport.open()
        await asyncio.gather(self.transport.start_worker("a", [0, 2]), self.transport.start_worker("b", [1, 3]))

    def process_id(self, name: str) -> int:
        return self.run(self.transport.ping(name)).process_id


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Workers of a ViT of four layers in bfloat16. At the end nothing is left of them."""
    folder = tmp_path_factory.mktemp("vit")
    randomize(Architecture("vit").classifier(**EXTRAS)).to(torch.bfloat16).save_pretrained(folder)
    with no_ray_left():
        started = Started(folder)
        try:
            started.run(started.start())
            yield started
            processes = descendants(os.getpid())
        finally:
            started.run(started.transport.close())
        started.run(started.transport.close())
        with pytest.raises(SwarmError, match="not open"):
            started.run(started.transport.ping("a"))
        started.loop.close()
    assert len(processes) > 4 and not any(map(is_running, processes))


def call(layer: int = 0, position: int = 0, *shape: int, dtype=torch.bfloat16) -> LayerCall:
    states = torch.randn(shape or (2, 5, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    return LayerCall("request", layer, position, states)


def test_layers_give_what_they_give_in_the_model(started):
    model = LayerwiseClassifier(load_classifier(started.folder).eval())
    model.embed(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))

    async def hops() -> list:
        places = [("a", 2, 0), ("b", 3, 1), ("b", 1, 2), ("a", 0, 3)]
        calls = [transport.call(name, call(layer, position)) for name, layer, position in places]
        return await asyncio.gather(*calls)

    transport = started.transport
    for result in started.run(hops()):
        with torch.no_grad():
            expected = model.run_layer(call().hidden_states, result.layer, result.position)[0]
        assert result.hidden_states.dtype == torch.bfloat16 and torch.equal(result.hidden_states, expected)
        assert result.seconds > 0
        result.hidden_states.zero_()  # not in shared memory


def test_workers_are_processes_that_say_what_they_are(started):
    first, second = (started.run(started.transport.ping(name)) for name in "ab")
    assert (first.name, first.layers, second.layers, first.device) == ("a", (0, 2), (1, 3), "cpu")
    assert first.process_id != second.process_id and {first.process_id, second.process_id} <= descendants(os.getpid())
    assert first.node == "127.0.0.1" and set(first.digests) == {0, 2, "depth_embedding"}
    assert first.digests["depth_embedding"] == second.digests["depth_embedding"]


def test_nobody_listens_but_on_the_loopback_interface(started):
    found = listening(descendants(os.getpid()) | {os.getpid()})
    assert len(found) > 4  # the sockets of Ray are seen
    assert {host for host, _ in found} <= {"127.0.0.1", "::1"}, found


def test_what_a_worker_refuses_is_a_fault_in_a_few_words(started):
    process_id = started.process_id("a")
    for wrong, message in (
        (call(1), r"holds? .*layer|layer 1"),
        (call(0, 0, 2, 5, 31), r"shape \(2, 5, 31\)"),
        (call(dtype=torch.float32), r"torch\.float32"),
    ):
        with pytest.raises(WorkerFaultError, match=message) as caught:
            started.run(started.transport.call("a", wrong))
        assert len(str(caught.value)) < 300 and "Traceback" not in str(caught.value)
    started.run(started.transport.call("a", call()))
    assert started.process_id("a") == process_id


def test_layers_that_are_loaded_take_the_place_of_others(started):
    transport = started.transport
    process_id = started.process_id("b")
    assert started.run(transport.load_layers("b", [0])).layers == (0,)
    with pytest.raises(ValueError, match="9"):
        started.run(transport.load_layers("b", [9]))
    here, there = (started.run(transport.call(name, call())).hidden_states for name in "ab")
    assert torch.equal(here, there)
    assert started.run(transport.load_layers("b", [1, 3])).layers == (1, 3)
    assert started.process_id("b") == process_id


def test_a_stopped_process_does_not_answer_until_it_goes_on(started):
    async def check() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(transport.ping("a"), 1.0)
        asked = asyncio.create_task(transport.call("a", call()))
        await transport.call("b", call(1))  # others do
        assert not asked.done()
        os.kill(process_id, signal.SIGCONT)
        await asked
        await transport.ping("a")

    transport, process_id = started.transport, started.process_id("a")
    os.kill(process_id, signal.SIGSTOP)
    try:
        started.run(check())
    finally:
        os.kill(process_id, signal.SIGCONT)


def test_a_killed_process_is_gone_and_can_be_started_again(started):
    async def check() -> None:
        os.kill(process_id, signal.SIGSTOP)  # so that calls are under way when it dies
        calls = [asyncio.create_task(transport.call("a", call())) for _ in range(8)]
        await asyncio.sleep(0.3)
        os.kill(process_id, signal.SIGKILL)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, WorkerGoneError) and len(str(error)) < 300
        with pytest.raises(WorkerGoneError, match="a died or cannot be reached"):
            await transport.ping("a")
        assert (await transport.start_worker("a", [2])).layers == (2,)
        await transport.call("a", call(2))
        await transport.load_layers("a", [0, 2])

    transport, process_id = started.transport, started.process_id("a")
    started.run(check())
    assert started.process_id("a") != process_id and not is_running(process_id)


def workers() -> set[int]:
    """Processes of actors. Ray keeps some beside them that wait to become one."""
    found = set()
    for each in descendants(os.getpid()):
        with suppress(OSError):
            if is_running(each) and Path(f"/proc/{each}/cmdline").read_bytes().startswith(b"ray::RayWorker"):
                found.add(each)
    return found


def test_workers_end_once_and_those_that_cannot_start_do_too(started):
    transport = started.transport
    before = workers()
    with pytest.raises(ValueError, match="9"):
        started.run(transport.start_worker("c", [9]))
    with pytest.raises(WorkerGoneError, match="no worker c"):
        started.run(transport.ping("c"))
    process_id = started.run(transport.start_worker("c", [0])).process_id
    os.kill(process_id, signal.SIGSTOP)  # it ends all the same
    try:
        started.run(transport.stop_worker("c", force=True))
        started.run(transport.stop_worker("c", force=True))
        started.run(transport.stop_worker("c"))
        until(lambda: not is_running(process_id))
    finally:
        with suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    with pytest.raises(WorkerGoneError, match="no worker c"):
        started.run(transport.call("c", call()))
    until(lambda: workers() == before)


def test_arguments_that_cannot_be_are_refused_before_anything_starts():
    for message, arguments in (
        ("`num_threads` is 0", {"num_threads": 0}),
        ("`object_store_bytes` is 1000", {"object_store_bytes": 1000}),
        ("`gpus_per_worker` is -1", {"gpus_per_worker": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            RayTransport(ls.example_model(), **arguments)


def test_a_transport_that_is_not_open_says_so():
    transport = RayTransport(ls.example_model())
    with pytest.raises(SwarmError, match="not open"):
        asyncio.run(transport.start_worker("a", [0]))
    asyncio.run(transport.close())
