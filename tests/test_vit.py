"""The models as users of timm make and use them."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import group_parameters
from timm.optim._param_groups import param_groups_weight_decay
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

import sovit
from sovit.architectures.vit import sinusoid_table
from sovit.head import FUSIONS
from sovit.networks.so_vit import ARCHITECTURES
from sovit.pooling import Pooling

# Counted from the layers' shapes; the first and fifth are the released code's own.
NUM_PARAMETERS = {
    "so_vit_7": 5_529_232,
    "so_vit_10": 7_108_240,
    "so_vit_14": 24_643_056,
    "so_vit_19": 43_799_440,
    "sot_tiny": 7_983_550,
    "sot_small": 27_010_856,
    "sot_base": 76_774_966,
}
TOKEN_EMBEDS = ("resnet", "densenet", "linear")
POOLINGS = {
    "cross_cov": {"type": "cross_cov", "reduced_dim": (6, 4)},
    "multi_head": {"type": "multi_head", "reduced_dim": 4, "num_heads": 2},
    "avg": {"type": "avg"},
}


def build(name: str = "so_vit_7", **kwargs: Any) -> sovit.SoViT:
    """Return a small model of a released kind."""
    settings = {"img_size": 32, "num_classes": 5, "depth": 2, **kwargs}
    model = timm.create_model(name, **settings)
    assert isinstance(model, sovit.SoViT)
    return model


def images(*, size: tuple[int, int] = (32, 32), in_chans: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, in_chans, *size, generator=generator)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_number_of_parameters_is_the_counted_one(name: str) -> None:
    assert timm.is_model(name)
    # Shapes alone tell it: nothing of 76 million parameters is drawn.
    with torch.device("meta"):
        shapes = [p.shape.numel() for p in timm.create_model(name).parameters()]
    assert sum(shapes) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_the_released_ones(name: str) -> None:
    pooling = sovit.default_pooling(name)
    assert (pooling.power, pooling.num_iterations, pooling.num_singular_values) == (
        0.5,
        1,
        1,
    )
    drop_rate = {"so_vit_14": 0.5, "so_vit_19": 0.5, "sot_small": 0.5, "sot_base": 0.7}
    model = build(name, depth=1)
    assert model.head.drop.p == drop_rate.get(name, 0.0)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    config = resolve_model_data_config(model)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("token_embed", "pooling", "fusion"),
    list(itertools.product(TOKEN_EMBEDS, POOLINGS, FUSIONS)),
)
def test_every_embedding_trains_with_every_head(
    token_embed: str, pooling: str, fusion: str
) -> None:
    model = build(
        token_embed=token_embed, pooling=POOLINGS[pooling], fusion=fusion, depth=1
    )
    logits = model(images())
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["so_vit_7", "sot_tiny"])
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (48, 80)])
def test_images_of_any_size_on_the_grid(name: str, size: tuple[int, int]) -> None:
    model = build(name, img_size=size, in_chans=1)
    tokens = model.forward_features(images(size=size, in_chans=1))
    assert tokens.shape == (2, 1 + size[0] * size[1] // 256, model.num_features)
    assert model.forward_head(tokens).shape == (2, 5)
    with pytest.raises(ValueError, match=r"got \(3, 96, 96\)"):
        model(images(size=(96, 96)))


@pytest.mark.parametrize("kind", TOKEN_EMBEDS)
def test_small_images_have_many_tokens_at_a_small_stride(kind: str) -> None:
    model = build(token_embed=kind, token_stride=4, img_size=28, depth=1).eval()
    assert model.grid_size == (7, 7)
    assert model.forward_features(images(size=(28, 28))).shape[1] == 1 + 49
    torch.testing.assert_close(model.pos_embed, sinusoid_table(50, 256))
    published = build(token_embed=kind, img_size=32, depth=1)
    if kind == "linear":
        with pytest.raises(RuntimeError, match="size mismatch for patch_embed"):
            model.load_state_dict(published.state_dict())
    else:
        model.load_state_dict(published.state_dict())
        torch.testing.assert_close(model.pos_embed, sinusoid_table(50, 256))
    model.set_input_size((32, 16))
    assert model(images(size=(32, 16))).shape == (2, 5)
    with pytest.raises(ValueError, match="multiple of 4 from 8 up"):
        model.set_input_size(30)


def test_a_model_of_few_tokens_warns_once_and_others_do_not() -> None:
    with pytest.warns(sovit.FewTokensWarning, match="of 4 tokens .* is 24:") as found:
        build(img_size=32)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(img_size=32, token_stride=4)
        build(img_size=32, fusion="class")
        model = build(img_size=32, pooling={"reduced_dim": (4, 8)})
        model(images())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        build(img_size=40)
    with pytest.raises(ValueError, match="embed_dim a multiple"):
        build(num_heads=3)
    with pytest.raises(ValueError, match="'inception'"):
        build(token_embed="inception")
    with pytest.raises(ValueError, match=r"one of \(16, 8, 4\), got 12"):
        build(token_stride=12)
    with pytest.raises(ValueError, match="'product'"):
        build(fusion="product")
    with pytest.raises(TypeError, match=r"got \['patch_size'\]"):
        build(patch_size=8)
    with pytest.raises(ValueError, match=r"got \['pwer'\]"):
        build(pooling={"pwer": 0.3})
    with pytest.raises(ValueError, match="load_official"):
        build(pretrained=True)
    with pytest.raises(ValueError, match="got 'so_vit_24'"):
        sovit.default_pooling("so_vit_24")


def test_pooling_is_given_whole_or_as_changes() -> None:
    changed = build(pooling={"power": 0.3, "num_iterations": 3})
    whole = build(pooling=Pooling(reduced_dim=(48, 24), power=0.3, num_iterations=3))
    whole.load_state_dict(changed.state_dict())
    torch.testing.assert_close(whole.eval()(images()), changed.eval()(images()))
    default = build()
    default.load_state_dict(changed.state_dict())
    assert not torch.allclose(default.eval()(images()), changed(images()))
    unchanged = build(pooling={})
    assert build(pooling="isqrt_cov").head.visual_dim == 32_896
    default.load_state_dict(unchanged.state_dict())
    torch.testing.assert_close(default(images()), unchanged.eval()(images()))
    # Settings of one model are no other's.
    assert sovit.default_pooling("so_vit_7").power == 0.5


def test_architecture_numbers_can_be_changed() -> None:
    model = build(depth=3, embed_dim=48, num_heads=3, mlp_ratio=1.5, qkv_bias=True)
    assert len(model.blocks) == 3
    assert model.state_dict()["blocks.0.mlp.fc1.weight"].shape == (72, 48)
    assert model.state_dict()["blocks.2.attn.qkv.bias"].shape == (144,)
    assert model(images()).shape == (2, 5)


def test_drop_rates_act_in_training_only() -> None:
    model = build(depth=3, drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    dropouts = {
        name.partition(".")[2]: module.p
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Dropout)
    }
    assert dropouts == {
        "attn.attn_drop": 0.3,
        "attn.proj_drop": 0.1,
        "mlp.drop1": 0.1,
        "mlp.drop2": 0.1,
    }
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_classifier_can_be_replaced() -> None:
    model = build()
    assert model.head_hidden_size == 256 + 48 * 24
    names = model.pretrained_cfg["classifier"]
    wanted = tuple(model.get_submodule(name) for name in names)
    assert model.get_classifier() == wanted
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.head_hidden_size)
    tokens = model.eval().forward_features(images())
    before = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(before, model(images()))
    assert isinstance(build(fusion="concat").get_classifier(), nn.Linear)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(9, "avg")
    alone = build(fusion="class", num_classes=0).double()
    alone.reset_classifier(4)
    assert alone(images().double()).shape == (2, 4)


def test_names_for_timm_follow_the_model() -> None:
    model = build(token_embed="linear", fusion="visual")
    assert isinstance(
        model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d
    )
    assert model.pretrained_cfg["classifier"] == ("head.fc_visual",)


def test_weight_decay_spares_vectors_and_biases() -> None:
    model = build()
    kept, decayed = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=tuple(model.no_weight_decay())
    )
    assert kept["weight_decay"] == 0
    assert all(p.ndim <= 1 for p in kept["params"])
    assert any(p is model.cls_token for p in decayed["params"])
    start = model.get_parameter("head.pool.normalize.start")
    assert any(p is start for p in kept["params"])
    assert model.no_weight_decay() == {"head.pool.normalize.start"}


def test_parameters_group_into_layers() -> None:
    groups = group_parameters(model := build(), model.group_matcher())
    layer = {name: index for index, names in groups.items() for name in names}
    assert layer["cls_token"] == layer["patch_embed.stem.weight"] == 0
    assert layer["blocks.0.attn.qkv.weight"] < layer["blocks.1.attn.qkv.weight"]
    assert layer["head.fc_class.weight"] == max(groups)


@pytest.mark.parametrize("name", ["so_vit_7", "sot_tiny"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = build(name).train()
    model.head.drop.p = 0.0
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for one in (model, twin):
        one(images()).square().sum().backward()
    for (name, plain), other in zip(
        model.named_parameters(), twin.parameters(), strict=True
    ):
        torch.testing.assert_close(plain.grad, other.grad, msg=name)


def test_copies_and_state_dicts_are_whole() -> None:
    model = build("sot_tiny").eval()
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = build("sot_tiny").eval()
    other.load_state_dict(torch.load(stored, weights_only=True))
    wanted = model(images())
    torch.testing.assert_close(other(images()), wanted)
    torch.testing.assert_close(copy.deepcopy(model)(images()), wanted)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.cls_token.add_(1)
    ema.update(model)
    averaged = ema.module.get_parameter("cls_token")
    torch.testing.assert_close(averaged, model.cls_token - 0.5)


def test_weights_of_another_image_size_load() -> None:
    small, large = build(img_size=32), build(img_size=(64, 48))
    assert "pos_embed" in dict(small.named_buffers())
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.pos_embed, sinusoid_table(13, 256))
    torch.testing.assert_close(small.pos_embed, sinusoid_table(5, 256))
    twin = copy.deepcopy(large)
    twin.set_input_size(96)
    twin.load_state_dict(small.state_dict())
    torch.testing.assert_close(twin.pos_embed, sinusoid_table(37, 256))
    small.set_input_size((64, 48))
    torch.testing.assert_close(
        small.eval()(images(size=(64, 48))), large.eval()(images(size=(64, 48)))
    )


@pytest.mark.parametrize("name", ["so_vit_7", "sot_tiny"])
def test_autocast_and_half_precision(name: str) -> None:
    model = build(name).eval()
    wanted = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = model(images())
        lowered.float().sum().backward()
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), wanted, rtol=0.1, atol=0.1)
    whole = model.to(torch.bfloat16)(images().bfloat16())
    torch.testing.assert_close(whole.float(), wanted, rtol=0.2, atol=0.2)
