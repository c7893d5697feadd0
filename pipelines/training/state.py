"""Build a worker's training state: model, average, optimiser, guard, wrapping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
)

from pipelines.config import Run
from pipelines.data.position import Position
from pipelines.hardware.device import is_gpu, set_numerics
from pipelines.hardware.row_limit import RowLimit
from pipelines.training.compiling import decide
from pipelines.training.freezing import Frozen
from pipelines.training.freezing import freeze as freeze
from pipelines.training.fsdp import shard
from pipelines.training.model import build_model
from pipelines.training.nonfinite import KeysOf, NonFiniteGuard
from pipelines.training.optimizer import build_optimizer


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


def checkpoint_gradients(model: nn.Module, *, name: str) -> None:
    """Make a model recompute activations in its backward pass.

    Raises ValueError where timm doesn't support it.
    """
    try:
        model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    except (AttributeError, AssertionError) as error:  # timm asserts where it can't
        raise ValueError(
            "scale.grad_checkpointing: expected a model that timm can checkpoint, got "
            f"{name}; set --scale.no-grad-checkpointing"
        ) from error


def share_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to all workers: BatchNorm statistics differ by worker."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
