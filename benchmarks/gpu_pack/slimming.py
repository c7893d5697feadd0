"""Remove from unpacked wheels what a training on one GPU architecture never reads."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_pack.packages import run_tool

_ELF = b"\x7fELF\x02\x01"  # 64 bit, little endian
_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
_NOBITS = 8
# A container's magic number, version, header size and payload size. Containers begin
# at multiples of 8 bytes.
_CONTAINER = struct.Struct("<IHHQ")
_MAGIC = 0xBA55ED50
_ALIGNMENT = 8
# An image's kind, version, header size and payload size, and its architecture.
_IMAGE = struct.Struct("<HHIQ12xI")
_PTX, _CUBIN = 1, 2
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


@dataclass(frozen=True, kw_only=True)
class _Image:
    kind: int
    arch: int
    start: int
    size: int


def is_elf(content: bytes | bytearray) -> bool:
    """Check whether the content is a 64-bit Linux executable or library."""
    return content[: len(_ELF)] == _ELF


def zero_other_images(library: bytearray, *, arch: int) -> int:
    """Zero the GPU images that a GPU of `arch` does not load, in place.

    `arch` is the compute capability times ten: 90 is sm_90. Returns the number of bytes
    zeroed. Raises ValueError where such a GPU can load none of a container's images, or
    where the layout is not the known one.
    """
    num_zeroed = 0
    for start, end in _fatbin_sections(library):
        for images in _containers(library, start=start, end=end):
            loaded = _loaded(images, arch=arch)
            for image in images:
                if image.kind in (_PTX, _CUBIN) and image not in loaded:
                    library[image.start : image.start + image.size] = bytes(image.size)
                    num_zeroed += image.size
    return num_zeroed


def _loaded(images: Sequence[_Image], *, arch: int) -> list[_Image]:
    of_major = [
        image
        for image in images
        if image.kind == _CUBIN
        and image.arch // 10 == arch // 10
        and image.arch <= arch
    ]
    ptx = [image for image in images if image.kind == _PTX and image.arch <= arch]
    usable = of_major or ptx
    if not usable:
        there = ", ".join(sorted({f"sm_{image.arch}" for image in images}))
        raise ValueError(
            f"expected GPU images that sm_{arch} loads, got {there}; choose another "
            "--arch"
        )
    # More than one of an architecture: sm_90 and sm_90a, or parts linked together.
    best = max(image.arch for image in usable)
    return [image for image in usable if image.arch == best]


def _containers(
    library: bytearray, *, start: int, end: int
) -> Iterator[Sequence[_Image]]:
    while start + _CONTAINER.size <= end:
        magic, _, header_size, size = _CONTAINER.unpack_from(library, start)
        if magic != _MAGIC:  # padding
            start += _ALIGNMENT
            continue
        first = start + header_size
        start = first + size
        if start > end:
            raise ValueError(
                "expected GPU images within their section, got a longer one"
            )
        yield list(_images(library, start=first, end=start))


def _images(library: bytearray, *, start: int, end: int) -> Iterator[_Image]:
    while start < end:
        kind, _, header_size, size, arch = _IMAGE.unpack_from(library, start)
        payload = start + header_size
        start = payload + size
        if header_size < _IMAGE.size or start > end:
            raise ValueError("expected headers of GPU images as known, got others")
        yield _Image(kind=kind, arch=arch, start=payload, size=size)


def _fatbin_sections(library: bytearray) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each section with GPU images."""
    if not is_elf(library):
        return
    (table,) = struct.unpack_from("<Q", library, 40)
    entry_size, num_entries, names_entry = struct.unpack_from("<HHH", library, 58)
    entries = [
        struct.unpack_from("<IIQQQQ", library, table + index * entry_size)
        for index in range(num_entries)
    ]
    if not entries:
        return
    names = entries[names_entry][4]
    for name, kind, _, _, start, size in entries:
        begin = names + name
        if library[begin : library.index(0, begin)] in _SECTIONS and kind != _NOBITS:
            yield start, start + size


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
