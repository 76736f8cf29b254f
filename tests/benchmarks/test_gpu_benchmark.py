"""benchmarks/gpu.py on the CPU, where compiling is left out. No time is asserted."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import gpu

    return gpu


@pytest.mark.parametrize("library", ["plain", "ours"])
def test_the_operations_counted_are_those_of_the_model(gpu, library):
    model = gpu.build(library, "tiny").eval()
    model.set_attn_implementation("eager")  # whose matrix products the counter sees
    images = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * gpu.forward_flops(gpu.sizes_of("tiny"))


def test_vit_base_is_that_of_the_papers(gpu):
    assert gpu.forward_flops(gpu.sizes_of("base")) / 2 == pytest.approx(17.58e9, rel=0.01)  # DeiT-B: 17.5 G
    assert gpu.forward_flops(gpu.sizes_of("small")) / 2 == pytest.approx(4.6e9, rel=0.01)
    assert sum(each.numel() for each in gpu.build("ours", "small").parameters()) == pytest.approx(22.05e6, rel=0.001)


def test_a_card_is_known_by_its_name(gpu):
    assert gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_of("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_of("NVIDIA A10G") == 70e12
    assert gpu.peak_of("NVIDIA L40S") == 362e12
    assert gpu.peak_of("Tesla K80") is None


def test_rows_compare_each_with_ours_compiled(gpu):
    seconds = {"plain": (4.0, 3.0), "timm": (3.0, 2.0), "ours": (4.0, 2.0)}
    contestants = [
        gpu.Contestant(library, is_compiled, lambda: torch.empty(1000), [seconds[library][is_compiled]] * 3)
        for library in gpu.LIBRARIES
        for is_compiled in (False, True)
    ]
    work = 3 * 10 * gpu.forward_flops(gpu.sizes_of("tiny"))
    args = SimpleNamespace(batch_size=10, rounds=3, device="cpu", peak=work / 1.0, peak_name="the peak")
    rows, numbers = gpu.rows_of(contestants, "tiny", "training", args)
    found = {(row.what.split(": ")[1], row.against, row.unit): row for row in rows}
    assert found["ours compiled", "the peak", "share of peak"].ratio == pytest.approx(0.5)
    assert found["ours compiled", "the peak", "share of peak"].met is True
    assert found["timm compiled", "ours compiled", "time"].ratio == 1
    assert found["timm compiled", "ours compiled", "time"].met is True
    assert found["plain compiled", "ours compiled", "time"].ratio == 1.5
    assert found["ours eager", "ours compiled", "time"].ratio == 2
    assert found["ours compiled", "timm compiled", "peak memory"].ratio == 1
    assert ("ours compiled", "ours compiled", "time") not in found
    assert [each["images_per_second"] for each in numbers] == [2.5, 10 / 3, 10 / 3, 5, 2.5, 5]


@pytest.mark.slow
def test_the_whole_script_with_a_tiny_model(gpu, monkeypatch, tmp_path, capsys):
    arguments = ["--tiny", "--device", "cpu", "--rounds", "2", "--warm_up", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(gpu, "libraries", lambda: (("plain", "ours"), "No timm."))
    monkeypatch.setattr(gpu, "compile_regions", lambda model: model)
    ahead = []
    monkeypatch.setattr(gpu, "compile_ahead", lambda args: ahead.append((args.size, args.libraries)))
    precision = torch.get_float32_matmul_precision()
    try:
        gpu.main()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert ahead == [(["tiny"], ("plain", "ours"))]
    assert "training, a tiny ViT: ours compiled" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    numbers = {(each["kind"], each["library"], each["compiled"]): each for each in written["measurements"]}
    assert len(numbers) == 8 and all(each["images_per_second"] > 0 for each in numbers.values())
    # The same tensors, whatever the order
    for kind in ("training", "inference"):
        peaks = {numbers[kind, library, False]["peak_bytes"] for library in ("plain", "ours")}
        assert max(peaks) == pytest.approx(min(peaks), rel=0.001)


def test_without_a_gpu_it_says_how_to_try_it(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="try the script out with --tiny --device cpu"):
        gpu.main()
