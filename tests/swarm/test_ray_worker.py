"""How calls get to the process of an actor and back."""

import numpy as np
import pytest
import ray
import torch

from hf_layershuffle.swarm.ray_transport import _running_ray
from hf_layershuffle.swarm.ray_worker import Failure, RayWorker, pack, unpack
from hf_layershuffle.swarm.transport import WorkerGoneError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit_wherever_they_stand(dtype):
    tensor = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    value = {"a": (tensor.transpose(0, 2), [None, 3]), "b": {"c": torch.tensor(1).to(dtype)}, "d": tensor[:0]}
    packed = pack(value)
    assert isinstance(packed["a"][0].content, np.ndarray)
    packed["a"][0].content.flags.writeable = False  # as in shared memory
    back = unpack(packed)
    assert back["a"][1] == [None, 3]
    for given, expected in ((back["a"][0], value["a"][0]), (back["b"]["c"], value["b"]["c"]), (back["d"], tensor[:0])):
        assert given.dtype == dtype and given.shape == expected.shape and torch.equal(given, expected)
    back["a"][0].zero_()  # in memory of its own
    assert torch.equal(unpack(packed)["a"][0], value["a"][0])


def test_what_fails_in_a_worker_is_told_in_a_line(tmp_path):
    worker = RayWorker()
    failure = worker.start(str(tmp_path), [0], 1, {"name": "a"})
    assert isinstance(failure, Failure) and failure.kind in ("OSError", "ValueError") and "config" in failure.message
    failure = worker.info()
    assert failure.kind == "WorkerFaultError" and failure.message.startswith("AttributeError: ")
    assert "\n" not in failure.message and len(failure.message) < 350


def test_a_ray_that_has_ended_is_not_started_again(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray started itself"))
    with pytest.raises(WorkerGoneError, match="Ray has ended"):
        _running_ray()
