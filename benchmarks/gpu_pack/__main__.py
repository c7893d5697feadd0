"""Pack what a GPU machine without registries lacks, small enough to be carried there.

    make gpu-pack
    python -m benchmarks.gpu_pack --present packages.txt --arch 80

Writes two archives: DALI with its codecs, and Ray, MLflow and what else is missing.
Wheels come from the index that uv is configured for. docs/running.md says how to unpack
them, and what is left out.
"""

from __future__ import annotations

import lzma
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu_pack.packages import choose, fetch, read_present
from benchmarks.gpu_pack.slimming import slim
from pipelines.cli.command import parse, run_command

_PROG = "benchmarks.gpu_pack"
_MIB = 1 << 20
_MAX_MIB = {"dali": 55.0, "rest": 45.0}
_OUT = Path("build/gpu-pack")
_PRESENT = Path(__file__).with_name("present.txt")
# Repeats lie far apart in libraries. Unpacking takes as much memory, packing ten times.
_MIN_DICTIONARY_BYTES, _MAX_DICTIONARY_BYTES = 1 << 12, 128 * _MIB


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the machine is, and where the packs go."""

    python: str = "3.12"
    """The machine's Python."""
    arch: int = 90
    """Its GPUs' compute capability times ten: 90 is sm_90, an H100 or H200."""
    present: Path = _PRESENT
    """Packages that it has: what `pip freeze` prints there, or names, one a line."""
    out: Path = _OUT
    """The folder for the archives."""
    packs: tuple[Literal["dali", "rest"], ...] = ("dali", "rest")
    """Which to build."""


def check(options: Options) -> None:
    """Raise ValueError if the options describe no machine."""
    if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", options.python):
        raise ValueError(
            f"--python: expected 3.11 or newer, such as 3.12, got {options.python}"
        )
    if not 50 <= options.arch < 1000:
        raise ValueError(
            "--arch: expected a compute capability times ten, such as 90 for sm_90, "
            f"got {options.arch}"
        )


def check_sizes(sizes_mib: dict[str, float]) -> None:
    """Raise ValueError if a pack is too large to be carried."""
    large = [
        f"{name} of {size:.1f} MiB (at most {_MAX_MIB[name]:.0f})"
        for name, size in sizes_mib.items()
        if size > _MAX_MIB[name]
    ]
    if large:
        raise ValueError(
            f"expected packs within their limits, got {', '.join(large)}; name in "
            "--present what the machine has"
        )


def write_archive(folder: Path, *, file: Path) -> float:
    """Write a folder as a .tar.xz that depends on its content alone; returns MiB."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    num_bytes = sum(path.stat().st_size for path in files)
    # Calls in machine code repeat once their targets are absolute.
    filters = [
        {"id": lzma.FILTER_X86},
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": min(
                max(num_bytes, _MIN_DICTIONARY_BYTES), _MAX_DICTIONARY_BYTES
            ),
        },
    ]
    with (
        lzma.open(file, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|") as archive,
    ):
        for path in files:
            archive.add(path, str(path.relative_to(folder)), filter=_anonymous)
    return file.stat().st_size / _MIB


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def _build(
    name: str, requirements: Sequence[str], *, options: Options, folder: Path
) -> float:
    start = time.monotonic()
    fetch(requirements, python=options.python, folder=folder)
    slim(folder, python=options.python, arch=options.arch)
    unpacked = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / _MIB
    tag = f"py{options.python}" + (f"-sm_{options.arch}" if name == "dali" else "")
    file = options.out / f"{name}-{tag}.tar.xz"
    size = write_archive(folder, file=file)
    shutil.rmtree(folder)
    print(
        f"{file}: {size:.1f} MiB (at most {_MAX_MIB[name]:.0f}), {unpacked:.0f} MiB "
        f"unpacked, {len(requirements)} packages, {time.monotonic() - start:.0f} s"
    )
    return size


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check(options)
    present = read_present(options.present)
    work = options.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    choice = choose(python=options.python, present=present, folder=work)
    sizes = {}
    for name in dict.fromkeys(options.packs):
        requirements = getattr(choice, name)
        print(f"{name}: {' '.join(requirements)}", flush=True)
        sizes[name] = _build(name, requirements, options=options, folder=work / name)
    shutil.rmtree(work)
    check_sizes(sizes)


if __name__ == "__main__":
    sys.exit(run_command(_main, prog=_PROG))
