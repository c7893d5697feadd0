"""Start a training from the weights of another: fine-tuning."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pipelines.checkpoint import (
    EMA_FILE,
    MODEL_FILE,
    opened,
    read_manifest,
    read_weights,
)
from pipelines.files import Place
from pipelines.optim import classifiers

_MAX_NAMES = 5


def load_initial(model: nn.Module, address: str, *, classes: tuple[str, ...]) -> bool:
    """Load a checkpoint's weights into a fresh model, whatever classes it had.

    The moving average is taken where the checkpoint has one. Its classifier goes with
    it where it was trained for the same classes, in the same order; else the model
    keeps its own. Position tables of another image size are fitted where the model can.
    Returns whether the classifier came with it.

    Raises ValueError naming tensors that are missing, unexpected or of another shape,
    and where there is no whole checkpoint.
    """
    with opened(address) as folder:
        manifest = read_manifest(folder)
        file = EMA_FILE if EMA_FILE in manifest.files else MODEL_FILE
        weights = read_weights(Path(folder) / file)
    own, fresh = model.state_dict(), set[str]()
    if manifest.classes != classes:
        fresh = _classifier_names(model)
        weights = {name: w for name, w in weights.items() if name not in fresh}
    _refuse("missing", set(own) - fresh - set(weights), address=address)
    _refuse("unexpected", set(weights) - set(own), address=address)
    try:
        model.load_state_dict({**own, **weights})
    except RuntimeError as error:
        wrong = {name for name in weights if weights[name].shape != own[name].shape}
        raise ValueError(_text("of another shape", wrong, address=address)) from error
    return not fresh


def _classifier_names(model: nn.Module) -> set[str]:
    own = {id(tensor) for layer in classifiers(model) for tensor in _tensors(layer)}
    return {
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in own
    }


def _tensors(layer: nn.Module) -> list[Tensor]:
    return list(layer.state_dict(keep_vars=True).values())


def _refuse(kind: str, names: set[str], *, address: str) -> None:
    if names:
        raise ValueError(_text(kind, names, address=address))


def _text(kind: str, names: set[str], *, address: str) -> str:
    shown = ", ".join(sorted(names)[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    name = str(Place(address))
    return (
        f"model.init_from: wanted a checkpoint of this model, came {name!r} with "
        f"tensors {kind}: {shown}{more}; set --model.name, --model.pooling and "
        "--model.kwargs as it was trained"
    )
