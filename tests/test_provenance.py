"""A run's origin is told truly, and no password comes with it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from pipelines.hardware.facts import gpu_summary, worker_facts
from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking.provenance import (
    git_tags,
    provenance_tags,
    version_tags,
)


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_commit_and_changes_of_the_repository_of_a_file(tmp_path: Path) -> None:
    source = tmp_path / "model.py"
    source.write_text("a = 1\n")
    _git(tmp_path, "init", "-q")
    assert git_tags(source) == {}, "not tracked: the repository is not its own"
    _git(tmp_path, "add", "model.py")
    assert git_tags(source) == {}, "no commit yet"
    _git(tmp_path, "commit", "-qm", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    expected = {"mlflow.source.git.commit": commit, "git.changed": "false"}
    assert git_tags(source) == expected
    source.write_text("a = 2\n")
    assert git_tags(source) == {**expected, "git.changed": "true"}


def test_no_commit_outside_a_repository_or_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.py"
    source.touch()
    assert git_tags(source) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_tags() == {}


def test_versions_and_hardware_are_this_machines() -> None:
    tags = provenance_tags()
    assert tags["version.python"] == platform.python_version()
    assert tags["version.torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"version.timm", "version.ray", "version.mlflow"} <= version_tags().keys()
    assert tags["hardware.num_cpus"] == str(os.cpu_count())
    assert int(tags["hardware.memory_gib"]) >= 1
    assert tags["hardware.cpu"]
    # What this host has of them trains no run of a cluster's: the workers tell.
    assert "hardware.gpus" not in tags


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_are_named_as_cuda_names_them() -> None:
    found = worker_facts(torch.device("cuda", 0), precision="bfloat16")
    assert found["gpu"] == torch.cuda.get_device_name(0)
    assert found["driver"]


def test_gpus_of_a_kind_are_counted() -> None:
    assert gpu_summary(["B", "A ", "B"]) == "1 x A, 2 x B"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:word@host/a", "https://host/a"),
        ("https://token@host:80/a", "https://host:80/a"),
        ("s3://AK:se/cr+et@bucket/x", "s3://bucket/x"),
        ("https://h/a?token=x&b=1", "https://h/a?token=***&b=1"),
        ("s3://b/k?region=eu&secret_key=a/b", "s3://b/k?region=eu&secret_key=***"),
        ("https://b/x?X-Amz-Signature=ab", "https://b/x?X-Amz-Signature=***"),
        ('{"a": "s3://k:s@b", "c": "d@e"}', '{"a": "s3://b", "c": "d@e"}'),
        ("no https://a:b@c/d, ask me@x", "no https://c/d, ask me@x"),
    ],
)
def test_credentials_leave_addresses(text: str, clean: str) -> None:
    assert without_credentials(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "/data/a@b/train",
        "sqlite:////data/a@b/mlflow.db",
        "http://host:8080/a@b",
        "gs://bucket/a:b@c?region=eu",
        "so_vit_7",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert without_credentials(text) == text


def test_an_error_is_told_in_one_line_without_password() -> None:
    address = "https://me:" + "p" * 400 + "@host"
    told = error_summary(OSError(f"no {address} {'x' * 900}\n[SQL: CREATE TABLE]"))
    assert told.startswith("OSError: no https://host xxx")
    assert "SQL" not in told
    assert len(told) < 320
    assert error_summary(OSError()) == "OSError: "
    advice = f"expected a, got {'b' * 900}; set --a"
    assert error_summary(ValueError(f"{advice}\nc")) == f"ValueError: {advice}"
