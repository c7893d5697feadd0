"""Options of a sweep: method, scheduler, budget, objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config import check_fields

Method = Literal["random", "grid", "optuna"]
Mode = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a sweep searches, and what it may cost."""

    method: Method = "random"
    """random draws settings, no two alike; grid takes all combinations of choices;
    optuna learns from what trials reported (TPE, and for several metrics too)."""
    num_trials: int = 16
    """Settings that are tried; at most this many of a grid."""
    num_concurrent: int = 0
    """Trials at a time; 0 takes as many as the machine or cluster has room for."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the trials that are behind others of the same epoch
    (arXiv 1810.05934); none trains each to its end."""
    grace_epochs: int = 1
    """Epochs that every trial gets; asha first compares after them."""
    reduction_factor: float = 3.0
    """asha lets about one in so many go on, and compares again after so many times as
    many epochs."""
    metrics: tuple[str, ...] = ("val/top1",)
    """What is looked for, the first above all: names as in MLflow, of metrics that come
    at each epoch's end, such as val/top1, train/images_per_s, train/peak_memory_mb,
    probe/loss_variation."""
    modes: tuple[Mode, ...] = ("max",)
    """Whether the most or the least of each metric is wanted."""
    max_gpu_hours: float = 0.0
    """The sweep stops when its trials have held GPUs for so many hours together; hours
    of workers where the recipe uses no GPU; 0 is no limit."""
    num_retries: int = 1
    """How often a trial whose workers, or whose process, died is tried again, from its
    last checkpoint; beside the run's own scale.max_failures."""
    sample_seed: int = 0
    """Of the settings that are drawn."""
    head_from: str = ""
    """Checkpoint of a trained backbone: then the settings are first tried on its tokens
    alone, and only the best are trained in full."""
    head_epochs: int = 3
    """Epochs that a head is trained for on the tokens."""
    num_promoted: int = 3
    """Best settings of the heads that are trained in full."""
    num_spread: int = 0
    """Further settings, spread evenly over the heads' ranks, that are trained in full
    to show how well the heads foretell it."""

    def __post_init__(self) -> None:
        """Reject invalid values."""
        check_fields(
            self,
            "",
            num_trials=(self.num_trials >= 1, "at least 1"),
            num_concurrent=(self.num_concurrent >= 0, "at least 0"),
            grace_epochs=(self.grace_epochs >= 1, "at least 1"),
            reduction_factor=(self.reduction_factor > 1, "above 1"),
            metrics=(
                bool(self.metrics) and len(set(self.metrics)) == len(self.metrics),
                "one metric at least, none twice",
            ),
            modes=(
                len(self.modes) == len(self.metrics),
                f"max or min for each of {self.metrics}",
            ),
            max_gpu_hours=(self.max_gpu_hours >= 0, "at least 0"),
            num_retries=(self.num_retries >= 0, "at least 0"),
            head_epochs=(self.head_epochs >= 1, "at least 1"),
            num_promoted=(self.num_promoted >= 1, "at least 1"),
            num_spread=(self.num_spread >= 0, "at least 0"),
        )

    @property
    def metric(self) -> str:
        """Metric that ranks the trials."""
        return self.metrics[0]

    @property
    def sign(self) -> int:
        """1 if the first metric is maximised, else -1."""
        return 1 if self.modes[0] == "max" else -1
