"""Ray Data delivers every worker its shares, in order, within its bounds."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest

from pipelines.config import Augment, Data, PixelSettings
from pipelines.data.epoch_plan import Unit, plan_epoch
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.worker.ray_source import begun, shares, split_units
from tests.small_sets import reading_of, worker_tables, write_set

DATA = Data(train="t", val="v", batch_size=10, num_readers=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("source") / "set"
    return read_shard_set(write_set(folder, groups=[[9, 9], [7], [1, 11, 4]] * 4))


def units_of(shards: ShardSet) -> list[Unit]:
    plan = plan_epoch(shards.groups, batch_size=10, shuffle_rows=20, seed=3)
    return list(plan.units())


def through_ray(
    shards: ShardSet, *, num_workers: int, data: Data, decode: PixelSettings | None
) -> list[list[pa.Table]]:
    """Read all units as some workers at the same time."""
    reading = reading_of(shards, num_workers=num_workers, decode=decode)
    split = split_units(units_of(shards), reading=reading, data=data)
    found: list[list[pa.Table]] = [[] for _ in split]

    def take(worker: int) -> None:
        found[worker] = [
            table.combine_chunks() for table in shares(split[worker], data=data)
        ]

    threads = [threading.Thread(target=take, args=(at,)) for at in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    return found


@pytest.mark.ray
@pytest.mark.parametrize("decode_on", ["workers", "readers"])
def test_workers_get_their_shares_in_order(
    ray_local: None, shards: ShardSet, decode_on: str
) -> None:
    """Also where labelled machines decode: the test's Ray has that label."""
    decodes = decode_on == "readers"
    label = "role=data" if decodes else ""
    # One megabyte of read-ahead is less than Ray would like: it must not hang.
    data = dataclasses.replace(DATA, reader_label=label, read_ahead_mb=1)
    pixels = PixelSettings(
        data=data, augment=Augment(re_prob=0.5), img_size=32, seed=0, train=True
    )
    decode = pixels if decodes else None
    found = through_ray(shards, num_workers=2, data=data, decode=decode)
    for worker, tables in enumerate(found):
        wanted = list(
            worker_tables(
                units_of(shards),
                shards=shards,
                num_workers=2,
                worker=worker,
                decode=decode,
            )
        )
        assert len(tables) == len(wanted) == len(units_of(shards))
        for table, one in zip(tables, wanted, strict=True):
            assert table.select(one.column_names).equals(one.combine_chunks())
    assert ("pixels" in found[0][0].column_names) == decodes


def test_the_first_item_is_taken_at_once_and_none_is_lost() -> None:
    taken: list[int] = []
    first = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            taken.append(number)
            first.set()
            yield number

    rest = begun(items())
    assert first.wait(timeout=10)
    assert taken == [0]
    assert list(rest) == list(range(5))
    assert list(begun(iter(()))) == []


def test_an_error_of_the_first_item_is_raised_where_it_is_taken() -> None:
    def broken() -> Iterator[int]:
        raise KeyError("gone")
        yield 0

    rest = begun(broken())
    with pytest.raises(KeyError, match="gone"):
        next(rest)
    later = begun(itertools.chain([1], broken()))
    assert next(later) == 1
    with pytest.raises(KeyError, match="gone"):
        next(later)
