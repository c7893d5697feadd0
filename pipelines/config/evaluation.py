"""Settings of evaluation on held-out images while a run trains."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.config.checks import check_fields

# Their metrics are val_NAME/top1 and, of the raw weights, val_NAME_raw/top1.
_NAME = re.compile(r"(?!.*raw$)[A-Za-z0-9_.-]+")
MAX_WORST = 256
"""Maximum pictures of the worst images in a report."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Evaluation of a run: how often, of which weights and on what else."""

    held_out: bool = True
    """no-held-out trains on without any held-out set: nothing is evaluated, and no
    checkpoint is the best."""
    every_epochs: int = 1
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""
    metric: Literal["top1", "top5", "loss"] = "top1"
    """Metric of the held-out set that the best checkpoint and `patience_epochs` go by,
    of the moving average where one is kept."""
    patience_epochs: int = 0
    """Epochs without a better metric after which the training ends; 0 never does."""
    weights: Literal["average", "both"] = "both"
    """both: the raw weights too, where a moving average is kept."""
    asynchronous: bool = False
    """Evaluate checkpoints asynchronously, in a separate Ray task, while training goes
    on; not for a run in one process."""
    num_gpus: float = 0.0
    """GPUs of an asynchronous evaluation; without one it runs on CPUs."""
    num_cpus: float = 1.0
    """CPUs of an asynchronous evaluation, and threads that it computes and decodes
    with."""
    real_labels: str = ""
    """ImageNet-ReaL's real.json, a file or a bucket address; none if empty."""
    also: tuple[str, ...] = ()
    """Further held-out shard sets, NAME=SHARDS, such as v2=shards/imagenet_v2."""
    num_worst: int = 32
    """Images of the highest loss that are shown; 0 is none."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "validation.",
            every_epochs=(self.every_epochs >= 1, "at least 1"),
            patience_epochs=(self.patience_epochs >= 0, "at least 0"),
            num_gpus=(self.num_gpus >= 0, "at least 0"),
            num_cpus=(self.num_cpus > 0, "above 0"),
            num_worst=(0 <= self.num_worst <= MAX_WORST, f"0 to {MAX_WORST}"),
        )
        named_addresses(self.also, option="--validation.also")
        if not self.held_out and (self.also or self.real_labels or self.asynchronous):
            raise ValueError(
                "validation.held_out: expected a held-out set for --validation.also, "
                "--validation.real-labels or --validation.asynchronous, got "
                "--validation.no-held-out; leave out either"
            )
        if self.patience_epochs and (self.asynchronous or not self.held_out):
            other = "asynchronous" if self.asynchronous else "no-held-out"
            raise ValueError(
                "validation.patience_epochs: expected an evaluation at an epoch's end "
                f"to wait for, got --validation.{other}; leave out either"
            )

    @property
    def also_at(self) -> dict[str, str]:
        """Addresses of the further sets by name."""
        return named_addresses(self.also, option="--validation.also")

    def is_due(self, epoch: int, *, num_epochs: int) -> bool:
        """Check whether to evaluate after so many of a run's epochs."""
        is_due = epoch % self.every_epochs == 0 or epoch == num_epochs
        return self.held_out and is_due

    def moved(self, move: Callable[[str], str]) -> Validation:
        """Return a copy with every path changed, to an absolute one say."""
        also = tuple(f"{name}={move(at)}" for name, at in self.also_at.items())
        real_labels = move(self.real_labels) if self.real_labels else ""
        return dataclasses.replace(self, also=also, real_labels=real_labels)


def named_addresses(also: Sequence[str], *, option: str) -> dict[str, str]:
    """Parse NAME=SHARDS of each set.

    Raises ValueError, naming the option, where one has no name, a name that its metrics
    could not be told apart by, or a name twice.
    """
    found: dict[str, str] = {}
    for item in also:
        name, _, address = item.partition("=")
        if not _NAME.fullmatch(name) or not address or name in found:
            raise ValueError(
                "expected sets as NAME=SHARDS, each name once, of letters, digits and "
                f"_.-, and none that ends in raw, got {item!r}; set {option}"
            )
        found[name] = address
    return found
