"""What an evaluation found, as tables and pictures, on a driver without torch."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.figures import binned, pictured, write_report
from pipelines.evaluation.report import Confusions, Report, Worst

FILES = {"confusion.png", "per_class.csv", "worst.csv", "worst.png"}


def confusions(num_classes: int, *, seed: int = 0) -> tuple[Confusions, np.ndarray]:
    """Make counts of many right and some wrong; give the matrix too."""
    rng = np.random.default_rng(seed)
    matrix = rng.binomial(3, 2 / num_classes, (num_classes, num_classes))
    np.fill_diagonal(matrix, 30)
    matrix[1] = 0  # a class without images
    right = matrix.diagonal().copy()
    wrong = matrix - np.diag(right)
    labels, predictions = np.nonzero(wrong)
    pairs = np.stack([labels, predictions, wrong[labels, predictions]], axis=1)
    found = Confusions(
        classes=tuple(f"class, {at} of $x_{at}" for at in range(num_classes)),
        num_images=matrix.sum(axis=1),
        num_right=right,
        pairs=pairs[np.argsort(-pairs[:, 2], kind="stable")],
    )
    return found, matrix


def worst(num: int, *, num_classes: int) -> Worst:
    rng = np.random.default_rng(1)
    return Worst(
        losses=np.sort(rng.random(num) * 9)[::-1],
        labels=rng.integers(0, num_classes, num),
        predictions=rng.integers(0, num_classes, num),
        probabilities=rng.random(num),
        row_ids=np.arange(num) * 7,
        pixels=rng.integers(0, 256, (num, 16, 16, 3), dtype=np.uint8),
        keys={0: "folder/n1, the first.jpg"},
    )


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def num_colors(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))


@pytest.mark.parametrize("num_classes", [3, 130])
def test_a_report_is_tables_and_pictures(tmp_path: Path, num_classes: int) -> None:
    found, matrix = confusions(num_classes)
    report = Report(confusions=found, worst=worst(5, num_classes=num_classes))
    np.testing.assert_array_equal(found.matrix(), matrix)
    assert found.top1 == pytest.approx(100 * np.trace(matrix) / matrix.sum())
    # A class without images has no recall, and is no part of the mean.
    recalls = [row[at] / row.sum() for at, row in enumerate(matrix) if row.sum()]
    assert len(recalls) == num_classes - 1
    assert found.balanced_top1 == pytest.approx(100 * np.mean(recalls))
    # As it travels to the driver.
    picture = pickle.loads(pickle.dumps(pictured({"val": report}, title="a run_$x")))
    picture.draw(tmp_path / picture.path)
    folder = tmp_path / "validation" / "val"
    assert {path.name for path in folder.iterdir()} == FILES
    assert num_colors(folder / "confusion.png") > 10
    # The noise of the images themselves is there.
    assert num_colors(folder / "worst.png") > 1000
    lines = table(folder / "per_class.csv")
    assert lines[0] == ["class", "images", "right", "top1", "taken_for"]
    assert len(lines) == num_classes + 1
    for at, (name, images, right, top1, taken_for) in enumerate(lines[1:]):
        assert name == found.classes[at]
        assert (int(images), int(right)) == (matrix[at].sum(), matrix[at, at])
        assert top1 == (f"{100 * int(right) / int(images):.2f}" if at != 1 else "")
        wrong = np.delete(matrix[at], at)
        counts = [
            int(item.rpartition(": ")[2]) for item in taken_for.split("; ") if item
        ]
        assert counts == sorted(wrong[wrong > 0].tolist(), reverse=True)[:3]
    lines = table(folder / "worst.csv")
    assert len(lines) == 6
    assert lines[1][:2] == ["folder/n1, the first.jpg", "0"]
    assert lines[2][:2] == ["row 7", "7"]


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    found, _ = confusions(4)
    found = Confusions(
        classes=found.classes,
        num_images=found.num_images,
        num_right=found.num_right,
        pairs=None,
    )
    report = Report(confusions=found, worst=worst(0, num_classes=4))
    write_report(report, tmp_path, title="")
    assert [path.name for path in tmp_path.iterdir()] == ["per_class.csv"]
    assert table(tmp_path / "per_class.csv")[1][4] == ""


def test_cells_add_up_neighbours_and_lose_none() -> None:
    matrix = np.arange(203 * 203).reshape(203, 203)
    cells, width = binned(matrix)
    assert (cells.shape, width) == ((68, 68), 3)
    assert cells[1, 2] == matrix[3:6, 6:9].sum()
    assert cells[-1, -1] == matrix[201:, 201:].sum()
    assert cells.sum() == matrix.sum()
    same, width = binned(matrix[:70, :70])
    assert width == 1
    np.testing.assert_array_equal(same, matrix[:70, :70])
