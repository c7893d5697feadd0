"""Measure a process group of one rank on the device, with training's backend."""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.on_gpu.rates import device_of, times_ms
from benchmarks.on_gpu.stages import Figures, Setting, Tasks


def tasks(setting: Setting) -> Tasks:
    """Sum a network's gradients over the group."""
    return {"all_reduce of one": lambda: _measure(setting)}


def _measure(setting: Setting) -> Figures:
    device = device_of(setting)
    backend = dist.get_default_backend_for_device(device)
    group = f"file://{setting.work / 'group'}"
    dist.init_process_group(backend, init_method=group, rank=0, world_size=1)
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
