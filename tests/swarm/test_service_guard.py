"""Which hosts are this machine, and how much may be sent; refusals over a connection are in test_service.py."""

import asyncio

import pytest
from starlette.exceptions import HTTPException

from hf_layershuffle.swarm.service_guard import Guard, host_name, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost.", "a.localhost"])
def test_names_and_addresses_of_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.1", "10.0.0.1", "", "localhost.example", "127.0.0.1.example", "1"]
)
def test_other_names_and_addresses(host):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "header, expected",
    [
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
        ("a", "a"),
        ("a@127.0.0.1:1", ""),
        ("127.0.0.1:80@evil.example", ""),
        ("[::1]evil.example", ""),
        ("", ""),
    ],
)
def test_the_host_of_a_header_has_no_port(header, expected):
    assert host_name(header) == expected


def answer_to(parts: list[bytes], most: int, **headers: str) -> tuple[int | None, bytes]:
    """The status of a refusal, and what the application read."""
    read, sent = b"", []

    async def application(scope, receive, send):
        nonlocal read
        is_more = True
        while is_more:
            message = await receive()
            read, is_more = read + message["body"], message["more_body"]

    async def run():
        messages = iter(parts)

        async def receive():
            return {
                "type": "http.request",
                "body": next(messages, b""),
                "more_body": parts[-1] not in read or not read,
            }

        async def send(message):
            sent.append(message)

        named = {"host": "localhost", **headers}
        scope = {"type": "http", "path": "/classify", "method": "POST"}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in named.items()]
        await Guard(application, most)(scope, receive, send)

    try:
        asyncio.run(run())
    except HTTPException as error:
        return error.status_code, read
    return (sent[0]["status"] if sent else None), read


def test_bytes_are_counted_whatever_the_request_says_of_them():
    assert answer_to([b"aaaa", b"bbbb"], 8) == (None, b"aaaabbbb")
    assert answer_to([b"aaaa", b"bbbb"], 7) == (413, b"aaaa")
    assert answer_to([b"aaaa", b"bbbb"], 7, **{"content-length": "1"}) == (413, b"aaaa")
    status, read = answer_to([b"aaaa"], 7, **{"content-length": "8"})
    assert (status, read) == (413, b"")
    assert answer_to([b"aaaa"], 7, **{"content-length": "many"}) == (None, b"aaaa")


@pytest.mark.parametrize("name", ["host", "origin"])
def test_two_headers_of_which_one_could_be_looked_at_are_refused(name):
    sent = []

    async def run():
        async def send(message):
            sent.append(message)

        first = [(b"host", b"localhost"), (b"origin", b"http://localhost")]
        scope = {"type": "http", "path": "/classify", "method": "POST", "headers": [*first, (name.encode(), b"other")]}
        await Guard(lambda *args: pytest.fail("it was let through"), 8)(scope, None, send)

    asyncio.run(run())
    assert sent[0]["status"] == 400
