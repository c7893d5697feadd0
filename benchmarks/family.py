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

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from tqdm import tqdm

import sovit
from benchmarks.report import machine
from pipelines.cli import parse, run_command
from pipelines.config import Run, Scale
from pipelines.ingest.footers import read_shard_set
from pipelines.ingest.stream import Plans
from pipelines.loop import LoopSettings, TrainState, train
from pipelines.optim import build_optimizer
from pipelines.outputs import check_file
from pipelines.supply import opened_here
from pipelines.validation.measure import validate
from recipes.demo import demo
from sovit.attention import add_gsop, stages_of
from sovit.networks.eca_gsop import add_eca
from sovit.pooling import Pooling

_PROG = "benchmarks.family"
_WIDTHS = (16, 32, 64, 128)
# timm's.
_STEM_WIDTH = 64
_ALL_STAGES = (1, 2, 3, 4)


def _eca(trunk: ResNet) -> None:
    add_eca(trunk, kernel_sizes=(3, 3, 3, 3))


def _gsop(trunk: ResNet) -> None:
    add_gsop(trunk, stages=_ALL_STAGES, reduced_dim=32)


def _nothing(trunk: ResNet) -> None:
    del trunk


Attend = Callable[[ResNet], None]
HEADS: Mapping[str, tuple[Pooling, Attend]] = MappingProxyType(
    {
        "first order": (Pooling.named("avg"), _nothing),
        "iSQRT-COV": (Pooling.named("isqrt_cov", reduced_dim=64), _nothing),
        "svPN": (Pooling.named("svpn"), _nothing),
        "ECA": (Pooling.named("avg"), _eca),
        "GSoP": (Pooling.named("avg"), _gsop),
    }
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what is trained, and how long."""

    heads: tuple[str, ...] = tuple(HEADS)
    num_seeds: int = 3
    num_epochs: int = 5
    num_threads: int = 2
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.heads) - set(HEADS))
        if unknown or self.num_seeds < 1:
            raise ValueError(
                f"wanted heads of {list(HEADS)} and a seed at least, came {unknown} "
                f"and {self.num_seeds}; set --heads and --num-seeds"
            )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Hold what one training reached."""

    top1: float
    """Percent of the held-out photographs, raw weights."""
    ema_top1: float
    """Of the weights' moving average."""
    num_params: int
    seconds: float
    """Of training, evaluation left out."""


def build(head: str, *, num_classes: int) -> nn.Module:
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


def train_once(
    build: Callable[..., nn.Module], *, seed: int, num_epochs: int
) -> Trained:
    """Train what `build` makes for `num_classes` with one seed, and evaluate."""
    run = describe_run(seed=seed, num_epochs=num_epochs)
    shards = {
        name: read_shard_set(getattr(run.data, name)) for name in ("train", "val")
    }
    epoch = Plans(shards=shards["train"], run=run, train=True).shape(0)
    settings = LoopSettings(
        run=run,
        num_classes=len(shards["train"].classes),
        steps_per_epoch=epoch.num_batches,
        images_per_epoch=epoch.num_images,
        device=torch.device("cpu"),
    )
    torch.manual_seed(seed)
    model = build(num_classes=settings.num_classes)
    model.to(memory_format=torch.channels_last)
    state = TrainState(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, optim=run.optim),
        ema=ModelEmaV3(model, decay=run.optim.ema_decay),
    )
    start_s = time.perf_counter()
    device = settings.device
    with opened_here(shards["train"], run=run, device=device, train=True) as batches:
        train(
            state,
            batches,
            settings=settings,
            on_log=lambda metrics, position: None,
            on_epoch_end=lambda state: None,
        )
    seconds = time.perf_counter() - start_s
    assert state.ema is not None
    models = {"raw": model, "average": state.ema.module}
    with opened_here(shards["val"], run=run, device=device) as batches:
        found = validate(models, batches, settings=settings).scores
    return Trained(
        top1=found["raw"].top1,
        ema_top1=found["average"].top1,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
    )


def describe_run(*, seed: int, num_epochs: int) -> Run:
    """Describe the demo's run for one worker, without its model."""
    run = demo()
    return dataclasses.replace(
        run,
        seed=seed,
        optim=dataclasses.replace(run.optim, num_epochs=num_epochs),
        scale=Scale(num_workers=1),
    )


def table(results: Mapping[str, Sequence[Trained]]) -> str:
    """Draw mean and spread over the seeds, and the difference to first order."""
    lines = [f"{'':<14}{'params':>9}{'top-1 %':>18}{'average %':>18}{'seconds':>9}"]
    for head, found in results.items():
        lines.append(
            f"{head:<14}{found[0].num_params:>9,}"
            f"{mean_spread([one.top1 for one in found]):>18}"
            f"{mean_spread([one.ema_top1 for one in found]):>18}"
            f"{statistics.mean(one.seconds for one in found):>9.0f}"
        )
    return "\n".join(lines)


def mean_spread(values: Sequence[float]) -> str:
    """Show mean and sample deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} +- {spread:.2f}"


def _main(arguments: Sequence[str]) -> None:
    options = parse(Options, arguments=arguments, prog=_PROG, text=__doc__)
    check_file(options.json, option="json")
    torch.set_num_threads(options.num_threads)
    results: dict[str, list[Trained]] = {head: [] for head in options.heads}
    # Heads take turns, so that a machine's drift meets all of them.
    work = [(head, seed) for seed in range(options.num_seeds) for head in options.heads]
    for head, seed in tqdm(work, unit="training", disable=None):
        make = functools.partial(build, head)
        results[head].append(train_once(make, seed=seed, num_epochs=options.num_epochs))
    print(table(results))
    if options.json:
        content: dict[str, Any] = {
            "machine": machine(),
            "options": str(dataclasses.replace(options, json=None)),
            "heads": {
                head: [asdict(one) for one in found] for head, found in results.items()
            },
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_command(_main, prog=_PROG)
