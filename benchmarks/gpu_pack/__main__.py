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

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", self.python):
            raise ValueError(
                f"--python: expected 3.11 or newer, such as 3.12, got {self.python}"
            )
        if not 50 <= self.arch < 1000:
            raise ValueError(
                "--arch: expected a compute capability times ten, such as 90 for "
                f"sm_90, got {self.arch}"
            )


def write_archive(folder: Path, *, file: Path) -> tuple[int, int]:
    """Write a folder as a .tar.xz that depends on its content alone.

    Returns the bytes of its files and of the archive.
    """
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
    return num_bytes, file.stat().st_size


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def build(
    name: str, requirements: Sequence[str], *, options: Options, folder: Path
) -> None:
    """Build a pack from pinned requirements; `folder` is for its content.

    Raises ValueError where it is too large to be carried.
    """
    start = time.monotonic()
    print(f"{name}: {' '.join(requirements)}", flush=True)
    fetch(requirements, python=options.python, folder=folder)
    slim(folder, python=options.python, arch=options.arch)
    tag = f"py{options.python}" + (f"-sm_{options.arch}" if name == "dali" else "")
    file = options.out / f"{name}-{tag}.tar.xz"
    unpacked, packed = (of / _MIB for of in write_archive(folder, file=file))
    shutil.rmtree(folder)
    print(
        f"{file}: {packed:.1f} MiB (at most {_MAX_MIB[name]:.0f}), {unpacked:.0f} MiB "
        f"unpacked, {len(requirements)} packages, {time.monotonic() - start:.0f} s"
    )
    if packed > _MAX_MIB[name]:
        raise ValueError(
            f"expected {name} within {_MAX_MIB[name]:.0f} MiB, got {packed:.1f}; name "
            "in --present what the machine has"
        )


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    present = read_present(options.present)
    work = options.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    packs = choose(python=options.python, present=present, folder=work)
    for name, requirements in packs.items():
        build(name, requirements, options=options, folder=work / name)
    shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(run_command(_main, prog=_PROG))
