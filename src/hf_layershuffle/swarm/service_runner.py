# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Runs the web service of a swarm from its start to a clean end."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demonstration import LabelledInput, PacedTransport
from .request_inputs import RequestInputs
from .service import create_app
from .service_guard import is_loopback
from .watched_swarm import WatchedSwarm


try:
    import uvicorn
except ImportError as error:
    raise ImportError(
        f'the service needs uvicorn ({error}); pip install "hf-layershuffle[swarm]"', name=error.name
    ) from error

if TYPE_CHECKING:
    from .swarm import Swarm

logger = logging.getLogger(__name__)
DRAIN_SECONDS = 30  # that answers under way have at the end
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@dataclass(frozen=True)
class Address:
    """Where a service listens, and whom it answers.

    Args:
        host: Name or address of this machine.
        port: From 0, for a free one, to 65535.
        token: That every request must bear. Needed where other machines reach the host.
        ssl_certfile, ssl_keyfile: Files of a certificate and its key, for HTTPS.

    Raises:
        `ValueError`: if a value is out of range, other machines reach it without a token, or a file is missing.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise ValueError(f"`port` is {self.port!r}; it must be an integer from 0 (a free one) to 65535.")
        if not is_loopback(self.host) and self.token is None:
            raise ValueError(
                f"`host` is '{self.host}', which other machines reach; give a token by --token_file FILE, which is "
                "made if it is not there, or stay on 127.0.0.1."
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("HTTPS needs both --ssl_certfile and --ssl_keyfile; give both or none.")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"`{name}` is '{path}', and there is no such file.")

    def bind(self) -> socket.socket:
        """A socket with this address. It refuses connections until it listens.

        Raises:
            `OSError`: if the port is taken, or the host is none of this machine.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except socket.gaierror as error:
            raise OSError(f"`host` is '{self.host}', which is no name or address: {error.strerror}.") from error
        bound = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # a port is free again at once after its last service ended
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            bound.close()
            raise OSError(
                f"{self.host}:{self.port} cannot be used ({error.strerror}); choose another --port, or 0 for a "
                "free one."
            ) from error
        return bound

    def url(self, bound: socket.socket) -> str:
        host, port = bound.getsockname()[:2]
        scheme = "http" if self.ssl_certfile is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def read_token(path: Path) -> str:
    """The token in a file, which is made, for its owner only, if it is missing.

    Raises:
        `ValueError`: if others may read the file, or it holds no token.
        `OSError`: if it cannot be read or made.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if not path.is_file():
            raise ValueError(
                f"The token file '{path}' is not a file; name one, or one that is not there yet."
            ) from None
        mode = stat.S_IMODE(path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ValueError(
                f"The token file '{path}' has mode {mode:04o}, so that others may use it; run chmod 600 {path}."
            ) from None
        token = path.read_text(encoding="utf-8").strip()
        if len(token) < 16 or len(token.split()) != 1 or not token.isascii():
            raise ValueError(
                f"The token file '{path}' holds no token of at least 16 letters and digits in one line; remove it, "
                "and a new one is made."
            ) from None
        return token
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{token}\n")
    return token


async def run_service(
    swarm: "Swarm",
    inputs: RequestInputs,
    address: Address | None = None,
    *,
    items: Sequence[LabelledInput] = (),
    rate: float = 4.0,
    paced: PacedTransport | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Starts a swarm and answers requests until the process is asked to end, by Ctrl-C, SIGTERM or SIGHUP.

    Then it takes no further request, answers those under way, and ends the swarm. A second Ctrl-C gives these up.

    Args:
        swarm: It is not started yet.
        inputs: Makes the model's inputs of what is sent.
        address: Where it listens.
        items, rate, paced: As for [`WatchedSwarm`].
        announce: Is told in one line where the service is, as soon as it answers.

    Raises:
        `OSError`, `SwarmError`, `ValueError`: if the port is taken, or the swarm cannot start. Nothing is left then.
    """
    stops = _Stops()
    inputs.cut_texts_for(swarm.model.model)
    try:
        async with AsyncExitStack() as stack:
            address = address or Address()
            bound = stack.enter_context(address.bind())
            stack.enter_context(stops.heard())
            if not await stops.unless_stopped(stack.enter_async_context(swarm)):
                return
            stops.hear()  # Ray has handlers of its own
            await stack.enter_async_context(_running_left(swarm))
            watched = WatchedSwarm(swarm, inputs.labels, items=items, rate=rate, paced=paced)
            app = create_app(watched, inputs, token=address.token)
            config = uvicorn.Config(
                app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False,
                server_header=False, timeout_graceful_shutdown=DRAIN_SECONDS, ssl_certfile=address.ssl_certfile,
                ssl_keyfile=address.ssl_keyfile,
            )  # fmt: skip
            server = _Server(config, on_start=lambda: announce(address.url(bound)))
            serving = asyncio.ensure_future(server.serve(sockets=[bound]))
            await asyncio.wait({serving, stops.first}, return_when=asyncio.FIRST_COMPLETED)
            watched.end()  # the streams of events, which have no end of their own
            server.should_exit = True
            await serving
    except asyncio.CancelledError:
        if not stops.is_forced:
            raise


@asynccontextmanager
async def _running_left(swarm: "Swarm") -> AsyncIterator[None]:
    """A context at whose end the requests that were left in the journal have run, and are no longer in it.

    Nobody can ask for their answers.
    """

    async def run(name: str) -> None:
        try:
            await swarm.answer(name)
        except Exception as error:  # each ends in its own way
            logger.warning("'%s', which was left in the journal, has no answer: %s", name, error)

    tasks = [asyncio.ensure_future(run(name)) for name in swarm.request_ids]
    try:
        yield
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _Server(uvicorn.Server):
    """Leaves the signals to us, and says when it answers."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]):
        super().__init__(config)
        self._on_start = on_start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            self._on_start()


class _Stops:
    """Signals that ask the process to end. The second cancels the task in which this was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self.first: asyncio.Future[None] = self._loop.create_future()
        self.is_forced = False

    def _stop(self) -> None:
        if not self.first.done():
            self.first.set_result(None)
        elif self._task is not None:
            self.is_forced = True
            self._task.cancel()

    def hear(self) -> None:
        """Takes the signals, also from who took them meanwhile."""
        for each in STOPPING:
            try:
                self._loop.add_signal_handler(each, self._stop)
            except (NotImplementedError, RuntimeError, ValueError):  # on Windows, or not in the main thread
                return

    @contextmanager
    def heard(self) -> Iterator[None]:
        """A context in which signals are heard. At its end they mean what they meant before."""
        try:
            earlier = {each: signal.getsignal(each) for each in STOPPING}
            self.hear()
            yield
        finally:
            for each, handler in earlier.items():
                try:
                    self._loop.remove_signal_handler(each)
                    signal.signal(each, handler)
                except (NotImplementedError, ValueError, TypeError):
                    continue

    async def unless_stopped(self, awaitable: Any) -> bool:
        """Awaits it; if a signal comes before, cancels it and returns False."""
        task = asyncio.ensure_future(awaitable)
        await asyncio.wait({task, self.first}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        await task
        return True
