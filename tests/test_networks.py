"""The papers' networks by name: built, trained, changed, exported and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from pipelines.config import Model
from pipelines.training.model import build_model
from sovit.attention import ATTENTIONS, Gsop
from sovit.networks import deit_swin, eca_gsop, gcp
from sovit.pooling import Pooling
from tests.bare import NETWORKS, printed
from tests.paper_networks import BIG, NAMES, ON_META, build, images, on_meta, usual

# One of each family is exported, and those that have most of ours compiled; the others
# are exported as shapes, apart from those that differ in a width only. Deeper ones have
# the same layers more often, and take seconds each.
FAMILIES = (
    *("isqrt_resnet18", "mpncov_resnet50", "gaussian_resnet50", "gsop_resnet50_2"),
    *("eca_resnet18", "eca_mobilenetv2", "deit_tiny_so", "swin_tiny_so"),
)
OTHERS = tuple(name for name in NAMES if not name.endswith(("_128", "_64", *FAMILIES)))
DEEPER = ("34", "101", "152", "_base_so")


def test_the_lists_are_whole() -> None:
    modules = (eca_gsop, gcp, deit_swin)
    registered = [name for module in modules for name in module.default_cfgs]
    assert sorted(registered) == sorted(NAMES)
    assert all(timm.is_model(name) for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BIG])
def test_every_network_learns_from_two_images(name: str) -> None:
    model = build(name)
    logits = model(images())
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ON_META)
def test_every_large_network_reaches_all_its_parameters(name: str) -> None:
    model = usual(name).train()
    with torch.device("meta"):
        logits = model(torch.zeros(2, 3, 224, 224))
        logits.sum().backward()
    assert logits.shape == (2, 1000)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_gsop_nets_have_their_blocks_where_the_paper_puts_them() -> None:
    places = {
        name: [n for n, m in usual(name).named_modules() if isinstance(m, Gsop)]
        for name in ("gsop_resnet50_1", "gsop_resnet50_2")
    }
    first = ["layer1.2.se", "layer2.3.se", "layer3.5.se", "layer4.2.se"]
    assert places["gsop_resnet50_1"] == first
    assert places["gsop_resnet50_2"] == [f"backbone.{n}" for n in first[:3]]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gsop_nets_take_every_kind_of_attention(attention: str) -> None:
    model = on_meta("gsop_resnet50_1", attention=attention, act=True)
    with torch.device("meta"):
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    block = model.get_submodule("layer4.2.se")
    assert isinstance(block, Gsop)
    assert block.attention == attention


def test_poolings_are_the_papers() -> None:
    def pooling(name: str) -> Pooling:
        return usual(name).head.pool.pooling

    assert pooling("mpncov_resnet50").normalizer == "eigen"
    assert pooling("isqrt_resnet50").num_iterations == 5
    assert pooling("gsop_resnet50_2").num_iterations == 3
    assert pooling("gaussian_resnet50").type == "gaussian"
    assert pooling("isqrt_mobilenetv2").act_layer == "relu6"
    assert pooling("swin_tiny_so").reduced_dim == 24


def test_positions_are_those_of_the_papers() -> None:
    def size(name: str, **kwargs: Any) -> tuple[int, ...]:
        model = on_meta(name, **kwargs) if kwargs else usual(name)
        with torch.device("meta"):
            return tuple(model.forward_features(torch.zeros(1, 3, 224, 224)).shape[-2:])

    assert size("isqrt_resnet50") == size("isqrt_vgg16") == (14, 14)
    assert size("gsop_resnet50_1") == size("gsop_resnet50_2") == (14, 14)
    assert size("isqrt_mobilenetv2") == size("eca_resnet50") == (7, 7)
    assert size("isqrt_resnet50", drop_last_stride=False) == (7, 7)


def test_settings_change_the_network() -> None:
    changes = {"reduced_dim": 16, "num_iterations": 3}
    model: Any = build("isqrt_resnet18", pooling=changes)
    assert model.head_hidden_size == 16 * 17 // 2
    assert model(images(size=96)).shape == (2, 3)
    named: Any = build("isqrt_resnet18_64", pooling="svpn")
    assert named.head_hidden_size == 48 * 24
    changes = {"progressive_dims": (128,), "num_groups": 2}
    progressive: Any = build("isqrt_resnet18_64", pooling=changes)
    assert progressive.head_hidden_size == 2 * (32 * 33 // 2)
    eca = on_meta("eca_resnet50", kernel_sizes=(3, 3, 3, 3))
    assert eca.layer4[0].se.conv.kernel_size == (3,)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="pretrained_backbone=True"):
        timm.create_model("isqrt_resnet50", pretrained=True)
    with pytest.raises(ValueError, match="at least 32"):
        timm.create_model("eca_resnet18", img_size=16)
    with pytest.raises(ValueError, match="got 'sum'"):
        on_meta("gsop_resnet50_1", attention="sum")
    with pytest.raises(ValueError, match=r"got \['pwer'\]"):
        on_meta("isqrt_resnet18", pooling={"pwer": 0.3})


def test_configurations_name_layers_that_are_there() -> None:
    for name in NAMES:
        model = usual(name)
        config = model.pretrained_cfg
        assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
        classifier = config["classifier"]
        for part in [classifier] if isinstance(classifier, str) else classifier:
            assert isinstance(model.get_submodule(part), nn.Linear)
        data = resolve_model_data_config(model)
        assert data["input_size"] == (3, 224, 224)
        assert data["crop_pct"] == 0.875


@pytest.mark.parametrize("name", ["isqrt_resnet18_64", "eca_resnet18"])
def test_weights_load_for_other_classes_and_channels(tmp_path: Path, name: str) -> None:
    source: Any = timm.create_model(name)
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    model: Any = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        num_classes=3,
        in_chans=1,
    )
    assert model.eval()(images()[:, :1]).shape == (2, 3)
    wanted, loaded = source.state_dict(), model.state_dict()
    first = model.pretrained_cfg["first_conv"]
    kernel = wanted.pop(f"{first}.weight").sum(1, keepdim=True)
    torch.testing.assert_close(loaded[f"{first}.weight"], kernel)
    for key, tensor in wanted.items():
        if tensor.shape[:1] != (1000,):
            torch.testing.assert_close(loaded[key], tensor, msg=key)


@pytest.mark.parametrize("name", ["isqrt_resnet18_64", "eca_resnet18", "deit_tiny_so"])
def test_the_pipeline_builds_them(name: str) -> None:
    settings = Model(name=name, img_size=96, drop_path_rate=0.1)
    model = build_model(settings, num_classes=4)
    assert model(images(size=96)).shape == (2, 4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.endswith(DEEPER) else name
        for name in OTHERS
    ],
)
def test_the_others_are_exported_too(name: str) -> None:
    model = usual(name).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, 224, 224, device="meta"),))
    assert set(program.state_dict) == set(model.state_dict())
    (logits,) = next(iter(reversed(program.graph.nodes))).args[0]
    assert logits.meta["val"].shape == (2, 1000)


@pytest.mark.slow
def test_every_family_compiles_and_exports() -> None:
    assert set(printed(NETWORKS).split()) == set(FAMILIES)
