"""Rows are runs that learn the same; means, fronts and short names are as defined."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.results.rows import (
    ComparedRun,
    Row,
    Spread,
    differences,
    group,
    pareto,
    short_name,
)
from pipelines.tracking.query import MetricPoint, StoredRun


def _measured(name: str, **params: str) -> ComparedRun:
    run = StoredRun(
        run_id=name,
        name=name,
        status="FINISHED",
        params=params,
        tags={},
        metrics={},
        start_s=0.0,
        end_s=1.0,
    )
    return ComparedRun(run=run, curve=(), losses=(), rates=(), epochs=())


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 9)), min_size=1
    )
)
def test_rows_are_the_runs_that_learn_the_same(
    runs: list[tuple[int, int, int]],
) -> None:
    """Whatever is drawn: a row a learnt setting, each run in one, and it is shown."""
    measured = [
        _measured(
            str(at), lr=str(lr), power=str(power), seed=str(seed), storage=str(at)
        )
        for at, (lr, power, seed) in enumerate(runs)
    ]
    rows = group(measured)
    assert sorted(id_ for row in rows for id_ in row.run_ids) == sorted(
        run.run.run_id for run in measured
    )
    assert len(rows) == len({(lr, power) for lr, power, _ in runs})
    assert len(group(measured, each=True)) == len(runs)
    shown = set(differences(rows))
    expected = {"lr": {lr for lr, _, _ in runs}, "power": {p for _, p, _ in runs}}
    assert shown == {name for name, values in expected.items() if len(values) > 1}


def test_what_only_some_rows_have_comes_after_what_differs() -> None:
    rows = group(
        [
            _measured("a", **{"pooling": "None", "z": "1"}),
            _measured("b", **{"pooling.power": "0.5", "z": "2"}),
        ]
    )
    assert list(differences(rows)) == ["z", "pooling", "pooling.power"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optim.lr", "lr"),
        ("pooling.power", "pooling.power"),
        ("optim.schedule.power", "schedule.power"),
        ("model.name", "model.name"),
        ("seed", "seed"),
    ],
)
def test_names_are_as_short_as_tells_them_apart(name: str, expected: str) -> None:
    among = ("optim.lr", "pooling.power", "optim.schedule.power", "model.name", "seed")
    assert short_name(name, among=among) == expected


@given(
    st.dictionaries(
        st.integers(0, 30), st.tuples(st.integers(0, 6), st.integers(0, 6))
    ),
    st.tuples(st.booleans(), st.booleans()),
)
def test_the_front_is_what_nothing_beats(
    points: dict[int, tuple[float, float]], more_is_better: tuple[bool, bool]
) -> None:
    front = pareto(points, more_is_better=more_is_better)
    signs = [1 if more else -1 for more in more_is_better]

    def is_beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point
            and all(s * o >= s * p for s, o, p in zip(signs, other, point, strict=True))
            for other in points.values()
        )

    unbeaten = {point for point in points.values() if not is_beaten(point)}
    assert [points[at] for at in front] == sorted(unbeaten)


@pytest.mark.parametrize("values", [[], [None], [1.0], [1.0, math.nan], [1, 2, 6]])
def test_a_spread_leaves_out_what_is_missing(values: list[float | None]) -> None:
    found, numbers = Spread.of(values), [one for one in values if one is not None]
    if not numbers:
        assert found is None
        return
    assert found is not None
    assert (found.deviation is None) == (len(numbers) == 1)
    if all(map(math.isfinite, numbers)):
        assert found.mean == statistics.fmean(numbers)
        assert found.deviation in (None, statistics.stdev([1, 2, 6]))


def test_a_curve_is_the_mean_where_all_seeds_have_come() -> None:
    def seed(*values: float) -> ComparedRun:
        def points(of: Sequence[float]) -> tuple[MetricPoint, ...]:
            return tuple(
                MetricPoint(10 * (at + 1), value, 0.0) for at, value in enumerate(of)
            )

        return dataclasses.replace(
            _measured("a"),
            curve=points(values),
            epochs=points(range(1, len(values) + 1)),
        )

    row = Row(runs=(seed(1.0, 3.0, 9.0), seed(3.0, 3.0), seed()))
    assert row.mean_curve() == [(1.0, 2.0, math.sqrt(2)), (2.0, 3.0, 0.0)]
