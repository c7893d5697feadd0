"""What trained a run is told by its workers, memory and precision with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.driver.progress import Display
from pipelines.events.bad_images import BadImageLog
from pipelines.events.channel import WorkerStarted
from pipelines.hardware import device, facts
from pipelines.hardware.device import CPU, PeakMemory
from pipelines.hardware.facts import host_facts, tags_of, without_bfloat16, worker_facts

GPU = torch.device("cuda", 0)
MIB = 1 << 20
V100 = {"gpu": "Tesla V100", "precision": "float32", "driver": "535.1"}
H200 = {"gpu": "NVIDIA H200", "precision": "bfloat16", "driver": "580.65"}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Pretend a GPU; what it has in use can be changed."""
    card = {"free": 90 * MIB, "total": 100 * MIB, "tensors": 4 * MIB}
    found = {
        "get_device_name": lambda device: "NVIDIA H200",
        "mem_get_info": lambda device: (card["free"], card["total"]),
        "max_memory_allocated": lambda device: card["tensors"],
    }
    for name, answer in found.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return card


@pytest.mark.usefixtures("card")
def test_a_worker_tells_its_gpus_kind_and_what_computes_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    answer = "case $1 in *driver_version*) echo 580.65.06;; esac"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = worker_facts(GPU, precision="bfloat16")
    assert found.items() >= host_facts().items()
    gpu = {name: value for name, value in found.items() if name not in host_facts()}
    assert gpu.pop("driver") == "580.65.06"
    assert gpu.pop("cuda", torch.version.cuda) == torch.version.cuda
    number = int("".join(f"{int(n):02}" for n in gpu.pop("cudnn", "0").split(".")))
    assert number == (torch.backends.cudnn.version() or 0)
    assert gpu.pop("nccl", "2").startswith("2")
    assert gpu == {"gpu": "NVIDIA H200", "precision": "bfloat16"}
    tool.unlink()
    assert "driver" not in worker_facts(GPU, precision="bfloat16")


def test_a_worker_on_a_cpu_tells_of_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "output_of", lambda *command: pytest.fail("asked"))
    wanted = host_facts() | {"precision": "float32"}
    assert worker_facts(CPU, precision="float32") == wanted


def test_different_kinds_are_all_named() -> None:
    found = tags_of([H200, H200, V100, {"precision": "bfloat16", "cpu": "EPYC"}])
    assert found == {
        "hardware.gpus": "2 x NVIDIA H200, 1 x Tesla V100",
        "hardware.precision": "bfloat16, float32",
        "version.nvidia-driver": "580.65, 535.1",
        "hardware.cpu": "EPYC",
    }
    assert tags_of([{}]) == {}


def test_gpus_without_bfloat16_are_told_of_with_what_that_means() -> None:
    line = without_bfloat16([V100, H200, V100])
    assert line.startswith("steps compute in float32 on 2 x Tesla V100, for want of bf")
    assert "--optim.num-accumulation" in line
    assert without_bfloat16([H200, {"precision": "float32"}]) == ""


def test_all_that_have_begun_are_told_of_together_in_their_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[list[int]] = []

    def note(begun: Any) -> str:
        seen.append([item.rank for item in begun])
        return without_bfloat16([item.hardware for item in begun])

    display = Display(
        num_steps=1,
        num_epochs=1,
        bad_images=BadImageLog(keep=lambda text: None),
        on_begun=note,
    )
    for rank, told in ((1, V100), (0, H200)):
        item = WorkerStarted(rank=rank, world_size=2, host="a", step=3, hardware=told)
        display.handle(item)
    display.close()
    first, second = capsys.readouterr().out.splitlines()
    gpus = "1 x NVIDIA H200, 1 x Tesla V100"
    assert first == f"2 workers on a: 2, {gpus}; from step 3"
    assert second == without_bfloat16([V100])
    assert seen == [[0, 1]]


def test_a_gpus_peak_is_of_all_that_uses_it(card: dict[str, Any]) -> None:
    peak = PeakMemory(GPU)
    peak.look()
    card["free"] = 30 * MIB
    peak.look()
    card["free"] = 80 * MIB
    assert peak.metrics() == {"peak_memory_mb": 70.0, "peak_tensors_mb": 4.0}


def test_a_cpus_peak_is_the_processs() -> None:
    peak = PeakMemory(CPU)
    peak.look()
    (found,) = peak.metrics().items()
    assert found[0] == "peak_memory_mb"
    assert 50 < found[1] < 1 << 20
    assert device.gpu_facts(CPU) == {}
