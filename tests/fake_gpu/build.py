"""Compile the stand-ins of CUDA's runtime and driver, and run a module on them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_RUNTIME, _DRIVER = "libfake_cudart.so", "libcuda.so.1"
# Within what comes with PyTorch: NVIDIA's wheels, then Triton, which has those that
# the wheel of the runtime refers to and lacks.
_HEADERS = ("nvidia/*/include", "triton/backends/nvidia/include")


def what_lacks() -> str:
    """Return the reason that the stand-ins can't be built here, or ""."""
    import torch

    if not sys.platform.startswith("linux"):
        return "needs Linux, whose loader takes a library before another"
    if torch.version.cuda is None:
        return "needs a PyTorch that is built for CUDA"
    if _compiler() is None:
        return "needs a C++ compiler"
    names = {header.name for path in _include_paths() for header in path.glob("*.h")}
    if "driver_types.h" not in names:
        return "needs CUDA's headers, from PyTorch's wheels"
    return ""


def build(folder: Path) -> dict[str, str]:
    """Compile both into a folder; return the environment to run processes in.

    Raises CalledProcessError if the compiler fails.
    """
    compiler = _compiler()
    assert compiler is not None, what_lacks()
    flags = [part for path in _include_paths() for part in ("-I", str(path))]
    sources = {_RUNTIME: ("runtime.cc", "properties.cc"), _DRIVER: ("driver.cc",)}
    for name, files in sources.items():
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", *flags, "-o", str(folder / name)]
            + [str(HERE / file) for file in files],
            check=True,
            capture_output=True,
            text=True,
        )
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / _RUNTIME),
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def runtime_path() -> Path:
    """Return the stand-in that this process was started with."""
    return Path(os.environ["LD_PRELOAD"])


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def _include_paths() -> list[Path]:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    site = Path(found.origin).parents[1]
    return [path for pattern in _HEADERS for path in sorted(site.glob(pattern))]
