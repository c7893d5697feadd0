"""Sweep timm's architectures: how `sovit.second_order` reads each, and whether rightly.

    python -m benchmarks.backbones
    python -m benchmarks.backbones --only volo_d1_224 pit_ti_224
    python -m benchmarks.backbones --table docs/backbones.md

At least one architecture of every module of timm, the smallest of each layout, with
fresh weights, at the smallest image size that it takes. What is right is decided
without asking the code that is tried: see `benchmarks.backbones`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import sovit
from pipelines.cli.command import parse, run_command

# Numbers below these, of the largest, are rounding.
_TINY = 1e-6
_SAME = 1e-4
_PROG = "benchmarks.backbones"
SIZES = (96, 128, 160, 192, 224, 240, 256)
MIN_POSITIONS = 4
_POOLING = sovit.Pooling(type="cross_cov", reduced_dim=(6, 4))
_HEADER = """\
# Backbones

How `sovit.second_order` reads timm's architectures: at least one of every module of
timm {version}. Written by `python -m benchmarks.backbones --table docs/backbones.md`,
held by `tests/test_backbone_table.py`.

*Right* is decided without asking the code that reads: with fresh weights, at that image
size, every position answers to the image, logits differ between images, a loss through
the pooled positions trains more than half of the trunk, its first layer too; and where
timm has them, positions are those of its last map (`forward_intermediates`: "timm's
map"), class token and positions those that its own head classifies by ("timm's head").

{count}

"""
_COLUMNS = (
    *("module", "architecture", "image", "features"),
    *("positions", "prefix", "class", "seen"),
)
_NAMES = Path(__file__).with_name("backbone_names.txt")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Evidence for a reading, and faults found in it."""

    evidence: tuple[str, ...]
    """The parts of timm's own that could be compared, and agree."""

    faults: tuple[str, ...]


def enliven(model: nn.Module, *, images: Tensor) -> nn.Module:
    """Randomise zero-initialised weights, and update norms' statistics on images.

    Otherwise branches get no gradient, and deep activations vanish.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        model.train().forward_features(images)  # pyright: ignore[reportCallIssue]
    return model.eval()


def judge(model: sovit.SecondOrderNet, plain: Any, *, images: Tensor) -> Verdict:
    """Compare a network that pools positions alone with its plain timm trunk."""
    with torch.no_grad():
        given = plain.forward_features(images)
        features = model.forward_features(images)
        skipped = model.features.num_prefix_tokens
        pooled = model.to_tokens(features)[:, skipped:]
    evidence, faults = list[str](), list[str]()
    if features.shape != given.shape or not torch.equal(features, given):
        faults.append("features are not those of timm's model")
    for name, agrees in (
        ("map", _map_agrees(plain, pooled, images=images)),
        ("head", _head_agrees(model, plain, given=given)),
    ):
        if agrees:
            evidence.append(name)
        elif agrees is not None:
            faults.append(f"timm's own {name} has other positions")
    faults += _answers(model, pooled, images=images)
    return Verdict(evidence=tuple(evidence), faults=tuple(faults))


def _map_agrees(plain: Any, pooled: Tensor, *, images: Tensor) -> bool | None:
    """Compare positions with timm's last feature map, if it has the same channels."""
    try:
        with torch.no_grad():
            found = plain.forward_intermediates(
                images, indices=1, norm=True, intermediates_only=True
            )
    except (AttributeError, TypeError, AssertionError, RuntimeError):
        return None
    last = found[-1]
    if not isinstance(last, Tensor) or last.ndim != 4:
        return None
    if last.shape[1] != pooled.shape[2]:
        return None
    tokens = last.flatten(2).mT
    if tokens.shape != pooled.shape:
        return False
    near = _SAME * pooled.abs().max()
    # Some models norm their features and not these: then the number alone can agree.
    return bool((tokens - pooled).abs().max() < near) or None


def _head_agrees(
    model: sovit.SecondOrderNet, plain: Any, *, given: Tensor
) -> bool | None:
    """Compare class token and positions with those that timm's head uses."""
    leaf = given.clone().requires_grad_()
    try:
        out = plain.forward_head(leaf)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    except (AttributeError, TypeError, AssertionError, RuntimeError):
        return None
    size = model.to_tokens(grad).abs().amax((0, 2))
    used = size > 0
    skipped = model.features.num_prefix_tokens
    by_positions = bool(used[skipped:].all())
    by_class = bool(used[:1].all()) and not bool(used[skipped:].any())
    return by_positions or (model.features.has_class_token and by_class)


def _answers(
    model: sovit.SecondOrderNet, pooled: Tensor, *, images: Tensor
) -> list[str]:
    """Find positions, logits and weights that do not depend on the image."""
    faults = list[str]()
    change = (pooled[0] - pooled[1]).abs().amax(-1)
    if not bool((change > _TINY * pooled.abs().max()).all()):
        faults.append("positions do not answer to the image")
    logits = model(images)
    differ = (logits[0] - logits[1]).abs().max()
    if not bool(differ > _TINY * logits.abs().max()):
        faults.append("logits are the same for different images")
    trunk = [p for p in model.backbone.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits.square().sum(), trunk, allow_unused=True)
    alive = [grad is not None and bool(grad.any()) for grad in grads]
    trained = sum(p.numel() for p, yes in zip(trunk, alive, strict=True) if yes)
    if trained <= sum(p.numel() for p in trunk) / 2:
        faults.append("most of the trunk gets no gradient")
    first = next(n for n, p in enumerate(trunk) if p.ndim > 1 and p.shape[0] > 1)
    if not alive[first]:
        faults.append("the first layer gets no gradient")
    return faults


def architectures() -> dict[str, dict[str, Any]]:
    """Return the architectures to try with their settings, some with fewer blocks.

    Where only few blocks are built, the layout is that of all.
    """
    lines = (line.split() for line in _NAMES.read_text().splitlines())
    return {
        name: {key: int(value) for key, value in (pair.split("=") for pair in pairs)}
        for name, *pairs in lines
    }


Row = Mapping[str, str]
"""How one architecture was read: the table's cells by column."""


def line_of(row: Row) -> str:
    """Format the table's row in Markdown."""
    return f"| {' | '.join(row.get(column, '') for column in _COLUMNS)} |"


def try_architecture(name: str) -> Row:
    """Build one architecture with a second-order head, and check how it was read.

    `seen` is "right" and what of timm's agrees, "refused: why", or "WRONG: why".
    """
    settings = dict(architectures().get(name, {}))
    size, in_kwargs = _smallest_size(name, settings)
    if in_kwargs:
        settings["img_size"] = size
    torch.manual_seed(0)
    images = torch.randn(2, 3, *size)
    plain: Any = timm.create_model(name, num_classes=0, **settings)
    trunk = copy.deepcopy(enliven(plain, images=images))
    with torch.no_grad():
        given = plain.forward_features(images)
    row = {
        "module": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        "architecture": f"`{name}`",
        "image": f"{size[0]}x{size[1]}",
        "features": _shape(given),
    }
    try:
        model = sovit.second_order(
            trunk,
            pooling=_POOLING,
            num_classes=3,
            fusion="visual",
            drop_last_stride=False,
            img_size=size,
        )
    except ValueError as error:
        return {**row, "seen": f"refused: {_why(error)}"}
    verdict = judge(model.eval(), plain, images=images)
    found = model.features
    kind = "map" if given.ndim == 4 else "tokens"
    last = "last" if found.channels_last else "first"
    agreed = " and ".join(f"timm's {name}" for name in verdict.evidence)
    right = f"right: {agreed} agrees" if agreed else "right"
    return {
        **row,
        "features": f"{kind} {row['features']}, channels {last}",
        "positions": str(found.num_tokens),
        "prefix": str(found.num_prefix_tokens),
        "class": "yes" if found.has_class_token else "no",
        "seen": f"WRONG: {'; '.join(verdict.faults)}" if verdict.faults else right,
    }


def _why(error: ValueError) -> str:
    return " ".join(str(error).split()).replace("|", "/").partition("; ")[0]


def _shape(given: Any) -> str:
    if isinstance(given, Tensor):
        return "x".join(str(side) for side in given.shape[1:])
    return f"{type(given).__name__} of {len(given)}"


def _smallest_size(
    name: str, settings: Mapping[str, Any]
) -> tuple[tuple[int, int], bool]:
    """Find the smallest image size that timm accepts, and whether it must be passed."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    native: tuple[int, int] = config.input_size[-2:]
    sizes = ((side, side) for side in SIZES if side <= min(native))
    for size in (*sizes, native):
        for in_kwargs in (False, True):
            said: dict[str, Any] = {"img_size": size} if in_kwargs else {}
            try:
                with torch.device("meta"), torch.no_grad():
                    model: nn.Module = timm.create_model(
                        name, num_classes=0, **settings, **said
                    )
                    given = model.eval().forward_features(torch.zeros(1, 3, *size))  # pyright: ignore[reportCallIssue]
            except (TypeError, RuntimeError, AssertionError, ValueError):
                continue
            if not isinstance(given, Tensor) or given.ndim < 3:
                return size, in_kwargs
            if given.numel() // model.num_features >= MIN_POSITIONS:  # pyright: ignore[reportOperatorIssue]
                return size, in_kwargs
    return native, False


def table(rows: Iterable[Row]) -> str:
    """Format the page with the table of all rows."""
    rows = sorted(rows, key=lambda row: (row["module"], row["architecture"].strip("`")))
    right, refused = (
        sum(row["seen"].startswith(word) for row in rows)
        for word in ("right", "refused")
    )
    count = (
        f"{len(rows)} architectures of {len({row['module'] for row in rows})} modules: "
        f"{right} right, {refused} refused, {len(rows) - right - refused} wrong."
    )
    head = {column: column for column in _COLUMNS}, dict.fromkeys(_COLUMNS, "---")
    lines = "".join(f"{line_of(row)}\n" for row in (*head, *rows))
    return _HEADER.format(version=timm.__version__, count=count) + lines


@dataclass(frozen=True, kw_only=True)
class _Options:
    only: tuple[str, ...] = ()
    """Architectures to try, else all."""

    table: Path | None = None
    """Write the page with the table here."""


def _main(arguments: Sequence[str]) -> None:
    options = parse(_Options, arguments=arguments, prog=_PROG, text=__doc__)
    rows = []
    for name in options.only or architectures():
        rows.append(try_architecture(name))
        print(line_of(rows[-1]), flush=True)
    if options.table is not None:
        options.table.write_text(table(rows))


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
