"""Balanced epochs: who is shown how often is known beforehand, and well spread."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import Augment
from pipelines.config.overrides import change_fields
from pipelines.data.balance import Balance
from pipelines.data.epoch_plan import plan_epoch
from pipelines.data.shard_set import read_shard_set
from pipelines.driver.preflight import check_run
from pipelines.dry_run.command import show_dry_run
from pipelines.evaluation.held_out import with_labels
from pipelines.preview import preview
from tests.fault_runs import brief_run
from tests.test_plan import batches_of, table


def balance_of(sizes: list[int], *, exponent: float, seed: int = 0) -> Balance:
    """Balance classes of these sizes, their rows strewn over the set."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(seed).permutation(labels)
    return Balance(labels, exponent=exponent, num_classes=len(sizes), seed=seed)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum),
    exponent=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_rows_of_a_class_come_equally_often(
    sizes: list[int], exponent: float, seed: int
) -> None:
    balance = balance_of(sizes, exponent=exponent, seed=seed)
    counts, total = np.array(sizes), sum(sizes)
    weights = np.where(counts, np.maximum(counts, 1.0) ** (1 - exponent), 0)
    assert balance.quotas.sum() == total
    assert (abs(balance.quotas - total * weights / weights.sum()) < 1).all()
    shown = np.zeros(total, np.int64)
    for epoch in range(5):
        showings = balance.showings(epoch)
        shown += showings
        assert showings.sum() == total
        for label, quota in enumerate(balance.quotas.tolist()):
            of_class = balance.labels == label
            assert showings[of_class].sum() == quota
            for times in (showings[of_class], shown[of_class]):
                assert len(times) == 0 or np.ptp(times) <= 1


def test_quotas_are_those_of_the_field() -> None:
    sizes = [900, 90, 10]
    assert balance_of(sizes, exponent=0).quotas.tolist() == sizes
    assert balance_of(sizes, exponent=1).quotas.tolist() == [334, 333, 333]
    # By the roots 30, 9.487 and 3.162.
    assert balance_of(sizes, exponent=0.5).quotas.tolist() == [703, 223, 74]
    seeds = [balance_of(sizes, exponent=1, seed=s).showings(0).tolist() for s in (0, 1)]
    assert seeds[0] != seeds[1]


def test_showings_are_numbered_and_spread_over_the_epoch() -> None:
    balance = balance_of([7600, 395, 5], exponent=1)
    groups = table([[50] * 16] * 10)
    plan = plan_epoch(
        groups, batch_size=40, shuffle_rows=400, seed=1, epoch=2, balance=balance
    )
    pairs = [
        (row_id, showing)
        for unit in plan.units()
        for item in unit.slices
        for row_id, showing in zip(item.ids(), item.taken()[1], strict=True)
    ]
    showings = balance.showings(2)
    assert sorted(pairs) == [(i, s) for i, k in enumerate(showings) for s in range(k)]
    # 2,667 showings of five rows: a quarter of them in each quarter of the epoch.
    labels = [balance.labels[batch] for batch in batches_of(plan).values()]
    rare = np.array([(of_batch == 2).sum() for of_batch in labels])
    assert rare.sum() == balance.quotas[2]
    quarters = rare.reshape(4, -1).sum(1) / rare.sum()
    assert quarters == pytest.approx([0.25] * 4, abs=0.05)


def test_a_run_says_what_its_epochs_are_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = change_fields(brief_run(tmp_path, num_epochs=2), {"data.balance": 1.0})
    checked = check_run(run)
    labels = checked.train_shards.labels
    assert labels is not None
    assert labels.dtype == np.uint8
    sizes = np.bincount(labels)
    line = checked.balance
    assert line.startswith("balanced epochs of 301 images: of ")
    # 30 or 31 showings of each of ten classes.
    assert f"({sizes.min()} images) {30 / sizes.min():.3g} times and of " in line
    show_dry_run(run, name="none", record=None, plot="")
    said = capsys.readouterr().out
    assert line in said
    # The steps are those of the set: an epoch keeps its length.
    assert "20 in 2 epochs of 10, of 32 images; an epoch's last of 13" in said
    assert check_run(change_fields(run, {"data.balance": 0.0})).balance == ""
    preview(run, num_images=2, num_epochs=1, path=tmp_path / "preview.png")
    assert with_labels(read_shard_set(run.data.train)).digest == (
        checked.train_shards.digest
    )


def test_what_would_balance_twice_is_refused(tmp_path: Path) -> None:
    run = brief_run(tmp_path, num_epochs=1)
    with pytest.raises(ValueError, match=r"balance: expected 0 with --optim\.class"):
        change_fields(run, {"data.balance": 0.5, "optim.class_weights": "inverse"})
    data = dataclasses.replace(run.data, balance=0.5)
    with pytest.raises(ValueError, match=r"0 with repeated augmentation"):
        dataclasses.replace(run, data=data, augment=Augment(num_repeats=2))
    with pytest.raises(ValueError, match=r"data\.balance: expected 0 <= balance"):
        dataclasses.replace(run.data, balance=1.5)
