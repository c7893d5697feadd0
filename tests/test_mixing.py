"""Mixing: timm's images and targets for the same draw."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy  # pyright: ignore

from pipelines.config import Optim
from pipelines.training.metrics import smooth_targets, soft_cross_entropy
from pipelines.training.mixup import draw_mix, mix

OPTIM = Optim(lr=1e-3, num_epochs=5)
BOTH = dataclasses.replace(OPTIM, mixup=0.8, cutmix=1.0)
LABELS = torch.tensor([0, 3, 1, 1, 2, 4])
NUM_CLASSES = 5


def images() -> torch.Tensor:
    return torch.randn(6, 3, 17, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("lam", [0.0, 0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("center", [None, (0.0, 0.0), (0.5, 0.3), (0.99, 0.99)])
def test_mixing_is_timms(
    lam: float, center: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = 17, 24
    monkeypatch.setattr(np.random, "beta", lambda *_: lam)
    if center is not None:
        places = iter([int(center[0] * height), int(center[1] * width)])
        monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(places))
    alphas: dict[str, Any] = {
        "mixup_alpha": 0.0 if center else 0.8,
        "cutmix_alpha": 1.0 if center else 0.0,
    }
    theirs = Mixup(**alphas, label_smoothing=0.1, num_classes=NUM_CLASSES)
    wanted = images()
    share = theirs._mix_batch(wanted)
    wanted_targets = mixup_target(LABELS, NUM_CLASSES, share, 0.1)
    targets = smooth_targets(LABELS, num_classes=NUM_CLASSES, smoothing=0.1)
    before = images()
    mixed, mixed_targets = mix(before, targets, draw=(lam, center))
    assert torch.equal(before, images())
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed_targets, wanted_targets, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_targets_are_timms(smoothing: float) -> None:
    found = smooth_targets(LABELS, num_classes=NUM_CLASSES, smoothing=smoothing)
    torch.testing.assert_close(found, mixup_target(LABELS, NUM_CLASSES, 1.0, smoothing))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))
    assert torch.equal(found.argmax(dim=1), LABELS)


def test_soft_cross_entropy_is_timms_and_torchs() -> None:
    logits = torch.randn(6, NUM_CLASSES)
    targets = smooth_targets(LABELS, num_classes=NUM_CLASSES, smoothing=0.1)
    found = soft_cross_entropy(logits, targets)
    torch.testing.assert_close(found.mean(), SoftTargetCrossEntropy()(logits, targets))
    torchs = torch.nn.functional.cross_entropy(
        logits, LABELS, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(found, torchs)


def test_draws_are_a_function_of_their_key() -> None:
    assert draw_mix(OPTIM, key=1) is None
    assert draw_mix(BOTH, key=7) == draw_mix(BOTH, key=7)
    assert len({draw_mix(BOTH, key=key) for key in range(200)}) == 200


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_draws_follow_the_settings(mixup: float, cutmix: float) -> None:
    num = 4000
    optim = dataclasses.replace(OPTIM, mixup=mixup, cutmix=cutmix, mix_switch=0.3)
    draws = [draw for key in range(num) if (draw := draw_mix(optim, key=key))]
    assert len(draws) == num
    share = sum(box is not None for _, box in draws) / num
    wanted = 0.3 if mixup and cutmix else float(cutmix > 0)
    assert abs(share - wanted) <= 4 * (wanted * (1 - wanted) / num) ** 0.5
    for kind, alpha in ((False, mixup), (True, cutmix)):
        lams = np.array([lam for lam, box in draws if (box is not None) == kind])
        if len(lams):
            # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
            variance = 1 / (4 * (2 * alpha + 1))
            assert abs(lams.mean() - 0.5) < 4 * (variance / len(lams)) ** 0.5
            assert lams.var() == pytest.approx(variance, rel=0.15)
    boxes = np.array([box for _, box in draws if box is not None])
    if len(boxes):
        assert boxes.min() >= 0
        assert boxes.max() < 1
        assert abs(boxes.mean(axis=0) - 0.5).max() < 4 * (1 / 12 / len(boxes)) ** 0.5
