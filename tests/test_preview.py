"""The preview shows what a training sees, in a file and in MLflow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines import tracking
from pipelines.config.recipes import load_recipe
from pipelines.preview import _main, preview
from tests.small_sets import write_set


def test_a_grid_is_written_and_kept(tmp_path: Path) -> None:
    address = write_set(tmp_path / "set", groups=[[9, 9]], num_classes=3)
    out, storage = tmp_path / "grid.png", tmp_path / "runs"
    _main(
        [
            "demo",
            *("--data.train", address, "--storage", str(storage)),
            *("--augment.auto-augment", "rand-m9-mstd0.5-inc1"),
            *("--augment.re-prob", "0.5"),
            *("--num-images", "3", "--num-epochs", "2", "--out", str(out)),
        ]
    )
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
    client = MlflowClient(tracking.default_uri(str(storage)))
    experiment = client.get_experiment_by_name("sovit")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == [
        "grid.png"
    ]


def test_where_a_run_decodes_makes_no_difference(tmp_path: Path) -> None:
    address = write_set(tmp_path / "set", groups=[[9]], num_classes=3)
    run = load_recipe("demo")
    pictures = []
    for decode_on in ("workers", "readers"):
        data = dataclasses.replace(run.data, train=address, decode_on=decode_on)
        path = tmp_path / f"{decode_on}.png"
        preview(
            dataclasses.replace(run, data=data), num_images=2, num_epochs=2, path=path
        )
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected a recipe"),
        (["demo", "--num-images", "0"], "--num-images"),
        (["demo", "--num-images", "99999"], "--num-images"),
        (["nothing"], "expected a recipe"),
    ],
)
def test_what_can_not_be_shown_is_said(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        _main([*arguments, *(["--storage", str(tmp_path)] if arguments else [])])
