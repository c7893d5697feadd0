"""Any timm model with a second-order head, by name: `sovit_second_order`.

`sovit.second_order("convnext_atto", ...)` and

    timm.create_model("sovit_second_order", backbone="convnext_atto", ...)

build the same network. Under this name timm saves it and loads it again, once sovit is
imported; where it is not, timm's "Unknown model (sovit_second_order)" says what lacks.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import build_model_with_cfg, load_pretrained, register_model

from sovit.architectures.backbones import (
    ARCHITECTURE,
    DATA_KEYS,
    SecondOrderNet,
    second_order,
)
from sovit.networks.build import check_weights, with_tuples


@register_model
def sovit_second_order(pretrained: bool = False, **kwargs: Any) -> SecondOrderNet:
    """Build a second-order head on the timm model named `backbone`.

    Arguments are those of `sovit.second_order`. Raises ValueError where `backbone` is
    no name that timm knows, and for `pretrained=True` without a file of weights.
    """
    backbone = kwargs.get("backbone")
    if not isinstance(backbone, str) or not timm.is_model(backbone):
        raise ValueError(
            f"{ARCHITECTURE}: expected backbone, a name that timm knows, got "
            f"{backbone!r}; see timm.list_models(), or give a model to "
            "sovit.second_order"
        )
    check_weights(kwargs, name=ARCHITECTURE, pretrained=pretrained)
    config = kwargs.get("pretrained_cfg") or _data_config(backbone)
    # The layers' names depend on backbone and settings: weights go in after them.
    model = build_model_with_cfg(
        second_order,  # pyright: ignore[reportArgumentType]
        ARCHITECTURE,
        False,
        **{**with_tuples(kwargs), "pretrained_cfg": config},
    )
    model.pretrained_cfg |= model.layer_names()
    if pretrained:
        load_pretrained(
            model,
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3),
            cache_dir=kwargs.get("cache_dir"),
        )
    return model


def _data_config(backbone: str) -> dict[str, Any]:
    """Return the entries on images of the backbone's configuration."""
    config = timm.get_pretrained_cfg(backbone)
    known = {} if config is None else config.to_dict()
    return {"url": "", **{key: known[key] for key in DATA_KEYS if key in known}}
