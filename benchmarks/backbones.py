"""Sweep timm's architectures: how `sovit.second_order` reads each, and whether rightly.

    python -m benchmarks.backbones
    python -m benchmarks.backbones --only volo_d1_224 pit_ti_224
    python -m benchmarks.backbones --table docs/backbones.md

At least one architecture of every module of timm, the smallest of each layout, with
fresh weights, at the smallest image size that it takes. What is right is decided
without asking the code that is tried: see `benchmarks.backbone_checks`.
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
from benchmarks.backbone_checks import enliven, judge
from pipelines.cli.command import parse, run_command

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

| module | architecture | image | features | positions | prefix | class | seen |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_NAMES = Path(__file__).with_name("backbone_names.txt")


def architectures() -> dict[str, dict[str, Any]]:
    """Return the architectures to try with their settings, some with fewer blocks.

    Where only few blocks are built, the layout is that of all.
    """
    lines = (line.split() for line in _NAMES.read_text().splitlines())
    return {
        name: {key: int(value) for key, value in (pair.split("=") for pair in pairs)}
        for name, *pairs in lines
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one architecture was read."""

    module: str
    name: str
    image: str
    features: str
    positions: str
    prefix: str
    class_token: str
    seen: str
    """"right" and what of timm's agrees, "refused: why", or "WRONG: why"."""

    def line(self) -> str:
        """Format the table's row in Markdown."""
        cells = (self.module, f"`{self.name}`", self.image, self.features)
        cells = (*cells, self.positions, self.prefix, self.class_token, self.seen)
        return "| " + " | ".join(cells) + " |"


def try_architecture(name: str) -> Row:
    """Build one architecture with a second-order head, and check how it was read."""
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
    shape = _shape(given)
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
        return _row(name, size=size, features=shape, seen=f"refused: {_why(error)}")
    verdict = judge(model.eval(), plain, images=images)
    found = model.features
    kind = "map" if given.ndim == 4 else "tokens"
    last = "last" if found.channels_last else "first"
    agreed = " and ".join(f"timm's {name}" for name in verdict.evidence)
    right = f"right: {agreed} agrees" if agreed else "right"
    return _row(
        name,
        size=size,
        features=f"{kind} {shape}, channels {last}",
        positions=str(found.num_tokens),
        prefix=str(found.num_prefix_tokens),
        class_token="yes" if found.has_class_token else "no",
        seen=f"WRONG: {'; '.join(verdict.faults)}" if verdict.faults else right,
    )


def _row(name: str, *, size: tuple[int, int], **cells: str) -> Row:
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    empty = {"positions": "", "prefix": "", "class_token": ""}
    image = f"{size[0]}x{size[1]}"
    return Row(module=module, name=name, image=image, **{**empty, **cells})  # pyright: ignore[reportArgumentType]


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
    rows = sorted(rows, key=lambda row: (row.module, row.name))
    right = sum(row.seen.startswith("right") for row in rows)
    refused = sum(row.seen.startswith("refused") for row in rows)
    count = (
        f"{len(rows)} architectures of {len({row.module for row in rows})} modules: "
        f"{right} right, {refused} refused, {len(rows) - right - refused} wrong."
    )
    lines = "\n".join(row.line() for row in rows)
    return _HEADER.format(version=timm.__version__, count=count) + lines + "\n"


@dataclass(frozen=True, kw_only=True)
class _Options:
    only: tuple[str, ...] = ()
    """Architectures to try, else all."""

    table: Path | None = None
    """Write the page with the table here."""


def main() -> None:
    """Run `python -m benchmarks.backbones`."""
    run_command(_run, prog=_PROG)


def _run(arguments: Sequence[str]) -> None:
    options = parse(_Options, arguments=arguments, prog=_PROG, text=__doc__)
    rows = []
    for name in options.only or architectures():
        rows.append(try_architecture(name))
        print(rows[-1].line(), flush=True)
    if options.table is not None:
        options.table.write_text(table(rows))


if __name__ == "__main__":
    main()
