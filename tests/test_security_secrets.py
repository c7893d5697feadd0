"""Doors for secrets: none in arguments, logs, MLflow or checkpoints."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.checkpoints.manifest import load_model, read_manifest
from pipelines.checkpoints.pretrained import load_initial
from pipelines.checkpoints.run_record import new_record, read_record
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.cli.command import refuse_secrets
from pipelines.config.serialization import flat_params
from pipelines.data.batch import Position
from pipelines.storage.redaction import without_credentials
from pipelines.training.model import build_model
from tests.small_runs import SO_VIT, small_run

ROOT = Path(__file__).parents[1]
KEY, SECRET = "AKIAEXAMPLE", "wJalr/XUtnFEMI+K7MDENG/bPxRfiCY"
ADDRESS = f"s3://{KEY}:{SECRET}@bucket/train"
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# Takes local paths alone.
WITHOUT_ADDRESSES = {"pipelines/shards/fashion_mnist.py"}

HOLD_A_SECRET = {
    "a bucket's": ADDRESS,
    "escaped": f"s3://{KEY}:{quote(SECRET, safe='')}@bucket/train",
    "with a number first": f"s3://{KEY}:123/{SECRET}@bucket",
    "with an @": f"s3://{KEY}:a@{SECRET}@bucket/train",
    "with a space": f"s3://{KEY}:a {SECRET}@bucket",
    "with quotes": f"s3://{KEY}:\"<'{SECRET}@bucket",
    "without a user": f"abfs://:{SECRET}@account/container",
    "a container's": f"abfs://container:{SECRET}@account/train",
    "a server's": f"https://me:{SECRET}@mlflow.example/a",
    "a server's token": "https://wJalrXUtnFEMI@mlflow.example/a",
    "a database's": f"postgresql+psycopg2://me:{SECRET}@host:5432/mlflow",
    "a database's argument": f"postgresql://host/mlflow?user=me&password={SECRET}",
    "a presigned address": f"https://b.example/x?X-Amz-Signature={SECRET}",
    "a temporary identity": f"s3://b/x?session_token={SECRET}",
    "an access signature": f"abfs://c@account/x?sv=2024&sig={SECRET}",
    "a shared key": f"abfs://c@account/x?account_key={SECRET}",
    "after a #": f"https://host/x#access_token={SECRET}",
    "within another": f"simplecache::s3://{KEY}:{SECRET}@bucket/train",
}
HOLD_NONE = [
    "s3://bucket/train?region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:9000",
    "gs://bucket/a:b@c",
    "abfs://container@account.dfs.core.windows.net/train",
    "hdfs://user@host:8020/train",
    "http://127.0.0.1:5000",
    "http://host:8080/a@b",
    "sqlite:////data/a@b/mlflow.db",
    "/data/a@b:c/train",
    "imagenet.so_vit_14",
    "me@example.org",
    "--data.train",
    "rand-m9-mstd0.5-inc1",
]


@pytest.mark.parametrize("kind", HOLD_A_SECRET)
@pytest.mark.parametrize("is_joined", [False, True])
def test_an_argument_with_a_secret_is_refused(kind: str, is_joined: bool) -> None:
    address = HOLD_A_SECRET[kind]
    typed = [f"--data.val={address}"] if is_joined else ["--data.val", address]
    with pytest.raises(ValueError, match=r"\(--data\.val\), which ps shows") as caught:
        refuse_secrets(["demo", *typed])
    message = str(caught.value)
    assert f"argument {2 if is_joined else 3} " in message
    assert "\n" not in message
    assert all(part not in message for part in (SECRET, KEY, "wJalr"))
    for remedy in ("AWS_SECRET_ACCESS_KEY", "instance profile", "MLFLOW_TRACKING_URI"):
        assert remedy in message


@pytest.mark.parametrize("argument", HOLD_NONE)
def test_other_arguments_pass(argument: str) -> None:
    refuse_secrets(["--storage", argument])
    assert without_credentials(argument) == argument


IN_TEXT = set(HOLD_A_SECRET) - {"with a space", "with quotes"}


@pytest.mark.parametrize("kind", sorted(IN_TEXT))
def test_no_text_keeps_a_secret(kind: str) -> None:
    """In a sentence or JSON, where quotes and spaces end an address."""
    address = HOLD_A_SECRET[kind]
    for text in (f"no {address}, or so", json.dumps({"a": address, "b": "c@d"})):
        clean = without_credentials(text)
        assert "wJalr" not in clean
        assert KEY not in clean
    assert json.loads(without_credentials(json.dumps({"a": address, "b": "c@d"})))


def test_a_containers_name_is_no_secret() -> None:
    clean = without_credentials(f"abfs://box:{SECRET.replace('/', '_')}@account/a")
    assert clean == "abfs://box@account/a"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_refuses_it_and_does_not_begin(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, function = SCRIPTS[name].partition(":")
    command = getattr(importlib.import_module(module), function)
    found = importlib.import_module(*command.args)

    def begin(_: object) -> None:
        raise AssertionError("the command has begun")

    monkeypatch.setattr(found, "_main", begin)
    monkeypatch.setattr(sys, "argv", [name, "demo", "--data.train", ADDRESS])
    with pytest.raises(SystemExit) as caught:
        command()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.count("\n") == 1
    assert "argument 3 (--data.train)" in said
    assert SECRET not in said


def runnable() -> Iterator[Path]:
    """Give the modules that can be run."""
    for room in ("pipelines", "tuning", "recipes", "benchmarks", "sovit"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if "__name__ ==" in path.read_text() and path.name != "__main__.py":
                yield path


@pytest.mark.parametrize("path", runnable(), ids=lambda path: path.stem)
def test_every_module_that_can_be_run_is_such_a_command(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in WITHOUT_ADDRESSES:
        return
    tree = ast.parse(path.read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "run_command" in called


def test_a_process_of_its_own_refuses_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.shards", "images", ADDRESS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "argument 2, which ps shows" in done.stderr
    assert SECRET not in done.stdout + done.stderr


LOGGING = """
import logging, sys
from pipelines.cli.command import run_command
def command(arguments):
    logging.getLogger("pipelines.some").info("reading %s", ADDRESS)
    logging.getLogger("other").warning("slow: %r", [ADDRESS])
    try:
        raise OSError(f"no {ADDRESS}")
    except OSError:
        logging.getLogger("other").exception("failed")
    raise ValueError(f"got {ADDRESS!r}")
run_command(command, prog="some")
"""


def test_a_command_logs_and_fails_without_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"ADDRESS = {ADDRESS!r}\n{LOGGING}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert said[0] == "reading s3://bucket/train"
    assert "OSError: no s3://bucket/train" in said
    assert said[-1] == "some: got 's3://bucket/train'"
    assert SECRET not in done.stderr
    assert KEY not in done.stderr


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def secret_run():
    """Describe a run whose every address holds a secret, as a recipe could."""
    run = small_run(ADDRESS, model=dataclasses.replace(SO_VIT, init_from=ADDRESS))
    return dataclasses.replace(run, storage=ADDRESS)


def keep(folder: Path) -> None:
    save_checkpoint(
        folder,
        run=secret_run(),
        position=Position(),
        classes=("a", "b"),
        metrics={},
        model=build_model(SO_VIT, num_classes=2),
        ema=None,
        optimizer=None,
    )


def test_a_checkpoint_holds_none_and_loads(tmp_path: Path) -> None:
    keep(tmp_path)
    found = files_below(tmp_path)
    assert len(found) == 2
    assert all(SECRET.encode() not in path.read_bytes() for path in found)
    assert read_manifest(tmp_path).run.data.train == "s3://bucket/train"
    load_model(tmp_path)
    other = build_model(SO_VIT, num_classes=2)
    assert load_initial(other, str(tmp_path), classes=("a", "b"))


def test_a_runs_record_keeps_it_so_that_the_run_can_go_on(tmp_path: Path) -> None:
    """As docs/security.md says: who writes one into a recipe finds it here."""
    run = dataclasses.replace(secret_run(), storage=str(tmp_path))
    new_record(run, name="mine")
    assert SECRET in (tmp_path / "mine" / "run.json").read_text()
    assert read_record(str(tmp_path), name="mine").run == run


def test_mlflow_holds_none(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run_id = tracking.open_run(
        uri,
        experiment="tests",
        name="mine",
        params=flat_params(secret_run()),
        tags={"from": ADDRESS},
    )
    tracking.log_dataset(
        uri,
        run_id,
        name="train",
        source=ADDRESS,
        num_rows=1,
        num_shards=1,
        digest="d",
        context="train",
    )
    tracking.log_text(uri, run_id, text=f"{ADDRESS}/x.parquet is bad", path="a.txt")
    tracking.end_run(uri, run_id, status="FAILED", reason=f"no {ADDRESS}")
    params = MlflowClient(uri).get_run(run_id).data.params
    assert params["data.train"] == params["storage"] == "s3://bucket/train"
    found = files_below(tmp_path)
    assert {"mlflow.db", "a.txt"} <= {path.name for path in found}
    for path in found:
        content = path.read_bytes()
        assert SECRET.encode() not in content
        assert KEY.encode() not in content


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_files_are_as_private_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    """The project opens none further, and shuts none that the user left open."""
    folder, before = tmp_path / "runs", os.umask(mask)
    try:
        run = dataclasses.replace(small_run("none"), storage=str(folder))
        record = new_record(run, name="mine")
        keep(folder / record.name)
        uri = tracking.default_uri(run.storage)
        tracking.open_run(uri, experiment="e", name="mine", params={}, tags={})
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & mask == 0, path
    names = {path.name for path in files_below(folder)}
    assert {"run.json", "checkpoint.json", "model.safetensors", "mlflow.db"} <= names
