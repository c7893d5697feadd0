"""Classes of unequal size weigh in the loss as their numbers of images say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from pipelines.config import Run
from pipelines.config.overrides import change_fields
from pipelines.driver.fit import fit
from pipelines.driver.preflight import check_run
from pipelines.training.metrics import class_weights, soft_cross_entropy
from pipelines.training.step import mixed
from tests.fault_runs import brief_run, learnt
from tests.mlflow_stores import prepare_store
from tests.small_runs import settings_of
from tests.test_loop import RUN, batch_of, pictures
from tuning.checks import check_sweep
from tuning.trials.options import Search

COUNTS = arrays(np.int64, st.integers(2, 9), elements=st.integers(0, 10**7)).filter(
    lambda counts: counts.sum() > 0
)


@given(counts=COUNTS)
def test_the_mean_weight_of_an_image_is_one_and_rare_classes_weigh_more(
    counts: np.ndarray,
) -> None:
    for kind in ("inverse", "effective"):
        weights = class_weights(counts, kind=kind).numpy()
        assert weights.dtype == np.float32
        mean = (weights.astype(np.float64) * counts).sum() / counts.sum()
        assert mean == pytest.approx(1, rel=1e-5)
        order = np.argsort(counts, kind="stable")
        shown = weights[order][counts[order] > 0]
        assert (np.diff(shown) <= 1e-6 * shown[:-1]).all()
        assert (weights[counts == 0] == 0).all()


def test_weights_are_the_papers() -> None:
    counts = np.array([10, 1000, 100_000])
    inverse = class_weights(counts, kind="inverse").double()
    torch.testing.assert_close(
        inverse[:2] / inverse[2], torch.tensor([1e4, 100.0]).double()
    )
    effective = class_weights(counts, kind="effective").double()
    # The effective number of n images is (1 - b^n) / (1 - b).
    number = [(1 - 0.9999**n) / (1 - 0.9999) for n in (10, 1000, 100_000)]
    wanted = torch.tensor([number[2] / n for n in number], dtype=torch.float64)
    torch.testing.assert_close(effective / effective[2], wanted, rtol=1e-5, atol=0)
    assert class_weights(np.array([7, 7, 7]), kind="inverse").tolist() == [1, 1, 1]


def test_the_loss_is_pytorchs_with_weights() -> None:
    """Of smoothed and mixed targets too."""
    run = change_fields(RUN, {"optim.mixup": 0.8, "optim.label_smoothing": 0.1})
    settings = settings_of(run, steps_per_epoch=4)
    weighing = dataclasses.replace(
        settings,
        run=change_fields(run, {"optim.class_weights": "inverse"}),
        class_counts=(6, 3, 1),
    )
    weights = class_weights(np.array([6, 3, 1]), kind="inverse")
    batch = batch_of(*pictures(4))
    logits = torch.randn(len(batch.labels), 3)
    _, plain = mixed(batch, settings=settings)
    _, weighed = mixed(batch, settings=weighing)
    each = torch.stack(
        [
            F.cross_entropy(row[None], target[None], weight=weights, reduction="sum")
            for row, target in zip(logits, plain, strict=True)
        ]
    )
    torch.testing.assert_close(soft_cross_entropy(logits, weighed), each)


def trained(folder: Path, **changes: Any) -> dict[str, Any]:
    run = brief_run(folder, num_epochs=1)
    prepare_store(run.storage)
    fit(change_fields(run, changes), name="a", keep_model=False)
    return learnt(Path(run.storage, "a", "epoch_0001"))


def test_a_run_counts_its_classes_and_learns_by_them(tmp_path: Path) -> None:
    run = brief_run(tmp_path / "counted", num_epochs=1)
    weighing = change_fields(run, {"optim.class_weights": "inverse"})
    counts = check_run(weighing).class_counts
    assert len(counts) == 10
    assert sum(counts) == 301
    assert check_run(run).class_counts == ()
    plain = trained(tmp_path / "plain")
    assert trained(tmp_path / "again")["weights"] == plain["weights"]
    weighed = trained(tmp_path / "weighed", **{"optim.class_weights": "inverse"})
    assert weighed["weights"] != plain["weights"]


def test_heads_on_tokens_refuse_what_they_do_not_have(tmp_path: Path) -> None:
    run: Run = change_fields(
        brief_run(tmp_path, num_epochs=1),
        {"optim.class_weights": "effective", "validation.every_epochs": 1},
    )
    with pytest.raises(ValueError, match=r"got --optim\.class-weights"):
        check_sweep(run, search=Search(head_from="runs/a/epoch_0001"))
    with pytest.raises(ValueError, match="class_weights"):
        change_fields(run, {"optim.class_weights": "inverted"})
