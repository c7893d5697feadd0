"""Held against what the papers' released code answers, and its checkpoints' layouts."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import sovit
from sovit.positions import sinusoid_table

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
