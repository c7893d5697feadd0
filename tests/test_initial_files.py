"""Starting from a file of weights: the authors', timm's, torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_model
from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

import sovit
from pipelines.checkpoints.pretrained import load_initial
from sovit.pooling import CrossCovPool
from sovit.weights.official import official_names
from tests.test_initial import CLASSES, build

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
}


def saved(model: nn.Module, path: Path) -> str:
    """Write a file of a model's weights, as others do."""
    if path.suffix == ".safetensors":
        save_model(model, str(path))
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def vit(*, seed: int, num_classes: int = 3, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings: Any = {"num_classes": num_classes, **VIT, **changes}
    return timm.create_model("test_vit", **settings)


@pytest.mark.parametrize("name", ["theirs.pth", "theirs.safetensors"])
@pytest.mark.parametrize("make", [build, vit])
def test_a_file_gives_all_but_the_classifier(
    name: str, make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Of as many classes, too: whether they are the same ones, the file doesn't say."""
    source, model, lines = make(seed=0).eval(), make(seed=2).eval(), []
    address = saved(source, tmp_path / name)
    assert not load_initial(model, address, classes=CLASSES, tell=lines.append)
    assert lines == [
        f"starting from the weights of {address}; the classifier starts fresh: it "
        "names none of its 3 classes, and these are not the 1,000 of ImageNet-1K in "
        "the order of their WordNet ids"
    ]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(features(model, images), features(source, images))
    assert not torch.equal(model(images), source(images))


def features(model: Any, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


def test_a_file_of_1000_classes_is_taken_to_know_imagenets(tmp_path: Path) -> None:
    imagenet = tuple(ImageNetInfo().label_names())
    source, lines = vit(seed=0, num_classes=1000).eval(), []
    address = saved(source, tmp_path / "theirs.pth")
    model = vit(seed=1, num_classes=1000).eval()
    assert not load_initial(model, address, classes=imagenet[::-1])
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), source(images))
    assert load_initial(model, address, classes=imagenet, tell=lines.append)
    assert torch.equal(model(images), source(images))
    assert lines == [
        f"starting from the weights of {address}; the classifier comes with them: it "
        "names no classes, and these are ImageNet-1K's in their order"
    ]


def test_the_authors_files_are_known_by_their_names(tmp_path: Path) -> None:
    source, model, lines = build(seed=0), build(seed=1, num_classes=2), []
    path = tmp_path / "So_ViT_7.pth.tar"
    weights, average = (official(source, f) for f in (1.0, 2.0))
    torch.save({"state_dict": weights, "state_dict_ema": average, "epoch": 309}, path)
    load_initial(model, str(path), classes=("a", "b"), tell=lines.append)
    assert lines[0].startswith(f"starting from the moving average of {path}; the class")
    for name, tensor in source.state_dict().items():
        wanted = 2 * tensor if tensor.ndim and name != "pos_embed" else tensor
        if not name.startswith("head.fc"):
            assert torch.equal(model.state_dict()[name], wanted), name
    del average["norm.bias"]
    torch.save({"model": average}, path)
    with pytest.raises(ValueError, match=r"missing: norm\.bias; set --model\.name"):
        load_initial(model, str(path), classes=("a", "b"))
    with pytest.raises(ValueError, match="So-ViT or SoT release; set --model"):
        load_initial(vit(seed=0), str(path), classes=CLASSES)


def official(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    """Give a model's weights, times a factor, the names of the authors' files."""
    assert isinstance(model, sovit.SoViT)
    pool = model.head.pool
    assert isinstance(pool, CrossCovPool)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = official_names(name, model=model)
        scaled = factor * tensor if tensor.ndim and name != "pos_embed" else tensor
        cut = tensor.ndim and len(parts) > 1
        tensors = (
            scaled.split(pool.pooling.reduced_dims) if cut else [scaled] * len(parts)
        )
        found |= dict(zip(parts, tensors, strict=True))
    return found


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (16, 16)])
def test_positions_of_timms_vits_are_fitted_too(
    size: tuple[int, int], tmp_path: Path
) -> None:
    source, model = vit(seed=0), vit(seed=1, img_size=size)
    address = saved(source, tmp_path / "theirs.pth")
    load_initial(model, address, classes=CLASSES)
    table = resample_abs_pos_embed(
        source.get_parameter("pos_embed").detach(),
        new_size=[side // 8 for side in size],
        num_prefix_tokens=1,
    )
    assert torch.equal(model.get_parameter("pos_embed"), table)
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


SWIN: dict[str, Any] = {
    "depths": (1, 1),
    "num_heads": (1, 1),
    "embed_dim": 8,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("trunk", "kwargs"),
    [("test_vit", VIT), ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 8})],
)
def test_positions_of_a_trunk_are_fitted(
    trunk: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    def second(size: int) -> nn.Module:
        settings: Any = {"pooling": {"reduced_dim": 4}, "num_classes": 3, **kwargs}
        return sovit.second_order(trunk, **settings | {"img_size": size})

    source, model = second(32), second(64)
    tables = [
        name
        for name, tensor in source.state_dict().items()
        if tensor.shape != model.state_dict()[name].shape
    ]
    assert tables
    load_initial(model, saved(source, tmp_path / "theirs.pth"), classes=CLASSES)
    for name, tensor in source.state_dict().items():
        if not name.startswith("head.fc") and name not in tables:
            assert torch.equal(model.state_dict()[name], tensor), name
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    # Of the trunk alone nothing is named as here.
    bare = timm.create_model(trunk, num_classes=3, **kwargs)
    with pytest.raises(ValueError, match=r"missing: .*set --model\.name"):
        load_initial(bare, saved(source, tmp_path / "theirs.pth"), classes=CLASSES)


def test_a_file_of_torchvisions_resnet_answers_as_there(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18().eval()
    address = saved(theirs, tmp_path / "resnet18.pth")
    model = timm.create_model("resnet18").eval()
    load_initial(model, address, classes=tuple(ImageNetInfo().label_names()))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs(images))


def test_weights_in_another_layout_are_converted_as_timm_does(tmp_path: Path) -> None:
    """Of OpenCLIP, say, whose trunk is timm's model and whose names have a prefix."""
    source, model = vit(seed=0).eval(), vit(seed=1, img_size=64).eval()
    weights = {f"visual.trunk.{n}": w for n, w in source.state_dict().items()}
    torch.save(weights, tmp_path / "clip.pth")
    load_initial(model, str(tmp_path / "clip.pth"), classes=CLASSES)
    for name, tensor in source.state_dict().items():
        if name != "pos_embed" and not name.startswith("head."):
            assert torch.equal(model.state_dict()[name], tensor), name


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    address = saved(vit(seed=0), tmp_path / "theirs.pth")
    wider = r"of another shape: .*pos_embed; set --model|of another shape: blocks"
    with pytest.raises(ValueError, match=wider):
        load_initial(vit(seed=1, embed_dim=64), address, classes=CLASSES)
    # timm would fit patches of another size.
    patches = r"of another shape: patch_embed\.proj\.weight; set"
    with pytest.raises(ValueError, match=patches):
        load_initial(vit(seed=1, patch_size=16), address, classes=CLASSES)
    with pytest.raises(ValueError, match=r"tensors missing: .* and \d+ more; set"):
        load_initial(timm.create_model("test_resnet"), address, classes=CLASSES)
    with pytest.raises(ValueError, match=r"tensors missing: blocks\.1"):
        load_initial(vit(seed=1, depth=2), address, classes=CLASSES)
    headless = saved(vit(seed=0, num_classes=0), tmp_path / "headless.pth")
    lines: list[str] = []
    assert not load_initial(vit(seed=1), headless, classes=CLASSES, tell=lines.append)
    assert lines[0].endswith("the classifier starts fresh: it has none")
