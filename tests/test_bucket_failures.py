"""Buckets that fail: what passes is waited for, the rest is one clear error."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pipelines.checkpoints.manifest import opened
from pipelines.checkpoints.run_record import check_name
from pipelines.data.shard_set import read_shard_set
from pipelines.storage import filesystem, retry
from pipelines.storage.path import StoragePath
from tests.bucket_sets import ROOT, content, make, upload, write_images
from tests.s3_server import BUCKET, Fault, Line, checked_credentials, s3_server
from tests.small_sets import write_set


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(retry, "_WAITS_S", (0.001,) * 4)
    with s3_server() as line:
        yield line


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.mark.parametrize("fault", ["503", "cut", "cut within"])
def test_a_store_that_fails_for_a_moment_changes_nothing(
    line: Line,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
) -> None:
    monkeypatch.setattr(filesystem, "_CLIENT_TRIES", 1)
    make(images, str(tmp_path / "train"))
    out = f"{ROOT}/train"
    line.fail(r"PUT .*-00001-of-", num=4, fault=fault)
    make(images, out)
    for pattern in (r"GET .*-00002-of-", r"GET .*classes", r"list-type"):
        line.fail(pattern, num=4, fault=fault)
    there = read_shard_set(out)
    assert there.digest == read_shard_set(str(tmp_path / "train")).digest
    assert content(StoragePath(out)) == content(StoragePath(str(tmp_path / "train")))
    warned = Counter(
        record.getMessage().partition(": ")[0] for record in caplog.records
    )
    names = ("train-00001-of-00003.parquet", "train-00002-of-00003.parquet")
    wanted = [f"{out}/{name}" for name in (*names, "classes.json")]
    assert warned == dict.fromkeys([*wanted, out], 4)


def test_a_store_that_is_down_is_one_clear_error(line: Line, tmp_path: Path) -> None:
    address = upload(Path(write_set(tmp_path / "set", groups=[[3]])), f"{ROOT}/set")
    line.taken()
    line.fail("list-type", num=100)
    with pytest.raises(ValueError, match=f"{address}: .*SLOW_DOWN.* 5 tries"):
        read_shard_set(address)
    assert len(line.taken()) == 15


def test_an_upload_that_fails_leaves_nothing(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_CLIENT_TRIES", 1)
    file = StoragePath(f"{ROOT}/large.bin")
    line.fail("PUT .*partNumber=2", num=100)
    with pytest.raises(ConnectionError), file.writing() as path:
        path.write_bytes(bytes(25_000_000))
    assert [entry.base_name for entry in StoragePath(ROOT).entries()] == []
    line.mend()
    with file.writing() as path:
        path.write_bytes(bytes(25_000_000))
    assert file.read() == bytes(25_000_000)


def test_a_shard_that_vanishes_is_named_at_once(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(Path(write_set(tmp_path / "set", groups=[[3]] * 2)), f"{ROOT}/set")
    gone = StoragePath(address).within("set-00001-of-00002.parquet")
    listed = StoragePath.entries

    def listing_then_losing(place: StoragePath) -> list:
        found = listed(place)
        gone.delete()
        line.taken()
        return found

    monkeypatch.setattr(StoragePath, "entries", listing_then_losing)
    with pytest.raises(ValueError, match=f"{gone}: .*not in the store"):
        read_shard_set(address)
    assert len([r for r in line.taken() if r.endswith(gone.name)]) == 1


def test_a_missing_folder_or_bucket_is_named_at_once(line: Line, images: Path) -> None:
    with pytest.raises(ValueError, match=f"{ROOT}/none.*is not there"):
        read_shard_set(f"{ROOT}/none")
    line.taken()
    with pytest.raises(ValueError, match=r"s3://nowhere/set: .*NO_SUCH_BUCKET.*mend"):
        read_shard_set("s3://nowhere/set")
    assert len(line.taken()) == 1
    for reason in (
        lambda: make(images, "s3://nowhere/train"),
        lambda: check_name("s3://nowhere/runs", name="a"),
    ):
        with pytest.raises(
            ValueError, match="expected a place in a bucket that is ther"
        ):
            reason()


def test_wrong_credentials_are_one_clear_error(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(Path(write_set(tmp_path / "set", groups=[[3]])), f"{ROOT}/set")
    with checked_credentials() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert read_shard_set(address).groups.total_rows == 3
        key = environment["AWS_ACCESS_KEY_ID"]
        secret = quote(environment["AWS_SECRET_ACCESS_KEY"], safe="")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-this")
        line.taken()
        with pytest.raises(ValueError, match=f"{address}: .*AWS_ACCESS_KEY_ID") as told:
            read_shard_set(address)
        assert len(line.taken()) == 1
        assert "not-this" not in str(told.value)
        for use in (
            lambda: check_name(ROOT, name="a"),
            lambda: contextlib.ExitStack().enter_context(opened(address)),
        ):
            with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
                use()
        # An address may bring its own.
        shards = read_shard_set(f"s3://{key}:{secret}@{BUCKET}/set")
        assert shards.groups.total_rows == 3
