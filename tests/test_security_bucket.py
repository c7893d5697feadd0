"""The rights that docs/security.md lists are enough for a run, and no more are used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import boto3
import pytest
from moto import settings

from pipelines.driver.fit import fit
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.storage.path import StoragePath
from tests.bucket_sets import ROOT, upload
from tests.demo_runs import small_demo
from tests.s3_server import BUCKET, Line, s3_server

DOCS = (Path(__file__).parents[1] / "docs/security.md").read_text()


@pytest.fixture
def line() -> Iterator[Line]:
    with s3_server() as line:
        yield line


def documented() -> dict[str, list[str]]:
    """Read the table of rights: each place with its actions."""
    rows = re.findall(r"^\| (shards|runs|the bucket) \| (.*?) \|", DOCS, flags=re.M)
    return {place: re.findall(r"`(s3:\w+)`", actions) for place, actions in rows}


@contextlib.contextmanager
def user_with(rights: dict[str, list[str]]) -> Iterator[None]:
    """Be a user who has these rights and no others; the store checks them."""
    places = {
        "the bucket": f"arn:aws:s3:::{BUCKET}",
        "shards": f"arn:aws:s3:::{BUCKET}/shards/*",
        "runs": f"arn:aws:s3:::{BUCKET}/runs/*",
    }
    # Amazon takes s3:ListBucket for the question whether a bucket is there and asks for
    # s3:DeleteObject by key; moto has an action of its own, and asks by bucket.
    of_moto = {"s3:ListBucket": ["s3:ListBucket", "s3:HeadBucket"]}
    statements = [
        {
            "Effect": "Allow",
            "Action": [name for one in actions for name in of_moto.get(one, [one])],
            "Resource": [places[place]]
            + [places["the bucket"]] * ("s3:DeleteObject" in actions),
        }
        for place, actions in rights.items()
    ]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam = boto3.client("iam", region_name="us-east-1")
    iam.create_user(UserName="trainer")
    key = iam.create_access_key(UserName="trainer")["AccessKey"]
    iam.put_user_policy(UserName="trainer", PolicyName="rights", PolicyDocument=policy)
    identity = {
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
    }
    with (
        mock.patch.dict(os.environ, identity),
        mock.patch.object(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0),
    ):
        yield


def run_in_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Put shards into the bucket, and describe a run of three epochs on them."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    run = small_demo(folder, num_epochs=3, num_workers=0)
    train = upload(Path(run.data.train), f"{ROOT}/shards/train")
    val = upload(Path(run.data.val), f"{ROOT}/shards/val")
    data = dataclasses.replace(run.data, train=train, val=val)
    return dataclasses.replace(
        run, data=data, storage=f"{ROOT}/runs", num_checkpoints_to_keep=1
    )


def test_the_rights_are_enough(
    tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in_bucket(tmp_path, monkeypatch)
    with user_with(documented()):
        trained = fit(run, name="far", keep_model=False)
        assert trained.checkpoint is not None
        options = Options(
            checkpoint=str(trained.checkpoint), shards=run.data.val, batch_size=64
        )
        assert evaluate_checkpoint(options)["num_images"] == 101
        names = {item.base_name for item in StoragePath(f"{ROOT}/runs/far").entries()}
        assert {"run.json", "epoch_0003"} <= names
        # The last is kept, and the best, which may be it.
        assert not {"epoch_0001", "epoch_0002"} <= names, "deleting was tried"
        with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
            StoragePath(f"{ROOT}/shards/train/x").write(b"")
    assert any("DELETE" in request or "?delete" in request for request in line.taken())


@pytest.mark.parametrize("place", ["shards", "runs", "the bucket"])
def test_each_of_them_is_needed(
    place: str, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in_bucket(tmp_path, monkeypatch)
    fewer = {name: rights for name, rights in documented().items() if name != place}
    with user_with(fewer), pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
        fit(run, name="far", keep_model=False)
