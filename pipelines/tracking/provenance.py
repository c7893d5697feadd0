"""Say where a run came from: code, versions and hardware, without secrets."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "timm", "ray", "mlflow", "nvidia-dali-cuda130", "pyarrow")
_COMMAND_TIMEOUT_S = 10


def provenance_tags() -> dict[str, str]:
    """Describe this code, these versions and this machine as tags of a run."""
    return {**git_tags(), **version_tags(), **hardware_tags()}


def git_tags(source: Path = Path(__file__)) -> dict[str, str]:
    """Name the commit that a source file belongs to, and whether its tree was changed.

    Returns no tags where git is missing, the file lies outside a repository, or the
    repository around it does not track it (an environment inside a checkout).
    """
    folder = source.resolve().parent
    if (
        _output_of("git", "ls-files", "--error-unmatch", source.name, cwd=folder)
        is None
    ):
        return {}
    commit = _output_of("git", "rev-parse", "HEAD", cwd=folder)
    changes = _output_of("git", "status", "--porcelain", "-uno", cwd=folder)
    if commit is None or changes is None:
        return {}
    # MLflow shows this name as the version of the run's source.
    return {
        "mlflow.source.git.commit": commit,
        "git.changed": str(bool(changes)).lower(),
    }


def version_tags() -> dict[str, str]:
    """Name the versions of Python and of the packages that can change a result."""
    tags = {"version.python": platform.python_version()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tags


def hardware_tags() -> dict[str, str]:
    """Describe this machine's processors, memory in GiB, and GPUs.

    Asks the driver's own tool for the GPUs: asking CUDA would take memory on each.
    """
    page_bytes, num_pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    tags = {
        "hardware.cpu": _cpu_name(),
        "hardware.num_cpus": str(os.cpu_count()),
        "hardware.memory_gib": f"{page_bytes * num_pages / 2**30:.0f}",
    }
    names = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if names:
        tags["hardware.gpus"] = gpu_summary(names.splitlines())
    return tags


def gpu_summary(names: list[str]) -> str:
    """Count GPUs of a kind: `8 x NVIDIA H200`."""
    counts = Counter(name.strip() for name in names)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(found, platform.machine()).strip()


def _output_of(*command: str, cwd: Path | None = None) -> str | None:
    """Run a program; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
