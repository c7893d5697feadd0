"""Remove from unpacked wheels what a training on one GPU architecture never reads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_pack.fatbin import is_elf, zero_other_images
from benchmarks.gpu_pack.packages import run_tool

_UNUSED = (
    # Scripts name the Python of the machine that packed them; what compilers read.
    *("bin", "**/tests", "**/*.pyi", "**/*.pyx", "**/*.pxd", "**/*.h", "**/*.hpp"),
    "*.dist-info/RECORD",
    # Ray: reinforcement learning, language models, serving, Java. Its dashboard
    # does not start without its pages, whose source maps are most of them.
    *("ray/rllib", "ray/llm", "ray/serve", "ray/jars", "ray/cpp"),
    "ray/dashboard/client/**/*.map",
    # MLflow's web pages.
    "mlflow/server/js",
    # DALI: extensions of nvImageCodec whose libraries are left out too.
    "nvidia/nvimgcodec/extensions/libnvjpeg2k_ext*",
    "nvidia/nvimgcodec/extensions/libnvtiff_ext*",
    *("nvidia/dali/include", "nvidia/nvimgcodec/include", "nvidia/nvimgcodec/tools"),
)
_EXTENSION = re.compile(r"\.cpython-(\w+)-")
# Else the first folder `nvidia` with an __init__.py hides CUDA's, which are elsewhere.
_NAMESPACE = '''"""Parts of this package lie in several folders of the path."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
'''


def slim(folder: Path, *, python: str, arch: int) -> None:
    """Remove unused files, other architectures' GPU images and symbols, in place.

    `arch` is a compute capability times ten. Raises ValueError where a GPU of it can't
    run what is there, or where binutils' strip is missing or fails.
    """
    for path in unused_files(folder, python=python):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if (nvidia := folder / "nvidia").is_dir():
        (nvidia / "__init__.py").write_text(_NAMESPACE)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            if not is_elf(file.read(16)):
                continue
        _slim_library(path, arch=arch)


def unused_files(folder: Path, *, python: str) -> Iterator[Path]:
    """Find files and folders that a training with that Python never reads."""
    found = {path for pattern in _UNUSED for path in folder.glob(pattern)}
    ours = python.replace(".", "")
    for path in folder.rglob("*.so"):
        tag = _EXTENSION.search(path.name)
        if tag and tag[1] != ours:
            found.add(path)
    # What lies in an unused folder goes with it.
    yield from (path for path in sorted(found) if found.isdisjoint(path.parents))


def _slim_library(path: Path, *, arch: int) -> None:
    content = bytearray(path.read_bytes())
    try:
        if zero_other_images(content, arch=arch):
            path.write_bytes(content)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    run_tool("strip", ["--strip-unneeded", str(path)], hint="install binutils")
