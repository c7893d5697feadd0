"""Describe a run as frozen dataclasses that refuse bad values when they are built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipelines.data_config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    Data,
    Interpolation,
)
from pipelines.field_checks import check_fields
from sovit import Pooling

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "Data",
    "Interpolation",
    "Model",
    "Optim",
    "Run",
    "Scale",
]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Name a timm model and what to build it with."""

    name: str
    """Any name that `timm.create_model` knows, ours included."""
    img_size: int = 224
    """Height and width of the input in pixels."""
    drop_path_rate: float = 0.0
    pooling: Pooling | None = None
    """Second-order head; None leaves the model's own."""
    kwargs: dict[str, int | float | str] = field(default_factory=dict)
    """Further keyword arguments for `timm.create_model`, such as depth."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.",
            img_size=(self.img_size >= 1, "at least 1 pixel"),
            drop_path_rate=(0 <= self.drop_path_rate < 1, "0 <= rate < 1"),
        )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Set the optimiser, its schedule and the regularisers of the loss."""

    lr: float
    num_epochs: int
    """Cosine epochs, warm-up included."""
    cooldown_epochs: int = 0
    """Epochs at min_lr after the cosine."""
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    """Not applied to parameters of one dimension."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad_norm: float = 0.0
    """0 leaves gradients as they are."""
    num_accumulation: int = 1
    """Micro-batches a worker's share of a batch is cut into."""
    label_smoothing: float = 0.1
    mixup: float = 0.0
    """Alpha of the beta distribution; 0 is off."""
    cutmix: float = 0.0
    mix_switch: float = 0.5
    """Probability of cutmix where both are on."""
    ema_decay: float = 0.0
    """0 keeps no moving average of the weights."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "optim.",
            lr=(self.lr > 0, "above 0"),
            num_epochs=(self.num_epochs >= 1, "at least 1"),
            cooldown_epochs=(self.cooldown_epochs >= 0, "at least 0"),
            warmup_epochs=(
                0 <= self.warmup_epochs <= self.num_epochs,
                "0 <= warmup_epochs <= num_epochs",
            ),
            num_accumulation=(self.num_accumulation >= 1, "at least 1"),
            label_smoothing=(0 <= self.label_smoothing < 1, "0 <= share < 1"),
            mixup=(self.mixup >= 0, "at least 0"),
            cutmix=(self.cutmix >= 0, "at least 0"),
            mix_switch=(0 <= self.mix_switch <= 1, "a probability"),
            ema_decay=(0 <= self.ema_decay < 1, "0 <= decay < 1"),
            weight_decay=(self.weight_decay >= 0, "at least 0"),
            clip_grad_norm=(self.clip_grad_norm >= 0, "at least 0"),
            warmup_lr=(self.warmup_lr >= 0, "at least 0"),
            min_lr=(self.min_lr >= 0, "at least 0"),
            betas=(min(self.betas) >= 0 and max(self.betas) < 1, "0 <= beta < 1"),
            eps=(self.eps > 0, "above 0"),
        )

    @property
    def total_epochs(self) -> int:
        """Count all epochs, the cool-down included."""
        return self.num_epochs + self.cooldown_epochs


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Say on how many workers a run goes, and what each of them holds."""

    num_workers: int = 1
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker."""
    max_failures: int = 3
    """Worker failures that are answered with a restart from the last checkpoint."""
    start_timeout_s: float = 30.0
    """How long a cluster may take to have the workers' CPUs and GPUs."""
    amp: Literal["auto", "off"] = "auto"
    """auto: bfloat16 autocast where the device has instructions for it."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "scale.",
            num_workers=(self.num_workers >= 1, "at least 1"),
            cpus_per_worker=(self.cpus_per_worker > 0, "above 0"),
            max_failures=(self.max_failures >= 0, "at least 0"),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Hold everything that one training needs: a recipe returns this."""

    recipe: str
    """Name that the recipe goes by, such as imagenet.so_vit_14."""
    model: Model
    data: Data
    optim: Optim
    augment: Augment = field(default_factory=Augment)
    scale: Scale = field(default_factory=Scale)
    seed: int = 42
    storage: str = "runs"
    """Folder (or bucket address) that holds each run's checkpoints."""
    experiment: str = "sovit"
    """MLflow experiment."""
    log_every_steps: int = 50
    checkpoint_every_steps: int = 0
    """Steps between checkpoints within an epoch; 0 is none by steps."""
    checkpoint_every_minutes: float = 30.0
    """Minutes between checkpoints within an epoch, looked at when metrics are logged;
    0 is none by time."""
    num_checkpoints_to_keep: int = 2
    key_log: str = ""
    """Folder in which every worker notes what it trained on, for audits; none if empty.
    See `pipelines.key_log`."""
    published_top1: float | None = None
    """Top-1 in percent that the paper or its code reports, if any."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "",
            log_every_steps=(self.log_every_steps >= 1, "at least 1"),
            num_checkpoints_to_keep=(self.num_checkpoints_to_keep >= 1, "at least 1"),
            checkpoint_every_steps=(self.checkpoint_every_steps >= 0, "at least 0"),
            checkpoint_every_minutes=(self.checkpoint_every_minutes >= 0, "at least 0"),
            key_log=("://" not in self.key_log, "a local or shared folder"),
        )
        if self.data.batch_size % self.augment.num_repeats:
            raise ValueError(
                "augment.num_repeats: wanted a divisor of data.batch_size, came "
                f"{self.augment.num_repeats} and {self.data.batch_size}; set "
                "--augment.num-repeats or --data.batch-size"
            )
        share = self.data.batch_size / self.scale.num_workers
        if share < 2 * self.optim.num_accumulation:
            raise ValueError(
                "data.batch_size: wanted at least 2 images a worker and micro-batch, "
                f"came {self.data.batch_size} over {self.scale.num_workers} workers; "
                "raise --data.batch-size or lower --scale.num-workers"
            )
        if self.data.eval_batch_size < self.scale.num_workers:
            raise ValueError(
                "data.eval_batch_size: wanted at least 1 image a worker, came "
                f"{self.data.eval_batch_size} over {self.scale.num_workers} workers; "
                "raise --data.eval-batch-size or lower --scale.num-workers"
            )

    @property
    def micro_batch_size(self) -> int:
        """Count the images of one forward pass of one worker."""
        share = math.ceil(self.data.batch_size / self.scale.num_workers)
        return math.ceil(share / self.optim.num_accumulation)
