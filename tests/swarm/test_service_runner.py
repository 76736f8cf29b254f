"""Addresses, token files, and signals; whole services are run by tests/cli/test_cli_swarm.py."""

import asyncio
import os
import signal
import socket

import pytest
import torch

import hf_layershuffle as ls
from hf_layershuffle.swarm.journal import Journal, Record
from hf_layershuffle.swarm.request_inputs import RequestInputs
from hf_layershuffle.swarm.service_runner import Address, _running_left, _Stops, read_token, run_service


def test_a_free_port_is_named_and_refuses_until_it_listens():
    address = Address(port=0)
    with address.bind() as bound:
        port = bound.getsockname()[1]
        assert address.url(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        bound.listen()
        with pytest.raises(
            OSError, match=rf"127.0.0.1:{port} cannot be used \(Address already in use\); choose another"
        ):
            Address(port=port).bind()


def test_addresses_of_version_6_have_brackets():
    if not socket.has_ipv6:
        return
    try:
        bound = Address(host="::1", port=0).bind()
    except OSError:  # a machine without them
        return
    with bound:
        assert Address(host="::1").url(bound) == f"http://[::1]:{bound.getsockname()[1]}"


def test_https_needs_two_files_that_are_there(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="HTTPS needs both --ssl_certfile and --ssl_keyfile; give both or none"):
        Address(ssl_keyfile=tmp_path / "a")
    with pytest.raises(ValueError, match=r"`ssl_keyfile` is '.*b', and there is no such file"):
        Address(ssl_certfile=tmp_path / "a", ssl_keyfile=tmp_path / "b")
    with Address(port=0, ssl_certfile=tmp_path / "a", ssl_keyfile=tmp_path / "a").bind() as bound:
        assert Address(ssl_certfile=tmp_path / "a", ssl_keyfile=tmp_path / "a").url(bound).startswith("https://")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.example"])
def test_what_other_machines_reach_needs_a_token(host):
    with pytest.raises(ValueError, match="which other machines reach; give a token by --token_file FILE"):
        Address(host=host)
    assert Address(host=host, token="x" * 16).host == host


def test_a_token_is_made_once_for_its_owner_alone(tmp_path):
    earlier = os.umask(0)
    try:
        token = read_token(tmp_path / "token")
    finally:
        os.umask(earlier)
    assert len(token) >= 32 and read_token(tmp_path / "token") == token
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert read_token(tmp_path / "other") != token
    with pytest.raises(OSError):
        read_token(tmp_path / "no-such-folder" / "token")


@pytest.mark.parametrize("content", ["", "short", "two words that are long enough", "ä" * 20])
def test_a_file_without_a_token_is_refused(tmp_path, content):
    (tmp_path / "token").write_text(content, encoding="utf-8")
    os.chmod(tmp_path / "token", 0o600)
    with pytest.raises(ValueError, match="holds no token of at least 16 letters and digits in one line; remove it"):
        read_token(tmp_path / "token")


def test_the_first_signal_asks_for_the_end_and_the_second_forces_it():
    async def run() -> str:
        stops = _Stops()
        try:
            with stops.heard():
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(asyncio.shield(stops.first), 30)
                assert not stops.is_forced
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            return "forced" if stops.is_forced else "cancelled by somebody else"
        return "went on"

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert asyncio.run(run()) == "forced"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_what_is_started_is_cancelled_by_a_signal_and_its_error_is_told():
    ended = []

    async def start():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled")

    async def broken():
        raise ValueError("no worker")

    async def run():
        stops = _Stops()
        with stops.heard():
            assert not await stops.unless_stopped(start())
        again = _Stops()
        with pytest.raises(ValueError, match="no worker"):
            await again.unless_stopped(broken())
        assert await again.unless_stopped(asyncio.sleep(0))

    asyncio.run(run())
    assert ended == ["cancelled"]


def test_a_token_file_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file; name one, or one that is not there yet"):
        read_token(tmp_path)


def test_what_was_left_in_the_journal_runs_once(tmp_path, caplog):
    folder = ls.example_model()

    def served(left: list[Record]) -> dict:
        async def run():
            swarm = ls.Swarm.from_pretrained(folder, workers=2, transport="local", journal=tmp_path / "journal")
            journal = Journal(tmp_path / "journal", swarm.model.digests)
            await journal.open()
            for record in left:
                await journal.write(record)
            await journal.close()
            stop = lambda address: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
            inputs = RequestInputs.from_pretrained(folder)
            await run_service(swarm, inputs, Address(port=0), announce=stop)
            return swarm.metrics()

        return asyncio.run(run())

    left = [Record(f"r{i}", {"pixel_values": torch.rand(1, 3, 8, 8)}) for i in range(3)]
    assert served([*left, Record("wrong", {"pixel_values": torch.rand(1, 5, 8, 8)})])["answered"] == 3
    assert list((tmp_path / "journal").iterdir()) == []
    assert "'wrong', which was left in the journal, has no answer: `pixel_values` has 5 channels" in caplog.text
    assert served([])["answered"] == 0


def test_what_was_left_in_the_journal_is_not_waited_for_after_a_fault():
    class Endless:
        request_ids = ("a",)

        async def answer(self, name):
            await asyncio.sleep(3600)

    async def run():
        async with _running_left(Endless()):
            raise KeyError("a fault")

    with pytest.raises(KeyError):
        asyncio.run(run())
