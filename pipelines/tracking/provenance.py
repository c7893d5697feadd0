"""Collect a run's provenance: code, versions and host, without secrets."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from pipelines.hardware.facts import host_facts, output_of, tags_of

_PACKAGES = ("torch", "timm", "ray", "mlflow", "nvidia-dali-cuda130", "pyarrow")


def provenance_tags() -> dict[str, str]:
    """Return the tags of this code, its versions and this host.

    Where workers train, their own host tags replace those of this host.
    """
    return {**git_tags(), **version_tags(), **tags_of([host_facts()])}


def git_tags(source: Path = Path(__file__)) -> dict[str, str]:
    """Return the tags of a source file's commit, and whether its tree was changed.

    Returns no tags where git is missing, the file lies outside a repository, or the
    repository around it does not track it (an environment inside a checkout).
    """
    folder = source.resolve().parent
    if output_of("git", "ls-files", "--error-unmatch", source.name, cwd=folder) is None:
        return {}
    commit = output_of("git", "rev-parse", "HEAD", cwd=folder)
    changes = output_of("git", "status", "--porcelain", "-uno", cwd=folder)
    if commit is None or changes is None:
        return {}
    # MLflow shows this name as the version of the run's source.
    return {
        "mlflow.source.git.commit": commit,
        "git.changed": str(bool(changes)).lower(),
    }


def version_tags() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    tags = {"version.python": platform.python_version()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tags
