"""Programs in children of `fork_server.py`, which have imported torch already."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from threading import Timer


SERVER = Path(__file__).with_name("fork_server.py")


@cache
def _server() -> subprocess.Popen:
    """One for all tests of this process; it ends with it, when its input ends."""
    return subprocess.Popen(
        [sys.executable, SERVER],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_forked(
    code_or_script: str | Path, arguments: list[str], environment: dict[str, str], cwd: str | None, timeout: float
) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives of a script (`Path`) or code (`str`).

    Raises:
        `subprocess.TimeoutExpired`: if it took longer than `timeout` seconds; it is killed then.
    """
    is_script = isinstance(code_or_script, Path)
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for path in streams.values():
            path.touch()
        request = {
            "code": code_or_script.read_text() if is_script else code_or_script,
            "file": str(code_or_script) if is_script else "<string>",
            "folder": str(code_or_script.parent) if is_script else "",
            "argv": [str(code_or_script) if is_script else "-c", *arguments],
            "environment": environment,
            "cwd": str(cwd or os.getcwd()),
            **{name: str(path) for name, path in streams.items()},
        }
        code = _answered(request, timeout)
        output, errors = (path.read_text() for path in streams.values())
    return subprocess.CompletedProcess(request["argv"], code, output, errors)


def _answered(request: dict, timeout: float) -> int:
    """The exit code of the child that the server makes."""
    server = _server()
    print(json.dumps(request), file=server.stdin, flush=True)
    child = int(server.stdout.readline())
    timed_out = []

    def kill() -> None:
        timed_out.append(True)
        os.kill(child, signal.SIGKILL)

    timer = Timer(timeout, kill)
    timer.start()
    try:
        code = int(server.stdout.readline())
    finally:
        timer.cancel()
    if timed_out:
        raise subprocess.TimeoutExpired(request["argv"], timeout)
    return code
