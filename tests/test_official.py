"""Held against what the papers' released code answers, and its checkpoints' layouts."""

from __future__ import annotations

import argparse
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import sovit
from sovit.architectures.vit import sinusoid_table
from sovit.weights.official import checkpoint_filter_fn, is_official

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("so_vit_7", "sot_tiny")
START_KEYS = (
    "classifier.normalization.weight",
    "classifier.representation.norm.weight",
)


def noise(name: str, *, num_values: int) -> np.ndarray:
    """Return fixed values in [-1, 1) for a name: a hash of name and index."""
    seed = np.uint64(zlib.crc32(name.encode()) << 32)
    with np.errstate(over="ignore"):
        z = (np.arange(num_values, dtype=np.uint64) + seed) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53 * 2 - 1


def filled(name: str, *, shape: list[int]) -> Tensor:
    """Return the fixed weights of a tensor of the released state dict."""
    if name == "pos_embed":
        return sinusoid_table(shape[1], shape[2])
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    size = int(np.prod(shape))
    u = noise(f"{name}#v0" if name in START_KEYS else name, num_values=size)
    if name.endswith("running_var"):
        values = 1 + 0.3 * u
    elif name in START_KEYS or name.endswith("running_mean"):
        values = 0.1 * u
    elif len(shape) == 1 and name.endswith(".weight"):
        values = 1 + 0.2 * u
    elif len(shape) <= 1:
        values = 0.1 * u
    else:
        values = u * np.sqrt(3 / (size / shape[0]))
    return torch.tensor(values.reshape(shape), dtype=torch.float32)


def golden(name: str) -> dict[str, Any]:
    """Return what the released model is and answers."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def official_weights(name: str) -> dict[str, Tensor]:
    """Return a state dict as the released model has it."""
    return {key: filled(key, shape=shape) for key, shape in golden(name)["state_dict"]}


def build(name: str, **kwargs: Any) -> sovit.SoViT:
    """Return one of our models."""
    model = timm.create_model(name, **kwargs)
    assert isinstance(model, sovit.SoViT)
    return model.eval()


def images() -> Tensor:
    """Return the two fixed images."""
    values = 1.5 * noise("image", num_values=2 * 3 * 28 * 28)
    image = torch.tensor(values.reshape(2, 3, 28, 28), dtype=torch.float32)
    return image.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_released_code(name: str) -> None:
    wanted = golden(name)
    model = build(name)
    sovit.load_official(model, official_weights(name))
    with torch.no_grad():
        tokens = model.patch_embed(images())
        logits = model(images()).double()
    assert list(tokens.shape) == wanted["tokens_shape"]
    assert tokens.norm().item() == pytest.approx(wanted["tokens_l2"], rel=1e-5)
    first = torch.tensor(wanted["first_16_logits"]).double()
    torch.testing.assert_close(logits[:, :16], first, rtol=0, atol=1e-4)
    norms = torch.tensor(wanted["logits_l2"]).double()
    torch.testing.assert_close(logits.norm(dim=1), norms, rtol=0, atol=1e-4)
    # A sum of a thousand logits has the error of a thousand, added at random.
    sums = torch.tensor(wanted["logits_sum"]).double()
    torch.testing.assert_close(logits.sum(dim=1), sums, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_trained_parameters_is_the_released_one(name: str) -> None:
    model = build(name)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == golden(name)["trainable_params"]


def small(name: str = "so_vit_7", **kwargs: Any) -> tuple[sovit.SoViT, dict[str, Any]]:
    """Return a shallow model and a released state dict of the same depth."""
    model = build(name, depth=2, **kwargs)
    weights = {
        key: value
        for key, value in official_weights(name).items()
        if not key.startswith("blocks.") or int(key.split(".")[1]) < 2
    }
    return model, weights


def first_difference(model: sovit.SoViT, weights: dict[str, Any]) -> float:
    """Return how far the model's class classifier is from the given one."""
    fc = model.get_submodule("head.fc_class").get_parameter("weight")
    return (fc - weights["classifier.cls_fc.weight"]).abs().max().item()


@pytest.mark.parametrize(
    "key", [None, "state_dict", "model", "state_dict_ema", "model_ema"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_every_layout_of_a_checkpoint_loads(key: str | None, prefix: str) -> None:
    model, weights = small()
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    got = sovit.load_official(model, {key: prefixed, "epoch": 3} if key else prefixed)
    assert got is model
    assert first_difference(model, weights) == 0


def test_file_with_the_trainers_arguments_loads(tmp_path: Path) -> None:
    model, weights = small()
    averaged = {name: 2 * tensor for name, tensor in weights.items()}
    averaged["pos_embed"] = weights["pos_embed"]
    checkpoint = {
        "epoch": 309,
        "arch": "So_vit_7",
        "args": argparse.Namespace(lr=1e-3, model="So_vit_7"),
        "state_dict": weights,
        "state_dict_ema": averaged,
    }
    path = tmp_path / "model_best.pth.tar"
    torch.save(checkpoint, path)
    sovit.load_official(model, path)
    assert first_difference(model, weights) == 0
    sovit.load_official(model, str(path), ema=True)
    assert first_difference(model, averaged) == 0


class Harmful:
    """Something whose loading would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code has run",))


def test_file_with_code_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, weights = small()
    path = tmp_path / "harmful.pth"
    torch.save({"state_dict": weights, "hook": Harmful()}, path)
    with pytest.raises(ValueError, match="something else or is damaged") as caught:
        sovit.load_official(model, path)
    assert "(it holds print)" in str(caught.value)
    assert "code has run" not in capsys.readouterr().out


def test_averaged_weights_must_be_there() -> None:
    model, weights = small()
    with pytest.raises(ValueError, match="ema=True: expected weights"):
        sovit.load_official(model, {"state_dict": weights}, ema=True)
    with pytest.raises(ValueError, match="ema=True: expected weights"):
        sovit.load_official(model, weights, ema=True)


def test_what_does_not_fit_is_named_and_nothing_is_loaded() -> None:
    model, weights = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "classifier.representation.conv_dr_block.1.0.weight"
    missing = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ValueError, match=f"1 tensors are missing: {re.escape(name)}"):
        sovit.load_official(model, missing)
    with pytest.raises(ValueError, match="1 tensors are unexpected: extra"):
        sovit.load_official(model, {**weights, "extra": torch.ones(1)})
    wrong = {**weights, name: torch.ones(12, 256, 1, 1)}
    with pytest.raises(ValueError, match="1 tensors are of another shape") as caught:
        sovit.load_official(model, wrong)
    assert f"{name} (12, 256, 1, 1), the model has (24, 256)" in str(caught.value)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_at_most_five_names_are_told_and_all_are_counted() -> None:
    model, weights = small()
    with pytest.raises(ValueError, match="tensors are missing") as caught:
        sovit.load_official(model, {"cls_token": weights["cls_token"]})
    count = len(weights) - 1
    assert f"{count} tensors are missing" in str(caught.value)
    assert sum(name in str(caught.value) for name in weights) == 5


def test_views_that_only_sum_up_are_refused() -> None:
    _, weights = small()
    swapped = build(depth=2, name="so_vit_7", pooling={"reduced_dim": (24, 48)})
    with pytest.raises(ValueError, match="another shape"):
        sovit.load_official(swapped, weights)


def test_other_models_are_refused() -> None:
    model, weights = small()
    with pytest.raises(ValueError, match="tensors are missing"):
        sovit.load_official(build("sot_tiny"), weights)
    with pytest.raises(ValueError, match="expected a So-ViT or SoT model"):
        sovit.load_official(torch.nn.Linear(2, 2), weights)
    with pytest.raises(ValueError, match="of the released kinds"):
        sovit.load_official(build("so_vit_7", fusion="concat"), weights)
    with pytest.raises(ValueError, match="of the released kinds"):
        sovit.load_official(build("so_vit_7", token_embed="linear"), weights)
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        sovit.load_official(model, {"epoch": 3})


def test_other_number_of_classes_needs_the_classifier_skipped() -> None:
    model, weights = small(num_classes=7)
    with pytest.raises(ValueError, match="skip_classifier=True") as caught:
        sovit.load_official(model, weights)
    assert "classifier.cls_fc.weight (1000, 256), the model has (7, 256)" in str(
        caught.value
    )
    before = model.get_parameter("head.fc_class.weight").clone()
    sovit.load_official(model, weights, skip_classifier=True)
    assert torch.equal(model.get_parameter("head.fc_class.weight"), before)
    assert torch.equal(model.cls_token, weights["cls_token"])
    headless, _ = small(num_classes=0)
    sovit.load_official(headless, weights, skip_classifier=True)
    assert torch.equal(headless.cls_token, weights["cls_token"])


def test_weights_of_another_image_size_load() -> None:
    model, weights = small("sot_tiny", img_size=(64, 96))
    assert weights["pos_embed"].shape == (1, 197, 240)
    sovit.load_official(model, weights)
    torch.testing.assert_close(model.pos_embed, sinusoid_table(25, 240))


def test_own_weights_pass_timms_filter_with_their_positions_fitted() -> None:
    small_images, _ = small(img_size=64)
    large, _ = small(img_size=(96, 64))
    weights = checkpoint_filter_fn(small_images.state_dict(), large)
    assert torch.equal(weights.pop("pos_embed"), large.pos_embed)
    assert weights.keys() == small_images.state_dict().keys() - {"pos_embed"}


def test_a_released_file_without_classifier_gives_none() -> None:
    model, weights = small()
    assert is_official(weights)
    assert not is_official(model.state_dict())
    whole = checkpoint_filter_fn(dict(weights), model)
    assert whole.keys() == model.state_dict().keys()
    rest = {n: w for n, w in weights.items() if "_fc." not in n}
    without = checkpoint_filter_fn(rest, model)
    assert whole.keys() - without.keys() == {
        f"head.fc_{of}.{kind}"
        for of in ("class", "visual")
        for kind in ("weight", "bias")
    }


def test_timm_loads_released_files_by_itself(tmp_path: Path) -> None:
    model, weights = small()
    path = tmp_path / "official.pth"
    torch.save({"state_dict": weights}, path)
    sovit.load_official(model, weights)
    settings = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    same = build("so_vit_7", depth=2, **settings)
    with torch.no_grad():
        torch.testing.assert_close(same(images()), model(images()))
    tuned = build("so_vit_7", depth=2, num_classes=7, **settings)
    assert torch.equal(tuned.cls_token, weights["cls_token"])
    assert tuned(images()).shape == (2, 7)
