"""What processes of this machine do, as Linux says it."""

import ipaddress
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def descendants(process_id: int) -> set[int]:
    """The processes that a process started, and those that they started, but for the server of `forked.py`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    found, new = set(), {process_id}
    while new:
        new = {child for child, parent in parents.items() if parent in new and not is_fork_server(child)} - found
        found |= new
    return found


def is_fork_server(process_id: int) -> bool:
    try:
        return b"/fork_server.py" in Path(f"/proc/{process_id}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds: float = 90.0):
    """What a condition gives as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def listening(process_ids: set[int]) -> set[tuple[str, int]]:
    """Addresses and ports of the TCP sockets at which processes listen."""
    inodes = set()
    for process_id in process_ids:
        with suppress(OSError):
            for link in Path(f"/proc/{process_id}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    inodes.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                host, port = fields[1].split(":")
                words = [struct.pack("=I", int(host[i : i + 8], 16)) for i in range(0, len(host), 8)]
                address = ipaddress.ip_address(b"".join(words))
                found.add((str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return found


def ray_folders() -> set[Path]:
    """Folders of the Ray of a swarm, of this process or those that it started."""
    ours = descendants(os.getpid()) | {os.getpid()}
    found = {path for parent in {tempfile.gettempdir(), "/tmp"} for path in Path(parent).glob("ls-ray-*")}
    return {path for path in found if int(path.name.split("-")[2]) in ours}


@contextmanager
def no_ray_left() -> Iterator[None]:
    """Checks that a Ray that is started inside leaves no process, socket, folder or environment variable."""
    before, processes, folders = _environment(), descendants(os.getpid()), ray_folders()
    yield
    changed = before.items() ^ _environment().items()
    assert not changed, changed
    assert not ray_folders() - folders
    left = {each for each in descendants(os.getpid()) - processes if is_running(each)}
    assert not left, [Path(f"/proc/{each}/cmdline").read_bytes()[:200] for each in left]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
