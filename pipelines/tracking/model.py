"""A checkpoint as an MLflow model: encoded images in, labels and scores out.

MLflow runs this file itself where the model is loaded (no pickle), next to copies of
`sovit` and `pipelines` and a checkpoint without optimiser state.

As JSON, an image is its base64 text: `mlflow models predict -i FILE -t json` and a
served model's `/invocations` take
`{"dataframe_split": {"columns": ["image"], "data": [["<base64>"], ...]}}`
or `{"dataframe_records": [{"image": "<base64>"}, ...]}`.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from mlflow.models import Model, ModelSignature, set_model
from mlflow.pyfunc import save_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

import pipelines
import sovit
from pipelines.checkpoints.manifest import load_model
from pipelines.checkpoints.snapshot import save_checkpoint
from pipelines.config import serialization
from pipelines.config.own_code import OwnCode
from pipelines.config.recipes import load_code
from pipelines.hardware.device import find_device
from pipelines.storage.redaction import without_credentials
from pipelines.transforms.decoder import decode_eval
from pipelines.transforms.headers import BadImageError
from pipelines.transforms.pillow_decode import is_whole

NUM_TOP = 5
_BATCH_SIZE = 32
_CHECKPOINT, _CODE = "checkpoint", "code"
_PACKAGES = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "timm", "torch")


class ImageClassifier(PythonModel):
    """MLflow `PythonModel` that classifies encoded images with a checkpoint's model.

    Input: a table with the column `image`, bytes of a JPEG, PNG or other format that
    training reads. Output, a row each: `label`, `score` (its probability), and
    `top_labels` and `top_scores`, the five most probable, or all of fewer classes.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Build the model, on a GPU if there is one."""
        if _CODE in context.artifacts:
            text = Path(context.artifacts[_CODE]).read_text()
            load_code(OwnCode(**json.loads(text)))
        folder = Path(context.artifacts[_CHECKPOINT])
        model, self._manifest = load_model(folder)
        self._device = find_device("auto")
        self._model = model.to(self._device)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Classify a table's images in batches of 32."""
        images = list(model_input["image"])
        rows = []
        for start in range(0, len(images), _BATCH_SIZE):
            rows += self._classify(images[start : start + _BATCH_SIZE], start=start)
        return pd.DataFrame(
            rows, columns=["label", "score", "top_labels", "top_scores"]
        )

    @torch.inference_mode()
    def _classify(self, encoded: list[bytes], *, start: int) -> list[dict[str, Any]]:
        run, classes = self._manifest.run, self._manifest.classes
        try:
            pixels = decode_eval(encoded, data=run.data, img_size=run.model.img_size)
        except BadImageError as error:
            bad = next(at for at, item in enumerate(encoded) if not is_whole(item))
            raise ValueError(
                f"expected images that decode, got in row {start + bad} one that does "
                f"not ({error}); leave it out"
            ) from error
        logits = self._model(pixels.to(self._device)).float()
        top = logits.softmax(dim=-1).topk(min(NUM_TOP, len(classes)))
        rows = []
        for scores, places in zip(
            top.values.tolist(), top.indices.tolist(), strict=True
        ):
            labels = [classes[place] for place in places]
            row = {"label": labels[0], "score": scores[0]}
            rows.append({**row, "top_labels": labels, "top_scores": scores})
        return rows


def write_model(
    folder: Path,
    *,
    checkpoint: Path,
    example: bytes,
    mlflow_model: Model | None = None,
    code: OwnCode | None = None,
) -> None:
    """Write a checkpoint's model (its average, if kept) as an MLflow model folder.

    Raises ValueError where the checkpoint is damaged.
    """
    with TemporaryDirectory() as scratch:
        reduced = Path(scratch) / _CHECKPOINT
        reduced.mkdir()
        _reduce(checkpoint, reduced)
        artifacts = {_CHECKPOINT: str(reduced)}
        if code is not None:  # an MLflow model brings all that it needs
            file = Path(scratch) / f"{_CODE}.json"
            file.write_text(without_credentials(json.dumps(dataclasses.asdict(code))))
            artifacts[_CODE] = str(file)
        save_model(
            folder,
            python_model=__file__,
            artifacts=artifacts,
            code_paths=[_package_folder(sovit), _package_folder(pipelines)],
            signature=signature(),
            input_example=pd.DataFrame({"image": [example]}),
            pip_requirements=requirements(),
            mlflow_model=mlflow_model,
        )


def signature() -> ModelSignature:
    """Return the signature: the columns of input and output."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "label"),
                ColSpec(DataType.double, "score"),
                ColSpec(Array(DataType.string), "top_labels"),
                ColSpec(Array(DataType.double), "top_scores"),
            ]
        ),
    )


def requirements() -> list[str]:
    """Pin the model's requirements, without a build's local version (`+cu130`)."""
    return [
        f"{package}=={metadata.version(package).partition('+')[0]}"
        for package in _PACKAGES
    ]


def _reduce(checkpoint: Path, folder: Path) -> None:
    """Rewrite a checkpoint with only the evaluated weights, and no password."""
    model, manifest = load_model(checkpoint)
    clean = without_credentials(serialization.to_json(manifest.run))
    save_checkpoint(
        folder,
        run=serialization.from_json(clean),
        position=manifest.position,
        classes=manifest.classes,
        metrics=manifest.metrics,
        model=model,
        ema=None,
        optimizer=None,
    )


def _package_folder(module: Any) -> str:
    return str(Path(module.__file__).parent)


set_model(ImageClassifier())
