# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Ray, started for one swarm on this machine alone, or joined where it runs; and ended without a trace."""

import atexit
import contextlib
import importlib
import importlib.util
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from .answers import SwarmError
from .ray_security import check_joined_nodes, check_joining


_logger = logging.getLogger(__name__)
DEFAULT_OBJECT_STORE_BYTES = 150 * 2**20
_FOLDER = "ls-ray-"  # short, since paths of sockets have at most 107 characters, of which Ray takes 65
_LONGEST_FOLDER = 38
_SECONDS_TO_END = 10.0
_SECONDS_TO_ANSWER = 5.0


class RayCluster:
    """Ray for this process: one that listens on the loopback interface only and asks for a token, or one that runs.

    Both methods may block for seconds. They can be called from any thread.

    Args:
        address: `host:port` of a running Ray of which this machine is a node. None to start one.
        object_store_bytes: Of shared memory for hidden states on their way, at least 76 MiB.
    """

    def __init__(self, address: str | None = None, object_store_bytes: int = DEFAULT_OBJECT_STORE_BYTES):
        self.address = address
        self.object_store_bytes = object_store_bytes
        self.folder: Path | None = None
        self.this_node = ""
        self._home: _Home | None = None

    def start(self) -> None:
        """Starts or joins Ray.

        Raises:
            `SwarmError`: if it cannot; nothing is left running then.
            `ValueError`: if an address is none, or joining it would not be safe.
        """
        if importlib.util.find_spec("ray") is None:
            raise SwarmError('Ray is missing; install it by `pip install "hf-layershuffle[swarm]"`.')
        if self._home is not None:
            raise SwarmError("this Ray runs already")
        self._home = _Home()
        atexit.register(self.stop)
        try:
            self._home.run(self._start)
        except (SwarmError, ValueError):
            self.stop()
            raise
        except Exception as error:
            self.stop()
            reason = " ".join(str(error).split())[:400]
            raise SwarmError(f"Ray could not start ({type(error).__name__}: {reason}).") from error

    def stop(self) -> None:
        """Ends what `start` started: processes, sockets and files. Ray that was joined goes on without this process.

        Calling it twice is no error.
        """
        home, self._home = self._home, None
        if home is not None:
            atexit.unregister(self.stop)
            home.run(self._stop)
            home.end()

    def nodes(self, num_gpus: float = 0.0) -> list[str]:
        """Ids of the machines that are there, this one first.

        Args:
            num_gpus: That a machine must have.
        """
        import ray

        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= num_gpus]
        return sorted((node["NodeID"] for node in alive), key=lambda node: (node != self.this_node, node))

    def _start(self) -> None:
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            raise SwarmError(
                "Ray is initialised in this process already, and a swarm has a Ray of its own, which listens on this "
                "machine only. End it by `ray.shutdown()`, or start the swarm in another process."
            )
        if self.address is not None:
            self._join(self.address)
            return
        remove_folders_of_the_dead()
        self.folder = _new_folder()
        token = self.folder / "token"
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        values = {
            # Without it Ray listens on all interfaces, also where it is given 127.0.0.1
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # On loopback too: other users of this machine are not the owner
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_AUTH_TOKEN": None,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": None,
        }
        with _settings(values):
            import ray

            ray.init(
                "local",
                num_cpus=1,  # of which actors take none: how many there are is said by the swarm
                include_dashboard=False,
                object_store_memory=self.object_store_bytes,
                _temp_dir=str(self.folder / "r"),  # Ray opens it to all users; the folder above is closed to them
                **_QUIET,
            )
            self._note_node()

    def _join(self, address: str) -> None:
        host, port = check_joining(address, os.environ)
        try:
            socket.create_connection((host, port), timeout=_SECONDS_TO_ANSWER).close()
        except OSError as error:  # Ray would try for minutes
            raise SwarmError(f"No Ray answers at '{address}' ({error}); start it there by `ray start`.") from error
        with _settings({"RAY_ADDRESS": None}):
            import ray

            ray.init(address, **_QUIET)
            check_joined_nodes([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]], os.environ)
            self._note_node()

    def _note_node(self) -> None:
        import ray

        self.this_node = ray.get_runtime_context().get_node_id()

    def _stop(self) -> None:
        ray: Any = sys.modules.get("ray")
        folder, self.folder = self.folder, None
        found = processes_using(folder) if folder is not None else set()
        if ray is not None and (folder is not None or self.address is not None):
            with contextlib.suppress(Exception):  # whatever a Ray says that is half started or dead
                ray.shutdown()
            _read_settings_again()
        if folder is not None:
            _end(folder, found)
            shutil.rmtree(folder, ignore_errors=True)


_QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "hf-layershuffle"}


class _Home:
    """A thread that lives as long as a cluster: Linux ends Ray's processes when the *thread* ends that started them.

    A daemon, so that it lives until the functions of `atexit` have run.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="ray-home", daemon=True).start()

    def run(self, function: Callable[[], None]) -> None:
        future: Future[None] = Future()
        self._calls.put((future, function))
        future.result()

    def end(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


@contextlib.contextmanager
def _settings(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables, some of which Ray reads at its import and others at its start, while it starts.

    Those that Ray itself sets are put back too.
    """
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if value is not None})
    for name in values.keys() & os.environ.keys():
        if values[name] is None:
            del os.environ[name]
    logger = logging.getLogger("ray")
    level = logger.level
    try:
        from ray._private import ray_constants, worker

        logger.setLevel(logging.ERROR)
        _read_settings_again()
        # Ray prints what it has to say of workers that died, a page each. The router says it in a line
        worker.print_to_stdstream = _log_message
        is_cluster, name = ray_constants.ENABLE_RAY_CLUSTER, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster and values.get(name) != "0"  # it may have been read before
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = is_cluster
    finally:
        logger.setLevel(level)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _log_message(data: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
    _logger.debug("Ray: %s", "\n".join(map(str, data["lines"])))


def _read_settings_again() -> None:
    """Ray keeps what it read of the environment, and the token."""
    raylet: Any = importlib.import_module("ray._raylet")
    if not hasattr(raylet, "AuthenticationTokenLoader"):
        version = importlib.import_module("ray").__version__
        raise SwarmError(f"Ray {version} asks nobody for a token; take 2.60 or newer, which do: pip install -U ray")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


# --- Folders and processes ---


def _new_folder() -> Path:
    parent = tempfile.gettempdir()
    if len(parent) + len(_FOLDER) + 18 > _LONGEST_FOLDER:
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-", dir=parent))  # of mode 0700


def remove_folders_of_the_dead() -> None:
    """Removes what is left of processes that were killed and could not do it themselves."""
    for parent in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(parent).glob(f"{_FOLDER}*-*"):
            process_id = folder.name.removeprefix(_FOLDER).partition("-")[0]
            with contextlib.suppress(OSError):
                is_ours = process_id.isdecimal() and folder.stat().st_uid == os.getuid() and not folder.is_symlink()
                if is_ours and not Path(f"/proc/{process_id}").exists() and Path("/proc/self").exists():
                    _end(folder, processes_using(folder))
                    shutil.rmtree(folder, ignore_errors=True)


def processes_using(folder: Path) -> set[tuple[int, str]]:
    """Processes that were started with a path in the folder or have a file in it open, but for this one.

    Each with the time of its start, since numbers of processes come again. None where there is no `/proc`.
    """
    found = set()
    prefix = os.path.realpath(folder)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is of another user
            if path.stat().st_uid != os.getuid() or int(path.name) == os.getpid():
                continue
            uses = prefix.encode() in (path / "cmdline").read_bytes()
            if uses or any(_target(link).startswith(prefix) for link in (path / "fd").iterdir()):
                found.add((int(path.name), _started(path)))
    return found


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def _started(path: Path) -> str:
    """When a process started, in ticks; nothing of one that ended, and waits for its parent."""
    state, *fields = (path / "stat").read_text().rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


def is_running(process_id: int, started: str) -> bool:
    try:
        return bool(started) and _started(Path(f"/proc/{process_id}")) == started
    except OSError:
        return False


def _end(folder: Path, processes: set[tuple[int, str]]) -> None:
    """Waits for processes to end by themselves, and then ends them."""
    for seconds, kill in ((_SECONDS_TO_END / 2, False), (_SECONDS_TO_END / 2, True)):
        processes = {each for each in processes | processes_using(folder) if is_running(*each)}
        if kill:
            for process_id, _ in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
        end = time.monotonic() + seconds
        while any(is_running(*each) for each in processes) and time.monotonic() < end:
            time.sleep(0.02)
