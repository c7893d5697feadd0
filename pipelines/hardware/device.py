"""CPU and GPU: everything that differs between the two.

No other module of ours asks what a device is by itself (`tests/test_device.py` checks
it), so that all code for a GPU is either common to both, and runs in every test, or
here, and is entered on a fake GPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.cuda import nccl

Wanted = Literal["auto", "cpu", "cuda"]
Event = torch.cuda.Event
CPU = torch.device("cpu")
_MIB = 1 << 20
_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# Eight buffers of 4 MiB, of the two settings that PyTorch takes the faster one.
_CUBLAS_DETERMINISTIC = ":4096:8"
# Of libraries that raise a plain RuntimeError: the CPU's allocator, cuBLAS and cuDNN,
# which ask for memory by themselves, and CUDA where a kernel needs some.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def is_gpu(device: torch.device) -> bool:
    """Check whether a device is a GPU; for features that only one of them has."""
    return device.type == "cuda"


def has_gpu() -> bool:
    """Check whether PyTorch finds a GPU on this machine."""
    return torch.cuda.is_available()


def find_device(wanted: Wanted, *, flag: str = "--device") -> torch.device:
    """Find a device of this machine; auto is a GPU where there is one.

    Raises ValueError, naming the flag, where cuda is wanted and there is no GPU.
    """
    if wanted == "cuda" and not has_gpu():
        raise ValueError(
            f"expected a GPU for {flag}, got a machine where PyTorch finds none; leave "
            f"out {flag} or look at nvidia-smi"
        )
    if wanted == "cpu" or not has_gpu():
        return CPU
    return torch.device("cuda", torch.cuda.current_device())


def device_of(use_gpu: bool, *, flag: str) -> torch.device:
    """Find the device that a flag asks for; ValueError names it where there is none."""
    return find_device("cuda" if use_gpu else "cpu", flag=flag)


def has_bfloat16(device: torch.device) -> bool:
    """Check whether a device has instructions for bfloat16, not just the type."""
    if is_gpu(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def autocast_dtype(device: torch.device, *, amp: str) -> torch.dtype:
    """Choose the dtype of a run's steps on a device: `amp` is that of `Scale`."""
    is_short = amp == "auto" and has_bfloat16(device)
    return torch.bfloat16 if is_short else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all work queued on it."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that a GPU's work is queued on here; None on a CPU.

    DALI's `run` takes either.
    """
    return torch.cuda.current_stream(device) if is_gpu(device) else None


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Queue the block's work on a stream beside the model's, not behind it."""
    if not is_gpu(device):
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def wait_for_stream(device: torch.device) -> None:
    """Wait until the current stream has finished all work queued on it."""
    if is_gpu(device):
        torch.cuda.current_stream(device).synchronize()


def record_event(device: torch.device) -> Event | None:
    """Record an event after the current stream's work so far; None on a CPU.

    A CPU has done its work when a call returns, so that there is nothing to wait for.
    """
    if not is_gpu(device):
        return None
    event = Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for_event(event: Event | None, device: torch.device) -> None:
    """Make the current stream wait for another one's event; the host goes on."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def used_here(*tensors: Tensor) -> None:
    """Keep memory of another stream's tensors until the current stream is done with it.

    PyTorch's allocator would otherwise reuse it as soon as the last reference goes.
    """
    for tensor in tensors:
        if is_gpu(tensor.device):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU through pinned memory, asynchronously."""
    if not is_gpu(device) or is_gpu(tensor.device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Copy a tensor to fresh memory of the host; from a GPU asynchronously.

    The memory is pinned, so that many copies run one after the other without a wait
    between: `wait_for_stream` once, after the last.
    """
    pinned = is_gpu(tensor.device)
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=True)


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Preserve the caller's random state, the device's too."""
    return torch.random.fork_rng(devices=[device] if is_gpu(device) else [])


def gpu_facts(device: torch.device) -> dict[str, str]:
    """Return a GPU's name, and versions of what computes on it; nothing of a CPU."""
    if not is_gpu(device):
        return {}
    facts = {"gpu": torch.cuda.get_device_name(device)}
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    if version := torch.backends.cudnn.version():
        facts["cudnn"] = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    if torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, nccl.version()))
    return facts


class PeakMemory:
    """Peak memory of a device, by all that uses it.

    Of a GPU that is what it tells whenever it is looked at: PyTorch's allocator, DALI's
    pools, NCCL, the context, and other processes too. What PyTorch has asked for it
    keeps, so that a step's peak is still there after the step. Of a CPU it is the
    process, libraries included: half a gigabyte or more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak_mb = device, 0.0

    def look(self) -> None:
        """Sample a GPU's memory in use."""
        if is_gpu(self._device):
            free, total = torch.cuda.mem_get_info(self._device)
            self._peak_mb = max(self._peak_mb, (total - free) / _MIB)

    def metrics(self) -> dict[str, float]:
        """Sample once more; return the peak, and of a GPU that of tensors alone."""
        if not is_gpu(self._device):
            return {"peak_memory_mb": _peak_of_process_mb()}
        self.look()
        tensors = torch.cuda.max_memory_allocated(self._device)
        return {"peak_memory_mb": self._peak_mb, "peak_tensors_mb": tensors / _MIB}


def _peak_of_process_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def set_numerics(
    *, deterministic: bool, matmul_precision: Literal["highest", "high"]
) -> None:
    """Set how this process computes from now on, whatever was set before.

    cuDNN tries its algorithms at each new shape and takes the fastest, unless the same
    bits are wanted; cuBLAS gives those with a workspace that it asks its environment
    for when it starts.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision(matmul_precision)
    if deterministic:
        os.environ.setdefault(_CUBLAS_VARIABLE, _CUBLAS_DETERMINISTIC)


@contextlib.contextmanager
def numerics_kept() -> Iterator[None]:
    """Restore the process's numerics after the block."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    precision = torch.get_float32_matmul_precision()
    workspace = os.environ.get(_CUBLAS_VARIABLE)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)
        if workspace is None:
            os.environ.pop(_CUBLAS_VARIABLE, None)


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error means that a device had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(t in said for t in _OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Return what nothing refers to any longer, and what PyTorch caches, to a device.

    For after a step that ran out of memory: blocks of the size of its tensors would
    otherwise lie in the way of smaller ones.
    """
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; 0 where the system does not say."""
    if is_gpu(device):
        return torch.cuda.mem_get_info(device)[0]
    return pages_bytes("SC_AVPHYS_PAGES")


def gpus_here() -> tuple[int, int]:
    """Return the number of GPUs, and the first one's bytes of memory: 0, 0 for none."""
    num = torch.cuda.device_count()
    return num, torch.cuda.get_device_properties(0).total_memory if num else 0


def pages_bytes(name: str) -> int:
    """Return the bytes of so many pages as `sysconf` says; 0 for an unknown name."""
    if name not in os.sysconf_names:
        return 0
    return max(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"), 0)
