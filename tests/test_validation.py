"""Validation: one pass over the images, each once, on however many workers."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipelines.config import Validation
from pipelines.data.batch import Batch
from pipelines.data.shard_set import ShardSet
from pipelines.errors import BadImagesError
from pipelines.evaluation import scores as sums
from pipelines.evaluation.measure import (
    EvaluationResult,
    Score,
    check_counted,
    models_of,
    validate,
)
from tests.small_runs import CPU, supply_of
from tests.small_validation import (
    GOOD,
    LABELS,
    NUM_CLASSES,
    NUM_WORST,
    REAL,
    SIZE,
    held_out,
    linear,
    logits_by_row,
    measure_as_worker,
    measured,
    run_of,
    write_damaged_set,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_damaged_set(tmp_path_factory.mktemp("validation") / "set")


def check(outcome: EvaluationResult, logits: np.ndarray, *, labels: np.ndarray) -> None:
    """Hold what the first model came to against the formulas, written out."""
    shares = np.exp(logits[GOOD])
    shares /= shares.sum(axis=1, keepdims=True)
    wanted, predictions = labels[GOOD], logits[GOOD].argmax(axis=1)
    losses = -np.log(shares[np.arange(len(GOOD)), wanted])
    score = outcome.primary
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert score.top1 == pytest.approx(100 * (predictions == wanted).mean())
    assert (score.num_images, score.num_bad) == (len(GOOD), 1)
    report = outcome.report
    assert report is not None
    matrix = np.zeros((logits.shape[1],) * 2, np.int64)
    np.add.at(matrix, (wanted, predictions), 1)
    np.testing.assert_array_equal(report.confusions.matrix(), matrix)
    recalls = [(predictions == label)[wanted == label].mean() for label in set(wanted)]
    assert score.balanced_top1 == pytest.approx(100 * np.mean(recalls))
    np.testing.assert_array_equal(report.confusions.num_images, matrix.sum(axis=1))
    assert report.confusions.pairs is not None
    assert np.diff(report.confusions.pairs[:, 2]).max(initial=0) <= 0
    order = np.argsort(-losses)[:NUM_WORST]
    worst = report.worst
    assert worst.row_ids.tolist() == [GOOD[at] for at in order]
    np.testing.assert_allclose(worst.losses, losses[order], rtol=1e-5)
    np.testing.assert_array_equal(worst.labels, wanted[order])
    np.testing.assert_array_equal(worst.predictions, predictions[order])
    np.testing.assert_allclose(
        worst.probabilities, shares.max(axis=1)[order], rtol=1e-5
    )


def test_what_is_measured_is_by_the_formulas(shards: ShardSet) -> None:
    model = linear(1)
    outcome = measured({"raw": model}, shards, described=held_out(shards))
    assert not model.training
    logits = logits_by_row(model, shards)
    check(outcome, logits, labels=LABELS)
    predictions = logits.argmax(axis=1)
    has_any = [row for row in GOOD if REAL[row].max() >= 0]
    right = [predictions[row] in REAL[row] for row in has_any]
    assert 0 < sum(right) < len(right)
    assert outcome.primary.real_top1 == pytest.approx(100 * np.mean(right))
    assert outcome.primary.num_real == len(has_any)
    # The pictures are those of the rows, as the model sees them.
    assert outcome.report is not None
    worst = outcome.report.worst
    assert worst.pixels.shape == (NUM_WORST, SIZE, SIZE, 3)
    run = run_of(shards.address)
    mean, std = np.array(run.data.mean), np.array(run.data.std)
    supply = supply_of(run, shards=shards, train=False)
    row = int(worst.row_ids[0])
    batch = next(batch for batch in supply if row in batch.draw_ids)
    supply.close()
    image = batch.images[batch.draw_ids.tolist().index(row)].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(worst.pixels[0], np.rint(255 * (image * std + mean)))


def test_two_models_share_one_pass_and_are_measured_as_alone(shards: ShardSet) -> None:
    models = {"average": linear(1), "raw": linear(2)}
    taken: list[int] = []

    def noted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            taken.append(batch.index)
            yield batch

    run = run_of(shards.address)
    supply = supply_of(run, shards=shards, train=False)
    both = validate(
        models, noted(supply), run=run, device=CPU, held_out=held_out(shards)
    )
    supply.close()
    assert taken == [0, 1, 2, 3, 4]
    for name, model in models.items():
        alone = measured({name: model}, shards, described=held_out(shards))
        assert both.scores[name] == alone.primary
    first = both.scores["average"]
    metrics = both.metrics()
    assert metrics["val/top1"] == first.top1
    assert metrics["val_raw/top1"] == both.scores["raw"].top1 != first.top1
    assert metrics["val/bad_images"] == 1
    names = {"loss", "top1", "top5", "balanced_top1", "real_top1"}
    counts = {"num_images", "bad_images", "num_real"}
    assert set(metrics) == {
        *(f"val/{name}" for name in names | counts),
        *(f"val_raw/{name}" for name in names),
    }
    assert "val_v2/top1" in both.metrics("val_v2")
    assert "val_v2_raw/top1" in both.metrics("val_v2")


def test_a_set_of_some_classes_is_chosen_from_alone(shards: ShardSet) -> None:
    """As ImageNet-A's 200 of 1,000: logits of other classes do not count."""
    layer = nn.Linear(3 * SIZE * SIZE, NUM_CLASSES + 4, bias=False)
    with torch.no_grad():
        layer.weight[7] = 9 * layer.weight[6]  # often the highest of all
    model = nn.Sequential(nn.Flatten(), layer)
    columns = (6, 0, 8, 3, 2)
    described = held_out(shards, columns=columns, real=None)
    outcome = measured({"raw": model}, shards, described=described)

    class Chosen(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images)[:, list(columns)]

    check(outcome, logits_by_row(Chosen(), shards), labels=LABELS)
    assert outcome.primary.real_top1 is None
    assert "val/real_top1" not in outcome.metrics()
    assert outcome.report is not None
    assert outcome.report.confusions.classes == shards.classes


def test_an_evaluation_begins_where_the_one_before_ended(shards: ShardSet) -> None:
    """A supply serves all epochs; what is not asked for is not reported."""
    run = run_of(shards.address)
    model = linear(3)
    supply = supply_of(run, shards=shards, train=False)
    found = [validate({"raw": model}, supply, run=run, device=CPU) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert found[0].report is None
    assert next(iter(supply), None) is None
    supply.close()


def test_mirrored_evaluation_averages_the_logits_of_both(shards: ShardSet) -> None:
    run = run_of(shards.address, eval_mirror=True)
    seen: list[Tensor] = []

    class Edge(nn.Module):
        """Tell the left edge from the right one."""

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            left, right = images[..., 0].mean((1, 2)), images[..., -1].mean((1, 2))
            return torch.stack([left, right, *[torch.zeros_like(left)] * 3], dim=1)

    found = measured({"raw": Edge()}, shards, run=run)
    assert torch.equal(seen[0].flip(-1), seen[1])

    class Both(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (Edge()(images) + Edge()(images.flip(-1))) / 2

    assert found.primary == measured({"raw": Both()}, shards).primary


def test_very_many_classes_are_counted_without_pairs(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linear(1)
    whole = measured({"raw": model}, shards, described=held_out(shards)).report
    monkeypatch.setattr(sums, "MAX_CLASSES", NUM_CLASSES - 1)
    found = measured({"raw": model}, shards, described=held_out(shards)).report
    assert found is not None
    assert whole is not None
    assert found.confusions.pairs is None
    for name in ("num_images", "num_right"):
        ours, wanted = (getattr(one.confusions, name) for one in (found, whole))
        np.testing.assert_array_equal(ours, wanted)


def test_large_images_are_kept_small_and_few_images_are_all_kept(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "PICTURE_PIXELS", 4)
    run = dataclasses.replace(
        run_of(shards.address), validation=Validation(num_worst=200)
    )
    described = held_out(shards)
    outcome = measured({"raw": linear(1)}, shards, run=run, described=described)
    assert outcome.report is not None
    worst = outcome.report.worst
    assert sorted(worst.row_ids.tolist()) == GOOD
    assert (np.diff(worst.losses) <= 0).all()
    assert worst.pixels.shape == (len(GOOD), 4, 4, 3)
    none = dataclasses.replace(run, validation=Validation(num_worst=0))
    outcome = measured({"raw": linear(1)}, shards, run=none, described=described)
    assert outcome.report is not None
    assert len(outcome.report.worst) == 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_no_batch_waits_for_the_device(shards: ShardSet) -> None:
    device = torch.device("cuda")
    run = run_of(shards.address)
    images = torch.randn(8, 3, SIZE, SIZE, device=device)
    labels = torch.arange(8, device=device) % NUM_CLASSES

    def watched() -> Iterator[Batch]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(3):
                yield Batch(
                    images=images,
                    labels=labels,
                    weights=torch.ones_like(labels, dtype=torch.float32),
                    draw_ids=np.arange(8) + 8 * index,
                    epoch=0,
                    index=index,
                    micro=0,
                    global_rows=8,
                    ends_step=True,
                    ends_epoch=False,
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")

    models: dict[str, nn.Module] = {
        "average": linear(1).to(device),
        "raw": linear(2).to(device),
    }
    described = held_out(shards)
    found = validate(models, watched(), run=run, device=device, held_out=described)
    assert found.primary.num_images == 24


def test_two_workers_measure_what_one_does(shards: ShardSet, tmp_path: Path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["tests.small_runs"]
    )
    mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        measure_as_worker,
        args=(shards.address, str(tmp_path), 2),
        nprocs=2,
        start_method="forkserver",
    )
    models: dict[str, nn.Module] = {"average": linear(1), "raw": linear(2)}
    alone = measured(models, shards, described=held_out(shards))
    assert alone.report is not None
    for rank in range(2):
        found: EvaluationResult = torch.load(
            tmp_path / f"rank{rank}.pt", weights_only=False
        )
        for name, score in found.scores.items():
            wanted = alone.scores[name].values()
            assert score.values() == pytest.approx(wanted, rel=1e-6)
            for count in ("num_images", "num_bad", "num_real", "top1", "real_top1"):
                assert score.values()[count] == wanted[count]
        assert found.report is not None
        ours, one = found.report.confusions, alone.report.confusions
        np.testing.assert_array_equal(ours.matrix(), one.matrix())
        worst, of_one = found.report.worst, alone.report.worst
        np.testing.assert_array_equal(worst.row_ids, of_one.row_ids)
        np.testing.assert_array_equal(worst.pixels, of_one.pixels)
        np.testing.assert_allclose(worst.losses, of_one.losses, rtol=1e-5)


def test_the_average_comes_first_where_there_is_one() -> None:
    raw, average = linear(1), linear(2)
    assert models_of(raw, average=None, weights="both") == {"raw": raw}
    only = models_of(raw, average=average, weights="average")
    assert only == {"average": average}
    both = models_of(raw, average=average, weights="both")
    assert list(both.items()) == [("average", average), ("raw", raw)]


def test_an_image_that_is_not_counted_is_noticed() -> None:
    def outcome(num_images: int, num_bad: int) -> EvaluationResult:
        score = Score(
            loss=1.0, top1=0.0, top5=0.0, num_images=num_images, num_bad=num_bad
        )
        return EvaluationResult(scores={"raw": score})

    check_counted(outcome(36, 1), num_rows=37, max_bad_share=0.03)
    for num_images in (35, 37):
        with pytest.raises(ValueError, match="of the 37 held-out images counted once"):
            check_counted(outcome(num_images, 1), num_rows=37, max_bad_share=1)
    with pytest.raises(BadImagesError, match="got 1, each named"):
        check_counted(outcome(36, 1), num_rows=37, max_bad_share=0.02)
