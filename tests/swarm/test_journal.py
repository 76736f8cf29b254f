"""Accepted requests on disk."""

import asyncio
import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY
from safetensors import SafetensorError
from support.swarm import IntegerModel, check_answer, integer_swarm, nothing_left, numbers, until

from hf_layershuffle.swarm import journal as journal_module
from hf_layershuffle.swarm.answers import MissingLayersError, SwarmClosedError
from hf_layershuffle.swarm.journal import Journal, Record


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_records_come_back_as_they_were_the_oldest_first(tmp_path):
    shared = torch.arange(6).reshape(2, 3)
    inputs = {"input_ids": shared, "mask": shared[:, :2], "flag": True, "half": torch.ones(2, dtype=torch.bfloat16)}

    async def main() -> None:
        journal = Journal(tmp_path / "new", {0: "a", "depth_embedding": "b"})
        assert await journal.open() == []
        await journal.write(Record("second", inputs, 2.5, 1))
        await journal.write(Record("first", {"x": numbers(1)}))
        await journal.write(Record("gone", {"x": numbers(1)}))
        await journal.remove("gone")
        await journal.remove("gone")
        await journal.close()
        again = Journal(tmp_path / "new", {"depth_embedding": "b", 0: "a"})
        records = await again.open()
        await again.close()
        assert [(each.name, each.deadline, each.max_skips) for each in records] == [
            ("second", 2.5, 1),
            ("first", None, None),
        ]
        assert records[0].inputs.keys() == inputs.keys() and records[0].inputs["flag"] is True
        for name in ("input_ids", "mask", "half"):
            assert torch.equal(records[0].inputs[name], inputs[name])
            assert records[0].inputs[name].dtype == inputs[name].dtype
        for path in (tmp_path / "new").glob("*.safetensors"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700

    asyncio.run(main())


def test_a_journal_has_one_owner(tmp_path):
    async def main() -> None:
        async with integer_swarm(journal=tmp_path):
            async with nothing_left(tasks=False):
                with pytest.raises(
                    ValueError, match=r"is in use by process \d+ .*choose another folder for `journal`"
                ):
                    async with integer_swarm(journal=tmp_path):
                        pass
        async with integer_swarm(journal=tmp_path):
            pass
        assert files(tmp_path) == []

    asyncio.run(main())


def test_requests_for_another_model_are_refused(tmp_path):
    async def main() -> None:
        journal = Journal(tmp_path, {0: "another"})
        await journal.open()
        await journal.write(Record("a", {"numbers": numbers(1)}))
        await journal.close()
        with pytest.raises(
            ValueError, match=r"holds requests for another model, or of another version .*choose another"
        ):
            async with integer_swarm(journal=tmp_path):
                pass
        assert files(tmp_path) == ["a.request.safetensors"]

    asyncio.run(main())


@pytest.mark.parametrize("content", [b"", b"garbage", None, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_set_aside_with_a_warning(content, tmp_path, caplog):
    async def main() -> None:
        journal = Journal(tmp_path, IntegerModel().digests)
        await journal.open()
        await journal.write(Record("good", {"numbers": numbers(1)}))
        await journal.write(Record("bad", {"numbers": numbers(2)}))
        await journal.close()
        path = tmp_path / "bad.request.safetensors"
        path.write_bytes(path.read_bytes()[:-3] if content is None else content)
        async with integer_swarm(journal=tmp_path) as swarm:
            assert swarm.request_ids == ["good"]
            check_answer(swarm, numbers(1), await swarm.answer("good"))
        assert files(tmp_path) == ["bad.request.safetensors.damaged"]

    asyncio.run(main())
    assert "bad.request.safetensors' is damaged and was set aside" in caplog.text


def test_what_was_accepted_is_there_until_its_answer_is_handed_over(tmp_path):
    async def main() -> None:
        async with integer_swarm(journal=tmp_path, suspect_timeout=20.0) as swarm:
            swarm.transport.hang("worker-0")
            task = asyncio.create_task(swarm.classify(numbers(3), request_id="a"))
            left = asyncio.create_task(swarm.classify(numbers(3), request_id="b"))
            await until(lambda: swarm.metrics()["accepted"] == 2)
            assert files(tmp_path) == ["a.request.safetensors", "b.request.safetensors"]
            left.cancel()
            await asyncio.wait([left])
            assert files(tmp_path) == ["a.request.safetensors"]
            with pytest.raises(ValueError, match="holds NaN"):
                await swarm.classify(numbers(float("nan")), request_id="c")
            swarm.transport.go_on("worker-0")
            await task
            assert files(tmp_path) == []

    asyncio.run(main())


def test_requests_that_a_closed_swarm_left_run_in_the_next_one(tmp_path):
    async def main() -> None:
        with pytest.raises(KeyError):
            async with integer_swarm(journal=tmp_path) as swarm:
                swarm.transport.hang("worker-0")
                tasks = [asyncio.create_task(swarm.classify(numbers(i), request_id=f"r{i}")) for i in range(5)]
                await until(lambda: swarm.metrics()["accepted"] == 5)
                raise KeyError("a fault of the caller")
        for task in tasks:
            with pytest.raises(SwarmClosedError, match="a swarm that opens the journal again runs it"):
                await task
        async with nothing_left():
            async with integer_swarm(journal=tmp_path) as swarm:
                assert swarm.request_ids == ["r0", "r1", "r2", "r3", "r4"]
                with pytest.raises(asyncio.TimeoutError):  # who leaves does not end a request of the journal
                    await asyncio.wait_for(swarm.answer("r2"), 0.0)
                for i in (2, 0):
                    check_answer(swarm, numbers(i), await swarm.answer(f"r{i}"))
                # Sent again by a client that did not hear of the answer: joined
                check_answer(swarm, numbers(1), await swarm.classify(numbers(1), request_id="r1"))
                assert swarm.metrics()["accepted"] == 5
        # Answered, but not handed over
        assert files(tmp_path) == ["r3.request.safetensors", "r4.request.safetensors"]

    asyncio.run(main())


def test_an_error_is_an_outcome_too(tmp_path):
    async def main() -> None:
        async with integer_swarm(journal=tmp_path, restart=False, max_wait=0.1) as swarm:
            await swarm.remove_worker("worker-1", force=True)
            with pytest.raises(MissingLayersError):
                await swarm.classify(numbers(1))
        assert files(tmp_path) == []

    asyncio.run(main())


def test_a_folder_that_cannot_be_written_into_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")

    async def main() -> None:
        async with nothing_left():
            with pytest.raises(ValueError, match=r"cannot be made.*choose another folder for `journal`"):
                async with integer_swarm(journal=tmp_path / "file" / "journal"):
                    pass

    asyncio.run(main())


def test_a_full_disk_refuses_requests_and_takes_no_answer_away(tmp_path, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*args, **kwargs):
        raise full

    async def main() -> None:
        async with nothing_left():
            async with integer_swarm(journal=tmp_path) as swarm:
                with monkeypatch.context() as patch:
                    patch.setattr(journal_module, "save_file", fails)
                    with pytest.raises(OSError, match="No space left"):
                        await swarm.classify(numbers(1), request_id="a")
                assert swarm.request_ids == [] and files(tmp_path) == []
                assert swarm.metrics()["refused"] == {"OSError": 1}
                with monkeypatch.context() as patch:
                    patch.setattr(Path, "unlink", fails)
                    check_answer(swarm, numbers(1), await swarm.classify(numbers(1), request_id="b"))

    asyncio.run(main())
    assert "'b' stays in the journal, and will be run again" in caplog.text


CRASHING = """
import asyncio, sys
from support.swarm import integer_swarm, numbers

async def main():
    async with integer_swarm(journal=sys.argv[1], suspect_timeout=100.0, max_queue=1000) as swarm:
        swarm.transport.hang("worker-0")
        for i in range(40):
            asyncio.create_task(swarm.classify(numbers(i, i + 1), request_id=f"r{i}"))
        while swarm.metrics()["accepted"] < 40:
            await asyncio.sleep(0.01)
        print("accepted", flush=True)
        await asyncio.sleep(100)

asyncio.run(main())
"""


def test_kill_9_of_the_routers_process_loses_no_accepted_request(tmp_path):
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])}
    command = [sys.executable, "-c", CRASHING, str(tmp_path / "journal")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "accepted\n"
        process.send_signal(signal.SIGKILL)

    async def main() -> None:
        async with integer_swarm(journal=tmp_path / "journal") as swarm:
            for i in range(40):
                check_answer(swarm, numbers(i, i + 1), await swarm.answer(f"r{i}"))
        assert files(tmp_path / "journal") == []

    asyncio.run(main())


@pytest.mark.parametrize("folder", ["", 5, None])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(ValueError, match=f"`journal` is {folder!r}; it must be the path of a folder"):
        Journal(folder, {})


def test_a_folder_that_is_there_keeps_its_mode_and_a_link_to_nothing_is_set_aside(tmp_path, caplog):
    tmp_path.chmod(0o755)
    (tmp_path / "lost.request.safetensors").symlink_to(tmp_path / "nothing")

    async def main() -> None:
        journal = Journal(tmp_path, {})
        assert await journal.open() == []
        await journal.close()

    asyncio.run(main())
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert "is damaged and was set aside" in caplog.text


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    async def main() -> None:
        journal = Journal(tmp_path, {})
        await journal.open()
        monkeypatch.setattr(journal_module, "save_file", full)
        with pytest.raises(OSError, match=r"a.request.safetensors' cannot be written: I/O error: No space left"):
            await journal.write(Record("a", {"x": numbers(1)}))
        await journal.close()

    asyncio.run(main())
    assert files(tmp_path) == []
