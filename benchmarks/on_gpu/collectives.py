"""A process group of one on the device, with the backend that training takes."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from benchmarks.on_gpu.rates import device_of, times_ms
from benchmarks.on_gpu.setting import Figures, Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """Sum a network's gradients over the group."""
    return [
        Task(name="all_reduce of one", measure=functools.partial(_measure, setting))
    ]


def _measure(setting: Setting) -> Figures:
    device = device_of(setting)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{setting.work / 'group'}",
        rank=0,
        world_size=1,
    )
    try:
        # Of So-ViT-14 in float32.
        num_values = setting.pick(24_600_000, tiny=1000)
        gradients = torch.ones(num_values, device=device)
        spent = times_ms(lambda: dist.all_reduce(gradients), setting=setting)
        if not (gradients == 1).all():
            raise ValueError("expected a sum over one worker to change nothing")
        return {"backend": backend, "ms": spent.median, "bytes": gradients.nbytes}
    finally:
        dist.destroy_process_group()
