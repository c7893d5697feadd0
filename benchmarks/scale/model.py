"""Count what a run asks of its cluster: pure arithmetic, on what was measured.

`scale/limits` sets these counts against what there is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.config import Run, Scale
from pipelines.ingest.plan import EpochShape, GroupTable, epoch_shape
from pipelines.ingest.reading import FILES_AT_ONCE, MAX_SHARE_BYTES
from pipelines.shards.format import cut_evenly, group_bounds, shard_name
from pipelines.shards.planning import BYTES_PER_SHARD, MIN_SHARDS
from recipes.imagenet import so_vit_14

_FOLDER = "bucket/imagenet/train"
_KB, _MB = 10**3, 10**6


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Describe a set of like images as sovit-shards writes it."""

    num_images: int
    image_bytes: int
    num_shards: int

    @functools.cached_property
    def groups_per_shard(self) -> int:
        """Count the row groups of a shard."""
        rows = math.ceil(self.num_images / self.num_shards)
        return sum(1 for _ in group_bounds([self.image_bytes] * rows))

    @property
    def num_groups(self) -> int:
        """Count the row groups of the set."""
        return self.num_shards * self.groups_per_shard

    @property
    def rows_per_group(self) -> float:
        """Give the mean rows of a group."""
        return self.num_images / self.num_groups

    def num_slices(self, num_rows: int) -> float:
        """Count the parts of row groups that so many rows in sequence are read from."""
        # Either end cuts a group in two, mostly.
        return min(num_rows / self.rows_per_group + 1, self.num_groups)

    def num_files(self, num_rows: int) -> float:
        """Count the files that those parts lie in: groups come in random order."""
        others = (1 - 1 / self.num_shards) ** self.num_slices(num_rows)
        return self.num_shards * (1 - others)


def shards_of(
    num_images: int, *, image_kb: float, max_shards: int | None = None
) -> Shards:
    """Cut a set as sovit-shards does, or into `max_shards` where that is fewer."""
    image_bytes = round(_KB * image_kb)
    num_shards = max(MIN_SHARDS, -(-num_images * image_bytes // BYTES_PER_SHARD))
    num_shards = min(num_shards, num_images, max_shards or num_shards)
    return Shards(num_images=num_images, image_bytes=image_bytes, num_shards=num_shards)


def group_table(shards: Shards) -> GroupTable:
    """List the row groups of such a set, as its footers would."""
    bounds = cut_evenly(shards.num_images, num_parts=shards.num_shards)
    rows = np.diff(np.array(bounds, np.int64)).tolist()
    patterns = {
        num: np.array(
            [stop - start for start, stop in group_bounds([shards.image_bytes] * num)],
            dtype=np.int32,
        )
        for num in set(rows)
    }
    of_files = [patterns[num] for num in rows]
    num = shards.num_shards
    return GroupTable(
        paths=tuple(
            f"{_FOLDER}/{shard_name('train', index=index, num_shards=num)}"
            for index in range(num)
        ),
        num_groups=np.array([len(groups) for groups in of_files], dtype=np.int32),
        num_rows=np.concatenate(of_files),
    )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Say what there is. The defaults are an assumption, of hosts like p4d.24xlarge."""

    gpus_per_host: int = 8
    cores_per_host: int = 96
    memory_per_host_gb: float = 1100.0
    network_per_host_gbit: float = 400.0
    store_requests_per_s: float = 5500.0
    """S3 promises as many GETs for one prefix."""
    store_latency_ms: float = 100.0
    """Of a request to the bucket; S3's guide says 100 to 200 for small objects."""
    stream_mb_s: float = 90.0
    """What one connection to the bucket carries; S3's guide says 85 to 90."""

    def num_hosts(self, num_gpus: int) -> int:
        """Count the hosts of some GPUs."""
        return math.ceil(num_gpus / self.gpus_per_host)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Hold what a model's checkpoint costs."""

    model: str
    num_params: int
    num_mb: float
    copy_s: float
    """To copy it within the host's memory: a GPU's way there was not measured."""
    write_s: float
    """To write it, until the disk has it, CRC-32 included."""
    crc_s: float
    """To read it through and check it, from the page cache."""
    load_s: float
    """To load weights, average and optimiser after that."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Hold the constants of the model, all measured."""

    block_ms: float
    """Ray's, to bring a block from a reader to a worker."""
    plan_us_per_group: float
    slice_us: float
    """To work out a unit, for each of its slices."""
    task_bytes_per_slice: float
    """Of a pickled read task."""
    set_bytes_per_shard: float
    """Of the pickled shard set that every worker gets."""
    footer_ms: float
    """To read a shard's footer on a local disk."""
    bucket_footer_ms: float
    """The same in a bucket that takes `bucket_latency_ms` to answer."""
    bucket_latency_ms: float
    requests_per_file: float
    """To read from a file of a bucket, beside one for each row group."""
    read_mb_s: float
    """What one reader reads and cuts from the page cache."""
    bucket_mb_s: float
    """What one reader reads from a bucket that answers at once: a server on the same
    cores, so the least that it can do."""
    post_us: float
    """To post a message to the driver's board and take it."""
    heard_s: float
    """Until the driver has heard a message, for which a report waits."""
    points_per_s: float | None
    """What MLflow takes on SQLite; None where it was not measured."""
    kept: Kept


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describe a training whose limits are sought."""

    run: Run
    shards: Shards
    images_per_gpu_s: float
    """What a GPU trains on if nothing holds it up."""
    in_bucket: bool = True

    @property
    def num_gpus(self) -> int:
        """Count the workers, each with a GPU."""
        return self.run.scale.num_workers

    @property
    def images_per_s(self) -> float:
        """Give what all GPUs want."""
        return self.num_gpus * self.images_per_gpu_s

    @functools.cached_property
    def epoch(self) -> EpochShape:
        """Count an epoch's batches and units."""
        return epoch_shape(
            self.shards.num_images,
            batch_size=self.run.data.batch_size,
            shuffle_rows=self.run.data.shuffle_rows,
        )

    @property
    def epoch_s(self) -> float:
        """Give the time of an epoch's steps."""
        return self.epoch.num_images / self.images_per_s

    @property
    def steps_per_s(self) -> float:
        """Give the global batches a second."""
        return self.images_per_s / self.run.data.batch_size

    @property
    def unit_rows(self) -> int:
        """Count the rows that a read task reads, holds and shuffles."""
        return min(self.epoch.unit_rows, self.epoch.num_rows)

    @property
    def unit_mb(self) -> float:
        """Give the size of those rows."""
        return self.unit_rows * self.shards.image_bytes / _MB

    @property
    def images_per_block(self) -> float:
        """Give the mean images of a block: as `share_tables` cuts a unit."""
        num_workers = self.num_gpus
        num_batches = math.ceil(self.unit_rows / self.run.data.batch_size)
        unit_bytes = self.unit_rows * self.shards.image_bytes
        share_bytes = max(unit_bytes // (num_batches * num_workers), 1)
        per_block = min(max(MAX_SHARE_BYTES // share_bytes, 1), num_batches)
        return self.unit_rows / (math.ceil(num_batches / per_block) * num_workers)

    @property
    def block_mb(self) -> float:
        """Give the mean size of a block."""
        return self.images_per_block * self.shards.image_bytes / _MB

    @property
    def blocks_per_s(self) -> float:
        """Give what the coordinator has to hand out."""
        return self.images_per_s / self.images_per_block

    @property
    def unit_files(self) -> float:
        """Count the files that a unit is read from."""
        return self.shards.num_files(self.unit_rows)

    @property
    def unit_slices(self) -> float:
        """Count the parts of row groups that it is read from."""
        return self.shards.num_slices(self.unit_rows)

    def requests_per_unit(self, costs: Costs) -> float:
        """Count the requests to a bucket for a unit; none for a path."""
        if not self.in_bucket:
            return 0.0
        return costs.requests_per_file * self.unit_files + self.unit_slices

    def waits_per_unit(self, costs: Costs) -> float:
        """Count how often a reader waits for a bucket's answer, one after another.

        Files are opened beside each other, as many as a read task asks for at a time.
        Row groups are fetched by Arrow's own threads, which are fewer.
        """
        if not self.in_bucket:
            return 0.0
        opened = costs.requests_per_file * self.unit_files
        opened /= min(FILES_AT_ONCE, self.unit_files)
        return opened + self.unit_slices / self._fetched_at_once

    @property
    def _fetched_at_once(self) -> float:
        return min(FILES_AT_ONCE, pa.io_thread_count(), self.unit_files)

    def unit_s(self, costs: Costs, cluster: Cluster) -> float:
        """Give the time in which one reader reads a unit: its waits and its bytes."""
        waiting_s = self.waits_per_unit(costs) * cluster.store_latency_ms / 1000
        reading_s = self.unit_mb / costs.read_mb_s
        if self.in_bucket:
            streams_mb_s = cluster.stream_mb_s * self._fetched_at_once
            reading_s += self.unit_mb / min(streams_mb_s, costs.bucket_mb_s)
        return waiting_s + reading_s

    def readers_needed(self, costs: Costs, cluster: Cluster) -> float:
        """Count the readers that together read as fast as the GPUs train."""
        return self.images_per_s * self.unit_s(costs, cluster) / self.unit_rows


def run_at(num_gpus: int, *, images_per_gpu: int) -> Run:
    """Describe So-ViT-14's run on some GPUs, with its recipe's settings otherwise."""
    run = so_vit_14()
    batch_size = num_gpus * images_per_gpu
    data = dataclasses.replace(
        run.data,
        batch_size=batch_size,
        eval_batch_size=max(run.data.eval_batch_size, num_gpus),
    )
    scale = Scale(num_workers=num_gpus, use_gpu=True)
    return dataclasses.replace(run, data=data, scale=scale)
