"""Compute a run's load on its cluster from measured costs.

A load of 1 is the full capacity. For rates, twice the load is half the speed. For
pauses 1 is a twentieth of the time, for the start ten minutes: a matter of taste.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pyarrow as pa

from pipelines.data.epoch_plan import EpochShape, epoch_shape
from pipelines.data.reading import FILES_AT_ONCE, MAX_SHARE_BYTES
from pipelines.data.shard_set import group_bounds
from pipelines.shards.planning import BYTES_PER_SHARD, MIN_SHARDS

REQUESTS_PER_FILE = 2  # of a bucket, beside one for each row group
_MB = 10**6
_NUM_HELD_OUT = 50_000
_BLOCKS_PER_READER = 2  # that Ray 2.60 lets a read task put out before they are taken
HEARD_S = (
    1.0  # until the driver has heard what was measured: two looks of half a second
)
_PAUSE_SHARE, _START_S = 0.05, 600.0
_FILES_PER_LISTING = 1000


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The constants of the model, all measured; the last three are of a checkpoint."""

    block_ms: float
    """Ray's, to move a block from a reader to a worker."""
    bucket_footer_ms: float
    """Of a shard, in a bucket with a latency of `bucket_latency_ms`."""
    bucket_latency_ms: float
    read_mb_s: float
    """One reader's rate of reading and cutting from the page cache."""
    bucket_mb_s: float
    """One reader's rate from a bucket without latency."""
    num_mb: float
    copy_s: float
    write_s: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that determine a training's loads; defaults from So-ViT-14's recipe."""

    images_per_gpu: int = 64
    image_kb: float = 110.0
    max_shards: int | None = None
    num_readers: int = 16
    shuffle_rows: int = 2048
    read_ahead_mb: int = 64
    every_epochs: int = 1
    """Epochs from one evaluation to the next."""
    store_requests_per_s: float = 5500.0
    """As Amazon's guide to S3 describes a bucket, like the next two: assumptions."""
    store_latency_ms: float = 100.0
    stream_mb_s: float = 90.0
    """What one connection carries."""


@dataclass(frozen=True, kw_only=True)
class Case(Settings):
    """A training on some GPUs."""

    num_gpus: int
    num_images: int
    images_per_gpu_s: float
    """A GPU's rate without any bottleneck."""

    @property
    def images_per_s(self) -> float:
        """Images per second that all GPUs need."""
        return self.num_gpus * self.images_per_gpu_s

    @property
    def num_shards(self) -> int:
        """Shards that sovit-shards cuts the set into."""
        num_bytes = round(self.num_images * 1000 * self.image_kb)
        num = max(MIN_SHARDS, -(-num_bytes // BYTES_PER_SHARD))
        return min(num, self.max_shards or num)

    @functools.cached_property
    def num_groups(self) -> int:
        """Row groups of the set."""
        sizes = [round(1000 * self.image_kb)] * -(-self.num_images // self.num_shards)
        return self.num_shards * sum(1 for _ in group_bounds(sizes))

    @functools.cached_property
    def epoch(self) -> EpochShape:
        """Batches and units of an epoch; a unit is what a task reads and shuffles."""
        return epoch_shape(
            self.num_images,
            batch_size=self.num_gpus * self.images_per_gpu,
            shuffle_rows=self.shuffle_rows,
        )

    @property
    def unit_rows(self) -> int:
        """Rows of a unit."""
        return min(self.epoch.unit_rows, self.num_images)

    @property
    def unit_slices(self) -> float:
        """Slices of row groups that a unit is read from: either end cuts one in two."""
        of_set = self.unit_rows / self.num_images * self.num_groups
        return min(of_set + 1, self.num_groups)

    @property
    def unit_files(self) -> float:
        """Files of those slices: groups come in random order."""
        others = (1 - 1 / self.num_shards) ** self.unit_slices
        return self.num_shards * (1 - others)

    @property
    def images_per_block(self) -> float:
        """Mean number of images in a block, as `share_tables` cuts a unit."""
        num_batches = math.ceil(self.unit_rows / self.epoch.batch_size)
        num_bytes = round(self.unit_rows * 1000 * self.image_kb)
        share_bytes = max(num_bytes // (num_batches * self.num_gpus), 1)
        per_block = min(max(MAX_SHARE_BYTES // share_bytes, 1), num_batches)
        return self.unit_rows / (math.ceil(num_batches / per_block) * self.num_gpus)

    def unit_s(self, costs: Costs) -> float:
        """Compute one reader's seconds for a unit: its waits and its bytes.

        Files are opened in parallel; row groups are fetched by Arrow's threads, which
        are fewer.
        """
        at_once = min(FILES_AT_ONCE, self.unit_files)
        fetched_at_once = min(at_once, pa.io_thread_count())
        waits = REQUESTS_PER_FILE * self.unit_files / at_once
        waits += self.unit_slices / fetched_at_once
        mb_s = min(self.stream_mb_s * fetched_at_once, costs.bucket_mb_s)
        unit_mb = self.unit_rows * self.image_kb / 1000
        reading_s = unit_mb / mb_s + unit_mb / costs.read_mb_s
        return waits * self.store_latency_ms / 1000 + reading_s


def loads_of(case: Case, *, costs: Costs) -> dict[str, float]:
    """Compute each resource's load."""
    epoch_s = case.num_images / case.images_per_s
    blocks_per_s = case.images_per_s / case.images_per_block
    block_mb = case.images_per_block * case.image_kb / 1000
    ahead_mb = case.num_gpus * case.read_ahead_mb * 2**20 / _MB
    readers_needed = case.images_per_s * case.unit_s(costs) / case.unit_rows
    per_unit = REQUESTS_PER_FILE * case.unit_files + case.unit_slices
    requests_per_s = case.images_per_s * per_unit / case.unit_rows
    # As fast as training: two passes forward are less than one forward and back.
    evaluation_s = _NUM_HELD_OUT / case.images_per_s / case.every_epochs
    pause_s = costs.copy_s + HEARD_S + evaluation_s
    transfer_s = costs.num_mb / case.stream_mb_s
    delay_s = case.store_latency_ms / 1000
    listed_s = delay_s * math.ceil(case.num_shards / _FILES_PER_LISTING)
    slower = case.store_latency_ms / costs.bucket_latency_ms
    footers_s = case.num_shards * costs.bucket_footer_ms * slower / 1000
    start_s = listed_s + footers_s + case.unit_s(costs) + transfer_s
    return {
        "handing out blocks": blocks_per_s * costs.block_ms / 1000,
        "reading": readers_needed / case.num_readers,
        "read-ahead for the readers": case.num_readers
        * _BLOCKS_PER_READER
        * block_mb
        / ahead_mb,
        "requests to the store": requests_per_s / case.store_requests_per_s,
        "an epoch's end": pause_s / epoch_s / _PAUSE_SHARE,
        # At an epoch's end training waits for the one before.
        "writing checkpoints": (costs.write_s + transfer_s) / epoch_s,
        "the start": start_s / _START_S,
    }
