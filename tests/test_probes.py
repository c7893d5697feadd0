"""Probes hold against losses whose values and gradients are known in closed form."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import sovit  # noqa: F401
from sovit.probes import Probed, find_stem, probe

STEPS = torch.tensor([0.0, 0.1, 0.5, 2.0, 75.0])


class Small(nn.Module):
    """A stem and a linear map, in float64."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.linear = nn.Linear(4, 3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stem(x).flatten(1))


class Noisy(nn.Module):
    """All that draws, counts or works in place: BatchNorm, dropout, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.rest = nn.Sequential(
            nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.stem(x)))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def images(*, size: int = 2, channels: int = 1, num: int = 6) -> Tensor:
    return torch.randn(num, channels, size, size, dtype=torch.float64)


def half_square(logits: Tensor) -> Tensor:
    return logits.square().sum() / 2


def probe_noisy(model: nn.Module, x: Tensor, steps: Tensor = STEPS) -> Probed:
    labels = torch.arange(len(x)) % 5
    return probe(
        model,
        x,
        loss=lambda logits: nn.functional.cross_entropy(logits, labels),
        stem="stem",
        step_sizes=steps,
    )


def test_a_quadratic_loss_is_probed_exactly() -> None:
    """L = |XW|^2 / 2 has g = XM, M = WW^T, and L(X + tg) = |X(I + tM)W|^2 / 2."""
    model, x = Small(nn.Identity()), images()
    found = probe(model, x, loss=half_square, stem="stem", step_sizes=STEPS)
    w = model.linear.weight.detach().T
    m, flat = w @ w.T, x.flatten(1)
    eye = torch.eye(4, dtype=torch.float64)
    for t, loss, change in zip(
        STEPS.double(), found.losses, found.gradient_changes, strict=True
    ):
        moved = flat @ (eye + t * m)
        torch.testing.assert_close(loss, half_square(moved @ w))
        torch.testing.assert_close(change, (t * flat @ m @ m).norm())
    torch.testing.assert_close(found.loss, half_square(flat @ w))
    assert torch.equal(found.step_sizes, STEPS)


def test_a_linear_loss_rises_with_the_step_and_its_gradient_stays() -> None:
    model, x = Small(nn.Identity()), images()
    found = probe(model, x, loss=torch.sum, stem="stem", step_sizes=STEPS)
    square = len(x) * model.linear.weight.detach().sum(0).square().sum()
    torch.testing.assert_close(found.losses, found.loss + STEPS.double() * square)
    torch.testing.assert_close(
        found.gradient_changes, torch.zeros(len(STEPS), dtype=torch.float64)
    )


def test_it_is_the_output_of_the_stem_that_moves() -> None:
    """A stem that triples: X is three times the images, and g is taken at X."""
    x = images()
    tripled = Small(nn.Conv2d(1, 1, 1, bias=False).double())
    nn.init.constant_(tripled.stem.weight, 3.0)  # pyright: ignore
    plain = Small(nn.Identity())
    plain.linear.load_state_dict(tripled.linear.state_dict())
    found = probe(tripled, x, loss=half_square, stem="stem", step_sizes=STEPS)
    wanted = probe(plain, 3 * x, loss=half_square, stem="stem", step_sizes=STEPS)
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.gradient_changes, wanted.gradient_changes)


@pytest.mark.parametrize("training", [True, False])
def test_a_step_of_zero_changes_nothing_though_dropout_draws(training: bool) -> None:
    found = probe_noisy(
        Noisy().train(training), images(size=8, channels=3).float(), torch.zeros(3)
    )
    assert torch.equal(found.losses, found.loss.expand(3))
    assert torch.equal(found.gradient_changes, torch.zeros(3))


def test_the_loss_is_that_of_the_step_to_come() -> None:
    """The same draws as a forward pass from here: the caller's generator is read."""
    model, x = Noisy().train(), images(size=8, channels=3).float()
    found = probe_noisy(model, x)
    labels = torch.arange(len(x)) % 5
    own = nn.functional.cross_entropy(model(x), labels)
    torch.testing.assert_close(found.loss, own.detach())
    assert not torch.equal(found.losses[-1], found.loss)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(training: bool) -> None:
    model = Noisy().train(training)
    x = images(size=8, channels=3).float()
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    probe_noisy(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.stem._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None
        assert grad is not None
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "maxpool"),
        ("isqrt_resnet18", "backbone.maxpool"),
        ("eca_resnet18", "maxpool"),
        ("gsop_resnet50_2", "backbone.maxpool"),
        ("mobilenetv2_100", "bn1"),
        ("isqrt_mobilenetv2", "backbone.bn1"),
        ("vit_tiny_patch16_224", "patch_embed"),
        ("so_vit_7", "patch_embed"),
        ("deit_tiny_so", "backbone.patch_embed"),
        ("swin_tiny_patch4_window7_224", "patch_embed"),
    ],
)
def test_every_family_has_its_stem(name: str, stem: str) -> None:
    assert find_stem(timm.create_model(name, num_classes=2)) == stem


@pytest.mark.parametrize(
    "name", ["isqrt_resnet18_64", "mobilenetv2_050", "so_vit_7", "eca_resnet18"]
)
def test_networks_can_be_probed(name: str) -> None:
    size = 32 if name == "so_vit_7" else None
    model = timm.create_model(name, num_classes=4, img_size=size).train()
    x, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = probe(
        model,
        x,
        loss=lambda logits: nn.functional.cross_entropy(logits, labels),
        stem=find_stem(model),
        step_sizes=torch.tensor([0.0, 1.0]),
    )
    torch.testing.assert_close(found.losses[0], found.loss)
    assert found.gradient_changes[1] > found.gradient_changes[0]


def test_an_unknown_stem_is_named_beside_those_there_are() -> None:
    model, x = Small(nn.Identity()), images()
    with pytest.raises(ValueError, match=r"got 'stems'.*Small's: stem, linear"):
        probe(model, x, loss=torch.sum, stem="stems", step_sizes=STEPS)
    with pytest.raises(ValueError, match=r"none of a known family.*0, 1"):
        find_stem(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)))
    assert find_stem(model, name="linear") == "linear"
    with pytest.raises(ValueError, match=r"got 'stems'.*Small's: stem, linear"):
        find_stem(model, name="stems")


def test_a_stem_that_does_not_run_is_refused_and_leaves_no_hook() -> None:
    model = Small(nn.Identity())
    model.add_module("idle", nn.Identity())
    with pytest.raises(ValueError, match="runs 0 times"):
        probe(model, images(), loss=torch.sum, stem="idle", step_sizes=STEPS)
    assert not model.idle._forward_hooks  # pyright: ignore
