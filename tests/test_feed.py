"""Feeding: the same number of batches of one shape on every worker, no row twice."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipelines.config import Augment, Data, PixelSettings
from pipelines.data.balance import Balance
from pipelines.data.batch import Batch
from pipelines.data.batching import batches
from pipelines.data.epoch_plan import EpochPlan, plan_epoch
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.transforms.decoder import BatchDecoder, Decoded
from pipelines.transforms.rows import Rows, rows_of
from tests.small_sets import uneven_labels, worker_tables, write_set

CPU = torch.device("cpu")
BATCH_SIZE = 12
NUM_ROWS = 37  # three whole batches and one of a single row


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("feed") / "set"
    return read_shard_set(write_set(folder, groups=[[5, 9], [7], [1, 11, 4]]))


def plan_of(shards: ShardSet) -> EpochPlan:
    return plan_epoch(
        shards.groups, batch_size=BATCH_SIZE, shuffle_rows=24, seed=3, epoch=1
    )


@dataclass
class ShowIds:
    """Decode each row to its id, so that batches can be told apart; no id is -1."""

    num_rows: int
    last: int = -1

    def start(self, rows: Rows, epoch: int) -> Callable[[], Decoded]:
        return lambda: self._decoded(rows, epoch)

    def _decoded(self, rows: Rows, epoch: int) -> Decoded:
        assert epoch == 1
        weights = (np.arange(self.num_rows) < len(rows)).astype(np.float32)
        ids = rows.ids if len(rows) else np.array([self.last])
        self.last = int(ids[0])
        ids = np.resize(ids, self.num_rows)
        images = torch.from_numpy(ids).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        return Decoded(
            images=images, labels=ids % 3, weights=weights, draw_ids=ids, bad=()
        )


def fed(
    shards: ShardSet,
    *,
    num_workers: int,
    num_micro: int,
    start_batch: int = 0,
    num_ahead: int = 0,
) -> list[list[Batch]]:
    """Give every worker's batches of an epoch."""
    micro_rows = math.ceil(math.ceil(BATCH_SIZE / num_workers) / num_micro)
    units = list(plan_of(shards).units(start_batch=start_batch))
    return [
        list(
            batches(
                worker_tables(
                    units, shards=shards, num_workers=num_workers, worker=worker
                ),
                num_micro=num_micro,
                micro_rows=micro_rows,
                decode=ShowIds(micro_rows).start,
                num_ahead=num_ahead,
                device=CPU,
            )
        )
        for worker in range(num_workers)
    ]


def ids_of(batch: Batch) -> np.ndarray:
    return batch.images[:, 0, 0, 0].numpy().astype(int)


@pytest.mark.parametrize("num_workers", range(1, 6))
@pytest.mark.parametrize("num_micro", range(1, 4))
@pytest.mark.parametrize("num_ahead", [0, 1])
def test_workers_go_in_step_and_no_row_counts_twice(
    shards: ShardSet, num_workers: int, num_micro: int, num_ahead: int
) -> None:
    of_workers = fed(
        shards, num_workers=num_workers, num_micro=num_micro, num_ahead=num_ahead
    )
    micro_rows = math.ceil(math.ceil(BATCH_SIZE / num_workers) / num_micro)
    counted = []
    for together in zip(*of_workers, strict=True):
        first = together[0]
        for batch in together:
            places = (batch.index, batch.micro, batch.ends_step, batch.ends_epoch)
            wanted = (first.index, first.micro, first.ends_step, first.ends_epoch)
            assert places == wanted
            assert batch.images.shape == (micro_rows, 3, 2, 2)
            assert batch.labels.shape == batch.weights.shape == (micro_rows,)
            assert batch.labels.dtype == torch.int64
            assert batch.global_rows == (BATCH_SIZE if batch.index < 3 else 1)
            assert batch.ends_step == (batch.micro == num_micro - 1)
            assert batch.ends_epoch == (batch.index == 3)
            is_real = batch.weights.numpy() == 1
            assert set(batch.weights.tolist()) <= {0.0, 1.0}
            counted += ids_of(batch)[is_real].tolist()
            assert (batch.labels.numpy() == ids_of(batch) % 3)[is_real].all()
    assert len(of_workers[0]) == 4 * num_micro
    assert sorted(counted) == list(range(NUM_ROWS))


def test_weights_of_a_batch_sum_to_its_rows(shards: ShardSet) -> None:
    sums = np.zeros(4)
    for batch in itertools.chain.from_iterable(fed(shards, num_workers=5, num_micro=2)):
        sums[batch.index] += float(batch.weights.sum())
    assert sums.tolist() == [12, 12, 12, 1]


def test_resuming_feeds_the_rest(shards: ShardSet) -> None:
    whole = fed(shards, num_workers=2, num_micro=2)
    rest = fed(shards, num_workers=2, num_micro=2, start_batch=2)
    for ours, wanted in zip(rest, whole, strict=True):
        assert len(ours) == 4
        for one, other in zip(ours, wanted[4:], strict=True):
            assert np.array_equal(ids_of(one), ids_of(other))
            assert (one.index, one.micro) == (other.index, other.micro)


def pixels(
    shards: ShardSet,
    *,
    num_workers: int,
    augment: Augment,
    decode_on: Any = "workers",
    balance: Balance | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Give every image of an epoch by row and repetition, as some workers see it."""
    data = Data(train="t", val="v", batch_size=BATCH_SIZE, decode_on=decode_on)
    settings = PixelSettings(
        data=data, augment=augment, img_size=16, seed=9, train=True
    )
    plan = plan_epoch(
        shards.groups,
        batch_size=BATCH_SIZE,
        shuffle_rows=24,
        seed=3,
        epoch=1,
        num_repeats=augment.num_repeats,
        balance=balance,
    )
    found: dict[tuple[int, int], Tensor] = {}
    num_rows = math.ceil(BATCH_SIZE / num_workers)
    for worker in range(num_workers):
        decode = BatchDecoder(settings, num_rows=num_rows, device=CPU)
        for table in worker_tables(
            plan.units(),
            shards=shards,
            num_workers=num_workers,
            worker=worker,
            decode=settings if decode_on == "readers" else None,
        ):
            rows, start = rows_of(table), 0
            for size in table["share_rows"][0].as_py():
                part = rows.cut(start, start + size)
                start += size
                images = decode(part, 1).images.clone()
                names = zip(part.ids.tolist(), part.repeats.tolist(), strict=True)
                found |= dict(zip(names, images, strict=False))
    return found


ALL = Augment(
    interpolation="random",
    auto_augment="rand-m9-mstd0.5-inc1",
    re_prob=0.5,
    num_repeats=2,
)


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_pixels_do_not_depend_on_the_number_of_workers(
    shards: ShardSet, num_workers: int
) -> None:
    alone = pixels(shards, num_workers=1, augment=ALL)
    together = pixels(shards, num_workers=num_workers, augment=ALL)
    assert len(alone) == 36  # half of the set, rounded down, twice each
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert not any(
        torch.equal(alone[row, 0], alone[row, 1]) for row, time in alone if time
    )


@pytest.mark.parametrize("decode_on", ["workers", "readers"])
def test_showings_of_a_balanced_epoch_are_augmented_anew(
    shards: ShardSet, decode_on: str
) -> None:
    labels = uneven_labels(NUM_ROWS)
    balance = Balance(labels, exponent=1, num_classes=5, seed=2)
    once = dataclasses.replace(ALL, num_repeats=1)
    settings: Any = {"augment": once, "balance": balance, "decode_on": decode_on}
    alone = pixels(shards, num_workers=1, **settings)
    together = pixels(shards, num_workers=3, **settings)
    times = balance.showings(1)
    assert times.max() > 4
    wanted = [(i, s) for i, num in enumerate(times) for s in range(num)]
    assert sorted(alone) == sorted(together) == wanted
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert len({value.numpy().tobytes() for value in alone.values()}) == NUM_ROWS


@pytest.mark.parametrize("num_workers", [1, 2])
def test_readers_decode_to_the_same_pixels(shards: ShardSet, num_workers: int) -> None:
    here = pixels(shards, num_workers=num_workers, augment=ALL)
    there = pixels(shards, num_workers=num_workers, augment=ALL, decode_on="readers")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_tables_are_let_go_of_when_they_are_fed(
    shards: ShardSet, num_ahead: int
) -> None:
    """Views keep their table alive, so a view that stays would keep a whole epoch."""
    alive = []

    def counted() -> Iterator[pa.Table]:
        units = list(plan_of(shards).units()) * 8
        for table in worker_tables(units, shards=shards, num_workers=1, worker=0):
            alive.append(pa.total_allocated_bytes())
            yield table

    for _ in batches(
        counted(),
        num_micro=1,
        micro_rows=12,
        decode=ShowIds(12).start,
        num_ahead=num_ahead,
        device=CPU,
    ):
        pass
    assert len(alive) == 16
    assert max(alive) < 1.5 * max(alive[:4])
