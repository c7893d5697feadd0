"""Say where a run came from: code, versions and hardware, without secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "timm", "ray", "mlflow", "nvidia-dali-cuda130", "pyarrow")
_COMMAND_TIMEOUT_S = 10
_MAX_ERROR_CHARS = 300
_HIDDEN = "***"
# These can't stand inside an address and end the search for it, so that JSON and
# sentences around addresses stay whole.
_ENDS = re.compile(r"[\s\"'<>]")
# `user:password@` after a scheme, up to the last @: bucket secrets may hold slashes
# that nobody escaped. `host:8080/a@b` is none.
_PASSWORD = re.compile(r"(?<=://)[^\s\"'<>/@:]*:[^\s\"'<>]*@")
_PORT = re.compile(r"[^:]*:\d{1,5}/")
_USER_INFO = re.compile(r"(?<=://)[^\s\"'<>/]*@")
_SECRET_ARGUMENT = re.compile(
    r"([?&#;][^\s\"'<>=&#;]*"
    r"(?:key|secret|token|passw|passphrase|pwd|signature|credential|sig|sas|auth)"
    r"[^\s\"'<>=&#;]*=)[^\s\"'<>&#;]*",
    re.IGNORECASE,
)
# Before the @ stands a container, or the name of a user, which is no secret.
_NAMED = frozenset({"abfs", "abfss", "wasb", "wasbs", "hdfs", "webhdfs", "ssh", "sftp"})
_WITHOUT_PORTS = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "wasb", "wasbs"})
_SCHEME = re.compile(r"[\w+.-]*$")
_LONGEST_SCHEME = 16


def without_credentials(text: str) -> str:
    """Take users, passwords and secret arguments out of every address in a text.

    `https://me:word@host/a?token=x` becomes `https://host/a?token=***`. Where what
    stands first is a container's or a user's name, it stays: `abfs://box@account/a`.
    """
    for pattern in (_PASSWORD, _USER_INFO):
        text = pattern.sub(_name_alone, text)
    return _SECRET_ARGUMENT.sub(rf"\1{_HIDDEN}", text)


def holds_secret(address: str) -> bool:
    """Tell whether one address, with no text around it, holds a secret."""
    plain = _ENDS.sub("_", address)
    return without_credentials(plain) != plain


def _name_alone(found: re.Match[str]) -> str:
    end = found.start() - len("://")
    before = _SCHEME.search(found.string, max(end - _LONGEST_SCHEME, 0), end)
    scheme = before[0].lower() if before else ""
    if scheme not in _WITHOUT_PORTS and _PORT.match(found[0]):
        return found[0]
    name = found[0][:-1].partition(":")[0]
    return f"{name}@" if name and scheme in _NAMED else ""


def error_summary(error: BaseException) -> str:
    """Say an error's type and first line, without credentials, for a log."""
    line = next(iter(without_credentials(str(error)).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:_MAX_ERROR_CHARS]}"


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
