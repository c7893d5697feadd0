"""The other papers' released files: names, wrappers, triangles, answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

import sovit
from pipelines.checkpoints.pretrained import load_initial
from sovit.weights.official import MisfitError, convert
from tests.released_files import (
    ECA,
    GSOP,
    RESNET,
    VGG,
    as_authors,
    as_pytorch_0_4,
    golden_images,
    golden_weights,
    in_lower_order,
    net,
    pair,
    same,
)
from tests.test_official import golden

GOLDEN = {
    "mpncovresnet50": {},
    "resnet18_mpncov": {},
    "gsop1_concat": {"attention": "concat"},
    "gsop2_channel": {},
    "eca_resnet18": {},
}
TEN = tuple("abcdefghij")


def logits_of(name: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a network and its authors' answer, in parts of the largest."""
    wanted = torch.tensor(golden(name)["first_10_logits"]).double()
    with torch.no_grad():
        came = model.eval()(golden_images(name)).double()
    return came / wanted.abs().max(), wanted / wanted.abs().max()


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_the_authors_networks(name: str, tmp_path: Path) -> None:
    """By `load_official` from a file, and once more by what a training starts from."""
    path, weights = tmp_path / "theirs.pth.tar", golden_weights(name)
    model = timm.create_model(golden(name)["ours"], num_classes=10, **GOLDEN[name])
    file = {
        "epoch": 3,
        "arch": "se_resnet50",
        "state_dict": {f"module.{n}": w for n, w in as_pytorch_0_4(weights).items()},
        "best_prec1": torch.tensor(70.0),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(file, path)
    sovit.load_official(model, path)
    came, wanted = logits_of(name, model)
    torch.testing.assert_close(came, wanted, rtol=0, atol=1e-5)

    loaded = {key: value.clone() for key, value in model.state_dict().items()}
    heads = [n for n in loaded if n.startswith(("fc.", "head.fc"))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    lines: list[str] = []
    assert not load_initial(model, str(path), classes=TEN, tell=lines.append)
    assert f"{path} holds {len(as_pytorch_0_4(weights))} tensors of " in lines[1]
    assert ("triangle (the default)" in lines[1]) == ("fc.weight" not in heads)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded[key]) != (key in heads), key
    # The classes have no names in the file, so that classifier is not taken.
    model.load_state_dict({**model.state_dict(), **{n: loaded[n] for n in heads}})
    again, _ = logits_of(name, model)
    assert torch.equal(again, came)


SMALL: dict[str, tuple[str, dict[str, Any], Mapping[str, str]]] = {
    "cov": ("isqrt_resnet18_64", {}, RESNET),
    "eca": ("eca_resnet18", {"kernel_sizes": (3, 3, 5, 7)}, ECA),
    "gsop2": ("gsop_resnet50_2", {"pooling": {"reduced_dim": 8}}, {**GSOP, **RESNET}),
    "channel": ("gsop_resnet50_1", {"attention": "channel"}, GSOP),
    "spatial": ("gsop_resnet50_1", {"attention": "spatial"}, GSOP),
    "avg": ("gsop_resnet50_1", {"attention": "avg"}, GSOP),
    "max": ("gsop_resnet50_1", {"attention": "max"}, GSOP),
}


@pytest.mark.parametrize("kind", SMALL)
def test_each_of_our_tensors_has_its_authors_name(kind: str) -> None:
    """Blocks are narrow and few here; the names don't depend on it."""
    name, settings, rules = SMALL[kind]
    if name.startswith("gsop"):
        settings = {"backbone": "resnet18", "reduced_dim": 16, **settings}
    source, model = net(name, **settings), net(name, seed=1, **settings)
    sovit.load_official(model, as_authors(source.state_dict(), rules), triangle=None)
    if kind == "gsop2":  # whose own order is the lower triangle
        assert not same(model, source)
        weights = as_authors(source.state_dict(), rules)
        weights["fc.weight"] = in_lower_order(weights["fc.weight"], side=8)
        sovit.load_official(model, weights)
    assert same(model, source)


DEEP = {
    "mpncov_resnet50": RESNET,
    **dict.fromkeys(("eca_resnet34", "eca_resnet50", "eca_resnet101"), ECA),
    "eca_resnet152": ECA,
    "gsop_resnet50_1": GSOP,
    "isqrt_vgg16": VGG,
}


@pytest.mark.parametrize("name", DEEP)
def test_the_published_networks_load_at_their_full_size(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    weights = as_authors(model.state_dict(), DEEP[name])
    found = convert(weights, model)
    assert {n: w.shape for n, w in found.weights.items()} == {
        n: w.shape for n, w in model.state_dict().items()
    }
    assert found.report.startswith(f"{len(weights)} tensors of a")
    eigen = "; the release has normalizer 'newton_schulz', the model 'eigen'; num_iter"
    assert (eigen in found.report) == name.startswith("mpncov")


def test_a_vgg_of_theirs_loads_into_hidden_layers_too() -> None:
    layers: Any = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
    theirs = torchvision.models.vgg.make_layers(layers, batch_norm=True).eval()
    model = sovit.second_order(
        "vgg11_bn", pooling={"type": "cov", "reduced_dim": 6, "normalizer": "none"},
        mlp_ratio=0.002, hidden_dims=(8, 8), num_classes=3,
    ).eval()  # fmt: skip
    own = as_authors(model.state_dict(), VGG)
    weights = {n: torch.rand_like(w.float()) for n, w in own.items()}
    for name, weight in theirs.state_dict().items():
        weights[f"features.module.{name}"] = weight
    sovit.load_official(model, as_pytorch_0_4(weights), triangle="lower")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # Their last pooling is left out.
        wanted = theirs[:-1](images)
        torch.testing.assert_close(model.forward_features(images), wanted)
    hidden = model.state_dict()["hidden.0.weight"]
    lower = weights["classifier.0.weight"]
    assert torch.equal(in_lower_order(hidden, side=6), lower)
    assert torch.equal(
        model.get_parameter("hidden.3.bias"), weights["classifier.3.bias"]
    )
    assert torch.equal(
        model.get_parameter("head.fc_visual.weight"), weights["classifier.6.weight"]
    )


MOBILE_HEADS = {
    "words": ("reduce_conv", "reduce_bn", "fc"),
    "numbers": ("features.19.0", "features.19.1", "classifier.1"),
    "resnet's": ("layer_reduce", "layer_reduce_bn", "classifier.1"),
}


@pytest.mark.parametrize("head", MOBILE_HEADS)
def test_a_mobilenet_is_matched_by_the_numbers_in_its_names(
    head: str, tmp_path: Path
) -> None:
    """Files of safetensors come in no order; torchvision's own network is the truth."""
    theirs = torchvision.models.mobilenet_v2(num_classes=3).eval()
    model = net("isqrt_mobilenetv2", pooling={"reduced_dim": 8})
    conv, norm, fc = MOBILE_HEADS[head]
    weights = {f"{norm}.{kind}": torch.rand(8) for kind in ("weight", "bias")}
    weights |= {f"{norm}.running_{kind}": torch.rand(8) for kind in ("mean", "var")}
    weights[f"{conv}.weight"] = torch.randn(8, 1280, 1, 1)
    weights |= {f"{fc}.weight": torch.randn(3, 36), f"{fc}.bias": torch.randn(3)}
    trunk = theirs.state_dict().items()
    weights |= {n: w.clone() for n, w in trunk if n.startswith("features.")}
    names = list(weights)
    random.Random(0).shuffle(names)
    save_file({n: weights[n] for n in names}, tmp_path / "theirs.safetensors")
    sovit.load_official(model, tmp_path / "theirs.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs.features(images)
        torch.testing.assert_close(model.forward_features(images), wanted)
    linear = model.get_parameter("head.pool.reduction.0.linear.weight")
    assert torch.equal(linear, weights[f"{conv}.weight"][:, :, 0, 0])
    assert torch.equal(
        model.get_parameter("head.fc_visual.weight"), weights[f"{fc}.weight"]
    )
    assert torch.equal(model.get_buffer("head.pool.reduction.0.norm.running_var"),
                       weights[f"{norm}.running_var"])  # fmt: skip


def eca_mobilenet(theirs: nn.Module) -> dict[str, Tensor]:
    """Put ECA's kernels into torchvision's MobileNetV2, at the end of each block."""
    weights = {k: v.clone() for k, v in theirs.state_dict().items()}
    for index in range(1, 18):
        block = f"features.{index}.conv."
        last = max(int(n.split(".")[3]) for n in weights if n.startswith(block))
        width = weights[f"{block}{last}.weight"].numel()
        kernel = torch.full((1, 1, 1 if width < 96 else 3), float(index))
        weights[f"{block}{last + 1}.conv.weight"] = kernel
    return weights


def test_an_eca_mobilenet_is_matched_too() -> None:
    theirs = torchvision.models.mobilenet_v2(num_classes=3)
    weights, model = eca_mobilenet(theirs), net("eca_mobilenetv2")
    sovit.load_official(model, weights)
    norms = [m for m in model.modules() if type(m).__name__ == "EcaModule"]
    kernels = [m.get_parameter("conv.weight") for m in norms]
    assert [k.flatten()[0].item() for k in kernels] == list(range(1, 18))
    assert torch.equal(
        model.get_parameter("classifier.bias"), weights["classifier.1.bias"]
    )
    own, other = model.state_dict(), theirs.state_dict()
    plain = [n for n in own if ".act." not in n and not n.startswith("classifier")]
    for name, torchvisions in zip(plain, other, strict=False):
        assert torch.equal(own[name], other[torchvisions]), name
    wider = {**weights, "features.19.0.weight": torch.zeros(4, 1280, 1, 1)}
    with pytest.raises(ValueError, match="with 121 layers before one classifier, got"):
        sovit.load_official(model, wider)


@pytest.mark.parametrize("triangle", ["upper", "lower"])
def test_the_triangle_is_what_is_asked_for(
    triangle: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A classifier on the lower triangle answers as one on the upper."""
    source, model = pair()
    weights = as_authors(source.state_dict(), RESNET)
    if triangle == "lower":
        weights["fc.weight"] = in_lower_order(weights["fc.weight"], side=64)
    with caplog.at_level("INFO", logger="sovit"):
        sovit.load_official(model, weights, triangle=triangle)
    assert same(model, source)
    assert caplog.messages[-1] == (
        "Loaded 128 tensors of a ResNet with iSQRT-COV (fast-MPN-COV, or the "
        f"optimisation study), {triangle} triangle"
    )
    for other in (net("eca_resnet18"), timm.create_model("so_vit_7", depth=1)):
        file = as_authors(other.state_dict(), ECA)
        if isinstance(other, sovit.SoViT):
            file = {"visual_tokens.x": torch.zeros(1)}
        with pytest.raises(
            ValueError, match="expected a classifier on the triangle of"
        ):
            sovit.load_official(other, file, triangle=triangle)
    with pytest.raises(ValueError, match=r"triangle: expected one of .* got 'left'"):
        sovit.load_official(model, weights, triangle="left")


def test_another_number_of_classes_keeps_the_models_classifier(tmp_path: Path) -> None:
    source, model = pair()
    model.reset_classifier(5)
    weights = as_authors(source.state_dict(), RESNET)
    with pytest.raises(MisfitError, match=r"fc.weight \(3, 2080\), the model has \(5"):
        sovit.load_official(model, weights)
    own = model.get_parameter("head.fc_visual.weight").clone()
    sovit.load_official(model, weights, skip_classifier=True, triangle="lower")
    assert torch.equal(model.get_parameter("head.fc_visual.weight"), own)
    assert same(model.get_submodule("head.pool"), source.get_submodule("head.pool"))
    assert same(model.get_submodule("backbone"), source.get_submodule("backbone"))
    model.reset_classifier(0)
    sovit.load_official(model, weights, skip_classifier=True)
    # timm's loader takes the file too, for other classes and for its own.
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": weights}, path)
    for num_classes in (3, 5):
        by_timm = timm.create_model(
            "isqrt_resnet18_64",
            pretrained=True,
            num_classes=num_classes,
            pretrained_cfg_overlay={"file": str(path), "num_classes": 3},
        )
        is_same = same(by_timm, source)
        assert is_same == (num_classes == 3)
        backbones = (m.get_submodule("backbone") for m in (by_timm, source))
        assert same(*backbones)


def test_a_training_starts_from_the_triangle_that_it_names(tmp_path: Path) -> None:
    """With ImageNet's classes, of which a file of a thousand is taken to know."""
    narrow: Any = {"num_classes": 1000, "pooling": {"reduced_dim": 8}}
    source, model = net(**narrow), net(seed=1, **narrow)
    weights = as_authors(source.state_dict(), RESNET)
    weights["fc.weight"] = in_lower_order(weights["fc.weight"], side=8)
    path, classes = str(tmp_path / "theirs.pth"), tuple(ImageNetInfo().label_names())
    torch.save(weights, path)
    lines = list[str]()
    assert load_initial(
        model, path, classes=classes, triangle="lower", tell=lines.append
    )
    assert same(model, source)
    assert lines[1] == (
        f"{path} holds 128 tensors of a ResNet with iSQRT-COV (fast-MPN-COV, or the "
        "optimisation study), lower triangle"
    )
    assert load_initial(model, path, classes=classes)
    assert not same(model, source)
    torch.save(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"model\.init_triangle: expected a file that"):
        load_initial(model, path, classes=classes, triangle="lower")
    torch.save(as_authors(net("eca_resnet18").state_dict(), ECA), path)
    with pytest.raises(
        ValueError, match=r"an ECA-ResNet; set --model\.name to eca_res"
    ):
        load_initial(model, path, classes=classes)
