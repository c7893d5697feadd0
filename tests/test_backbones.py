"""A second-order head on any timm backbone, used as timm's models are."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import group_parameters
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor, nn

import sovit
from sovit.architectures.tokens import ConvEmbed
from sovit.architectures.trunks import unstride_last_stage
from sovit.pooling import Pooling

SMALL = {"type": "cross_cov", "reduced_dim": (4, 3)}
# Maps, channels last, tokens with and without class token, one and several prefixes,
# heads that keep layers of their own (VGG, ConvNeXt, EfficientNet's, attention pools).
FAMILIES = {
    "resnet18": (512, 0, False),
    "vgg11": (512, 0, False),
    "mobilenetv3_small_050": (288, 0, False),
    "convnext_atto": (320, 0, False),
    "swin_tiny_patch4_window7_224": (768, 0, False),
    "mixer_s32_224": (512, 0, False),
    "deit_tiny_patch16_224": (192, 1, True),
    "deit_tiny_distilled_patch16_224": (192, 2, True),
    "vit_small_patch14_reg4_dinov2": (384, 5, True),
    "vit_base_patch16_siglip_224": (768, 0, False),
    "cait_xxs24_224": (192, 1, True),
    "so_vit_7": (256, 1, True),
}


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(name: str = "resnet18", **kwargs: Any) -> sovit.SecondOrderNet:
    settings = {"pooling": SMALL, "num_classes": 5, **kwargs}
    return sovit.second_order(name, **settings)


def small_vit(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    settings = {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2, **kwargs}
    return timm.create_model(name, **settings)


def small_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, depths=(1,) * 4, embed_dim=24
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_no_parameter_lies_idle(name: str) -> None:
    embed_dim, num_prefix_tokens, has_class = FAMILIES[name]
    with torch.device("meta"):
        model = build(name)
        height, width = model.backbone.pretrained_cfg["input_size"][1:]
        logits = model(torch.zeros(2, 3, height, width))
        logits.sum().backward()
    assert logits.shape == (2, 5)
    features = model.features
    assert features.embed_dim == model.num_features == embed_dim
    assert features.num_prefix_tokens == num_prefix_tokens
    assert features.has_class_token == has_class
    assert model.head.fusion == ("sum" if has_class else "visual")
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    groups = group_parameters(model, model.group_matcher())
    layer = {name: index for index, names in groups.items() for name in names}
    assert layer["head.fc_visual.weight"] == max(groups)
    assert layer[f"{model.pretrained_cfg['first_conv']}.weight"] == 0


@pytest.mark.parametrize("layout", ["map", "channels_last", "tokens"])
def test_the_head_pools_every_position(layout: str) -> None:
    backbone = {
        "map": lambda: timm.create_model("resnet18"),
        "channels_last": small_swin,
        "tokens": small_vit,
    }[layout]()
    model = sovit.second_order(
        backbone, pooling={"type": "avg"}, fusion="visual", num_classes=5
    ).eval()
    features = model.forward_features(images())
    means = {
        "map": lambda: features.mean((2, 3)),
        "channels_last": lambda: features.mean((1, 2)),
        "tokens": lambda: features[:, 1:].mean(1),
    }[layout]()
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), means)
    wanted = means @ model.head.get_parameter("fc_visual.weight").T
    torch.testing.assert_close(model(images()), wanted)


def test_positions_become_tokens_row_by_row() -> None:
    model, swin = build(), sovit.second_order(small_swin(), pooling=SMALL)
    features = torch.arange(2 * 512 * 6.0).view(2, 512, 2, 3)
    tokens = model.to_tokens(features)
    torch.testing.assert_close(tokens[:, 5], features[:, :, 1, 2])
    same = swin.to_tokens(features.permute(0, 2, 3, 1).contiguous())
    torch.testing.assert_close(same, tokens)


def test_the_class_token_is_seen_and_other_prefixes_are_not() -> None:
    vit = small_vit("deit_tiny_distilled_patch16_224")
    model = sovit.second_order(
        vit, pooling={"type": "avg"}, fusion="concat", num_classes=5
    ).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 2 + 16, 24)
    wanted = torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], dim=1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), wanted)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "resnet18d", "resnetblur18", "vgg11"]
)
def test_the_last_stage_loses_its_stride_and_nothing_else(name: str) -> None:
    with torch.device("meta"):
        plain = timm.create_model(name)
        model = timm.create_model(name)
        unstride_last_stage(model)
        image = torch.zeros(1, 3, 224, 224)
        features = [m.forward_features(image) for m in (plain, model)]  # pyright: ignore[reportCallIssue]
    assert [f.shape[-2:] for f in features] == [(7, 7), (14, 14)]
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.dilation for conv in convs} == {(1, 1)}
    info: Any = model.feature_info
    assert info[-1]["reduction"] == 16


def test_without_stride_the_old_positions_keep_their_shortcut() -> None:
    plain, model = (timm.create_model("resnet18").eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    unstride_last_stage(model)
    x = torch.randn(1, 256, 6, 6)
    old, new = (m.get_submodule("layer4.0.downsample")(x) for m in (plain, model))
    torch.testing.assert_close(new[:, :, ::2, ::2], old)
    with pytest.raises(ValueError, match="got MobileNetV3"):
        build("mobilenetv3_small_050", drop_last_stride=True)


def test_the_stride_can_stay() -> None:
    kept, dropped = build(drop_last_stride=False), build()
    assert kept.forward_features(images()).shape[-2:] == (2, 2)
    assert dropped.forward_features(images()).shape[-2:] == (4, 4)
    assert build("convnext_atto").forward_features(images()).shape[-2:] == (2, 2)


def test_classifiers_are_made_anew() -> None:
    model = build(hidden_dims=(6, 7)).eval()
    assert model.head_hidden_size == 7
    assert model.forward_head(model.forward_features(images()), True).shape == (2, 7)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    classifier = model.get_classifier()
    assert isinstance(classifier, nn.Linear)
    assert classifier.in_features == 7
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert model(images()).shape == (2, 7)
    vit = sovit.second_order(small_vit(), pooling=SMALL)
    assert isinstance(vit.get_classifier(), tuple)
    with pytest.raises(ValueError, match="got 'avg'"):
        model.reset_classifier(3, "avg")


def test_hidden_layers_have_relu_and_dropout() -> None:
    model = build(hidden_dims=(6,), drop_rate=0.5)
    assert [type(layer) for layer in model.hidden] == [nn.Linear, nn.ReLU, nn.Dropout]
    assert model.head.drop.p == 0
    assert build(drop_rate=0.5).head.drop.p == 0.5


def test_weight_decay_spares_what_backbone_and_head_name() -> None:
    model = sovit.second_order(small_vit(), pooling=SMALL)
    names = model.no_weight_decay()
    assert names & {name for name, _ in model.named_parameters()} == {
        "backbone.pos_embed",
        "backbone.cls_token",
        "head.pool.normalize.start",
    }
    kept, _ = param_groups_weight_decay(model, no_weight_decay_list=tuple(names))
    assert any(p is model.backbone.pos_embed for p in kept["params"])


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    backbone = small_vit() if name == "vit" else timm.create_model(name)
    model = sovit.second_order(backbone, pooling=SMALL, num_classes=5).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for one in (model, twin):
        one(images()).square().sum().backward()
    for (name, plain), other in zip(
        model.named_parameters(), twin.parameters(), strict=True
    ):
        torch.testing.assert_close(plain.grad, other.grad, msg=name)


def test_image_sizes_are_the_backbone_s() -> None:
    model = build("vit_tiny_patch16_224", img_size=(64, 32), depth=1)
    assert model(torch.zeros(2, 3, 64, 32)).shape == (2, 5)
    model.set_input_size(64)
    assert model(images()).shape == (2, 5)
    with torch.device("meta"):
        windows = build("maxvit_rmlp_pico_rw_256", img_size=64)
        assert windows(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    convolutional = build(img_size=96)
    convolutional.set_input_size((64, 48))
    assert convolutional(torch.zeros(2, 3, 64, 48)).shape == (2, 5)
    with pytest.raises(ValueError, match="at least 32"):
        build(img_size=16)


@pytest.mark.parametrize(
    ("name", "settings", "num_tokens"),
    [
        ("resnet18", {}, 16),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 4),
        ("vit_tiny_patch16_224", {"depth": 1}, 16),
    ],
)
def test_few_tokens_are_warned_of_where_the_size_is_known(
    name: str, settings: dict[str, Any], num_tokens: int
) -> None:
    with pytest.warns(
        sovit.FewTokensWarning, match=f"of {num_tokens} tokens .* is 17:"
    ) as found:
        model = build(name, img_size=64, pooling={"reduced_dim": 17}, **settings)
    assert len(found) == 1
    assert model.features.num_tokens == num_tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
        build(name, img_size=64, pooling={"reduced_dim": 4}, **settings)
        # 49 positions at the usual size, but it may be made for any.
        build("mobilenetv3_small_050", pooling={"reduced_dim": 64})


@pytest.mark.parametrize(
    ("name", "kind", "stride", "settings"),
    [
        ("vit_tiny_patch16_224", "densenet", 16, {"depth": 1}),
        ("vit_tiny_patch16_224", "resnet", 8, {"depth": 1, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", "densenet", 4, {"depths": (1, 1, 1, 1)}),
        ("swin_tiny_patch4_window7_224", "resnet", 4, {"depths": (1, 1, 1, 1)}),
    ],
)
def test_transformers_take_the_convolutional_embedding(
    name: str, kind: str, stride: int, settings: dict[str, Any]
) -> None:
    model = build(name, token_embed=kind, img_size=64, **settings)
    patches = model.get_submodule("backbone.patch_embed.proj")
    assert isinstance(patches, ConvEmbed)
    assert patches(images()).shape[-2:] == (64 // stride, 64 // stride)
    model(images()).sum().backward()
    assert all(p.grad is not None for p in patches.parameters())
    assert model.pretrained_cfg["first_conv"] == "backbone.patch_embed.proj.stem"


def test_weights_of_the_backbone_are_timm_s(tmp_path: Path) -> None:
    source = timm.create_model("resnet18", num_classes=1000)
    file = tmp_path / "backbone.pth"
    torch.save(source.state_dict(), file)
    model = build(
        pretrained_backbone=True, pretrained_cfg_overlay={"file": str(file), "url": ""}
    )
    loaded = model.backbone.state_dict()
    wanted = source.state_dict()
    assert set(wanted) - set(loaded) == {"fc.weight", "fc.bias"}
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def test_data_settings_are_the_backbone_s() -> None:
    model = build("vit_tiny_patch16_224", depth=1)
    config = resolve_model_data_config(model)
    assert config["mean"] == (0.5, 0.5, 0.5)
    assert config["input_size"] == (3, 224, 224)
    assert model.pretrained_cfg["classifier"] == ("head.fc_class", "head.fc_visual")
    assert "hf_hub_id" not in model.pretrained_cfg


def test_the_head_follows_the_backbone_s_dtype_and_mode() -> None:
    backbone = timm.create_model("resnet18").to(torch.bfloat16)
    model = sovit.second_order(backbone, pooling="isqrt_cov", num_classes=5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16
    whole = build(pooling=Pooling.named("isqrt_cov", reduced_dim=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole(images()).float().square().mean().backward()
    assert all(p.grad is not None for p in whole.parameters())
    assert all(
        p.grad.isfinite().all() for p in whole.parameters() if p.grad is not None
    )


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'resnet19'"):
        build("resnet19")
    with pytest.raises(ValueError, match="set fusion='visual'"):
        build(fusion="sum")
    with pytest.raises(ValueError, match="no hidden_dims"):
        build("vit_tiny_patch16_224", depth=1, hidden_dims=(4,))
    with pytest.raises(ValueError, match=r"got a model and \['drop_path_rate'\]"):
        sovit.second_order(small_vit(), drop_path_rate=0.1)
    with pytest.raises(ValueError, match="token_embed: expected a backbone with patch"):
        build(token_embed="densenet")
    with pytest.raises(ValueError, match="got 'inception'"):
        build("vit_tiny_patch16_224", depth=1, token_embed="inception")
    with pytest.raises(ValueError, match="with patches of 32"):
        build("vit_small_patch32_224", depth=1, token_embed="resnet")
    with torch.device("meta"), pytest.raises(ValueError, match="CoaT gives"):
        build("coat_tiny")
