"""Places: what an address opens, what is tried again, what an error keeps secret."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.shard_set import SCHEMA, write_shard
from pipelines.storage.filesystem import open_filesystem
from pipelines.storage.path import StoragePath
from pipelines.storage.retry import is_remote, retrying
from tests.small_sets import jpeg

SLOW_DOWN = "When reading: AWS Error SLOW_DOWN during GetObject operation: Reduce."
STORE = "s3://bucket/folder"


def test_paths_and_file_addresses_are_local(tmp_path: Path) -> None:
    for address in (str(tmp_path), f"file://{tmp_path}"):
        filesystem, path = open_filesystem(address)
        assert isinstance(filesystem, pafs.LocalFileSystem)
        assert path == str(tmp_path)
        assert not is_remote(address)


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return monkeypatch


def settings_of(filesystem: pafs.FileSystem) -> dict[str, object]:
    """Give what an S3 client was made with: pyarrow shows it in its pickle alone."""
    assert isinstance(filesystem, pafs.S3FileSystem)
    return filesystem.__reduce__()[1][0]


def test_s3_takes_its_settings_from_the_environment(
    s3_environment: pytest.MonkeyPatch,
) -> None:
    filesystem, path = open_filesystem("s3://bucket/a/b/")
    found = settings_of(filesystem)
    assert path == "bucket/a/b"
    assert found["region"] == "eu-north-1"
    assert found["endpoint_override"] == "http://127.0.0.1:9"
    assert open_filesystem("s3://bucket/other")[0] is filesystem
    s3_environment.setenv("AWS_CA_BUNDLE", __file__)
    s3_environment.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:7")
    s3_environment.delenv("AWS_REGION")
    s3_environment.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    found = settings_of(open_filesystem("s3://bucket/a")[0])
    assert found["endpoint_override"] == "http://127.0.0.1:7"
    assert found["region"] == "eu-west-3"
    assert found["tls_ca_file_path"] == __file__


def test_someone_else_gets_another_client(s3_environment: pytest.MonkeyPatch) -> None:
    before = open_filesystem(STORE)[0]
    s3_environment.setenv("AWS_ACCESS_KEY_ID", "another")
    assert open_filesystem(STORE)[0] is not before


@pytest.mark.usefixtures("s3_environment")
def test_an_address_has_the_last_word() -> None:
    address = "s3://me:sec%2Fret@bucket/a%20b?region=ap-east-1&scheme=http"
    filesystem, path = open_filesystem(address)
    found = settings_of(filesystem)
    assert path == "bucket/a b"
    assert (found["access_key"], found["secret_key"]) == ("me", "sec/ret")
    assert (found["region"], found["scheme"]) == ("ap-east-1", "http")
    found = settings_of(open_filesystem("s3://bucket/a?anonymous=true")[0])
    assert found["anonymous"] is True


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize(
    ("address", "saying"),
    [
        ("nope://bucket/x", "nope"),
        ("sftp://host/x", "install the package for sftp://"),
        ("s3://", "names no bucket"),
        ("s3://key:hidden/word@bucket/x", "%2F"),
        ("s3://key:hidden@bucket/x?colour=red", "region, scheme"),
        ("gs://key:hidden/word@bucket/x", "gs://"),
        ("file://host/x", "file://host/x"),
    ],
)
def test_what_cannot_be_opened_is_said_without_secrets(
    address: str, saying: str
) -> None:
    with pytest.raises(ValueError, match=r"expected .* such as s3://bucket") as caught:
        open_filesystem(address)
    assert saying in str(caught.value)
    shown = "".join(map(str, [caught.value, caught.value.__cause__]))
    assert "hidden" not in shown
    assert "word" not in shown


def test_google_s_store_is_not_waited_for_15_minutes() -> None:
    for option, limit_s in (("", 10), ("?retry_limit_seconds=77", 77)):
        filesystem, path = open_filesystem(f"gs://anonymous@bucket/x{option}")
        assert path == "bucket/x"
        assert isinstance(filesystem, pafs.GcsFileSystem)
        limit = filesystem.__reduce__()[1][0]["retry_time_limit"]
        assert limit.total_seconds() == limit_s


class Failing:
    """Fail some times with one error, then give 7; count the calls and the waits."""

    def __init__(self, error: Exception, *, num: int) -> None:
        self.error, self.num_left = error, num
        self.num_calls = 0
        self.waits_s: list[float] = []

    def __call__(self) -> int:
        self.num_calls += 1
        if self.num_left:
            self.num_left -= 1
            raise self.error
        return 7

    def tried(self, address: str = STORE) -> int:
        return retrying(self, address=address, sleep=self.waits_s.append)


PASSING = [
    OSError(SLOW_DOWN),
    OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: "),
    OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 52"),
    OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"),
    OSError(errno.EIO, "the store had an internal error"),
    ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    TimeoutError("read"),
]
STAYING = [
    FileNotFoundError(errno.ENOENT, "x"),
    PermissionError(errno.EACCES, "x"),
    IsADirectoryError(errno.EISDIR, "x"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("Couldn't deserialize thrift: No more data to read."),
    OSError("ZSTD decompression failed: Data corruption detected"),
    pa.ArrowInvalid("Parquet magic bytes not found in footer."),
    ValueError("x"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_may_pass_is_tried_five_times(
    error: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    for num in range(5):
        caplog.clear()
        failing = Failing(error, num=num)
        assert failing.tried() == 7
        assert failing.num_calls == num + 1
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * num
        assert failing.waits_s == pytest.approx([1, 2, 4, 8][:num], rel=0.25)
    failing = Failing(error, num=5)
    with pytest.raises(ConnectionError, match=f"{STORE}: .* 5 tries") as caught:
        failing.tried()
    assert failing.num_calls == 5
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", STAYING, ids=str)
def test_what_stays_is_raised_at_once(error: Exception) -> None:
    failing = Failing(error, num=1)
    with pytest.raises(type(error)) as caught:
        failing.tried()
    assert caught.value is error
    assert failing.num_calls == 1


@pytest.mark.parametrize("address", ["/data/set", "file:///data/set"])
def test_local_files_are_not_tried_again(address: str) -> None:
    failing = Failing(OSError(errno.EIO, "Input/output error"), num=1)
    with pytest.raises(OSError, match="Input/output error"):
        failing.tried(address)
    assert failing.num_calls == 1


@pytest.mark.parametrize(
    ("text", "kind", "saying"),
    [
        ("AWS Error ACCESS_DENIED during HeadObject", ValueError, "AWS_ACCESS_KEY_ID"),
        ("AWS Error UNKNOWN (HTTP status 403) during", ValueError, "AWS_PROFILE"),
        ("AWS Error NO_SUCH_BUCKET during PutObject", ValueError, "AWS_ENDPOINT_URL"),
        ("Bucket 'bucket' not found", ValueError, "mend its name"),
        ("AWS Error NO_SUCH_KEY during GetObject", FileNotFoundError, STORE),
    ],
)
def test_what_a_store_refuses_is_one_clear_error(
    text: str, kind: type[Exception], saying: str
) -> None:
    failing = Failing(OSError(text), num=1)
    with pytest.raises(kind, match=saying) as caught:
        failing.tried("s3://key:hidden@bucket/folder")
    assert failing.num_calls == 1
    assert "hidden" not in str(caught.value)


@functools.cache
def shard() -> bytes:
    """Give a small shard as sovit-shards writes them."""
    labels = list(range(6))
    columns = {
        "image": [jpeg(label) for label in labels],
        "label": labels,
        "key": [f"k{label}" for label in labels],
        "width": [16] * 6,
        "height": [12] * 6,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard")
        write_shard(path, rows=pa.table(columns, schema=SCHEMA), rows_per_group=3)
        return path.read_bytes()


@given(at=st.integers(0, 2**16), kind=st.sampled_from(["flip", "zero", "short"]))
@settings(max_examples=300)
def test_no_damage_of_a_shard_is_taken_for_the_network(at: int, kind: str) -> None:
    content = bytearray(shard())
    place = at % len(content)
    if kind == "flip":
        content[place] ^= 1 << (at % 8)
    elif kind == "zero":
        content[place : place + 12] = bytes(len(content[place : place + 12]))
    else:
        del content[place:]
    waits_s: list[float] = []

    def read() -> object:
        with pq.ParquetFile(pa.BufferReader(bytes(content))) as file:
            return [file.read_row_group(i) for i in range(min(file.num_row_groups, 4))]

    with contextlib.suppress(OSError, ValueError):
        retrying(read, address=STORE, sleep=waits_s.append)
    assert not waits_s


@pytest.fixture(params=["path", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    roots = {"path": str(tmp_path), "file://": f"file://{tmp_path}"}
    return StoragePath(roots.get(request.param, f"memory://{tmp_path.name}"), "a/b")


def test_a_file_is_written_whole_and_read_back(
    folder: StoragePath, tmp_path: Path
) -> None:
    assert folder.kind() == pafs.FileType.NotFound
    folder.make_folder()
    assert folder.kind() == pafs.FileType.Directory
    file = folder.within("x.bin")
    for content in (b"first", b"", b"second" * 10_000):
        file.write(content)
        assert file.read() == content
    with file.writing() as path:
        path.write_bytes(b"third")
        assert file.read() == content
    assert [item.base_name for item in folder.entries()] == ["x.bin"]
    copy = tmp_path / "copy"
    file.download(copy)
    assert copy.read_bytes() == b"third"
    file.delete()
    file.delete()
    with pytest.raises(FileNotFoundError):
        file.read()
    assert folder.entries() == []


def test_a_file_that_was_not_finished_does_not_appear(folder: StoragePath) -> None:
    folder.make_folder()
    file = folder.within("x.bin")
    file.write(b"before")
    with contextlib.suppress(KeyError), file.writing() as path:
        path.write_bytes(b"half")
        raise KeyError
    assert file.read() == b"before"


def test_a_place_is_small_and_shows_no_secret() -> None:
    place = StoragePath("s3://key:hidden@bucket/a?region=eu-west-1", "b").within(
        "c.json"
    )
    assert str(place) == "s3://bucket/a/b/c.json?region=eu-west-1"
    assert pickle.loads(pickle.dumps(place)) == place
