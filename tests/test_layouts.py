"""What a backbone's features are: read rightly, or refused with what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import sovit
from sovit.architectures.layouts import read_layout
from sovit.architectures.trunks import Features, inspect_features

SIZE, DIM = (64, 32), 6
ROWS, COLUMNS = SIZE[0] // 16, SIZE[1] // 16
SMALL = {"type": "cross_cov", "reduced_dim": (4, 3)}


class Trunk(nn.Module):
    """Patches of 16x16 pixels, of which `read` makes the features."""

    def __init__(self, read: Callable[[Any, Tensor], Any], **said: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 16, 16)
        self.mix: nn.Module = nn.Linear(DIM, DIM)
        self.cls_token = nn.Parameter(torch.randn(1, said.pop("num_class", 1), DIM))
        self.head = nn.Linear(DIM, 5)
        self.read = read
        for name, value in said.items():
            setattr(self, name, value)

    def map(self, x: Tensor) -> Tensor:
        return self.mix(self.patches(x).permute(0, 2, 3, 1))

    def tokens(self, x: Tensor) -> Tensor:
        return self.map(x).flatten(1, 2)

    def prefix(self, x: Tensor) -> Tensor:
        return self.cls_token.expand(len(x), -1, -1) + 0 * self.map(x).mean()

    def forward_features(self, x: Tensor) -> Any:
        return self.read(self, x)


def inspect(read: Callable[[Any, Tensor], Any], **said: Any) -> Features:
    return inspect_features(Trunk(read, **said), img_size=SIZE)


def before(trunk: Trunk, x: Tensor) -> Tensor:
    return torch.cat([trunk.prefix(x), trunk.tokens(x)], dim=1)


def after(trunk: Trunk, x: Tensor) -> Tensor:
    return torch.cat([trunk.tokens(x), trunk.prefix(x)], dim=1)


def rows_last(trunk: Trunk, x: Tensor) -> Tensor:
    return trunk.map(x)


def rows_first(trunk: Trunk, x: Tensor) -> Tensor:
    return trunk.map(x).permute(0, 3, 1, 2)


READ = {
    "map": (rows_first, {}, (False, 0, False)),
    "map, channels last, not declared": (rows_last, {}, (True, 0, False)),
    "map, declared wrongly": (rows_last, {"output_fmt": "NCHW"}, (True, 0, False)),
    "tokens": (Trunk.tokens, {}, (True, 0, False)),
    "class token, not declared": (before, {}, (True, 1, True)),
    "class and distillation": (before, {"num_class": 2}, (True, 2, True)),
    "declared": (before, {"num_prefix_tokens": 1}, (True, 1, True)),
    "registers": (
        before,
        {"num_class": 4, "num_prefix_tokens": 4, "has_class_token": False},
        (True, 4, False),
    ),
    "declared, taken off": (Trunk.tokens, {"num_prefix_tokens": 1}, (True, 0, False)),
}


@pytest.mark.parametrize("kind", READ)
def test_positions_are_told_from_the_rest(kind: str) -> None:
    read, said, (last, prefix, has_class) = READ[kind]
    found = inspect(read, **said)
    assert found.embed_dim == DIM
    assert found.num_tokens == ROWS * COLUMNS
    assert found.channels_last == last
    assert (found.num_prefix_tokens, found.has_class_token) == (prefix, has_class)


def of_last(trunk: Trunk, x: Tensor, **_: Any) -> Tensor:
    return trunk.head(x[:, -1])


def of_first(trunk: Trunk, x: Tensor, **_: Any) -> Tensor:
    return trunk.head(x[:, 0])


def of_mean(trunk: Trunk, x: Tensor, **_: Any) -> Tensor:
    return trunk.head(x[:, 1:].mean(1))


def with_head(read: Any, head: Any) -> Trunk:
    class WithHead(Trunk):
        def forward_head(self, x: Tensor) -> Tensor:
            return head(self, x)

    return WithHead(read)


def test_a_class_token_that_is_not_declared_must_be_first() -> None:
    for head in (of_first, of_mean):
        found = inspect_features(with_head(before, head), img_size=SIZE)
        assert found.num_prefix_tokens == 1
    for head in (of_last, lambda trunk, x: trunk.head(x[:, :-1].mean(1))):
        with pytest.raises(ValueError, match="class token first"):
            inspect_features(with_head(after, head), img_size=SIZE)


REFUSED = {
    "class token alone": (Trunk.prefix, {}, "as many as it has class tokens"),
    "two class tokens alone": (Trunk.prefix, {"num_class": 2}, "got 2 from Trunk"),
    "declared, alone": (Trunk.prefix, {"num_prefix_tokens": 1}, "got 1 from Trunk"),
    "no grid": (lambda t, x: t.tokens(x)[:, 3:], {}, "set model.num_prefix_tokens"),
    "a map of no grid": (lambda t, x: t.map(x)[:, :1], {}, "set model.output_fmt"),
    "two maps": (lambda t, x: [t.map(x), t.map(x)], {}, "Trunk gives list"),
    "a vector": (lambda t, x: t.tokens(x).mean(1), {}, "Trunk gives"),
    "not of the image": (
        lambda t, x: before(t, torch.zeros_like(x)),
        {},
        "without one to the image",
    ),
    "detached": (lambda t, x: t.tokens(x).detach(), {}, "take out no_grad"),
    "no_grad": (torch.no_grad()(lambda t, x: t.tokens(x)), {}, "take out no_grad"),
    "mostly detached": (
        lambda t, x: t.tokens(x).detach() + x[:, :, ::16, ::16].flatten(2).mT.mean(),
        {},
        "most of the weights",
    ),
    "images it can't take": (
        lambda t, x: t.tokens(x[:, :2]),
        {},
        "takes images .3, 64, 32.*RuntimeError",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_positions_is_refused(kind: str) -> None:
    read, said, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        inspect(read, **said)


def test_two_readings_of_a_map_are_refused() -> None:
    cube = (2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"set model\.output_fmt"):
        read_layout(nn.Module(), shape=cube, image=(64, 64))
    for fmt in ("NCHW", "NHWC"):
        model = nn.Module()
        model.output_fmt = fmt  # pyright: ignore[reportArgumentType]
        layout = read_layout(model, shape=cube, image=(64, 64))
        assert layout.channels_last == (fmt == "NHWC")


def test_layers_without_gradient_stay_as_they_are() -> None:
    trunk = Trunk(lambda t, x: t.mix(t.patches(x).detach().flatten(2).mT))
    trunk.mix = nn.Sequential(trunk.mix, nn.Linear(DIM, 2000), nn.Linear(2000, DIM))
    x = torch.randn(2, 3, *SIZE)
    expected = trunk.forward_features(x)
    with pytest.raises(ValueError, match="the image"):
        sovit.second_order(trunk, pooling=SMALL, img_size=SIZE)
    read = trunk.read
    trunk.read = lambda t, x: read(t, x) + 0 * x.mean()
    model = sovit.second_order(trunk, pooling=SMALL, img_size=SIZE)
    torch.testing.assert_close(model.forward_features(x), expected)
    assert model.features.detached == ("patches.weight", "patches.bias")
    assert not trunk.patches.weight.requires_grad


def test_looking_at_a_trunk_leaves_nothing_in_it() -> None:
    def read(trunk: Trunk, x: Tensor) -> Tensor:
        if not hasattr(trunk, "kept"):
            trunk.kept = torch.ones(DIM, device=x.device)
        again: Any = trunk.again
        return again(trunk.mix(trunk.patches(x).flatten(2).mT)) * trunk.kept

    trunk = Trunk(read)
    trunk.again = trunk.mix  # Two names for one layer, as in CoaT.
    model = sovit.second_order(trunk, pooling=SMALL, num_classes=5, img_size=SIZE)
    model(torch.randn(2, 3, *SIZE)).sum().backward()
    assert trunk.patches.weight.grad is not None
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_channels_are_what_the_model_takes() -> None:
    with torch.device("meta"):
        for name, size in (("tresnet_m", 64), ("csatv2", 128)):
            assert sovit.second_order(name, img_size=size).features.num_tokens >= 4
    grey = timm.create_model("test_resnet", in_chans=1)
    assert sovit.second_order(grey, pooling=SMALL).features.embed_dim == 96


@pytest.mark.parametrize("name", ["volo_d1_224", "coat_lite_tiny"])
def test_class_tokens_that_timm_does_not_declare_are_not_pooled(name: str) -> None:
    with torch.device("meta"):
        model = sovit.second_order(name, pooling=SMALL)
    assert (model.features.num_prefix_tokens, model.head.fusion) == (1, "sum")


def test_models_without_features_are_told_what_to_be() -> None:
    for model, what in (
        (torchvision.models.resnet18(), "torchvision.*ResNet"),
        (timm.create_model("test_resnet", features_only=True), "features_only=True"),
        ("test_resnet", "features_only=True"),
        (nn.Linear(3, 3), "Linear"),
    ):
        settings = {"features_only": True} if isinstance(model, str) else {}
        with pytest.raises(ValueError, match=f"forward_features.*{what}") as raised:
            sovit.second_order(model, pooling=SMALL, **settings)  # pyright: ignore[reportArgumentType]
        assert "create_model(name)" in str(raised.value)


def test_one_position_has_no_covariance() -> None:
    for pooling in (SMALL, "isqrt_cov"):
        said = "of 1 token is pooled, .* 0 for every image, so the head learns nothing"
        with pytest.warns(sovit.FewTokensWarning, match=said):
            sovit.second_order(
                "test_resnet", pooling=pooling, img_size=32, drop_last_stride=False
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = sovit.second_order(
            "test_resnet", pooling={"type": "avg"}, img_size=32, drop_last_stride=False
        )
    assert kept.features.num_tokens == 1
    with (
        pytest.raises(ValueError, match="got 1 from PoolingVisionTransformer"),
        torch.device("meta"),
    ):
        sovit.second_order("pit_ti_224")
