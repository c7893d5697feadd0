"""Call all of `pipelines/hardware/device.py`, which alone inspects devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipelines.hardware import device
from tests.fake_gpu.device import GPU
from tests.fake_gpu.watch import Watch


def offered() -> tuple[str, ...]:
    """List the module's public functions and classes."""
    found = inspect.getmembers(
        device, lambda it: callable(it) and hasattr(it, "__name__")
    )
    own = (name for name, it in found if it.__module__ == device.__name__)
    return tuple(name for name in own if not name.startswith("_"))


def _within(context: Any) -> str:
    with context:
        return type(torch.cuda.current_stream()).__name__


def _numerics() -> bool:
    with device.numerics_kept():
        device.set_numerics(deterministic=False, matmul_precision="high")
        return torch.backends.cudnn.benchmark


def _event() -> None:
    device.wait_for_event(device.record_event(GPU), GPU)


def _out_of_memory() -> list[bool]:
    errors = torch.OutOfMemoryError("no memory"), RuntimeError("no kernel")
    return [device.is_out_of_memory(error) for error in errors]


CALLS: Mapping[str, Callable[[], Any]] = {
    "PeakMemory": lambda: list(device.PeakMemory(GPU).metrics()),
    "autocast_dtype": lambda: str(device.autocast_dtype(GPU, amp="auto")),
    "current_stream": lambda: device.current_stream(GPU) is not None,
    "device_of": lambda: str(device.device_of(True, flag="--x")),
    "download": lambda: device.download(torch.ones(3, device=GPU)).tolist(),
    "find_device": lambda: [str(device.find_device(w)) for w in ("auto", "cuda")],
    "forked_rng": lambda: _within(device.forked_rng(GPU)),
    "free_memory": lambda: device.free_memory(GPU) >> 30,
    "gpu_facts": lambda: device.gpu_facts(GPU)["gpu"],
    "gpus_here": lambda: device.gpus_here()[0],
    "has_bfloat16": lambda: device.has_bfloat16(GPU),
    "has_gpu": device.has_gpu,
    "is_gpu": lambda: device.is_gpu(GPU),
    "is_out_of_memory": _out_of_memory,
    "numerics_kept": _numerics,
    "pages_bytes": lambda: device.pages_bytes("no such name"),
    "record_event": _event,
    "release_memory": lambda: device.release_memory(GPU),
    "set_numerics": _numerics,
    "side_stream": lambda: _within(device.side_stream(GPU)),
    "synchronize": lambda: device.synchronize(GPU),
    "upload": lambda: str(device.upload(torch.ones(3), GPU).device),
    "used_here": lambda: device.used_here(torch.ones(3, device=GPU)),
    "wait_for_event": _event,
    "wait_for_stream": lambda: device.wait_for_stream(GPU),
}
ANSWERS: Mapping[str, Any] = {
    "PeakMemory": ["peak_memory_mb", "peak_tensors_mb"],
    "autocast_dtype": "torch.bfloat16",
    "current_stream": True,
    "device_of": "cuda:0",
    "download": [0.0, 0.0, 0.0],
    "find_device": ["cuda:0", "cuda:0"],
    "forked_rng": "Stream",
    "free_memory": 100,
    "gpu_facts": "Fake H200",
    "gpus_here": 1,
    "has_bfloat16": True,
    "has_gpu": True,
    "is_gpu": True,
    "is_out_of_memory": [True, False],
    "numerics_kept": True,
    "pages_bytes": 0,
    "set_numerics": True,
    "side_stream": "Stream",
    "upload": "cuda:0",
}


def enter_all(watch: Watch) -> dict[str, Any]:
    """Call each; return the results by name."""
    watch.on()
    found = {name: call() for name, call in CALLS.items()}
    watch.off()
    return found
