"""Read parts of a shard set before training starts: damage shows while one waits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipelines.data.epoch_plan import Unit
from pipelines.data.reading import Reading, read_rows
from pipelines.data.shard_set import ShardSet
from pipelines.rng import seeded_order
from pipelines.storage.retry import answering

# A few seconds of reading: small sets are read whole, of large ones a sample.
_MAX_BYTES = 256 << 20
_NUM_THREADS = 8


def spot_check(shards: ShardSet, *, max_bytes: int = _MAX_BYTES) -> int:
    """Read row groups all over a set until `max_bytes` have passed.

    Returns how many groups were read. Raises ValueError naming a damaged shard, or a
    store that does not answer; what is damaged elsewhere shows when it is read for
    training.
    """
    order = seeded_order(len(shards.groups.num_rows), key=0)
    num_read, num_bytes = 0, 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(order), _NUM_THREADS):
            groups = order[start : start + _NUM_THREADS].tolist()
            sizes = list(pool.map(lambda group: _read(shards, group=group), groups))
            num_read += len(sizes)
            num_bytes += sum(sizes)
            if num_bytes >= max_bytes:
                break
    return num_read


def _read(shards: ShardSet, *, group: int) -> int:
    """Read one row group; return its number of bytes."""
    whole = shards.groups.slice_of(group)
    unit = Unit(
        epoch=0,
        first_batch=0,
        batch_size=1,
        num_rows=whole.stop,
        slices=(whole,),
        row_key=None,
        ends_epoch=False,
    )
    reading = Reading(address=shards.address, num_classes=len(shards.classes))
    with answering():
        return read_rows(unit, reading=reading).nbytes
