"""Skip optimizer steps with NaN or inf gradients; report the images and layers.

Nothing here waits for the device before `check`: the fused optimisers skip a step by
a flag on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.config import Optim
from pipelines.data.batch import Batch
from pipelines.errors import NonFiniteLossError, RewindError
from pipelines.training.model import is_sharded, local
from pipelines.training.optimizer import FOUND_INF
from pipelines.transforms.rows import DRAW_STRIDE

_MAX_KEYS = 8
# As torch.nn.utils.clip_grad_norm_ has it.
_CLIP_EPS = 1e-6
KeysOf = Callable[[Sequence[int]], Mapping[int, str]]
"""Looks up the keys of images by their rows in the training set."""


class NonFiniteGuard:
    """Guard that detects NaN and inf in a worker's steps, and skips those steps.

    With several workers `check` is a collective if a step was bad: all have the same
    gradients, and so the same result.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        optim: Optim,
        device: torch.device,
        rank: int = 0,
        keys_of: KeysOf = lambda rows: {},
    ) -> None:
        self._optimizer, self._optim, self._rank = optimizer, optim, rank
        self._keys_of = keys_of
        # Only what is trained has gradients to look at.
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._params = [parameter for _, parameter in named]
        self._is_sharded = is_sharded(self._params)
        places = [group_of(name) for name, _ in named]
        self._names = tuple(dict.fromkeys(places))
        index = [self._names.index(place) for place in places]
        self._index = torch.tensor(index, device=device)
        # Statistics of BatchNorm have seen the images of a step that is not to count.
        self._buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        self._saved = [buffer.clone() for buffer in self._buffers]
        # On the device: a step writes them, and only `check` reads them.
        self._before = torch.zeros(len(self._names), device=device)
        self._then = torch.zeros_like(self._before)
        self._flag = torch.zeros((), device=device)
        self._has_bad = torch.zeros_like(self._flag)
        self._bad: list[tuple[int, Tensor]] = []
        self._seen: list[tuple[int, np.ndarray, Tensor]] = []
        self._num_skipped = 0

    def begin(self) -> None:
        """Save the buffers that a forward pass changes."""
        # Before each step, since which one is bad is known only after it; into the same
        # memory, so that the allocator has nothing to do.
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)  # pyright: ignore

    def undo(self, *, step: int) -> None:
        """Restore the buffers, and forget the batches, of a step that starts over."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)  # pyright: ignore
        self._seen = [seen for seen in self._seen if seen[0] != step]

    def observe(self, batch: Batch, losses: Tensor, *, step: int) -> Tensor:
        """Record a micro-batch; return its losses (B,), 0 for non-finite ones.

        The backward pass uses the losses as they are.
        """
        is_finite = torch.isfinite(losses.detach())
        # Keys are looked up for a bad step alone: here a flag is kept, unread.
        self._seen.append((step, batch.draw_ids, is_finite.all()))
        return torch.where(is_finite, losses.detach(), 0.0)

    def mask_bad_step(self, *, step: int) -> None:
        """Flag a step with non-finite gradients for the optimiser; clip the rest.

        The same flag on all workers, whose gradients are summed by now.
        """
        # Of a loss that is not finite the gradients are neither: one norm over all of
        # them tells of both, and clipping needs it anyway.
        grads = local(p.grad for p in self._params if p.grad is not None)
        squares = self._squares(grads)
        total = squares.sum().sqrt()
        self._flag = (~torch.isfinite(total)).float()
        if self._optim.clip_grad_norm:
            share = self._optim.clip_grad_norm / (total + _CLIP_EPS)
            torch._foreach_mul_(grads, share.clamp(max=1.0))  # pyright: ignore
        # A parameter that the step did not use has no gradient, and the groups would
        # not fit the table.
        if len(grads) == len(self._params):
            groups = self._by_group(squares)
            # What is reported is the first bad step, and the last good one before it.
            is_first = self._flag > self._has_bad
            self._then = torch.where(is_first, groups, self._then)
            self._before = torch.where(self._flag > 0, self._before, groups)
        self._has_bad = torch.maximum(self._has_bad, self._flag)
        self._bad.append((step, self._flag))
        # What GradScaler sets, without its scaling: bfloat16 has float32's range.
        setattr(self._optimizer, FOUND_INF, self._flag)

    def end(self) -> None:
        """Restore the buffers if the step was skipped."""
        if self._optim.on_nonfinite != "skip":
            return
        # By `where` and not by `if`, which would wait for the flag.
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(self._flag > 0, saved, buffer))

    def check(self) -> str:
        """Read the flags of the steps since the last check, and act on the bad ones.

        Returns a line to show if some were skipped, else "".

        Raises NonFiniteLossError to stop the run, RewindError to return it to its last
        checkpoint.
        """
        bad, seen, self._bad, self._seen = self._bad, self._seen, [], []
        self._has_bad = torch.zeros_like(self._flag)
        if not bad:
            return ""
        # All at once: each value that is read by itself would be waited for.
        flags = torch.stack([flag for _, flag in bad]).tolist()
        steps = [step for (step, _), flag in zip(bad, flags, strict=True) if flag]
        if not steps:
            return ""
        line = self._line(steps[0], seen=seen)
        self._num_skipped += len(steps)
        if self._optim.on_nonfinite == "rewind":
            raise RewindError(f"expected a finite loss, {line}", steps[0])
        is_over = self._num_skipped > self._optim.max_nonfinite_steps
        if self._optim.on_nonfinite == "stop" or is_over:
            raise NonFiniteLossError(
                f"expected a finite loss, {line}; lower --optim.lr, lengthen the "
                "warm-up or set --optim.on-nonfinite"
            )
        return f"steps left out: {len(steps)}, {self._num_skipped} in all; {line}"

    @torch.no_grad()
    def _squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Compute the squared norm of each tensor; of sharded ones, over all shards."""
        squares = torch.stack(torch._foreach_norm(tensors)).square()  # pyright: ignore
        if self._is_sharded:
            dist.all_reduce(squares)
        return squares

    def _by_group(self, squares: Tensor) -> Tensor:
        return torch.zeros_like(self._before).index_add_(0, self._index, squares)

    def _line(self, step: int, *, seen: list[tuple[int, np.ndarray, Tensor]]) -> str:
        """Describe a bad step: the images of each worker, and norms by layer group."""
        rows = [
            draw_id % DRAW_STRIDE
            for at, ids, is_finite in seen
            if at == step and not bool(is_finite)
            for draw_id in ids.tolist()
            if draw_id >= 0
        ]
        try:
            keys = self._keys_of(rows)
        except ValueError:  # the others wait for what this worker has to tell
            keys = {}
        own = tuple(keys.get(row, f"row {row}") for row in rows)
        groups = self._by_group(self._squares(local(self._params)))
        columns = [each.sqrt().tolist() for each in (groups, self._before, self._then)]
        norms = ", ".join(
            f"{name} {weight:.3g}/{before:.3g}/{then:.3g}"
            for name, weight, before, then in zip(self._names, *columns, strict=True)
        )
        where = "; ".join(
            f"worker {rank}, images {_shown(keys)}"
            for rank, keys in sorted(_gathered(self._rank, own))
            if keys
        )
        return (
            f"got nan or infinity at step {step}, {where or 'in the gradients alone'}; "
            f"norms of weights/gradients before/gradients then: {norms}"
        )


def group_of(name: str) -> str:
    """Return a parameter's layer group: `blocks.3` of `blocks.3.attn.qkv.weight`."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return parts[0]


def _gathered(rank: int, value: Any) -> list[tuple[int, Any]]:
    """Gather a value of every worker; a collective if there are several."""
    if not dist.is_initialized():
        return [(rank, value)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (rank, value))
    return found


def _shown(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MAX_KEYS} more" if len(keys) > _MAX_KEYS else ""
    return ", ".join(keys[:_MAX_KEYS]) + more
