"""Build the network that a run's settings describe, and count what it costs."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import sovit
from pipelines.config import Model, Optim
from pipelines.storage.redaction import error_summary
from pipelines.training.optimizer import freeze
from sovit import SecondOrderNet
from sovit.architectures.backbones import ARCHITECTURE

# What timm's builder, and ours of networks, take to load weights.
PRETRAINED = ("pretrained", "pretrained_backbone", "checkpoint_path")
# What constructors raise for arguments that they do not know or can't use.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
Shape = Sequence[int]
# Of BatchNorm one image makes no batch.
_NUM_TRAINED = 2


def is_ours(name: str) -> bool:
    """Check whether a name in timm's registry is a network of `sovit`."""
    module = timm.model_entrypoint(name).__module__
    return module.partition(".")[0] == sovit.__name__


def takes_pooling(name: str) -> bool:
    """Check whether a network takes a pooling: ours, and others with the argument."""
    entry = timm.model_entrypoint(name)
    return is_ours(name) or "pooling" in inspect.signature(entry).parameters


def architecture_of(settings: Model) -> tuple[str, dict[str, Any]]:
    """Return timm's name of a network, and its arguments.

    Our networks take `pooling` and `img_size` themselves. Any other model of timm with
    a pooling is the backbone of a `sovit.second_order`; without one it is timm's own,
    and takes its size from `kwargs`: convolutional ones have no such argument.
    """
    name, arguments = settings.name, dict[str, Any](settings.kwargs)
    if settings.pooling is not None:
        arguments["pooling"] = dataclasses.asdict(settings.pooling)
        if not takes_pooling(name):
            name, arguments["backbone"] = ARCHITECTURE, name
            if "pretrained" in arguments:  # timm's weights are the backbone's
                arguments["pretrained_backbone"] = arguments.pop("pretrained")
    if is_ours(name):
        arguments["img_size"] = settings.img_size
    return name, arguments


def title_of(settings: Model) -> str:
    """Return the name of a network for people, with the head put on it."""
    if settings.pooling is None or takes_pooling(settings.name):
        return settings.name
    return f"{settings.name} with a second-order head ({settings.pooling.type})"


def build_model(
    settings: Model,
    *,
    num_classes: int,
    tell: Callable[[str], object] = lambda line: None,
) -> nn.Module:
    """Build the network that the settings describe, with fresh weights.

    Args:
        tell: Called with a warning on tokens too few for the pooling. By default it is
            dropped: the check of a run shows it once, not each of its workers.

    Raises ValueError for a name unknown to timm, and for arguments that don't fit.
    """
    backbone = settings.kwargs.get("backbone", settings.name)
    for field, wanted in (("name", settings.name), ("kwargs.backbone", backbone)):
        # Weights and code that are elsewhere are not for a name to choose.
        if not isinstance(wanted, str) or not timm.is_model(wanted):
            raise ValueError(
                f"model.{field}: expected a model that timm knows, got {wanted!r}; see "
                "timm.list_models(), or name the recipe file that registers it "
                "(sovit-eval, sovit-predict, sovit-export: --code FILE)"
            )
    name, arguments = architecture_of(settings)
    if settings.drop_path_rate:
        arguments["drop_path_rate"] = settings.drop_path_rate
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", sovit.FewTokensWarning)
            model = timm.create_model(name, num_classes=num_classes, **arguments)
    except (*_MISFITS, RuntimeError) as error:
        is_misfit = isinstance(error, _MISFITS)
        if not is_misfit and any(arguments.get(key) for key in PRETRAINED):
            raise  # of the weights: a store that is away, a file that is damaged
        raise _unfit(settings, error=error) from error
    for one in found:
        if issubclass(one.category, sovit.FewTokensWarning):
            tell(f"{settings.name}: {one.message}")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return model


def without_weights(settings: Model) -> Model:
    """Remove from a model's settings whatever loads weights."""
    kwargs = {k: v for k, v in settings.kwargs.items() if k not in PRETRAINED}
    return dataclasses.replace(
        settings, kwargs=kwargs, init_from="", init_triangle="auto"
    )


def _unfit(settings: Model, *, error: Exception) -> ValueError:
    """Build the one-line error on arguments that a network doesn't take."""
    name, why = settings.name, error_summary(error)
    if settings.pooling is not None and "'pooling'" in str(error):
        return ValueError(
            f"model.pooling: expected none for {name}, whose network has no place for "
            f"it, got {settings.pooling.type!r}; leave it out, or put a second-order "
            f"head on the network: name {ARCHITECTURE!r}, kwargs {{'backbone': "
            f"{name!r}}}"
        )
    given = dict(settings.kwargs)
    if settings.drop_path_rate:
        given["drop_path_rate"] = settings.drop_path_rate
    known = _known_arguments(settings)
    takes = f"it takes {', '.join(known)}" if known else "see its code in timm"
    return ValueError(
        f"model.kwargs: expected arguments that {name} is made with, got {given} "
        f"({why}); {takes}"
    )


def _known_arguments(settings: Model) -> list[str]:
    """List the arguments of a network, if it can be built without any."""
    kept = {k: v for k, v in settings.kwargs.items() if k == "backbone"}
    plain = dataclasses.replace(settings, kwargs=kept, drop_path_rate=0.0)
    name, arguments = architecture_of(without_weights(plain))
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, **arguments)
    except (*_MISFITS, RuntimeError, ValueError):
        return []
    makers: list[Callable[..., Any]] = [type(model)]
    if isinstance(model, SecondOrderNet):
        makers = [sovit.second_order, type(model.backbone)]
    found = (
        p for maker in makers for p in inspect.signature(maker).parameters.values()
    )
    named = dict.fromkeys(p.name for p in found if p.kind is not p.VAR_KEYWORD)
    return [name for name in named if name not in ("backbone", "num_classes", "kwargs")]


def checkpoint_gradients(model: nn.Module, *, name: str) -> None:
    """Make a model recompute activations in its backward pass.

    Raises ValueError where timm doesn't support it.
    """
    try:
        model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    except (AttributeError, AssertionError) as error:  # timm asserts where it can't
        raise ValueError(
            "scale.grad_checkpointing: expected a model that timm can checkpoint, got "
            f"{name}; set --scale.no-grad-checkpointing"
        ) from error


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this worker's shards of tensors, or whole tensors as they are."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Check whether any of the tensors is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts of a model."""

    num: int
    num_trained: int
    groups: Mapping[str, int]
    """By the model's first level: modules, and parameters in none. A trunk under our
    head by its own first level."""
    num_bytes: int
    """Of all parameters."""
    num_trained_bytes: int
    num_buffer_bytes: int


def shapes_of(
    settings: Model,
    *,
    num_classes: int,
    grad_checkpointing: bool = False,
    optim: Optim | None = None,
) -> nn.Module:
    """Build a model on the meta device; no weights are loaded.

    Args:
        optim: Says what is frozen; by default nothing is.

    Raises ValueError where it can't be built, or can't checkpoint its activations.
    """
    with torch.device("meta"):
        model = build_model(without_weights(settings), num_classes=num_classes)
    if grad_checkpointing:
        checkpoint_gradients(model, name=settings.name)
    if optim is not None:
        freeze(model, optim=optim)
    return model


def count_parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters, shared ones once."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = _group(name)
        groups[group] = groups.get(group, 0) + parameter.numel()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Parameters(
        num=sum(groups.values()),
        num_trained=sum(p.numel() for p in trained),
        groups=groups,
        num_bytes=sum(p.nbytes for p in model.parameters()),
        num_trained_bytes=sum(p.nbytes for p in trained),
        num_buffer_bytes=sum(b.nbytes for b in model.buffers()),
    )


def _group(name: str) -> str:
    first, *rest = name.split(".")
    # Ours hold another model's trunk as a whole.
    return f"{first}.{rest[0]}" if first == "backbone" and rest else first


def count_macs(model: nn.Module, *, img_size: int) -> int:
    """Count the multiply-adds of one image through a meta model in evaluation.

    Counted are products of matrices and vectors, and convolutions, as the code runs
    them. Eigenvalues and element-wise operations are not.
    """
    model.eval()
    with _counting() as counter, torch.no_grad():
        model(_images(1, img_size=img_size))
    return counter.get_total_flops() // 2


def count_training_macs(model: nn.Module, *, img_size: int) -> int:
    """Count the multiply-adds of one image in training: forward and backward.

    Recomputation of checkpointed activations counts again.
    """
    model.train()
    with _counting() as counter:
        model(_images(_NUM_TRAINED, img_size=img_size)).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() // 2 // _NUM_TRAINED


def _images(num_images: int, *, img_size: int) -> torch.Tensor:
    return torch.zeros(num_images, 3, img_size, img_size, device="meta")


def _counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))


def _mv(matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _dot(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left)


def _batches(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _added(formula: Callable[..., int]) -> Callable[..., int]:
    """Return the formula of a product for the same product plus an addend."""

    def count(added: Shape, *args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return count


def _convolution_backward(
    grad: Shape,
    images: Shape,
    weight: Shape,
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    wanted: Sequence[bool],
    **kwargs: Any,
) -> int:
    """Count a forward pass each for the gradients of images and weights.

    The counter's own formula treats each group as a product of all channels.
    """
    forward = conv_flop_count(list(images), list(weight), list(grad), transposed)
    return forward * sum(wanted[:2])


# What PyTorch's counter has no formula for, or a wrong one.
_FORMULAS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.aten.mv: _mv,
        torch.ops.aten.addmv: _added(_mv),
        torch.ops.aten.dot: _dot,
        torch.ops.aten.vdot: _dot,
        torch.ops.aten.addbmm: _added(_batches),
        torch.ops.aten.convolution_backward: _convolution_backward,
    }
)
