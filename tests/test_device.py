"""One module knows what a GPU is; here on the CPU, and on a GPU that is pretended."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

from pipelines.hardware import device
from pipelines.hardware.device import CPU

ROOT = Path(__file__).parents[1]


def cuda_mentions(source: str) -> list[int]:
    """Lines that ask PyTorch about CUDA, or compare something with its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        is_torch_cuda = (
            isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        )
        asks = isinstance(node, ast.Attribute) and node.attr == "is_cuda"
        compares = isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Constant) and part.value == "cuda"
            for part in (node.left, *node.comparators)
        )
        names = isinstance(node, ast.Call) and any(
            isinstance(part, ast.Constant) and part.value == "cuda"
            for argument in node.args
            for part in ast.walk(argument)
        )
        if is_torch_cuda or asks or compares or names:
            found.append(getattr(node, "lineno", 0))
    return found


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("torch.cuda.synchronize()", True),
        ("if x.is_cuda: pass", True),
        ("if device.type == 'cuda': pass", True),
        ("torch.device('cuda' if here else 'cpu')", True),
        ("torch.device('cpu')", False),
        ("wanted = 'cuda'", False),
    ],
)
def test_the_wall_sees_what_asks_for_cuda(code: str, is_found: bool) -> None:
    assert bool(cuda_mentions(code)) == is_found


def test_one_module_knows_cuda() -> None:
    """What stands behind such a question elsewhere, no test on a CPU would enter."""
    mentions = {
        path.relative_to(ROOT).as_posix(): lines
        for layer in ("sovit", "pipelines", "tuning")
        for path in sorted((ROOT / layer).rglob("*.py"))
        if (lines := cuda_mentions(path.read_text()))
    }
    assert list(mentions) == ["pipelines/hardware/device.py"]


@pytest.mark.skipif(device.has_gpu(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here_is_one_line_that_names_the_flag() -> None:
    assert device.find_device("auto") == device.find_device("cpu") == CPU
    assert device.device_of(False, flag="--scale.use-gpu") == CPU
    with pytest.raises(ValueError, match=r"expected a GPU for --device, got .* finds"):
        device.find_device("cuda")
    with pytest.raises(ValueError, match=r"leave out --scale\.use-gpu"):
        device.device_of(True, flag="--scale.use-gpu")
    assert device.gpus_here() == (0, 0)


def test_on_a_cpu_nothing_waits_and_nothing_is_copied_twice() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    with device.side_stream(CPU):
        assert device.upload(tensor, CPU) is tensor
        device.used_here(tensor)
        device.wait_for_stream(CPU)
        device.synchronize(CPU)
    copy = device.download(tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    assert copy.stride() == tensor.stride()
    assert torch.equal(copy, tensor)
    assert not copy.is_pinned()


def test_memory_of_a_cpu_is_the_machines() -> None:
    assert 1 << 20 < device.free_memory(CPU) < device.pages_bytes("SC_PHYS_PAGES")
    assert device.pages_bytes("no such name") == 0


def test_how_a_process_computes_is_set_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variable = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(variable, raising=False)
    before = torch.backends.cudnn.benchmark
    with device.numerics_kept():
        device.set_numerics(deterministic=False, matmul_precision="high")
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "high"
        assert variable not in os.environ
        device.set_numerics(deterministic=True, matmul_precision="highest")
        assert not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[variable] == ":4096:8"
        with device.numerics_kept():
            device.set_numerics(deterministic=False, matmul_precision="high")
        assert os.environ[variable] == ":4096:8"
        assert torch.get_float32_matmul_precision() == "highest"
    assert variable not in os.environ
    assert torch.backends.cudnn.benchmark == before
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(variable, ":16:8")
    device.set_numerics(deterministic=False, matmul_precision="highest")
    with device.numerics_kept():
        device.set_numerics(deterministic=True, matmul_precision="highest")
        assert os.environ[variable] == ":16:8"
    torch.backends.cudnn.benchmark = before


def test_random_numbers_of_the_caller_stay() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with device.forked_rng(CPU):
        torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
