"""Measure a step's activation memory on fake tensors, without allocating it.

A forward and a backward pass on PyTorch's fake tensors allocate nothing, but make and
drop the very tensors of a real one on a CPU; so their bytes can be summed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.config import Run
from pipelines.training.metrics import soft_cross_entropy
from pipelines.training.model import shapes_of


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a step needs beside weights, gradients and images."""

    kept: int
    """Between the forward and the backward pass, each storage once."""
    peak: int
    """Peak over both passes."""


def measure_step(
    run: Run, *, num_classes: int, batch_size: int, use_bfloat16: bool
) -> StepMemory:
    """Measure the passes over one micro-batch, with a CPU's kernels.

    A GPU's kernels may keep other tensors; a compiled step keeps less.
    """
    model = shapes_of(
        run.model,
        num_classes=num_classes,
        grad_checkpointing=run.scale.grad_checkpointing,
        optim=run.optim,
    )
    is_mixed = run.optim.mixup > 0 or run.optim.cutmix > 0
    with FakeTensorMode():
        _make_fake(model.train())
        size = (batch_size, 3, run.model.img_size, run.model.img_size)
        images = torch.empty(size).to(memory_format=torch.channels_last)
        targets = torch.empty(batch_size, num_classes)
        with _Living(_tensors(model, images, targets)) as living:
            mixed = images.clone() if is_mixed else images
            with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
                logits = model(mixed)
            loss = soft_cross_entropy(logits, targets).mean()
            kept = living.num_bytes
            loss.backward()
            return StepMemory(kept=kept, peak=living.most_bytes)


def _make_fake(model: nn.Module) -> None:
    """Replace a meta model's weights by fake CPU ones with gradients, in place."""
    # Not by `to_empty`, which can't swap fake tensors that are shared.
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, before in store.items():
                if before is not None:
                    if id(before) not in made:
                        made[id(before)] = _fake(before)
                    store[name] = made[id(before)]  # pyright: ignore


def _fake(before: Tensor) -> Tensor:
    made = torch.empty(before.shape, dtype=before.dtype, device="cpu")
    if made.dim() == 4:
        made = made.to(memory_format=torch.channels_last)
    if isinstance(before, nn.Parameter):
        made = nn.Parameter(made, requires_grad=before.requires_grad)
        if made.requires_grad:
            made.grad = torch.empty_like(made)
    return made


def _tensors(model: nn.Module, *others: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    grads = [p.grad for p in parameters if p.grad is not None]
    return [*parameters, *grads, *model.buffers(), *others]


class _Living(TorchDispatchMode):
    """Dispatch mode that sums the bytes of live storages, except those known before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.num_bytes = self.most_bytes = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = id(storage), storage.nbytes()
        if number in self._seen:
            return

        def forget(_: object) -> None:
            del self._seen[number]
            self.num_bytes -= size

        self._seen[number] = weakref.ref(storage, forget)
        self.num_bytes += size
        self.most_bytes = max(self.most_bytes, self.num_bytes)
