"""Build a worker's training state: model, average, optimiser, guard, FSDP2.

A checkpoint holds whole tensors whatever their sharding was, so a run may resume on
more or fewer workers, sharded or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.config import Run
from pipelines.data.batch import Position
from pipelines.hardware.device import is_gpu, set_numerics
from pipelines.hardware.row_limit import RowLimit
from pipelines.training.compiling import decide
from pipelines.training.model import build_model, checkpoint_gradients, local
from pipelines.training.nonfinite import KeysOf, NonFiniteGuard
from pipelines.training.optimizer import Frozen, build_optimizer, freeze


@dataclass(kw_only=True)
class TrainState:
    """State that changes during a training."""

    model: nn.Module
    """Bare model, whose weights are saved."""
    forward: nn.Module
    """Model as the step calls it: wrapped for data parallelism, or bare."""
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    guard: NonFiniteGuard
    """Guard of the model and the optimizer above, which skips bad steps."""
    frozen: Frozen = field(default_factory=Frozen)
    position: Position = field(default_factory=Position)
    limit: RowLimit = field(default_factory=RowLimit)
    """Limit of the rows that one forward and backward pass takes."""

    def train_mode(self) -> None:
        """Set the model to training, and what is frozen in this epoch to evaluation."""
        self.forward.train()
        self.frozen.set_modes(self.model, epoch=self.position.epoch)


def build_state(
    run: Run,
    *,
    num_classes: int,
    device: torch.device,
    world_size: int = 1,
    rank: int = 0,
    keys_of: KeysOf = lambda rows: {},
    load: Callable[[nn.Module], None] = lambda model: None,
    load_average: Callable[[nn.Module], None] = lambda average: None,
    tell: Callable[[str], None] = lambda line: None,
    limit: RowLimit | None = None,
) -> TrainState:
    """Build a run's model, on its device, with average, optimiser and guard.

    With several workers this is a collective: their process group must exist.

    Args:
        keys_of: Looks up the keys of images by row, for a message on a bad step.
        load: Loads weights into the model before the average is copied from it.
        load_average: Loads weights into the average.
        tell: Called with a line for the user on whether steps are compiled.
        limit: Limit that was found before; none by default.

    Raises ValueError where the model doesn't support the run's settings.
    """
    scale = run.scale
    # First, since cuBLAS looks at it when it starts.
    set_numerics(
        deterministic=scale.deterministic, matmul_precision=scale.matmul_precision
    )
    compiling = decide(scale, device=device, world_size=world_size)
    tell(compiling.line)
    torch.manual_seed(run.seed)
    model = build_model(run.model, num_classes=num_classes)
    if scale.grad_checkpointing:
        checkpoint_gradients(model, name=run.model.name)
    # Before the average is copied, and before data parallelism sees what has gradients.
    frozen = freeze(model, optim=run.optim)
    is_sharded = scale.sharding == "fsdp" and world_size > 1
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
    optimizer = build_optimizer(model, optim=run.optim)
    limit = limit or RowLimit()
    return TrainState(
        model=model,
        forward=wrapped(
            model,
            run=run,
            device=device,
            world_size=world_size,
            is_compiled=compiling.is_on,
            accumulates=limit.max_rows > 0,
        ),
        limit=limit,
        frozen=frozen,
        optimizer=optimizer,
        ema=ema,
        # After sharding, since it looks at the parameters that gradients will have.
        guard=NonFiniteGuard(
            model,
            optimizer,
            optim=run.optim,
            device=device,
            rank=rank,
            keys_of=keys_of,
        ),
    )


def wrapped(
    model: nn.Module,
    *,
    run: Run,
    device: torch.device,
    world_size: int,
    is_compiled: bool = False,
    accumulates: bool = False,
) -> nn.Module:
    """Wrap a model as the step calls it: data parallel, compiled, or as it is.

    Args:
        accumulates: Whether a step may have more micro-batches than the run says.
    """
    forward = model
    if world_size > 1 and run.scale.sharding == "none":
        forward = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if is_gpu(device) else None,
            gradient_as_bucket_view=True,
            # What a graph does at the second step it does at all: without
            # accumulation, and where nothing is compiled into other graphs.
            static_graph=run.num_micro(world_size) == 1
            and not accumulates
            and not is_compiled,
            # The papers keep BatchNorm's statistics by GPU; rank 0's are shared where
            # they are used, at the epoch's end.
            broadcast_buffers=False,
        )
        if run.scale.gradient_dtype == "bfloat16":
            forward.register_comm_hook(state=None, hook=bf16_compress_hook)
    if is_compiled:
        # All batches have one shape. Around data parallelism, so that gradients are
        # sent while others are still computed.
        return torch.compile(forward, dynamic=False)  # pyright: ignore[reportReturnType]
    return forward


def share_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to all workers: BatchNorm statistics differ by worker."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


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


def whole(value: Any) -> Any:
    """Gather a sharded tensor on every worker; a collective if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
