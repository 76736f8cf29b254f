# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Who may ask a service, and how much they may send, whatever is behind it."""

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
# The page itself holds nothing of the swarm, and asks for the token
PUBLIC_PATHS = ("/",)


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a name or an address."""
    name = host.rstrip(".").lower().removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def host_name(host: str) -> str:
    """The name or address of a `Host` header, without the port; nothing if it is no such header."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d*)?", host, re.ASCII)
    return found[1] if found is not None else ""


class Guard:
    """Refuses requests before anything reads them.

    A page of the web that is open in a browser on this machine must not reach a service on this machine: it could
    send requests to it, and, with a name that it lets point to 127.0.0.1, also read what comes back. So the `Host`
    must be of this machine, unless there is a token, and an `Origin` must be the service itself.

    Args:
        app: The service.
        max_body_bytes: Bytes of a request at most, whether it says its length or not.
        token: That requests must bear; None for none.
    """

    def __init__(self, app: Application, max_body_bytes: int, token: str | None = None):
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.token = token

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self._refusal(scope, Headers(raw=scope["headers"]))
        if refusal is not None:
            return await refusal(scope, receive, send)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, receive_limited, send)

    def _refusal(self, scope: MutableMapping[str, Any], headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if max(len(headers.getlist(name)) for name in ("host", "origin")) > 1:
            return _refused(400, "The request has two headers Host or Origin.")
        if self.token is None and not is_loopback(host_name(host)):
            return _refused(403, f"The host '{host[:100]}' is not this machine; ask by 127.0.0.1 or localhost.")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return _refused(403, f"The request comes from a page of '{origin[:100]}', which may not send any.")
        is_cross_site = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if is_cross_site and scope["path"] not in PUBLIC_PATHS:
            return _refused(403, "The request comes from a page of another site, which may not send any.")
        if self.token is not None and scope["path"] not in PUBLIC_PATHS and not self._bears_token(headers):
            return _refused(
                401, "Send the token of this service: 'Authorization: Bearer TOKEN'.", {"WWW-Authenticate": "Bearer"}
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return _refused(413, self._too_large())
        return None

    def _bears_token(self, headers: Headers) -> bool:
        kind, _, token = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), (self.token or "").encode())

    def _too_large(self) -> str:
        return f"The request is larger than {self.max_body_bytes:,} bytes, the most that is taken."


def _refused(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # What was sent is not read, so that the connection cannot go on
    return JSONResponse({"detail": message}, status, {**(headers or {}), "Connection": "close"})
