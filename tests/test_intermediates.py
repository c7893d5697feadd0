"""timm's ways to the features inside our networks, held against hooks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import sovit

NARROW = {"pooling": {"reduced_dim": 8}}
SHORT = {"layers": (1, 1, 1, 1)}
NETWORKS: dict[str, dict[str, Any]] = {
    "so_vit_7": {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": (64, 32)},
    "sot_tiny": {"depth": 3, "embed_dim": 32, "num_heads": 2, "token_stride": 8},
    "deit_tiny_so": {"depth": 4},
    "swin_tiny_so": {"depths": (1,) * 4, "num_heads": (1,) * 4, "embed_dim": 8},
    "isqrt_resnet18": {**NARROW, **SHORT},
    "mpncov_resnet50": {**NARROW, **SHORT},
    "gaussian_resnet50": {**NARROW, **SHORT},
    "isqrt_vgg16": {**NARROW, "hidden_dims": (8,), "mlp_ratio": 0.01},
    "isqrt_mobilenetv2": NARROW,
    "gsop_resnet50_1": {**SHORT, "reduced_dim": 8, "attention": "avg"},
    "gsop_resnet50_2": {**NARROW, **SHORT, "reduced_dim": 8},
    "eca_resnet18": SHORT,
    "eca_mobilenetv2": {},
}


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"img_size": 64, **NETWORKS[name], **kwargs}
    return timm.create_model(name, **settings).eval()


def images(name: str) -> Tensor:
    size = NETWORKS[name].get("img_size", (64, 64))
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def hooked(model: Any, x: Tensor) -> list[Tensor]:
    """Return what the modules of `feature_info` put out, as maps of channels first."""
    found: list[Tensor] = []
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        # A later layer may write into its input.
        module.register_forward_hook(lambda *args: found.append(args[-1].clone()))
    with torch.no_grad():
        model(x)
    return [
        _as_map(y, x, info) for y, info in zip(found, model.feature_info, strict=True)
    ]


def _as_map(y: Tensor, x: Tensor, info: dict[str, Any]) -> Tensor:
    if y.ndim == 3:
        rows = x.shape[2] // info["reduction"]
        return y[:, 1:].mT.unflatten(2, (rows, -1))
    return y if y.shape[1] == info["num_chs"] else y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_only_gives_what_hooks_see(name: str) -> None:
    x = images(name)
    wanted = hooked(build(name), x)
    model = build(name, features_only=True)
    with torch.no_grad():
        came = model(x)
    indices = model.feature_info.out_indices
    num_wanted = 3 if name in ("so_vit_7", "sot_tiny", "deit_tiny_so") else len(wanted)
    assert len(came) == num_wanted
    for index, y, num_chs, reduction in zip(
        range(-num_wanted, 0),
        came,
        model.feature_info.channels(),
        model.feature_info.reduction(),
        strict=True,
    ):
        assert torch.equal(y, wanted[index])
        assert y.shape[1:] == (num_chs, *(side // reduction for side in x.shape[2:]))
    assert list(indices) == list(range(len(wanted)))[-num_wanted:]


@pytest.mark.parametrize("name", ["so_vit_7", "isqrt_resnet18", "eca_mobilenetv2"])
def test_some_features_are_chosen_and_the_rest_is_taken_out(name: str) -> None:
    x, whole = images(name), build(name)
    wanted, last = hooked(whole, x), build(name, features_only=True, out_indices=(0, 2))
    with torch.no_grad():
        for y, of in zip(last(x), (0, 2), strict=True):
            assert torch.equal(y, wanted[of])
    num_params = [sum(p.numel() for p in m.parameters()) for m in (last, whole)]
    assert num_params[0] < num_params[1]
    assert build(name).prune_intermediate_layers([-1, 0]) == [len(wanted) - 1, 0]


@pytest.mark.parametrize("name", ["so_vit_7", "deit_tiny_so", "isqrt_resnet18"])
def test_a_network_cut_short_learns_new_classes(name: str) -> None:
    x, model = images(name), build(name, num_classes=3)
    features = hooked(model, x)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    with torch.no_grad():
        vectors, final = model(x), model.forward_features(x)
    is_map = final.ndim == 4
    last = final if is_map else final[:, 1:].mT.reshape(features[1].shape)
    assert torch.equal(last, features[1])
    pooled = final.mean((2, 3)) if is_map else final[:, 0]
    torch.testing.assert_close(vectors, pooled)
    assert model.num_classes == 0
    assert model.head_hidden_size == vectors.shape[1]
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_with_its_head_a_network_is_only_cut_after_the_last_stage() -> None:
    x, model = images("isqrt_resnet18"), build("isqrt_resnet18", num_classes=3)
    with torch.no_grad():
        wanted = model(x)
        model.prune_intermediate_layers([4], prune_head=False)
        assert torch.equal(model(x), wanted)
        model.prune_intermediate_layers([3], prune_head=False)
        assert model(x).shape == (2, 256)


@pytest.fixture(scope="module")
def so_vit() -> sovit.SoViT:
    return build("so_vit_7")


def test_so_vit_takes_the_arguments_of_timms_vit(so_vit: sovit.SoViT) -> None:
    for name in ("forward_intermediates", "prune_intermediate_layers"):
        ours, theirs = (
            inspect.signature(getattr(cls, name)).parameters
            for cls in (sovit.SoViT, VisionTransformer)
        )
        told = [n for n in theirs if n not in ("attn_mask", "is_causal")]
        assert list(ours) == told
        assert [ours[n].default for n in told] == [theirs[n].default for n in told]
    x = images("so_vit_7")
    with pytest.raises(ValueError, match=r"output_fmt: expected one of .* got 'NHWC'"):
        so_vit.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="expected images of"):
        so_vit.forward_intermediates(x[:, :1])


def test_so_vits_intermediates_have_timms_shapes_and_order(
    so_vit: sovit.SoViT,
) -> None:
    x, seen = images("so_vit_7"), list[Tensor]()
    handles = [
        block.register_forward_hook(lambda *args: seen.append(args[-1]))
        for block in so_vit.blocks
    ]
    with torch.no_grad():
        wanted = so_vit.forward_features(x)
        blocks = list(seen)
        final, maps = so_vit.forward_intermediates(x)
        assert torch.equal(final, wanted)
        assert [m.shape for m in maps] == [(2, 32, 4, 2)] * 4
        for block, one in zip(blocks, maps, strict=True):
            assert torch.equal(one.flatten(2).mT, block[:, 1:])
        seen.clear()
        found = so_vit.forward_intermediates(
            x, indices=[-3, 0], norm=True, stop_early=True, output_fmt="NLC",
            return_prefix_tokens=True, intermediates_only=True,
        )  # fmt: skip
        assert len(seen) == 2
        for (tokens, prefix), block in zip(found, blocks, strict=False):
            joined = torch.cat([prefix, tokens], dim=1)
            assert torch.equal(joined, so_vit.norm(block))
        named = so_vit.forward_intermediates(
            x, indices=1, output_dict=True, return_prefix_tokens=True
        )
        assert torch.equal(named["image_features"], wanted)
        assert torch.equal(named["image_intermediates"][0], maps[-1])
        assert torch.equal(named["image_intermediates_prefix"][0], blocks[-1][:, :1])
        (last,) = so_vit.get_intermediate_layers(x, norm=True, reshape=True)
        assert torch.equal(last.flatten(2).mT, wanted[:, 1:])
    so_vit.set_grad_checkpointing(True)
    saved = so_vit.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(saved[0], maps[0])
    so_vit.set_grad_checkpointing(False)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "trunk", "settings"),
    [
        ("isqrt_resnet18", "resnet18", {"drop_last_stride": False, **SHORT}),
        ("isqrt_mobilenetv2", "mobilenetv2_100", {}),
    ],
)
def test_features_are_those_of_timms_own_trunk(
    name: str, trunk: str, settings: dict[str, Any]
) -> None:
    """Same numbers, channels and reductions as timm's `features_only` of the trunk."""
    x, full = images(name), build(name, **settings)
    ours = build(name, features_only=True, **settings)
    kept = {k: v for k, v in settings.items() if k == "layers"}
    theirs = timm.create_model(trunk, features_only=True, **kept).eval()
    missing, _ = theirs.load_state_dict(full.backbone.state_dict(), strict=False)
    assert not missing
    for what in ("channels", "reduction"):
        assert (
            getattr(ours.feature_info, what)() == getattr(theirs.feature_info, what)()
        )
    with torch.no_grad():
        for y, wanted in zip(ours(x), theirs(x), strict=True):
            assert torch.equal(y, wanted)


def test_dinos_interface_is_there_where_the_trunk_has_it() -> None:
    deit, resnet = build("deit_tiny_so"), build("isqrt_resnet18")
    x = images("deit_tiny_so")
    with torch.no_grad():
        (last,) = deit.get_intermediate_layers(x, n=1)
        assert torch.equal(last, deit.forward_intermediates(
            x, (-1,), output_fmt="NLC", intermediates_only=True)[0])  # fmt: skip
    assert not hasattr(resnet, "get_intermediate_layers")
    assert isinstance(resnet, nn.Module)
