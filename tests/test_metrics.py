"""What is measured: the best k, and weighted means that start again."""

from __future__ import annotations

import pytest
import torch

from pipelines.training.metrics import MetricSums, correct


def test_correct_counts_the_best_k() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 0])
    assert correct(logits, labels, k=1).tolist() == [False, False]
    assert correct(logits, labels, k=2).tolist() == [True, False]
    assert correct(logits, labels, k=5).tolist() == [True, True]


def test_sums_are_weighted_means_and_start_again() -> None:
    sums = MetricSums(torch.device("cpu"))
    ranks = torch.arange(8.0)
    # The label comes first, first, sixth; a filling row counts nowhere.
    logits = torch.stack([-ranks, -(ranks - 1).abs(), -ranks, ranks])
    labels = torch.tensor([0, 1, 5, 2])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    losses = torch.tensor([1.0, 2.0, 6.0, 100.0])
    sums.add(logits, labels, weights, losses, num_bad=2)
    sums.add(logits[:1], labels[:1], weights[:1], losses[:1], num_bad=1)
    total = sums.total(votes={"is_time": True, "is_last": False})
    assert total["num_bad"] == 3
    assert total["is_time"] == 1
    assert total["is_last"] == 0
    assert total["num_images"] == 4
    assert total["loss"] == pytest.approx(2.5)
    assert total["top1"] == pytest.approx(75)
    assert total["top5"] == pytest.approx(75)
    assert set(sums.total().values()) == {0}
