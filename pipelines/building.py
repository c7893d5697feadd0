"""Build what a worker trains: model, average, optimiser, and how the step calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from pipelines.checkpoint import build_model
from pipelines.config import Run
from pipelines.device import is_gpu
from pipelines.loop import TrainState
from pipelines.optim import build_optimizer
from pipelines.sharding import shard


def build_state(
    run: Run,
    *,
    num_classes: int,
    device: torch.device,
    world_size: int = 1,
    load: Callable[[nn.Module], None] = lambda model: None,
    load_average: Callable[[nn.Module], None] = lambda average: None,
) -> TrainState:
    """Build a run's model, on its device, with average and optimiser.

    With several workers this is a collective: their process group must be there.

    Args:
        load: Puts weights into the model before the average is taken from it.
        load_average: Puts others into the average.

    Raises ValueError where the model can't be what the run asks for.
    """
    torch.use_deterministic_algorithms(run.scale.deterministic)
    torch.manual_seed(run.seed)
    model = build_model(run.model, num_classes=num_classes)
    if run.scale.grad_checkpointing:
        checkpoint_gradients(model, name=run.model.name)
    is_sharded = run.scale.sharding == "fsdp" and world_size > 1
    if not is_sharded:  # else no device has to hold the whole
        # Convolutions are faster so, on CPUs too, and decoders give their images so;
        # FSDP2 takes no such weights.
        model.to(device).to(memory_format=torch.channels_last)
    load(model)
    decay = run.optim.ema_decay
    ema = ModelEmaV3(model, decay=decay) if decay else None
    if ema is not None:
        load_average(ema.module)
    if is_sharded:
        for whole in (model, ema.module if ema is not None else None):
            if whole is not None:
                shard(whole, device=device)
    return TrainState(
        model=model,
        forward=wrapped(model, run=run, device=device, world_size=world_size),
        optimizer=build_optimizer(model, optim=run.optim),
        ema=ema,
    )


def wrapped(
    model: nn.Module, *, run: Run, device: torch.device, world_size: int
) -> nn.Module:
    """Give the model as the step calls it: data parallel, compiled, or as it is."""
    forward = model
    if world_size > 1 and run.scale.sharding == "none":
        forward = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if is_gpu(device) else None,
            gradient_as_bucket_view=True,
            # What a graph does at the second step it does at all: without
            # accumulation, and where nothing is compiled into other graphs.
            static_graph=run.num_micro(world_size) == 1 and not run.scale.compile,
            # The papers keep BatchNorm's statistics by GPU; rank 0's are shared where
            # they are used, at the epoch's end.
            broadcast_buffers=False,
        )
    if run.scale.compile:
        # All batches have one shape. Around data parallelism, so that gradients are
        # sent while others are still computed.
        return torch.compile(forward, dynamic=False)  # pyright: ignore[reportReturnType]
    return forward


def checkpoint_gradients(model: nn.Module, *, name: str) -> None:
    """Have a model compute activations again in its backward pass.

    Raises ValueError where timm can't do that for it.
    """
    try:
        model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    except (AttributeError, AssertionError) as error:  # timm asserts where it can't
        raise ValueError(
            f"scale.grad_checkpointing: wanted a model that timm can checkpoint, came "
            f"{name}; set --scale.no-grad-checkpointing"
        ) from error
