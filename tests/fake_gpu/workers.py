"""Run as the first of several workers in PyTorch's fake process group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipelines.training import state

NUM_WORKERS = 8


@contextlib.contextmanager
def among_workers() -> Iterator[None]:
    """Join a fake process group of eight, whose collectives change nothing.

    Data parallelism's comparison and broadcast of weights at its start are skipped:
    fake weights have no values.
    """
    dist.init_process_group("fake", rank=0, world_size=NUM_WORKERS, store=FakeStore())
    find_mesh = state.init_device_mesh

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # ranks are looked up in it
            return find_mesh(*args, **kwargs)

    nothing = mock.Mock(return_value=None)
    verify, share = "_verify_param_shape_across_processes", "_sync_module_states"
    try:
        with (
            mock.patch.object(state, "init_device_mesh", real_mesh),
            mock.patch.object(distributed, verify, nothing),
            mock.patch.object(distributed, share, nothing),
        ):
            yield
    finally:
        dist.destroy_process_group()


def sum_gradients(model: DistributedDataParallel) -> None:
    """Make data parallelism take its buckets from where the fake group left them.

    Its own way of calling the group takes them from a future, which is empty there.
    """

    # Without annotations, which PyTorch would not take as text.
    model.register_comm_hook(None, lambda _, bucket: _summed(bucket))


def _summed(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    dist.all_reduce(bucket.buffer(), async_op=True)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
