"""What is said of files that do not fit, or that no authors released."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import sovit
from sovit.weights.official import MisfitError
from sovit.weights.releases import recognise
from tests.released_files import ECA, GSOP, RESNET, as_authors, net, pair


def test_what_differs_is_named_by_its_setting() -> None:
    def refused(model: nn.Module, file: nn.Module, rules: Mapping[str, str]) -> str:
        with pytest.raises(MisfitError) as caught:
            sovit.load_official(model, as_authors(file.state_dict(), rules))
        return str(caught.value)

    eca, other = net("eca_resnet18"), net("eca_resnet18", kernel_sizes=(3, 3, 5, 7))
    said = refused(eca, other, ECA)
    assert "The file has kernel_sizes (3, 3, 5, 7), the model (3, 5, 7, 7). " in said
    assert "layer2.0.eca.conv.weight (1, 1, 3), the model has (1, 1, 5)" in said
    with torch.device("meta"):
        deep = timm.create_model("eca_resnet101", num_classes=3)
        block, both = (
            timm.create_model("gsop_resnet50_1", backbone="resnet18", attention=name)
            for name in ("channel", "max")
        )
    assert "network 'ResNet-101', the model 'ResNet-18'" in refused(eca, deep, ECA)
    said = refused(net(pooling={"reduced_dim": 8}), pair()[0], RESNET)
    assert "pooling['reduced_dim'] 64, the model 8" in said
    said = refused(block, both, GSOP)
    assert "attention 'avg or max', the model 'channel'" in said


def test_a_file_that_is_no_release_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    cov, so_vit = pair()[0], timm.create_model("so_vit_7", depth=1, num_classes=3)
    eca = net("eca_resnet18")
    plain = timm.create_model("resnet18").state_dict()
    cases: list[tuple[nn.Module, Mapping[str, Tensor], str]] = [
        (cov, cov.state_dict(), "weights by this model's own names"),
        (so_vit, so_vit.state_dict(), "weights by this model's own names"),
        (eca, eca.state_dict(), "weights by this model's own names"),
        (so_vit, cov.state_dict(), "of another network of sovit's own"),
        (cov, so_vit.state_dict(), "of another network of sovit's own"),
        (cov, plain, r"the plain backbone, .* load them into model\.backbone with"),
        (eca, plain, "the plain backbone, .* load them into model with strict=False"),
        (so_vit, plain, "a plain ResNet, by timm's or torchvision's names"),
        (
            eca,
            as_authors(cov.state_dict(), RESNET),
            "expected a ResNet with a covariance head f",
        ),
        (
            sovit.second_order("resnet18", pooling="avg", layers=(1, 1, 1, 1)),
            as_authors(cov.state_dict(), RESNET),
            "expected a ResNet with a covariance head of the rel.* with AvgPool",
        ),
        (nn.Linear(2, 2), {"a": torch.ones(1)}, "expected a network of the papers"),
    ]
    for model, weights, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            sovit.load_official(model, weights)
        assert len(str(caught.value)) < 500
    with pytest.raises(
        ValueError, match=r"such as x, y are of no .*tried: .*GSoP"
    ) as caught:
        sovit.load_official(cov, {"x": torch.ones(1), "y": torch.ones(1)})
    assert "128 tensors are missing: bn1.bias; " in str(caught.value)
    for file, message in (
        ("checkpoint.json", "a checkpoint folder of sovit's own; start from it with"),
        ("config.json", "a folder that sovit-export or timm wrote; timm.create_model"),
        ("notes", "a folder; name the file of weights in it"),
    ):
        folder = tmp_path / file.partition(".")[0]
        folder.mkdir()
        (folder / file).write_text("{}")
        with pytest.raises(ValueError, match=message):
            sovit.load_official(cov, folder)
    for name in ("model.pt2", "model.onnx"):
        with pytest.raises(
            ValueError, match=r"an exported graph; take the model\.safe"
        ):
            sovit.load_official(cov, tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(
        ValueError, match="expected safetensors, got a file of something"
    ):
        sovit.load_official(cov, tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        sovit.load_official(cov, tmp_path / "none.safetensors")


def test_plain_networks_are_no_release() -> None:
    with torch.device("meta"):
        for name in ("mobilenet_v2", "resnet50", "vgg11_bn", "densenet121"):
            theirs = getattr(torchvision.models, name)()
            assert recognise(theirs.state_dict()) is None, name
