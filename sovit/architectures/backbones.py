"""A second-order head on any timm backbone: `second_order("resnet50", pooling=...)`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VGG, ResNet, load_model_config_from_hf, parse_model_name
from torch import nn

from sovit.architectures.intermediates import TrunkIntermediates
from sovit.architectures.model_args import KeepsArgs
from sovit.architectures.resampling import fit_positions
from sovit.architectures.trunks import (
    built_size,
    check_conv_size,
    check_trunk,
    embed_by_convolutions,
    inspect_features,
    placed,
    strip,
    unstride_last_stage,
)
from sovit.head import SecondOrderHead
from sovit.pooling import Pooling, as_pooling
from sovit.shapes import Float, Number, Tensor

# In timm's registry: `sovit.networks.any_backbone`.
ARCHITECTURE = "sovit_second_order"
# What a backbone's configuration says about images; not where its weights are.
DATA_KEYS = (
    "input_size",
    "fixed_input_size",
    "crop_pct",
    "interpolation",
    "mean",
    "std",
)

# What `timm.create_model` loads weights by: a model that is made again has its own.
_OF_WEIGHTS = frozenset(
    {
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "checkpoint_path",
        "cache_dir",
    }
)


class SecondOrderNet(KeepsArgs, TrunkIntermediates):
    """Classifier with a second-order head on the features of a timm model.

    The trunk may give a map (B, C, H, W) or (B, H, W, C), whose positions are the
    tokens, or tokens (B, N, C). The head sees the class token where there is one and
    `fusion` asks for it; further prefix tokens are left out. `fusion` defaults to "sum"
    with a class token and to "visual" without. `hidden_dims` puts linear layers with
    ReLU and dropout before the classifier; else the dropout is on the pooled vector.

    The trunk is modified: layers that its features do not need are removed.
    `img_size` is that of its images where neither its patches nor its configuration say
    it. Raises ValueError for settings that do not fit.
    """

    backbone: Any
    """The trunk: a model of timm, whose methods no common class declares."""
    # What timm's builder leaves on every model it makes.
    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pooling: Pooling,
        num_classes: int = 1000,
        fusion: str | None = None,
        hidden_dims: tuple[int, ...] = (),
        drop_rate: Number = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        check_trunk(backbone)
        if hasattr(backbone, "reset_classifier"):
            self.backbone.reset_classifier(0)
        size = None if img_size is None else check_conv_size(img_size)
        self.features = inspect_features(backbone, img_size=size)
        # Else it is the usual size that was looked at, and others come as well.
        is_sized = size is not None or built_size(backbone) is not None
        strip(backbone, unused=self.features.unused, detached=self.features.detached)
        has_class = self.features.has_class_token
        fusion = fusion or ("sum" if has_class else "visual")
        if fusion != "visual" and (not has_class or hidden_dims):
            raise ValueError(
                f"fusion={fusion!r}: expected a class token and no hidden_dims, got "
                f"{type(backbone).__name__} and hidden_dims={hidden_dims}; set "
                "fusion='visual'"
            )
        self.num_features = self.embed_dim = self.features.embed_dim
        self.head = SecondOrderHead(
            self.embed_dim,
            num_classes=0 if hidden_dims else num_classes,
            pooling=pooling,
            fusion=fusion,
            drop_rate=0.0 if hidden_dims else drop_rate,
            num_prefix_tokens=self.features.num_prefix_tokens,
            num_tokens=self.features.num_tokens if is_sized else None,
        )
        self.hidden = nn.Sequential()
        for dim in hidden_dims:
            self.hidden.append(nn.Linear(self.head.visual_dim, dim))
            self.hidden.extend([nn.ReLU(), nn.Dropout(drop_rate)])
            self.head.visual_dim = self.head.num_features = dim
        self.hidden.to(next(backbone.parameters()))
        self.reset_classifier(num_classes)
        self.head_hidden_size = self.head.num_features
        self.pretrained_cfg = self.default_cfg = _adapted(self)
        self.register_load_state_dict_pre_hook(_fit_positions)
        # What a model declares timm's builder leaves as it is.
        self._traits: dict[str, Any] = {"first_conv": self.pretrained_cfg["first_conv"]}

    def no_weight_decay(self) -> set[str]:
        """Return names without weight decay besides vectors and biases."""
        own = getattr(self.backbone, "no_weight_decay", set)()
        starts = {n for n, _ in self.head.named_parameters() if n.endswith(".start")}
        return {f"backbone.{n}" for n in own} | {f"head.{n}" for n in starts}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable:
        """Return the trunk's patterns; head and hidden layers come after all of it."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        if isinstance(matcher, Mapping):
            return {key: _nested(patterns) for key, patterns in matcher.items()}

        def match(name: str) -> Any:
            trunk, dot, rest = name.partition(".")
            return matcher(rest) if dot and trunk == "backbone" else (float("inf"),)

        return match

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the trunk, where it can."""
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size of a trunk with positions; others take any."""
        size = check_conv_size(img_size)
        if hasattr(self.backbone, "set_input_size"):
            self.backbone.set_input_size(size)
            self._traits["img_size"] = size

    def layer_names(self) -> dict[str, Any]:
        """Return what timm's configurations call the first and the last layers."""
        convs = (n for n, m in self.named_modules() if isinstance(m, nn.Conv2d))
        return {
            "first_conv": next(convs, None),
            "classifier": tuple(f"head.{name}" for name in self.head.classifier_names),
        }

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the linear classifier, or the two whose logits are added."""
        return self.head.classifier

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Make new classifiers for `num_classes`; see the head's `reset`."""
        self.head.reset(num_classes, global_pool=global_pool)
        self.num_classes = num_classes
        self.head.to(next(self.backbone.parameters()))

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """Return the trunk's features as timm's model gives them."""
        return self.backbone.forward_features(x)

    def to_tokens(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b n d"]:
        """Return features as tokens: prefix tokens first, or positions row by row."""
        return x.flatten(1, -2) if self.features.channels_last else x.flatten(2).mT

    def forward_head(
        self, x: Float[Tensor, "b ..."], pre_logits: bool = False
    ) -> Float[Tensor, "b k"]:
        """Return logits of features; with `pre_logits` what the classifier sees."""
        tokens = self.to_tokens(x)
        if not self.hidden:
            return self.head(tokens, pre_logits=pre_logits)
        vector = self.hidden(self.head(tokens, pre_logits=True))
        return vector if pre_logits else self.head.classifiers()[0](vector)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return logits (B, num_classes) of images."""
        return self.forward_head(self.forward_features(x))


def _fit_positions(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Resize the positions of weights that were trained at another image size."""
    assert isinstance(model, SecondOrderNet)
    below = f"{prefix}backbone."
    trunk = {
        name.removeprefix(below): tensor
        for name, tensor in state_dict.items()
        if name.startswith(below)
    }
    for name, table in fit_positions(model.backbone, trunk).items():
        state_dict[below + name] = table


def _nested(patterns: Any) -> Any:
    """Prefix timm's patterns of parameter names with `backbone.`."""
    if isinstance(patterns, str):
        free = re.sub(r"(^|\|)\^", r"\1", patterns)
        return rf"^backbone\.(?:{free})"
    return [(_nested(pattern), suffix) for pattern, suffix in patterns]


def _adapted(model: SecondOrderNet) -> dict[str, Any]:
    """Return the trunk's configuration with this model's names and no weights."""
    config: dict[str, Any] = getattr(model.backbone, "pretrained_cfg", None) or {}
    return {
        **{key: config[key] for key in DATA_KEYS if key in config},
        "url": "",
        "num_classes": model.num_classes,
        **model.layer_names(),
    }


def second_order(
    backbone: nn.Module | str,
    *,
    pooling: Pooling | Mapping[str, Any] | str = "isqrt_cov",
    num_classes: int = 1000,
    fusion: str | None = None,
    hidden_dims: tuple[int, ...] = (),
    drop_rate: Number = 0.0,
    drop_last_stride: bool | None = None,
    token_embed: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained_backbone: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> SecondOrderNet:
    """Build a timm backbone, by name or given as a model, with a second-order head.

    Names are those that `timm.create_model` takes, hf-hub: and local-dir: too.

    `drop_last_stride` takes the stride out of the last stage; by default for ResNet and
    VGG, as the papers do. `token_embed` ("resnet" or "densenet") gives a transformer
    So-ViT's embedding. `pretrained_backbone` loads timm's weights; the network is built
    on `device` and then has `dtype`; `drop_path_rate` and the other `kwargs` go to
    `timm.create_model`. `pooling` is a `Pooling`, a mapping of its fields, or a
    method's name (`Pooling.named`). See `SecondOrderNet` for the rest. Raises
    ValueError for what does not fit.

    By name the model is `timm.create_model("sovit_second_order", backbone=...)`: timm's
    `save_for_hf` keeps it, and loads it again where sovit is imported.
    """
    name = None
    if isinstance(backbone, str):
        name = backbone
        backbone = _trunk(
            backbone,
            pretrained=pretrained_backbone,
            img_size=img_size,
            device=device,
            dtype=dtype,
            **kwargs,
        )
    elif kwargs or pretrained_backbone or device or dtype:
        given = {**kwargs, "device": device, "dtype": dtype}
        names = sorted(name for name, value in given.items() if value is not None)
        raise ValueError(
            "expected settings of the backbone with its name, got a model and "
            f"{names or 'pretrained_backbone=True'}; give the name, or build the model "
            "with them"
        )
    if drop_last_stride is None:
        drop_last_stride = isinstance(backbone, ResNet | VGG)
    if drop_last_stride:
        unstride_last_stage(backbone)
    if token_embed is not None:
        embed_by_convolutions(backbone, kind=token_embed)
    pooling = as_pooling(pooling, default=Pooling())
    model = SecondOrderNet(
        backbone,
        pooling=pooling,
        num_classes=num_classes,
        fusion=fusion,
        hidden_dims=hidden_dims,
        drop_rate=drop_rate,
        img_size=img_size,
    )
    if name is not None:
        model.pretrained_cfg["architecture"] = ARCHITECTURE
        model._model_args = {
            "backbone": name,
            "pooling": pooling,
            "fusion": model.head.fusion,
            "hidden_dims": hidden_dims,
            "drop_last_stride": drop_last_stride,
            "token_embed": token_embed,
            "img_size": img_size,
            **{key: kwargs[key] for key in kwargs.keys() - _OF_WEIGHTS},
        }
    return model


def _trunk(
    name: str,
    *,
    img_size: int | tuple[int, int] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    **kwargs: Any,
) -> nn.Module:
    """Create a backbone without classifier; positions fix the image size of some."""
    architecture, config = _described(name, cache_dir=kwargs.get("cache_dir"))
    if not timm.is_model(architecture):
        raise ValueError(
            "backbone: expected a model or a name that timm knows, got "
            f"{architecture!r}{'' if architecture == name else f' in {name!r}'}; see "
            "timm.list_models(), or give hf-hub:owner/name or local-dir:path"
        )
    try:
        usual = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:  # The name is known, its tag of weights isn't.
        raise ValueError(f"backbone {name!r}: {error}; leave the tag out") from error
    fixed = usual is not None and usual.fixed_input_size
    if img_size is not None and config.get("fixed_input_size", fixed):
        kwargs["img_size"] = img_size
    elif img_size is not None:
        check_conv_size(img_size)
    with placed(device):
        trunk = timm.create_model(name, num_classes=0, **kwargs)
    return trunk if dtype is None else trunk.to(dtype=dtype)


def _described(name: str, *, cache_dir: Any) -> tuple[str, Mapping[str, Any]]:
    """Return architecture and configuration of a name that `timm.create_model` takes.

    Those of a folder or a repository are in its config.json.
    """
    source, model_id = parse_model_name(name)
    try:
        if source == "hf-hub":
            config, architecture, _ = load_model_config_from_hf(
                model_id, cache_dir=cache_dir
            )
            return architecture, config or {}
        if source == "local-dir":
            found = json.loads((Path(model_id) / "config.json").read_text())
            return found["architecture"], found.get("pretrained_cfg", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a model that timm saved, with a config.json, got {name!r} "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())[:200]}); check "
            "the name"
        ) from error
    return name, {}
