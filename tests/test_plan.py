"""Plans: every row once an epoch, in batches that no number of workers changes."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.balance import Balance
from pipelines.data.epoch_plan import EpochPlan, GroupTable, Unit, plan_epoch, share
from tests.small_sets import uneven_labels

FILES = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5)
SOME_ROWS = FILES.filter(lambda files: sum(map(sum, files)) > 0)
SETTINGS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 12),
        "shuffle_rows": st.integers(1, 40),
        "seed": st.integers(-5, 2**40),
        "epoch": st.integers(0, 3),
        "shuffle": st.booleans(),
    }
)
EXPONENTS = st.sampled_from([0.0, 0.0, 0.5, 1.0])


def table(files: list[list[int]]) -> GroupTable:
    return GroupTable(
        paths=tuple(f"{file:03d}.parquet" for file in range(len(files))),
        num_groups=np.array([len(of_file) for of_file in files], dtype=np.int32),
        num_rows=np.array([num for of_file in files for num in of_file], np.int32),
    )


def ids_of(unit: Unit) -> list[int]:
    return unit.ids()[unit.order()].tolist()


def balanced(
    groups: GroupTable, arguments: dict, *, exponent: float
) -> tuple[dict, np.ndarray]:
    """Give a plan's arguments, balanced, and how often the epoch shows each row."""
    if not exponent:
        return arguments, np.ones(groups.total_rows)
    labels = uneven_labels(groups.total_rows)
    balance = Balance(labels, exponent=exponent, num_classes=5, seed=7)
    showings = balance.showings(arguments["epoch"])
    return {**arguments, "shuffle": True, "balance": balance}, showings


def batches_of(plan: EpochPlan, *, start_batch: int = 0) -> dict[int, list[int]]:
    """Give each global batch's row ids, as the workers train on them."""
    found: dict[int, list[int]] = {}
    for unit in plan.units(start_batch=start_batch):
        ids = ids_of(unit)
        for at in range(unit.num_batches):
            if unit.first_batch + at >= unit.start_batch:
                begin = at * unit.batch_size
                found[unit.first_batch + at] = ids[begin : begin + unit.batch_size]
    return found


@given(files=SOME_ROWS, arguments=SETTINGS, exponent=EXPONENTS, resume=st.floats(0, 1))
@settings(max_examples=200)
def test_every_row_comes_as_often_as_it_should_and_resuming_gives_the_rest(
    files: list[list[int]], arguments: dict, exponent: float, resume: float
) -> None:
    groups = table(files)
    arguments, showings = balanced(groups, arguments, exponent=exponent)
    plan = plan_epoch(groups, **arguments)
    found = batches_of(plan)
    assert list(found) == list(range(plan.shape.num_batches))
    ids = [i for batch in found.values() for i in batch]
    assert np.bincount(ids, minlength=groups.total_rows).tolist() == showings.tolist()
    assert len(ids) == groups.total_rows
    if not arguments["shuffle"]:
        assert ids == sorted(ids)
    sizes = [len(batch) for batch in found.values()]
    assert sizes[:-1] == [arguments["batch_size"]] * (plan.shape.num_batches - 1)
    start = round(resume * plan.shape.num_batches)
    rest = {number: batch for number, batch in found.items() if number >= start}
    assert batches_of(plan, start_batch=start) == rest


@given(files=SOME_ROWS, arguments=SETTINGS, exponent=EXPONENTS)
@settings(max_examples=100)
def test_units_are_whole_batches_of_rows_that_their_groups_have(
    files: list[list[int]], arguments: dict, exponent: float
) -> None:
    groups = table(files)
    arguments, _ = balanced(groups, arguments, exponent=exponent)
    plan = plan_epoch(groups, **arguments)
    units = list(plan.units())
    firsts = {
        (f"{file:03d}.parquet", at): sum(map(sum, files[:file])) + sum(of[:at])
        for file, of in enumerate(files)
        for at in range(len(of))
    }
    for index, unit in enumerate(units):
        assert unit == plan.unit(index)
        assert unit.first_batch * unit.batch_size == index * plan.shape.unit_rows
        assert unit.ends_epoch == (index == len(units) - 1)
        assert sum(s.stop - s.start for s in unit.slices) == unit.num_rows
        assert len(unit.ids()) == unit.num_rows
        for piece in unit.slices:
            num_rows = files[int(piece.path[:3])][piece.place]
            rows, _ = piece.taken()
            assert 0 <= rows.min() <= rows.max() < num_rows
            if not exponent:
                assert 0 <= piece.start < piece.stop <= num_rows
            assert piece.first_id == firsts[piece.path, piece.place]


@given(num_rows=st.integers(0, 50), num_parts=st.integers(1, 8))
def test_shares_cover_a_batch_in_order(num_rows: int, num_parts: int) -> None:
    bounds = [share(num_rows, num_parts=num_parts, part=i) for i in range(num_parts)]
    assert [i for pair in bounds for i in range(*pair)] == list(range(num_rows))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == math.ceil(num_rows / num_parts)


def test_another_epoch_or_seed_gives_another_order() -> None:
    groups = table([[10] * 5] * 4)

    def order(seed: int, epoch: int) -> list[int]:
        plan = plan_epoch(groups, batch_size=8, shuffle_rows=32, seed=seed, epoch=epoch)
        return [i for batch in batches_of(plan).values() for i in batch]

    orders = [order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert order(0, 0) == orders[0]
    for at, one in enumerate(orders):
        for other in orders[at + 1 :]:
            # Two random orders of 200 rows agree in one place, give or take one.
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_rows_are_shuffled_within_their_unit_only() -> None:
    plan = plan_epoch(table([[10] * 10]), batch_size=5, shuffle_rows=20)
    for unit in plan.units():
        assert sorted(unit.order()) == list(range(20))
        assert {i // 10 for i in ids_of(unit)} == {
            s.first_id // 10 for s in unit.slices
        }
        assert ids_of(unit) != sorted(ids_of(unit))
    orders = {tuple(unit.order()) for unit in plan.units()}
    assert len(orders) == 5


def test_a_group_that_straddles_a_bound_is_read_by_both_units() -> None:
    plan = plan_epoch(table([[7, 7, 7]]), batch_size=5, shuffle_rows=6, shuffle=False)
    assert plan.shape.unit_rows == 10
    pieces = [[(s.place, s.start, s.stop) for s in u.slices] for u in plan.units()]
    assert pieces == [[(0, 0, 7), (1, 0, 3)], [(1, 3, 7), (2, 0, 6)], [(2, 6, 7)]]


@pytest.mark.parametrize("files", [[], [[]], [[0], [0, 0]]])
def test_a_set_without_rows_is_refused(files: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="with rows"):
        plan_epoch(table(files), batch_size=2, shuffle_rows=4)


def test_a_plan_of_billions_of_rows_holds_a_few_numbers_a_group() -> None:
    num_files, per_file, rows = 100_000, 10, 5000
    num_groups = num_files * per_file
    groups = GroupTable(
        paths=tuple(f"{number:06d}" for number in range(num_files)),
        num_groups=np.full(num_files, per_file, dtype=np.int32),
        num_rows=np.full(num_groups, rows, dtype=np.int32),
    )
    plan = plan_epoch(groups, batch_size=1024, shuffle_rows=20_480, seed=1)
    shape = plan.shape
    assert shape.num_rows == 5 * 10**9
    arrays = [value for value in vars(plan).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == (4 + 8) * num_groups
    last = plan.unit(shape.num_units - 1)
    assert last.ends_epoch
    assert shape.unit_rows * (shape.num_units - 1) + last.num_rows == 5 * 10**9
    for unit in (plan.unit(0), plan.unit(123_456), last):
        assert len(unit.slices) <= 20_480 // rows + 2
        assert len(set(ids_of(unit))) == unit.num_rows
    # Ids of so many rows do not fit 32 bits.
    assert groups.slice_of(num_groups - 1).first_id == 5 * 10**9 - rows
    assert groups.path_of(5 * 10**9 - 1) == "099999"
    assert groups.path_of(0) == "000000"


def test_a_plan_of_a_billion_rows_fits_half_a_gigabyte() -> None:
    """10^5 shards of 157 groups of 64 rows; traced, NumPy's memory included."""
    num_files, per_file = 100_000, 157
    groups = GroupTable(
        paths=tuple(f"train-{n:06d}-of-100000.parquet" for n in range(num_files)),
        num_groups=np.full(num_files, per_file, dtype=np.int32),
        num_rows=np.full(num_files * per_file, 64, dtype=np.int32),
    )
    tracemalloc.start()
    try:
        plan = plan_epoch(groups, batch_size=4096, shuffle_rows=65_536, seed=1)
        units = [plan.unit(at) for at in range(50)]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert groups.total_rows > 10**9
    assert sum(unit.num_rows for unit in units) == 50 * 65_536
    assert peak_bytes + groups.num_rows.nbytes < 500 * 2**20
