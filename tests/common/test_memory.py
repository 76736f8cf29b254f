import ctypes
import sys
from pathlib import Path

import pytest
from conftest import run_python

from hf_layershuffle.common.memory import give_back_large_blocks


# Blocks of which each is freed while a small one lies above it
CODE = """
import ctypes, sys
from hf_layershuffle.common.memory import give_back_large_blocks
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "given back":
    give_back_large_blocks()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def block(size):
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    return address
libc.free(block(20 * 2**20))  # which raises the threshold of glibc
before = resident()
blocks = []
for _ in range(20):
    blocks.append(block(10 * 2**20))
    block(300_000)
for address in blocks:
    libc.free(address)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc")
def test_large_blocks_go_back_to_the_system():
    kept, given_back = (float(run_python(CODE, how, fresh=True).stdout) for how in ("kept", "given back"))
    assert given_back < 30
    assert kept > 100  # or the call would be for nothing


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Path())  # has no `mallopt`
    give_back_large_blocks()
