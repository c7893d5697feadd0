"""Second-order networks built as timm builds its own: sizes, classes, places, names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import timm.models
import timm.models._hub
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

import sovit

SMALL = {"type": "cross_cov", "reduced_dim": (4, 3)}
WINDOWS: dict[str, Any] = {
    "depths": (1, 1),
    "embed_dim": 24,
    "num_heads": (2, 2),
    "window_size": 24,
}
VIT: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def loaded(name: str, *, file: Path, num_classes: int, **kwargs: Any) -> Any:
    """Build a network by timm's loader, from weights of five classes."""
    return timm.create_model(
        name,
        pretrained=True,
        num_classes=num_classes,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 5},
        **kwargs,
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("deit_tiny_distilled_patch16_224", VIT),
        ("beit_base_patch16_224", VIT),
        ("swin_tiny_patch4_window7_224", WINDOWS),
    ],
)
def test_positions_of_a_trunk_are_fitted_as_timm_fits_them(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = timm.create_model(name, img_size=64, num_classes=5, **settings)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    expected = loaded(
        name, file=tmp_path / "timm.pth", num_classes=0, img_size=96, **settings
    ).state_dict()
    net, other = (
        sovit.second_order(
            timm.create_model(name, img_size=size, num_classes=0, **settings),
            pooling=SMALL,
            num_classes=5,
        )
        for size in (64, 96)
    )
    weights = source.state_dict()
    net.load_state_dict(
        {f"backbone.{key}": weights[key] for key in net.backbone.state_dict()},
        strict=False,
    )
    other.load_state_dict(net.state_dict())
    fitted = other.backbone.state_dict()
    grown = [key for key in fitted if fitted[key].shape != weights[key].shape]
    assert grown
    for key, tensor in fitted.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0, msg=key)


def test_a_table_that_timm_has_no_filter_for_is_fitted_too() -> None:
    settings: dict[str, Any] = {
        "depth": 1,
        "depth_token_only": 1,
        "embed_dim": 24,
        "num_heads": 2,
    }
    small, large = (
        sovit.second_order(
            timm.create_model("cait_xxs24_224", img_size=size, **settings),
            pooling=SMALL,
            num_classes=5,
        )
        for size in (64, 96)
    )
    large.load_state_dict(small.state_dict())
    expected = resample_abs_pos_embed(
        small.backbone.pos_embed, new_size=[6, 6], num_prefix_tokens=0
    )
    torch.testing.assert_close(large.backbone.pos_embed, expected)


def test_weights_of_another_network_are_refused_as_ever() -> None:
    def build(**kwargs: Any) -> nn.Module:
        trunk = timm.create_model("vit_tiny_patch16_224", img_size=64, **VIT | kwargs)
        return sovit.second_order(trunk, pooling=SMALL, num_classes=5)

    with pytest.raises(RuntimeError, match=r"size mismatch for backbone\.pos_embed"):
        build().load_state_dict(build(embed_dim=32).state_dict())


def test_deit_so_loads_at_another_size_with_other_classes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    source: Any = timm.create_model(
        "deit_tiny_so", num_classes=5, img_size=64, **settings
    )
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = loaded(
        "deit_tiny_so",
        file=tmp_path / "weights.pth",
        num_classes=3,
        img_size=96,
        **settings,
    )
    expected = resample_abs_pos_embed(source.backbone.pos_embed, new_size=[6, 6])
    torch.testing.assert_close(model.backbone.pos_embed, expected)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 3)


@pytest.mark.parametrize("fusion", ["concat", "class", "visual", "sum"])
def test_other_classes_after_each_fusion(fusion: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"fusion": fusion, "img_size": 64, "depth": 1}
    for name in ("deit_tiny_so", "so_vit_7"):
        source = timm.create_model(name, num_classes=5, **settings)
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        model = loaded(
            name, file=tmp_path / "weights.pth", num_classes=3, **settings
        ).state_dict()
        for key, tensor in source.state_dict().items():
            if not key.startswith("head.fc"):
                torch.testing.assert_close(model[key], tensor, msg=key)
        classifiers = [key for key in model if key.startswith("head.fc")]
        assert classifiers
        assert {len(model[key]) for key in classifiers} == {3}


NETWORKS: dict[str, dict[str, Any]] = {
    "so_vit_7": {"pooling": {"start": "ones"}},
    "swin_tiny_so": {"depths": (1, 2), "embed_dim": 24, "num_heads": (2, 2)},
    "eca_resnet18": {},
    "gsop_resnet50_2": {"backbone": "resnet10t"},
    "isqrt_resnet18_64": {},
}


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_built_without_numbers_take_those_of_others(name: str) -> None:
    settings = {"num_classes": 5, "img_size": 64, **NETWORKS[name]}
    model = timm.create_model(name, **settings).eval()
    with torch.device("meta"):
        empty = timm.create_model(name, **settings).eval()
    same = timm.create_model(name, device="meta", **settings)
    assert all(tensor.is_meta for tensor in (*tensors(empty), *tensors(same)))
    empty.to_empty(device="cpu")
    for tensor in tensors(empty):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
    empty.load_state_dict(model.state_dict())
    for module in empty.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            cast(Any, module).init_non_persistent_buffers()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(empty(images), model(images), rtol=0, atol=0)


def test_networks_are_built_in_the_dtype_that_timm_is_asked_for() -> None:
    for name in ("so_vit_7", "eca_resnet18"):
        model = timm.create_model(name, dtype=torch.bfloat16, img_size=64)
        floats = [t for t in tensors(model) if t.is_floating_point()]
        assert {tensor.dtype for tensor in floats} == {torch.bfloat16}
    model = sovit.second_order(
        "test_vit", pooling=SMALL, dtype=torch.float64, device="cpu"
    )
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"got a model and \['dtype'\]"):
        sovit.second_order(timm.create_model("test_vit"), dtype=torch.float64)


def saved(folder: Path, name: str, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    timm.models.save_for_hf(
        model, str(folder), model_config={}, model_args=kwargs, safe_serialization=True
    )
    return model


def test_backbones_come_from_folders_and_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path, "test_vit", num_classes=7)

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "owner/name"
        if not (tmp_path / filename).is_file():
            raise OSError(f"no {filename}")
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    for name in (f"local-dir:{tmp_path}", "hf-hub:owner/name", "hf_hub:owner/name"):
        net = sovit.second_order(
            name, pooling=SMALL, num_classes=3, pretrained_backbone=True
        )
        trunk = net.backbone.state_dict()
        for key, tensor in model.state_dict().items():
            if not key.startswith("head."):
                torch.testing.assert_close(trunk[key], tensor, msg=key)
        other = sovit.second_order(name, pooling=SMALL, img_size=96)
        assert other(torch.randn(2, 3, 96, 96)).shape == (2, 1000)


def test_names_that_are_none_are_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet19"}))
    for name, message in (
        (f"local-dir:{tmp_path}", "got 'resnet19' in 'local-dir:"),
        (f"local-dir:{tmp_path}/none", "timm saved, .*FileNotFoundError"),
        ("owner/name", "Use 'hf-hub:owner/name'"),
        ("s3:bucket", "Unknown model source"),
        ("resnet18.none", "leave the tag out"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            sovit.second_order(name, pooling=SMALL)
        assert "\n" not in str(raised.value)
