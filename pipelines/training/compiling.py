"""Decide whether a run's steps are compiled: on all of its workers, or on none.

One worker without a compiler would slow down the others at every all-reduce of
gradients anyway, and whether data parallelism may use a static graph depends on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from pipelines.config import Scale

_NEEDS = "a C++ compiler (g++), Python's headers and, on a GPU, Triton"
_MAX_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """Whether steps are compiled, and a line with the reason."""

    is_on: bool
    line: str


def decide(scale: Scale, *, device: torch.device, world_size: int = 1) -> Compiling:
    """Decide on torch.compile, if wanted, by a trial on every worker: all or none.

    A collective if there are several workers and compiling is wanted.
    """
    if not scale.wants_compile:
        why = "--scale.no-compile"
        if scale.compile == "auto":
            why = "--scale.compile auto does so on GPUs alone"
        return Compiling(is_on=False, line=f"steps are not compiled: {why}")
    if lacks := _first_lack(why_not(device), world_size=world_size):
        return Compiling(
            is_on=False,
            line=f"steps are not compiled, and slower: torch.compile needs {_NEEDS}, "
            f"and {lacks}",
        )
    line = "steps are compiled: the first takes a minute or more"
    return Compiling(is_on=True, line=f"{line} (--scale.no-compile leaves that out)")


def _first_lack(own: str, *, world_size: int) -> str:
    """Return the first worker that can't compile, and why; "" if all can."""
    found: list[str] = [own]
    if world_size > 1:
        found = [""] * world_size
        dist.all_gather_object(found, own)
    lacks = [f"worker {rank} got: {why}" for rank, why in enumerate(found) if why]
    return lacks[0] if lacks else ""


@cache
def why_not(device: torch.device) -> str:
    """Compile a sum for a device; return the reason of a failure, or "".

    Only a trial finds everything that can be wrong: the compiler, headers, Triton, an
    unsupported GPU, a cache folder that can't be written.
    """
    # A number that no kernel in inductor's cache on the disk has: it is compiled anew.
    factor = time.time()
    try:
        with torch.no_grad():
            compiled = torch.compile(lambda x: x * factor + 1, dynamic=False)
            compiled(torch.ones(8, device=device))
    except Exception as error:  # inductor lets Triton's and the system's through
        return _line_of(error)
    return ""


def _line_of(error: Exception) -> str:
    """Return the most informative line of an error, a compiler's if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    compilers = [line for line in lines if "error: " in line]
    return (compilers or lines or [type(error).__name__])[0][:_MAX_CHARS]
