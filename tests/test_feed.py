"""Feeding: the same number of batches of one shape on every worker, no row twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipelines.config import Data
from pipelines.ingest.batch import Batch
from pipelines.ingest.decoder import decode_rows
from pipelines.ingest.feed import Rows, Shape, batches, geometry_of, rows_of
from pipelines.ingest.footers import ShardSet, read_shard_set
from pipelines.ingest.plan import EpochPlan, plan_epoch
from pipelines.ingest.torch_decode import TorchDecoder
from tests.small_sets import worker_tables, write_set

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


def show_ids(rows: Rows, epoch: int) -> Tensor:
    """Decode each row to its id, so that batches can be told apart."""
    assert epoch == 1
    return torch.from_numpy(rows.ids).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def fed(
    shards: ShardSet, *, num_workers: int, num_micro: int, start_batch: int = 0
) -> list[list[Batch]]:
    """Give every worker's batches of an epoch."""
    shape = Shape(share_rows=math.ceil(BATCH_SIZE / num_workers), num_micro=num_micro)
    units = list(plan_of(shards).units(start_batch=start_batch))
    return [
        list(
            batches(
                worker_tables(
                    units, shards=shards, num_workers=num_workers, worker=worker
                ),
                shape=shape,
                decode=show_ids,
                device=CPU,
            )
        )
        for worker in range(num_workers)
    ]


def ids_of(batch: Batch) -> np.ndarray:
    return batch.images[:, 0, 0, 0].numpy().astype(int)


@pytest.mark.parametrize("num_workers", range(1, 6))
@pytest.mark.parametrize("num_micro", range(1, 4))
def test_workers_go_in_step_and_no_row_counts_twice(
    shards: ShardSet, num_workers: int, num_micro: int
) -> None:
    of_workers = fed(shards, num_workers=num_workers, num_micro=num_micro)
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


def test_filling_rows_copy_real_rows_in_turn_with_their_labels(
    shards: ShardSet,
) -> None:
    for worker, of_worker in enumerate(fed(shards, num_workers=5, num_micro=1)):
        for batch in of_worker:
            ids, num_real = ids_of(batch), int(batch.weights.sum())
            assert batch.weights.tolist() == [1.0] * num_real + [0.0] * (3 - num_real)
            if num_real:
                assert ids.tolist() == np.resize(ids[:num_real], 3).tolist()
                assert (batch.labels.numpy() == ids % 3).all()
            else:
                # An empty share shows an image that this worker had before.
                assert batch.index == 3
                assert set(ids) <= set(ids_of(of_worker[-2]))
                assert worker < 4


def test_a_start_without_images_is_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="fewer workers"):
        fed(shards, num_workers=2, num_micro=1, start_batch=3)


def test_resuming_feeds_the_rest(shards: ShardSet) -> None:
    whole = fed(shards, num_workers=2, num_micro=2)
    rest = fed(shards, num_workers=2, num_micro=2, start_batch=2)
    for ours, wanted in zip(rest, whole, strict=True):
        assert len(ours) == 4
        for one, other in zip(ours, wanted[4:], strict=True):
            assert np.array_equal(ids_of(one), ids_of(other))
            assert (one.index, one.micro) == (other.index, other.micro)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_pixels_do_not_depend_on_the_number_of_workers(
    shards: ShardSet, num_workers: int
) -> None:
    data = Data(train="t", val="v", batch_size=BATCH_SIZE)
    decoder = TorchDecoder(
        img_size=8, mean=data.mean, std=data.std, interpolation="bicubic", device=CPU
    )
    decode = decode_rows(decoder, data=data, img_size=8, seed=9, train=True)

    def pixels(num_workers: int) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for worker in range(num_workers):
            tables = worker_tables(
                plan_of(shards).units(),
                shards=shards,
                num_workers=num_workers,
                worker=worker,
            )
            for table in tables:
                rows = rows_of(table)
                if rows.views:
                    images = decode(rows, table["epoch"][0].as_py())
                    found |= dict(zip(rows.ids.tolist(), images, strict=True))
        return found

    alone, together = pixels(1), pixels(num_workers)
    assert sorted(together) == list(range(NUM_ROWS))
    assert all(torch.equal(together[i], alone[i]) for i in alone)


def test_evaluation_windows_are_the_whole_image(shards: ShardSet) -> None:
    data = Data(train="t", val="v", batch_size=BATCH_SIZE)
    tables = worker_tables(
        plan_of(shards).units(), shards=shards, num_workers=1, worker=0
    )
    rows = rows_of(next(tables))
    arguments = {"data": data, "img_size": 8, "seed": 0, "epoch": 1}
    fixed = geometry_of(rows, **arguments, train=False)
    assert (fixed.window == [12, 16]).all()
    drawn = geometry_of(rows, **arguments, train=True)
    assert len({tuple(window) for window in drawn.window.tolist()}) > 5


def test_tables_are_let_go_of_when_they_are_fed(shards: ShardSet) -> None:
    """Views keep their table alive, so a view that stays would keep a whole epoch."""
    alive = []

    def counted() -> Iterator[pa.Table]:
        units = list(plan_of(shards).units()) * 8
        for table in worker_tables(units, shards=shards, num_workers=1, worker=0):
            alive.append(pa.total_allocated_bytes())
            yield table

    shape = Shape(share_rows=12)
    for _ in batches(counted(), shape=shape, decode=show_ids, device=CPU):
        pass
    assert len(alive) == 16
    assert max(alive) < 1.5 * max(alive[:4])
