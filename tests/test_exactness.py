"""Every image as often as planned, whatever happens: random histories of a training.

A history is a set of uneven shards with bad images in it, and a sequence of attempts:
each begins at the last checkpoint with some number of workers and is killed after some
steps. What counts is what the surviving weights were trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import Augment, Data, Model, Optim, Run
from pipelines.data import loader as loading
from pipelines.data.batch import Batch, Position
from pipelines.data.batching import batches
from pipelines.data.epoch_plan import GroupTable, Unit
from pipelines.data.loader import EpochStream, Plans
from pipelines.data.reading import share_table
from pipelines.data.shard_set import ShardSet
from pipelines.transforms.decoder import Decoded
from pipelines.transforms.rows import REPEAT, ROW_ID, BadImage, Rows
from tests.small_sets import uneven_labels

CPU = torch.device("cpu")
NUM_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One life of a worker group."""

    num_workers: int
    num_steps: int
    """Steps until it is killed."""


@dataclass(frozen=True, kw_only=True)
class History:
    """All that happens to a run."""

    run: Run
    shards: ShardSet
    checkpoint_every: int
    bad_share: float
    attempts: list[Attempt]
    units_per_segment: int

    def is_bad(self, row: int) -> bool:
        return np.random.default_rng(row).random() < self.bad_share


@st.composite
def histories(draw: st.DrawFn) -> History:
    files = draw(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4))
    files.append([draw(st.integers(3, 9))])
    repeats, balance = draw(
        st.sampled_from([(1, 0.0), (2, 0.0), (3, 0.0), (1, 0.5), (1, 1.0)])
    )
    num_micro = draw(st.integers(1, 2))
    run = Run(
        recipe="history",
        model=Model(name="none"),
        data=Data(
            train="t",
            val="v",
            batch_size=repeats * draw(st.integers(2 * num_micro, 12)),
            shuffle_rows=draw(st.integers(1, 40)),
            balance=balance,
        ),
        augment=Augment(num_repeats=repeats),
        optim=Optim(
            lr=1.0,
            num_epochs=NUM_EPOCHS * repeats,
            warmup_epochs=0,
            num_accumulation=num_micro,
        ),
        seed=draw(st.integers(0, 99)),
    )
    groups = GroupTable(
        paths=tuple(f"{at}.parquet" for at in range(len(files))),
        num_groups=np.array([len(of_file) for of_file in files], np.int32),
        num_rows=np.array([num for of_file in files for num in of_file], np.int32),
    )
    attempt = st.builds(
        Attempt, num_workers=st.integers(1, 8), num_steps=st.integers(0, 25)
    )
    return History(
        run=run,
        shards=ShardSet(
            address="none",
            classes=("a", "b", "c", "d", "e"),
            groups=groups,
            digest="",
            labels=uneven_labels(groups.total_rows),
        ),
        checkpoint_every=draw(st.integers(1, 7)),
        bad_share=draw(st.sampled_from([0.0, 0.1, 0.5])),
        attempts=draw(st.lists(attempt, max_size=5)),
        units_per_segment=draw(st.sampled_from([1, 2, 3, 1000])),
    )


@dataclass
class MemoryOpener:
    """Deal units out as Ray does, from rows that are only numbers."""

    num_workers: int
    worker: int
    units: list[Unit] = field(default_factory=list)

    def prepare(self, plan: Callable[[], list[Unit]]) -> None:
        self.units = plan()

    def open(self) -> Iterator[pa.Table]:
        return self._tables(self.units)

    def _tables(self, units: list[Unit]) -> Iterator[pa.Table]:
        for unit in units:
            ids = unit.ids()
            rows = pa.table(
                {
                    "label": np.zeros(len(ids), np.int64),
                    "key": [str(i) for i in ids],
                    "width": np.ones(len(ids), np.int32),
                    "height": np.ones(len(ids), np.int32),
                    ROW_ID: ids,
                    REPEAT: np.concatenate([s.taken()[1] for s in unit.slices]),
                }
            )
            first = max(unit.start_batch - unit.first_batch, 0)
            if first < unit.num_batches:
                yield share_table(
                    unit,
                    range(first, unit.num_batches),
                    order=unit.order(),
                    rows=rows,
                    images=[np.empty(0, np.uint8)] * len(ids),
                    worker=self.worker,
                    num_workers=self.num_workers,
                )


@dataclass(frozen=True, kw_only=True)
class ShowRows:
    """Decode rows to (id, repetition); the bad ones get no weight."""

    num_rows: int
    history: History

    @property
    def num_ahead(self) -> int:
        """Batches ahead: as on a GPU, where segments are long enough for it."""
        return int(self.history.units_per_segment == 1000)

    def start(self, rows: Rows, epoch: int) -> Callable[[], Decoded]:
        return lambda: self._decoded(rows)

    def _decoded(self, rows: Rows) -> Decoded:
        bad = [self.history.is_bad(int(row)) for row in rows.ids]
        images = np.full((self.num_rows, 2), -1)
        images[: len(rows)] = np.stack([rows.ids, rows.repeats], axis=1)
        weights = np.zeros(self.num_rows, np.float32)
        weights[: len(rows)] = np.logical_not(bad)
        return Decoded(
            images=torch.from_numpy(images),
            labels=np.zeros(self.num_rows, np.int64),
            weights=weights,
            draw_ids=np.full(self.num_rows, -1),
            bad=tuple(
                BadImage(row_id=0, key="", reason="bad", repeat=int(repeat))
                for is_bad, repeat in zip(bad, rows.repeats, strict=True)
                if is_bad
            ),
        )


def batches_of(
    history: History, start: Position, *, num_workers: int, worker: int
) -> Iterator[Batch]:
    run = history.run
    stream = EpochStream(
        Plans(shards=history.shards, run=run, train=True),
        opener=MemoryOpener(num_workers=num_workers, worker=worker),
        is_planner=True,
        start=start,
        num_epochs=run.optim.total_epochs,
    )
    share_rows = -(-run.data.batch_size // num_workers)
    num_micro = run.optim.num_accumulation
    decode = ShowRows(num_rows=-(-share_rows // num_micro), history=history)
    for batch in batches(
        stream.tables(),
        num_micro=num_micro,
        micro_rows=decode.num_rows,
        decode=decode.start,
        num_ahead=decode.num_ahead,
        device=CPU,
    ):
        stream.reached(batch.epoch, batch.index)
        yield batch


def train(
    history: History, start: Position, *, num_workers: int, num_steps: int | None
) -> Iterator[tuple[Position, list[tuple[int, int, int]], int]]:
    """Yield after each step: the position, what was trained on, the bad images."""
    workers = [
        batches_of(history, start, num_workers=num_workers, worker=worker)
        for worker in range(num_workers)
    ]
    position, trained, num_bad, step = start, [], 0, 0
    for together in zip(*workers, strict=True):  # strict: no worker steps more often
        first = together[0]
        for batch in together:
            places = (batch.index, batch.micro, batch.ends_step, batch.ends_epoch)
            wanted = (first.index, first.micro, first.ends_step, first.ends_epoch)
            assert places == wanted
            assert len(batch.images) == len(first.images)
            real = batch.images[batch.weights == 1].tolist()
            trained += [(batch.epoch, row, repeat) for row, repeat in real]
            num_bad += batch.num_bad
        if not first.ends_step:
            continue
        if step == num_steps:
            return
        step += 1
        position = Position(epoch=first.epoch, batch=first.index + 1)
        if first.ends_epoch:
            position = Position(epoch=first.epoch + 1)
        yield position, trained, num_bad
        trained, num_bad = [], 0


def live(history: History) -> tuple[list[tuple[int, int, int]], int]:
    """Live through all attempts and one that ends; give what survives."""
    kept, num_bad, position = [], 0, Position()
    last = Attempt(num_workers=2, num_steps=10**6)
    for attempt in [*history.attempts, last]:
        since, bad_since = [], 0
        steps = train(
            history,
            position,
            num_workers=attempt.num_workers,
            num_steps=attempt.num_steps,
        )
        for step, (now, trained, bad) in enumerate(steps, start=1):
            since += trained
            bad_since += bad
            if step % history.checkpoint_every == 0 or now.batch == 0:
                kept, num_bad, position = kept + since, num_bad + bad_since, now
                since, bad_since = [], 0
        # The kill: what was trained since the checkpoint is gone with the weights.
    assert position.epoch == history.run.optim.total_epochs
    return kept, num_bad


@given(history=histories())
@settings(max_examples=300)
def test_the_surviving_weights_saw_every_good_image_as_planned(
    history: History,
) -> None:
    repeats = history.run.augment.num_repeats
    total = history.shards.groups.total_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_UNITS_PER_SEGMENT", history.units_per_segment)
        if total < repeats:
            return
        kept, num_bad = live(history)
    good = [row for row in range(total) if not history.is_bad(row)]
    # With repeated augmentation a pass over the set takes as many epochs.
    seen = Counter((epoch // repeats, row, repeat) for epoch, row, repeat in kept)
    times = np.full((NUM_EPOCHS, total), repeats)  # once, repeated
    balance = Plans(shards=history.shards, run=history.run, train=True).balance
    if balance is not None:
        times = np.stack([balance.showings(epoch) for epoch in range(NUM_EPOCHS)])
    wanted = {
        (whole_pass, row, repeat)
        for whole_pass in range(NUM_EPOCHS)
        for row in good
        for repeat in range(times[whole_pass, row])
    }
    assert set(seen) == wanted
    assert set(seen.values()) <= {1}
    # A bad image counts once, however often it comes in an epoch.
    assert num_bad == (np.delete(times, good, axis=1) > 0).sum()


def test_the_histories_contain_what_they_should() -> None:
    """Hold the test above: kills, resizes and bad images do occur in its examples."""
    found: list[History] = []

    @given(history=histories())
    @settings(max_examples=100, database=None, derandomize=True)
    def look(history: History) -> None:
        found.append(history)

    look()
    assert sum(len(history.attempts) >= 2 for history in found) > 20
    sizes = {attempt.num_workers for h in found for attempt in h.attempts}
    assert sizes == set(range(1, 9))
    assert sum(history.bad_share > 0 for history in found) > 20
    assert sum(history.run.augment.num_repeats > 1 for history in found) > 10
    assert sum(history.run.data.balance > 0 for history in found) > 20


def test_a_lost_row_would_be_noticed() -> None:
    """Hold the test above: a checkpoint that is one batch off is caught."""
    shards = ShardSet(
        address="none",
        classes=("c",),
        groups=GroupTable(
            paths=("0",),
            num_groups=np.array([3], np.int32),
            num_rows=np.array([9, 9, 9], np.int32),
        ),
        digest="",
    )
    run = Run(
        recipe="history",
        model=Model(name="none"),
        data=Data(train="t", val="v", batch_size=4, shuffle_rows=8),
        optim=Optim(lr=1.0, num_epochs=1, warmup_epochs=0),
    )
    history = History(
        run=run,
        shards=shards,
        checkpoint_every=1,
        bad_share=0.0,
        attempts=[],
        units_per_segment=1000,
    )
    for start, missing in ((0, 0), (1, 4), (6, 24)):
        steps = train(history, Position(batch=start), num_workers=3, num_steps=None)
        rows = [row for _, trained, _ in steps for _, row, _ in trained]
        assert len(rows) == len(set(rows)) == 27 - missing
