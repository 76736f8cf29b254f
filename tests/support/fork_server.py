"""Gives each program a process of its own that has torch already: half of what a fresh process does is importing it.

    python fork_server.py        # answers the requests of `conftest.run_python`, a line of JSON each

What is imported before the fork reads no environment variable that a test sets: neither transformers nor anything of
Hugging Face, nor this package. The children share the seed of Python's hashes. A program of which the imports, the
memory or the hashes are tested needs `fresh=True`.
"""

import gc
import json
import os
import random
import sys
import tempfile
import types


def main() -> dict | None:
    """Answers requests with the process id and then the exit code of a child. Returns a request in each child."""
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch._dynamo  # noqa: F401

    assert not {"transformers", "huggingface_hub", "hf_layershuffle"} & sys.modules.keys()
    gc.freeze()  # what is imported here stays: the children need neither look through it nor copy it
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                return json.loads(line)
            print(child, file=answers, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    return None


def become(request: dict) -> types.CodeType:
    """Makes this process what a fresh one would be; returns the program."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(request[name], os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    inherited = [os.path.dirname(__file__), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    random.seed()
    tempfile.tempdir = None  # is read of the environment at first use
    sys.argv = request["argv"]
    own = [request["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*own, *(path for path in sys.path if path not in inherited)]
    return compile(request["code"], request["file"], "exec")


if __name__ == "__main__":
    request = main()
    if request is not None:
        program = become(request)
        # A module of its own; multiprocessing and pickle look for it by this name
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        if request["file"] != "<string>":
            module.__file__ = request["file"]
        exec(program, module.__dict__)
