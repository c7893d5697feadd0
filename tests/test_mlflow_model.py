"""A checkpoint becomes an MLflow model that answers in and out of this process."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import get_model_info
from PIL import Image

from pipelines import tracking
from pipelines.checkpoints.manifest import load_model, read_manifest
from pipelines.checkpoints.snapshot import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    save_checkpoint,
)
from pipelines.config import Data, Model, Optim, Run
from pipelines.data.batch import Position
from pipelines.tracking.model import NUM_TOP, requirements, write_model
from pipelines.training.model import build_model
from pipelines.transforms.decoder import decode_eval

CLASSES = tuple("abcdefg")
# The model's own copy of the code must do: nothing of this checkout may be found.
HIDE_CHECKOUT = (
    "import sys; sys.meta_path[:] = "
    "[f for f in sys.meta_path if 'editable' not in repr(f)]\n"
)


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((210, 150)).save(file, "JPEG")
    return file.getvalue()


IMAGES = [_jpeg(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint whose average differs from its weights."""
    settings = Model(name="so_vit_7", img_size=64, kwargs={"depth": 1})
    torch.manual_seed(0)
    model = build_model(settings, num_classes=len(CLASSES))
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(
        folder,
        run=Run(
            recipe="test",
            model=settings,
            data=Data(train="s3://key:secret@bucket/t", val="v", batch_size=8),
            optim=Optim(lr=1e-3, num_epochs=5),
        ),
        position=Position(epoch=1, step=9),
        classes=CLASSES,
        metrics={"top1": 50.0},
        model=model,
        ema=build_model(settings, num_classes=len(CLASSES)),
        optimizer=torch.optim.AdamW(model.parameters()),
    )
    return folder


@pytest.fixture(scope="module")
def model_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow") / "model"
    write_model(folder, checkpoint=checkpoint, example=IMAGES[0])
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """Compute the average's probabilities without MLflow, shape (3, 7)."""
    model, manifest = load_model(checkpoint, ema=True)
    pixels = decode_eval(IMAGES, data=manifest.run.data, img_size=64)
    with torch.inference_mode():
        return model(pixels).softmax(dim=-1)


def _check(rows: list[dict], expected: torch.Tensor) -> None:
    assert len(rows) == len(expected)
    for row, probabilities in zip(rows, expected, strict=True):
        top = probabilities.topk(NUM_TOP)
        assert row["top_labels"] == [CLASSES[place] for place in top.indices]
        assert row["top_scores"] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert row["label"] == row["top_labels"][0]
        assert row["score"] == row["top_scores"][0]


def test_it_answers_as_the_checkpoints_average(
    model_folder: Path, expected: torch.Tensor
) -> None:
    model = mlflow.pyfunc.load_model(str(model_folder))
    _check(model.predict(pd.DataFrame({"image": IMAGES})).to_dict("records"), expected)
    many = model.predict(pd.DataFrame({"image": IMAGES * 12}))
    _check(many.to_dict("records"), expected.repeat(12, 1))
    none = pd.DataFrame({"image": pd.Series([], dtype=object)})
    assert len(model.predict(none)) == 0
    bad = [*(IMAGES * 12)[:33], b"GIF89a", *IMAGES]
    with pytest.raises(ValueError, match=r"in row 33 one that does not \(format GIF"):
        model.predict(pd.DataFrame({"image": bad}))


def test_its_columns_are_in_its_signature(model_folder: Path) -> None:
    info = get_model_info(str(model_folder))
    assert info.signature is not None
    assert info.signature.inputs.input_names() == ["image"]
    names = ["label", "score", "top_labels", "top_scores"]
    assert info.signature.outputs.input_names() == names
    model = mlflow.pyfunc.load_model(str(model_folder))
    example = model.input_example
    assert isinstance(example, pd.DataFrame)
    assert list(example["image"]) == IMAGES[:1]
    with pytest.raises(mlflow.MlflowException, match="image"):
        model.predict(pd.DataFrame({"picture": IMAGES}))


def test_it_holds_the_average_alone_and_no_secret(
    model_folder: Path, checkpoint: Path
) -> None:
    (reduced,) = (model_folder / "artifacts").iterdir()
    manifest, original = read_manifest(reduced), read_manifest(checkpoint)
    assert set(original.files) == {MODEL_FILE, EMA_FILE, OPTIMIZER_FILE}
    assert set(manifest.files) == {MODEL_FILE}
    assert manifest.position == original.position
    average = load_model(checkpoint, ema=True)[0].state_dict()
    for name, value in load_model(reduced)[0].state_dict().items():
        assert torch.equal(value, average[name])
    assert manifest.run.data.train == "s3://bucket/t"
    text = (model_folder / "requirements.txt").read_text()
    assert text.splitlines() == requirements()
    assert "torch==" in text
    assert "://" not in text
    assert "+" not in text


def test_the_command_line_answers_from_the_models_own_code(
    model_folder: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    texts = [[base64.b64encode(image).decode()] for image in IMAGES]
    asked = tmp_path / "asked.json"
    asked.write_text(
        json.dumps({"dataframe_split": {"columns": ["image"], "data": texts}})
    )
    answered = tmp_path / "answered.json"
    command = ["mlflow", "models", "predict", "-m", str(model_folder)]
    command += ["-i", str(asked), "-o", str(answered), "-t", "json"]
    command += ["--env-manager", "local"]
    code = (
        f"{HIDE_CHECKOUT}from mlflow.cli import cli\nsys.argv = {command!r}\n"
        "cli(standalone_mode=False)\n"
        "import pipelines, sovit\nprint(pipelines.__file__, sovit.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.split()[-2:]
    assert all(path.startswith(str(model_folder / "code")) for path in used)
    _check(json.loads(answered.read_text())["predictions"], expected)


@pytest.fixture
def run_of_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = tracking.open_run(
        uri, experiment="models", name="a", params={"pooling.power": 0.5}, tags={}
    )
    # Not mlflow.set_tracking_uri: that one stays in the environment for good.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri, run_id


def test_a_run_keeps_its_model(
    run_of_store: tuple[str, str], checkpoint: Path, expected: torch.Tensor
) -> None:
    uri, run_id = run_of_store
    address = tracking.log_model(uri, run_id, checkpoint=checkpoint, example=IMAGES[0])
    table = pd.DataFrame({"image": IMAGES})
    for name in (address, f"runs:/{run_id}/model"):
        rows = mlflow.pyfunc.load_model(name).predict(table).to_dict("records")
        _check(rows, expected)
    client = MlflowClient(uri)
    logged = client.get_logged_model(address.removeprefix("models:/"))
    assert logged.status == "READY"
    assert logged.source_run_id == run_id
    assert logged.params == {"pooling.power": "0.5"}
    with pytest.raises(ValueError, match="checkpoint"):
        tracking.log_model(
            uri, run_id, checkpoint=checkpoint / "none", example=IMAGES[0]
        )
    assert len(client.search_logged_models([logged.experiment_id])) == 1
