"""A head on any timm model is a model of timm's registry, kept and made again by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry

import sovit
from sovit.architectures.backbones import ARCHITECTURE

SMALL = sovit.Pooling.named("isqrt_cov", reduced_dim=8)


def by_name(backbone: str, **settings: Any) -> Any:
    return timm.create_model(ARCHITECTURE, backbone=backbone, **settings)


def resized() -> Any:
    model = sovit.second_order("test_vit", pooling="svpn", num_classes=3, img_size=64)
    model.set_input_size(96)
    model.reset_classifier(5)
    return model


# What is kept, and the size of its images.
MODELS: dict[str, tuple[Any, int]] = {
    "a map": (
        lambda: sovit.second_order(
            "test_convnext", pooling={"type": "cov", "reduced_dim": 8}, num_classes=3
        ),
        64,
    ),
    "hidden layers": (
        lambda: by_name("test_resnet", pooling=SMALL, hidden_dims=(5,), num_classes=3),
        64,
    ),
    "tokens": (lambda: by_name("test_vit", pooling="svpn", img_size=48), 48),
    "another embedding": (
        lambda: sovit.second_order(
            "test_vit",
            token_embed="resnet",
            fusion="concat",
            img_size=64,
            num_classes=3,
            pooling=SMALL,
        ),
        64,
    ),
    "changed since": (resized, 96),
    "a paper's": (lambda: timm.create_model("isqrt_resnet18", pooling=SMALL), 64),
    "So-ViT": (
        lambda: timm.create_model(
            "so_vit_7",
            depth=1,
            img_size=32,
            pooling=sovit.Pooling(type="cross_cov", reduced_dim=(6, 4)),
        ),
        32,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_timm_keeps_it_and_loads_it_again(kind: str, tmp_path: Path) -> None:
    build, size = MODELS[kind]
    model = build().eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_other_classes_and_channels_are_fitted(tmp_path: Path) -> None:
    model = sovit.second_order("test_convnext", pooling=SMALL, num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path))
    again: Any = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, num_classes=7, in_chans=1
    )
    assert again.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    wanted, found = model.state_dict(), again.state_dict()
    first = again.pretrained_cfg["first_conv"]
    kernel = wanted.pop(f"{first}.weight").sum(1, keepdim=True)
    torch.testing.assert_close(found[f"{first}.weight"], kernel)
    for name, tensor in wanted.items():
        fresh = name.startswith("head.fc_visual")
        assert fresh or torch.equal(found[name], tensor), name


def test_timm_alone_names_what_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sovit.second_order("test_convnext", pooling=SMALL, num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path))
    monkeypatch.delitem(_registry._model_entrypoints, ARCHITECTURE)
    with pytest.raises(RuntimeError, match=r"Unknown model \(sovit_second_order\)"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("backbone", [None, "no_such", "hf-hub:a/b", torch.nn.ReLU()])
def test_a_backbone_is_a_name_that_timm_knows(backbone: Any) -> None:
    with pytest.raises(ValueError, match="expected backbone, a name that timm know"):
        timm.create_model(ARCHITECTURE, backbone=backbone)


def test_weights_that_are_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match="pretrained_backbone=True"):
        by_name("test_convnext", pretrained=True)
