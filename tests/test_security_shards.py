"""Doors for foreign images, shards and tars: nothing in them is run, or written away.

Ray registers types with Arrow that are pickled Python objects; a file names such a type
in its schema, and reading a value unpickles it. So these tests load Ray Data, as the
processes do that read shards.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import Data
from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.reading import read_rows, share_tables
from pipelines.data.shard_set import read_shard_set
from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.images import BadImageError, check_image
from pipelines.shards.making import in_process
from pipelines.shards.sources import list_source
from pipelines.shards.state import RECORDS_FILE
from pipelines.transforms.decoder import decode_eval
from pipelines.transforms.pillow_decode import is_whole, stored_size
from tests.bucket_sets import write_images
from tests.small_sets import jpeg, reading_of
from tests.test_security import Hostile, Trap, trap
from tests.token_sets import write_token_set
from tuning.heads.feature_set import TokenReader, TokenSet

__all__ = ["trap"]  # the fixture

NUM_ROWS = 6
# Makes a file in the working directory.
PICKLE = pickle.dumps(Hostile(Path("unpickled")), protocol=0)
SHARD = "set-00000-of-00001.parquet"


def columns() -> dict[str, pa.Array]:
    """Give the columns of a good shard."""
    return {
        "image": pa.array([jpeg(i) for i in range(NUM_ROWS)], pa.binary()),
        "label": pa.array([i % 3 for i in range(NUM_ROWS)], pa.int64()),
        "key": pa.array([f"k{i}" for i in range(NUM_ROWS)]),
        "width": pa.array([16] * NUM_ROWS, pa.int32()),
        "height": pa.array([12] * NUM_ROWS, pa.int32()),
    }


def pickled_column(trap: Trap, *, num_rows: int = NUM_ROWS) -> pa.Array:
    """Make a column of a type that Ray registers: each value a pickle."""
    from ray.data.extensions import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects([trap.hostile] * num_rows)


def write(folder: Path, found: dict[str, pa.Array] | pa.Table) -> str:
    """Write a set of one file; the schema goes with it, as Arrow keeps it."""
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text('["a", "b", "c"]')
    table = found if isinstance(found, pa.Table) else pa.table(found)
    pq.write_table(table, folder / SHARD)
    return str(folder)


def test_the_attack_is_real(tmp_path: Path) -> None:
    made = Trap(tmp_path / "unpickled")
    folder = write(tmp_path / "set", columns() | {"key": pickled_column(made)})
    assert not made.was_sprung
    pq.read_table(Path(folder) / SHARD)["key"].to_pylist()
    assert made.was_sprung


@pytest.mark.parametrize("name", ["image", "label", "key", "width"])
def test_a_shard_of_pickled_objects_is_refused(
    name: str, tmp_path: Path, trap: Trap
) -> None:
    folder = write(tmp_path / "set", columns() | {name: pickled_column(trap)})
    with pytest.raises(ValueError, match=f"{SHARD}: expected the columns {name}: "):
        read_shard_set(folder)


def test_a_further_column_of_pickled_objects_is_never_read(
    tmp_path: Path, trap: Trap
) -> None:
    shards = read_shard_set(write(tmp_path, columns() | {"x": pickled_column(trap)}))
    plan = plan_epoch(shards.groups, batch_size=2, shuffle_rows=6)
    for table in share_tables(plan.unit(0), reading=reading_of(shards)):
        assert "x" not in table.column_names
        table.to_pylist()


@pytest.mark.parametrize("name", ["image", "label", "key"])
def test_a_shard_that_was_exchanged_since_is_refused(
    name: str, tmp_path: Path, trap: Trap
) -> None:
    shards = read_shard_set(write(tmp_path, columns()))
    unit = plan_epoch(shards.groups, batch_size=2, shuffle_rows=6).unit(0)
    write(tmp_path, columns() | {name: pickled_column(trap)})
    with pytest.raises(ValueError, match=f"{SHARD}: expected a whole shard"):
        read_rows(unit, reading=reading_of(shards)).to_pylist()


def forged(table: pa.Table, column: str, *, name: str) -> pa.Table:
    """Let a column say that it is of a registered type, described by a pickle."""
    described = {"ARROW:extension:name": name, "ARROW:extension:metadata": PICKLE}
    place = table.schema.get_field_index(column)
    field = table.schema.field(place).with_metadata(described)
    return pa.table(table.columns, schema=table.schema.set(place, field))


@pytest.mark.parametrize(
    "name", ["arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor"]
)
def test_a_type_described_by_a_pickle_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray 2.49 to 2.54 described these so, and can be told to read it still."""
    import ray.data  # noqa: F401

    monkeypatch.chdir(tmp_path)
    good = pa.table(columns()).append_column("x", pa.array([[1.0]] * NUM_ROWS))
    write(tmp_path, forged(good, "x", name=f"ray.data.{name}"))
    with pytest.raises(ValueError, match=SHARD) as caught:
        read_shard_set(str(tmp_path))
    assert "AUTOLOAD" not in str(caught.value), "no advice to open this door"
    with pytest.raises(ValueError, match=SHARD):
        list_source(tmp_path / SHARD)
    assert not Path("unpickled").exists()


def test_arrows_own_pickled_type_is_no_type_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2023-47248: pyarrow before 14.0.1 unpickled this where it read a schema."""
    monkeypatch.chdir(tmp_path)
    table = forged(pa.table(columns()), "key", name="arrow.py_extension_type")
    shards = read_shard_set(write(tmp_path, table))
    unit = plan_epoch(shards.groups, batch_size=2, shuffle_rows=6).unit(0)
    assert len(read_rows(unit, reading=reading_of(shards)).to_pylist()) == NUM_ROWS
    assert not Path("unpickled").exists()


def struct(data: pa.Array, path: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([data, path], ["bytes", "path"])


SOURCES: dict[str, Callable[[Trap], dict[str, pa.Array]]] = {
    "key": lambda trap: {"key": pickled_column(trap)},
    "bytes": lambda trap: {"image": pickled_column(trap)},
    "path": lambda trap: {
        "image": struct(columns()["image"], pickled_column(trap)),
    },
    "bytes in a struct": lambda trap: {
        "image": struct(pickled_column(trap), columns()["key"]),
    },
    "label": lambda trap: {"label": pickled_column(trap)},
}


@pytest.mark.parametrize("part", SOURCES)
def test_a_source_of_pickled_objects_is_refused(
    part: str, tmp_path: Path, trap: Trap
) -> None:
    write(tmp_path / "set", columns() | SOURCES[part](trap))
    with pytest.raises(ValueError, match=rf"expected .* in .*{SHARD}"):
        list_source(tmp_path / "set" / SHARD)


def test_records_that_someone_put_there_are_refused(tmp_path: Path, trap: Trap) -> None:
    """The list of images lies in OUT while a set is made, and tasks read it."""
    source, out = write_images(tmp_path / "images"), tmp_path / "out"
    arguments = Arguments(source, str(out), num_shards=2)

    def exchange(task: Any, indices: Any) -> Any:
        path = out / RECORDS_FILE
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        place = table.schema.get_field_index("key")
        for name in (place, table.schema.get_field_index("label")):
            field = table.schema.field(name).name
            keys = pickled_column(trap, num_rows=len(table))
            changed = table.set_column(name, field, keys)
            with pa.ipc.new_file(str(path), changed.schema) as writer:
                writer.write_table(changed)
            with pytest.raises(ValueError, match="is not what this command wrote"):
                list(in_process(task, indices))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(arguments, execute=exchange)


def test_an_index_of_unpacked_images_holds_numbers_alone(
    tmp_path: Path, trap: Trap
) -> None:
    """What a task finds unpacked it uses again."""
    write(tmp_path / "set", columns())

    def plant(task: Any, indices: Any) -> Any:
        blob = task.args[0].blob_path(0)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b"images")
        np.save(blob.with_suffix(".npy"), np.array([trap.hostile], dtype=object))
        return in_process(task, indices)

    arguments = Arguments(tmp_path / "set" / SHARD, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="Python object"):
        make_shards(arguments, execute=plant)


@pytest.mark.parametrize("name", ["tokens", "label"])
def test_tokens_of_pickled_objects_are_not_unpickled(
    name: str, tmp_path: Path, trap: Trap
) -> None:
    write_token_set(tmp_path / "tokens", num_parts=1, num_rows=30)
    path = next((tmp_path / "tokens").glob("*.parquet"))
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    table = table.set_column(at, name, pickled_column(trap, num_rows=30))
    pq.write_table(table, path)
    reader = TokenReader(TokenSet.open(str(tmp_path / "tokens")))
    with pytest.raises((ValueError, TypeError, pa.ArrowException)):
        list(reader.epoch(0, batch_size=8))


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 12
%%EndComments
(drawn) show
%%EOF
"""


def test_no_image_starts_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands PostScript to Ghostscript, where that is installed."""
    ran = tmp_path / "ran"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\necho 10.0\nexit 1\n")
    ghostscript.chmod(ghostscript.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(BadImageError, match="EPS"):
        check_image(EPS)
    assert not is_whole(EPS)
    with pytest.raises(BadImageError, match="EPS"):
        stored_size(EPS)
    with pytest.raises(BadImageError, match="EPS"):
        decode_eval([EPS], data=Data(train="t", val="v", batch_size=8), img_size=8)
    assert not ran.exists()
    with Image.open(io.BytesIO(EPS)) as image, pytest.raises(Exception, match=r"."):
        image.load()
    assert ran.exists(), "Pillow alone would have run it"
