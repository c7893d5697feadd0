"""Shard a model over the workers with FSDP2, and gather it again.

A checkpoint holds whole tensors whatever their sharding was, so a run may resume on
more or fewer workers, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, *, device: torch.device) -> None:
    """Shard every parameter over the workers; a collective.

    The elements of the model's sequences, such as a transformer's blocks, are gathered
    one after the other as they are needed; the rest of it as one.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for part in child:
                if any(True for _ in part.parameters()):
                    fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Buffers are no parameters, and stay where they were.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard an optimiser's state, loaded whole, like its parameters; a collective."""
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = distribute_tensor(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Update an exponential moving average of a model's weights and buffers.

    Non-float tensors are copied. As timm's ModelEmaV3, whose own update fails on a
    mixture of sharded parameters and whole buffers.
    """
    pairs = [
        local(pair)
        for pair in zip(
            average.state_dict().values(), model.state_dict().values(), strict=True
        )
    ]
    floats = [(old, new) for old, new in pairs if old.is_floating_point()]
    olds, news = zip(*floats, strict=True)
    torch._foreach_lerp_(olds, news, weight=1 - decay)  # pyright: ignore
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this worker's shards of tensors, or whole tensors as they are."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Check whether any of the tensors is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(value: Any) -> Any:
    """Gather a sharded tensor on every worker; a collective if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
