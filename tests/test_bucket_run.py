"""A run lives in a bucket: shards, record and checkpoints, and no secret gets out.

Trials on Ray's workers that keep theirs in a bucket: see test_sweep.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs
import pytest

from pipelines import tracking
from pipelines.checkpoints.manifest import opened, read_manifest
from pipelines.checkpoints.run_record import read_record
from pipelines.data.shard_set import read_shard_set
from pipelines.driver.fit import fit
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.storage.filesystem import open_filesystem
from tests.demo_runs import small_demo
from tests.s3_server import BUCKET, Line, s3_server


@pytest.fixture
def line() -> Iterator[Line]:
    with s3_server() as line:
        yield line


def addresses(*names: str) -> list[str]:
    """Name places so that workers, whose environment is older, find them too."""
    key, secret = (
        os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    )
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    options = f"scheme=http&endpoint_override={quote(endpoint)}&region=us-east-1"
    return [f"s3://{key}:{secret}@{BUCKET}/{name}?{options}" for name in names]


def upload(folder: str, address: str) -> None:
    filesystem, path = open_filesystem(address)
    pafs.copy_files(
        folder,
        path,
        source_filesystem=pafs.LocalFileSystem(),
        destination_filesystem=filesystem,
    )


def test_a_run_lives_in_a_bucket(
    tmp_path: Path,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = small_demo(tmp_path, num_epochs=1, num_workers=0)
    train, val, storage = addresses("train", "val", "runs")
    upload(run.data.train, train)
    upload(run.data.val, val)
    data = dataclasses.replace(run.data, train=train, val=val)
    run = dataclasses.replace(run, data=data, storage=storage, checkpoint_every_steps=7)
    line.taken()
    line.fail(r"GET .*train.*parquet", num=2, fault="cut")
    result = fit(run, name="far")
    assert result.checkpoint is not None
    assert any(
        "PUT" in request and "model.safetensors" in request for request in line.taken()
    )

    (checkpoint,) = addresses("runs/far/epoch_0001")
    with opened(checkpoint) as folder:
        manifest = read_manifest(folder)
    assert manifest.position.step == 10
    options = Options(checkpoint=checkpoint, shards=val, batch_size=64)
    again = evaluate_checkpoint(options)
    assert again["top1"] == pytest.approx(manifest.metrics["val/top1"])
    with pytest.raises(ValueError, match="has finished"):
        read_record(storage, name="far")

    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    texts = [str(tracked.to_dictionary()), *capfd.readouterr()]
    assert all(secret not in text for text in texts)
    assert tracking.default_uri(storage) == uri


def test_a_set_in_a_bucket_is_the_set_on_the_disk(tmp_path: Path, line: Line) -> None:
    run = small_demo(tmp_path, num_epochs=1)
    (train,) = addresses("train")
    upload(run.data.train, train)
    here, there = read_shard_set(run.data.train), read_shard_set(train)
    assert there.classes == here.classes
    assert there.groups.num_rows.tolist() == here.groups.num_rows.tolist()
    assert there.digest == here.digest
