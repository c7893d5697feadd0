"""Start training from the weights of another: fine-tuning."""

from __future__ import annotations

import sys
from collections.abc import Callable

from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from pipelines.checkpoints.weight_sources import Start, read_start
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary
from pipelines.training.optimizer import classifiers
from sovit import SecondOrderNet, SoViT
from sovit.weights.official import MisfitError, checkpoint_filter_fn, convert
from sovit.weights.releases import plain_names, recognise, release_of

_MAX_NAMES = 5
_TRUNK = "backbone."
_ADVICE = "set --model.name, --model.pooling and --model.kwargs as it was trained"
# timm names position tables so: pos_embed, rel_pos_h, relative_position_bias_table.
_POSITIONS = "pos"
# What timm's filters raise for weights of another architecture.
_UNFILTERED = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_initial(
    model: nn.Module,
    address: str,
    *,
    classes: tuple[str, ...],
    triangle: str | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> bool:
    """Load weights that `read_start` finds into a fresh model, whatever classes it had.

    The classifier goes with them where it was trained for the same classes, in the same
    order; else the model keeps its own. A file that names no classes is taken to know
    ImageNet-1K's if it has 1,000. Position tables of another image size are fitted
    where the model can. Returns whether the classifier came with the weights.

    Args:
        triangle: Which triangle of the covariance the classifier of a file that authors
            released was trained on: see `sovit.load_official`.
        tell: Called with a line on what was loaded, and why the classifier or not.

    Raises ValueError naming tensors that are missing, unexpected or of another shape,
    and where there are no weights.
    """
    start, name = read_start(address), str(StoragePath(address))
    weights, report = _adapted(start.weights, model, name=name, triangle=triangle)
    own, classifier = model.state_dict(), _classifier_names(model)
    theirs = [weights[key] for key in classifier & set(weights)]
    num_rows = min((len(weight) for weight in theirs if weight.ndim), default=0)
    is_taken, why = _choose(start, num_rows=num_rows, classes=classes)
    fresh = set() if is_taken else classifier
    weights = {key: weight for key, weight in weights.items() if key not in fresh}
    _refuse("missing", set(own) - fresh - set(weights), name=name)
    _refuse("unexpected", set(weights) - set(own), name=name)
    wrong = {key for key, weight in weights.items() if weight.shape != own[key].shape}
    _refuse("of another shape", wrong, name=name)
    model.load_state_dict({**own, **weights})
    what = "the moving average" if start.is_average else "the weights"
    comes = "comes with them" if is_taken else "starts fresh"
    tell(f"starting from {what} of {name}; the classifier {comes}: {why}")
    if report:
        tell(f"{name} holds {report}")
    return is_taken


def _choose(
    start: Start, *, num_rows: int, classes: tuple[str, ...]
) -> tuple[bool, str]:
    """Decide whether a classifier of so many classes is taken; also return why."""
    if not num_rows:
        return False, "it has none"
    if start.classes is not None:
        if start.classes == classes:
            return True, "it was trained for the same classes"
        return False, "it was trained for other classes"
    imagenet = tuple(ImageNetInfo("imagenet-1k").label_names())
    if num_rows == len(imagenet) and classes == imagenet:
        return True, "it names no classes, and these are ImageNet-1K's in their order"
    return False, (
        f"it names none of its {num_rows:,} classes, and these are not the 1,000 of "
        "ImageNet-1K in the order of their WordNet ids"
    )


def _adapted(
    weights: dict[str, Tensor], model: nn.Module, *, name: str, triangle: str | None
) -> tuple[dict[str, Tensor], str]:
    """Rename weights as in the model, and fit position tables to its image size.

    Returns them, and of a file that authors released a description.
    """
    named = plain_names(weights)
    if recognise(named) and not weights.keys() <= model.state_dict().keys():
        return _of_authors(named, model, name=name, triangle=triangle)
    if triangle is not None:
        raise ValueError(
            "model.init_triangle: expected a file that authors released, got "
            f"{name!r}, whose classifier has the model's own order; leave "
            "--model.init-triangle"
        )
    try:
        return _fitted(weights, model), ""
    except ValueError as error:
        raise _misfit(error, name=name) from error


def _of_authors(
    weights: dict[str, Tensor], model: nn.Module, *, name: str, triangle: str | None
) -> tuple[dict[str, Tensor], str]:
    release = recognise(weights)
    if release is not None and release is not release_of(model):
        raise ValueError(
            f"model.init_from: expected a checkpoint of {type(model).__name__}, got "
            f"{name!r}, {release.title}; set --model.name to {release.example} or "
            "another of its kind"
        )
    try:
        found = convert(weights, model, triangle=triangle, classifier="any")
    except MisfitError as error:
        text = _text(error.kind, error.names, name=name, hint=error.hint)
        raise ValueError(text) from error
    except ValueError as error:
        raise _misfit(error, name=name) from error
    return found.weights, found.report


def _misfit(error: ValueError, *, name: str) -> ValueError:
    return ValueError(
        f"model.init_from: expected a checkpoint of this model, got {name!r}, which "
        f"does not fit it ({error_summary(error)}); {_ADVICE}"
    )


def _fitted(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, SoViT):
        return checkpoint_filter_fn(weights, model)
    if not isinstance(model, SecondOrderNet):
        return _filtered(weights, model, classifier=_classifier_names(model))
    trunk = {
        key.removeprefix(_TRUNK): weight
        for key, weight in weights.items()
        if key.startswith(_TRUNK)
    }
    fitted = _filtered(trunk, model.backbone, classifier=set())
    rest = {k: w for k, w in weights.items() if not k.startswith(_TRUNK)}
    return rest | {f"{_TRUNK}{key}": weight for key, weight in fitted.items()}


def _filtered(
    weights: dict[str, Tensor], model: nn.Module, *, classifier: set[str]
) -> dict[str, Tensor]:
    """Convert by what timm's module of the model has for it, where anything differs."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    own = model.state_dict()
    missing = own.keys() - weights.keys()
    differs = {n for n, w in weights.items() if n in own and w.shape != own[n].shape}
    if convert is None or not missing | differs:
        return weights
    try:
        converted = convert(dict(weights), model)
    except _UNFILTERED:
        return weights  # of another architecture: its tensors are named as they are
    if missing - classifier:
        return converted
    # All is named as in the model. Positions alone are taken then: timm would fit
    # patches of another size too.
    tables = {n for n in differs if _POSITIONS in n and n in converted}
    return weights | {name: converted[name] for name in tables}


def _classifier_names(model: nn.Module) -> set[str]:
    own = {id(tensor) for layer in classifiers(model) for tensor in _tensors(layer)}
    return {
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in own
    }


def _tensors(layer: nn.Module) -> list[Tensor]:
    return list(layer.state_dict(keep_vars=True).values())


def _refuse(kind: str, names: set[str], *, name: str) -> None:
    if names:
        raise ValueError(_text(kind, sorted(names), name=name))


def _text(kind: str, names: list[str], *, name: str, hint: str = "") -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return (
        f"model.init_from: expected a checkpoint of this model, got {name!r} with "
        f"tensors {kind}: {shown}{more}; {hint}{_ADVICE}"
    )
