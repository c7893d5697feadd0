"""Build models and settings as on a GPU, of fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tests.fake_gpu.watch import Watch

GPU = torch.device("cuda", 0)


@contextlib.contextmanager
def on_fake_gpu() -> Iterator[Watch]:
    """Make all tensors fake within the context, and watch the operations on them.

    Two things differ from a real GPU: timm draws no weights, since they would have no
    values, and modules drop what would keep their parameters from moving.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    swap = torch.utils.swap_tensors

    def swap_fake(one: torch.Tensor, other: torch.Tensor) -> None:
        # Of where they come from, to which the mode has weak references.
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap(one, other)

    # What `torch.tensor` makes is else moved before a mode sees it.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            without_weights(),
            mock.patch.object(torch.utils, "swap_tensors", swap_fake),
            mode,
            Watch() as watch,
        ):
            yield watch
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Make timm build networks on the host without initialising weights."""
    create = timm.create_model

    def create_empty(*args: Any, **kwargs: Any) -> nn.Module:
        with unset_fake_temporarily(), torch.device("meta"):
            model = create(*args, **kwargs)
        for module in model.modules():
            _fill(module)
        return model

    with mock.patch.object(timm, "create_model", create_empty):
        yield


def _fill(module: nn.Module) -> None:
    """Replace a meta module's tensors by empty ones on the host, as if just built."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype),
                requires_grad=parameter.requires_grad,
            )
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
