"""Write a model as ONNX, and run it with onnxruntime.

Images go in as float32 (batch, 3, H, W) named `images`, logits (batch, classes) come
out as `logits`; the model's card is in the file's metadata.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pipelines.export.program import nodes_of

ONNX = "model.onnx"
INPUT, OUTPUT = "images", "logits"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf message ends at 2 GiB: weights beyond it go into a file of their own.
_MAX_BYTES = 1_900_000_000
# ONNX defines no operator for a decomposition. The normalisers of ours that need one:
_DECOMPOSITIONS = {
    "linalg_eigh": "eigenvalues ('eigen' and 'log', as in mpncov_*)",
    "linalg_svd": "singular values ('svd')",
}


def check_installed() -> None:
    """Raise ValueError if a package that ONNX needs is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"expected {', '.join(_PACKAGES)} for --formats onnx, got none of "
            f"{', '.join(missing)}; pip install 'sovit[export]', or leave onnx out: "
            "--formats timm torch"
        )


def write_onnx(path: Path, program: ExportedProgram, *, card: Mapping[str, Any]) -> int:
    """Write a program as ONNX; return the version of its operators (opset).

    Weights of more than 1.9 GB go into `model.onnx.data` beside it. Raises ValueError
    where ONNX lacks an operator.
    """
    _refuse_decompositions(program)
    images = torch.zeros(2, *program.example_inputs[0][0].shape[1:])  # pyright: ignore
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                (images,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # its own for each step, with pages of advice
        raise ValueError(
            "expected a model that torch.onnx can translate, got one where it says: "
            f"{_reason(error)}; leave onnx out: --formats timm torch"
        ) from error
    assert made is not None
    made.model.metadata_props.update(_texts(card))
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # torch's notes for its own developers
    num_bytes = sum(w.numel() * w.element_size() for w in program.state_dict.values())
    made.save(path, external_data=num_bytes > _MAX_BYTES)
    return made.model.opset_imports[""]


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Validate an ONNX file, and load it with onnxruntime on the CPU."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run


def _refuse_decompositions(program: ExportedProgram) -> None:
    names = {str(node.target) for node in nodes_of(program)}
    for part, what in _DECOMPOSITIONS.items():
        if any(part in name for name in names):
            raise ValueError(
                "model.pooling.normalizer: expected one that ONNX has operators for, "
                f"got one by {what}, and ONNX defines no such decomposition; leave "
                "onnx out: --formats timm torch"
            )


def _texts(card: Mapping[str, Any]) -> dict[str, str]:
    """Encode a card's values as JSON, except strings: ONNX stores only strings."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in card.items()
    }


def _reason(error: BaseException) -> str:
    """Return an error's line that names what is missing, or the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "No ONNX function found" in line]
    return (telling or lines or [type(error).__name__])[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and warnings of torch's ONNX exporter temporarily."""
    noisy = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
