"""Train one small backbone with each head of the family, and compare what they reach.

    python -m benchmarks.family
    python -m benchmarks.family --num-seeds 1 --num-epochs 2 --json result.json

The demo's photographs, its way of training and its schedule; a ResNet of one block a
stage for 32x32 pixels, whose last three stages have 8x8 positions: 64 tokens, as many
as the widest head has channels. First order is average pooling; ECA and GSoP gate the
channels within the blocks and end in average pooling. Seeds change weights and the
order of images. One process, without Ray.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import sovit
from benchmarks import trainings
from benchmarks.trainings import Results, mean_spread, train_all
from pipelines.cli.command import parse, run_command
from sovit.attention import add_gsop, stages_of
from sovit.networks.eca_gsop import add_eca
from sovit.pooling import Pooling

_PROG = "benchmarks.family"
_WIDTHS = (16, 32, 64, 128)
# timm's.
_STEM_WIDTH = 64

Attend = Callable[[ResNet], object]
HEADS: Mapping[str, tuple[Pooling, Attend]] = MappingProxyType(
    {
        "first order": (Pooling.named("avg"), lambda trunk: None),
        "iSQRT-COV": (Pooling.named("isqrt_cov", reduced_dim=64), lambda trunk: None),
        "svPN": (Pooling.named("svpn"), lambda trunk: None),
        "ECA": (
            Pooling.named("avg"),
            lambda trunk: add_eca(trunk, kernel_sizes=(3, 3, 3, 3)),
        ),
        "GSoP": (
            Pooling.named("avg"),
            lambda trunk: add_gsop(trunk, stages=(1, 2, 3, 4), reduced_dim=32),
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Options(trainings.Options):
    """What is trained, and how long."""

    heads: tuple[str, ...] = tuple(HEADS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.heads) - set(HEADS)):
            raise ValueError(
                f"expected heads of {list(HEADS)}, got {unknown}; set --heads"
            )


def build(head: str, num_classes: int) -> nn.Module:
    """Build the small ResNet with a head of the family."""
    pooling, attend = HEADS[head]
    block: Any = BasicBlock  # timm's annotation asks for an instance.
    trunk = ResNet(block, layers=(1, 1, 1, 1), channels=_WIDTHS)
    # For 32x32 pixels: the stem keeps a quarter of them, and two stages their size.
    conv1 = nn.Conv2d(3, _STEM_WIDTH, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
    trunk.set_submodule("conv1", conv1)
    trunk.set_submodule("maxpool", nn.Identity())
    for module in stages_of(trunk)[2].modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    attend(trunk)
    return sovit.second_order(trunk, pooling=pooling, num_classes=num_classes)


def table(results: Results) -> str:
    """Format mean and spread over the seeds."""
    rows = {
        head: {
            "params": f"{found[0].num_params:,}",
            "top-1 %": mean_spread([one.top1 for one in found]),
            "average %": mean_spread([one.ema_top1 for one in found]),
            "seconds": f"{statistics.mean(one.seconds for one in found):.0f}",
        }
        for head, found in results.items()
    }
    return pd.DataFrame(rows).T.to_string()


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    builds = {head: functools.partial(build, head) for head in options.heads}
    print(table(train_all(builds, options=options)))


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
