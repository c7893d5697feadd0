"""Record what makes the host wait for a GPU or copies data, and the line at fault."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tests.fake_gpu.build import ROOT, runtime_path

_OURS = ("sovit/", "pipelines/", "tuning/")
# Whoever calls it is looked for.
_BETWEEN = "pipelines/hardware/device.py"
_MOVES = ("_to_copy", "copy_")
_SHAPED_BY_VALUES = ("nonzero", "masked_select", "_unique", "unique_", "bincount")
# Their CUDA kernels look at values before they return: no other operation shows it.
_WAITS_INSIDE = ("_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_check_errors")
# In place, and without a rule for fake tensors.
_LEFT_OUT = ("_fused_sgd_",)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One recorded event, and its line of code."""

    what: str
    op: str
    where: str
    """File and function of ours, or the node of autograd's graph."""
    line: int = 0

    @property
    def told(self) -> str:
        """The event and its place in one line, without its unstable line number."""
        return f"{self.what}: {self.where}"


class Watch(TorchDispatchMode):
    """Dispatch mode that records waits and copies, on top of a fake mode.

    It records between `on` and `off`. The host gets zeros for whatever it reads from
    the device, so that the work goes on: in a mask all rows are taken, as many as there
    can be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.num_ops = 0
        """Operations on the device while it was on."""
        self._is_on = False
        self._pinned = WeakIdKeyDictionary()  # a set
        # Kept here: CUDA's stand-in calls it.
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._hear)
        ctypes.CDLL(str(runtime_path())).fake_gpu_tell(self._callback)

    def on(self) -> None:
        """Start recording."""
        self._is_on = True

    def off(self) -> None:
        """Stop recording."""
        self._is_on = False

    def _hear(self, what: bytes) -> None:
        self._note(f"waits for {what.decode()}", "cuda")

    def _note(self, what: str, op: str) -> None:
        """Record an event; once, if a line of ours causes it many times in a row."""
        if not self._is_on:
            return
        where, line = _place()
        found = Seen(what=what, op=op, where=where, line=line)
        if not self.seen or self.seen[-1] != found:
            self.seen.append(found)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes again, of this worker's part
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            # There, what is made of other operations comes as a whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        is_on_device = any(t.is_cuda for t in tensors)
        self.num_ops += self._is_on and is_on_device
        if name in _LEFT_OUT:
            return None
        if name in ("pin_memory", "_pin_memory"):
            return self._pinned_now(_zeros_like(args[0]))
        if name == "is_pinned":
            return args[0] in self._pinned
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return self._read(args[0])
        if name in _MOVES:
            return self._moved(func, name, args, kwargs)
        if is_on_device:
            args = self._looked_at(name, args, tensors)
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            return self._pinned_now(_zeros_like(out))
        if name == "empty" and out.dtype == torch.int32 and not out.is_cuda:
            return _zeros_like(out)  # data parallelism writes into it from C++
        return out

    def _pinned_now(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor] = None
        return tensor

    def _read(self, tensor: Tensor) -> float | int | bool:
        if tensor.is_cuda:
            self._note("reads a value", "_local_scalar_dense")
        if tensor.dtype == torch.bool:
            return False
        return 0.0 if tensor.is_floating_point() else 0

    def _moved(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `_to_copy` or `copy_`; record it if it crosses devices."""
        if name == "copy_":
            to, source = args[:2]
            target, is_free = to.device, kwargs.get("non_blocking", len(args) > 2)
            pageable = to if source.is_cuda else source
        else:
            source = pageable = args[0]
            target = torch.device(kwargs.get("device") or source.device)
            is_free = kwargs.get("non_blocking", False)
            if source.is_cuda and is_free:
                pageable = None  # PyTorch pins what it makes then
        if target.type == source.device.type:
            return func(*args, **kwargs)
        waits = not is_free or (pageable is not None and pageable not in self._pinned)
        side = "host" if source.is_cuda else "device"
        self._note(f"copies to the {side}" + ", waiting" * waits, name)
        if name == "copy_":
            func(*args, **kwargs)
            return args[0]
        if target.type != "cpu":  # values would be followed to the stand-in's memory
            size, stride, dtype = source.size(), source.stride(), source.dtype
            source = torch.empty_strided(size, stride, dtype=dtype)
            return func(source, *args[1:], **kwargs)
        return _zeros_like(source, dtype=kwargs.get("dtype"))

    def _looked_at(
        self, name: str, args: tuple[Any, ...], tensors: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        """Record a device operation that reads values, or mixes devices."""
        if name.startswith(_SHAPED_BY_VALUES):
            self._note("takes a shape from values", name)
        elif name.startswith(_WAITS_INSIDE):
            self._note("waits inside", name)
        # A number that lies on the host is an argument of the kernel.
        elif len({t.device.type for t in tensors if t.dim() or t.is_cuda}) > 1:
            self._note("mixes devices", name)
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], list):
            return self._unmasked(name, args)
        return args

    def _unmasked(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace masks among indices by all positions: their number is unknown."""
        source, given, *values = args
        is_fill = bool(values) and values[0].numel() == 1  # which needs no places
        indices: list[Tensor | None] = []
        for index in given:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            if not is_fill:
                self._note("takes a shape from values", name)
            indices += [index.new_zeros(index.numel(), dtype=torch.int64)] * index.dim()
        return (source, indices, *values)


def _zeros_like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Create a real host tensor of zeros."""
    size, stride = tensor.size(), tensor.stride()
    with unset_fake_temporarily():
        made = torch.empty_strided(size, stride, dtype=dtype or tensor.dtype)
        return made.zero_()


def _place() -> tuple[str, int]:
    """Find the innermost line of ours, or autograd's current node."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        if file.startswith(_OURS) and file != _BETWEEN:
            return f"{file} {frame.f_code.co_qualname}", frame.f_lineno
        frame = frame.f_back
    node = torch._C._current_autograd_node()  # pyright: ignore
    return f"autograd {node.name()}" if node else "nobody of ours", 0
