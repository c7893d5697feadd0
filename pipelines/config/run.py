"""Configuration of a run: frozen dataclasses that reject bad values when built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.checks import check_fields
from pipelines.config.data import Augment, Data, PixelSettings
from pipelines.config.evaluation import Validation
from pipelines.config.optim import Optim
from sovit import Pooling


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model of timm, and the arguments to build it with."""

    name: str
    """Any name that timm knows, ours included."""
    img_size: int = 224
    """Height and width of the input in pixels."""
    drop_path_rate: float = 0.0
    pooling: Pooling | None = None
    """Second-order head, put on a model of timm as by `sovit.second_order`; None leaves
    the model's own."""
    init_from: str = ""
    """Address of weights that training starts from: a checkpoint of ours, a file that a
    paper's authors released, a file or folder of timm's for the same model. The moving
    average is taken where there is one; other classes get a fresh classifier."""
    init_triangle: Literal["auto", "upper", "lower"] = "auto"
    """Which triangle of the covariance the classifier in such a released file sees.
    auto: lower for GSoP, upper for the others; fast-MPN-COV before 2018-12-26 has the
    lower one too, which nothing in the file tells."""
    kwargs: dict[str, bool | int | float | str | tuple[int, ...]] = field(
        default_factory=dict
    )
    """Further keyword arguments of the network, such as depth; with a pooling those of
    `sovit.second_order` too, such as fusion."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.",
            img_size=(self.img_size >= 1, "at least 1 pixel"),
            drop_path_rate=(0 <= self.drop_path_rate < 1, "0 <= rate < 1"),
            init_triangle=(
                self.init_triangle == "auto" or self.init_from != "",
                "auto without model.init_from",
            ),
        )

    @property
    def triangle(self) -> str | None:
        """Return `init_triangle` as `sovit.load_official` takes it."""
        return None if self.init_triangle == "auto" else self.init_triangle


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Probing of the loss along its gradient: see `sovit.probes`."""

    every_steps: int = 0
    """Steps from one probe to the next; 0 is never, the optimisation study has 500."""
    min_step_size: float = 0.1
    """As the study has it for ResNets; MobileNetV2 has 0.045 to 1.5."""
    max_step_size: float = 75.0
    num_step_sizes: int = 50
    stem: str = ""
    """Module whose output is moved along its gradient; found by the network's family
    if empty."""

    def __post_init__(self) -> None:
        low, high = self.min_step_size, self.max_step_size
        check_fields(
            self,
            "probe.",
            every_steps=(self.every_steps >= 0, "at least 0"),
            min_step_size=(0 <= low <= high, "0 <= min_step_size <= max_step_size"),
            num_step_sizes=(self.num_step_sizes >= 2, "at least 2"),
        )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Number of workers of a run, and the resources of each."""

    num_workers: int = 1
    """0 trains in the calling process, without Ray: a failure ends the run, which
    --resume continues."""
    min_workers: int = 0
    """Elastic training: continue with as few workers when hosts are lost, and with more
    as they come back, up to num_workers; 0 waits until all are there. Batches stay the
    same, in more micro-batches."""
    resize_every_s: float = 60.0
    """Seconds from one look for workers that have come back to the next."""
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker, and threads that it computes with."""
    max_failures: int = 3
    """Worker failures that are answered with a restart from the last checkpoint."""
    start_timeout_s: float = 30.0
    """Seconds that a cluster may take to provide the workers' CPUs and GPUs."""
    amp: Literal["auto", "off"] = "auto"
    """auto: bfloat16 autocast where the device has instructions for it."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the training step with torch.compile: a minute or more at each start,
    faster steps after it. auto: on GPUs. Where a worker can't, for want of a C++
    compiler say, none does."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory,
    a third more time."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: shard the weights, their gradients and the optimiser's state over the
    workers, for models that do not fit one GPU."""
    deterministic: bool = False
    """Deterministic kernels: the same bits every time, on a GPU too, where that is
    slower; a model with an operation that has none is refused at its first step."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """Precision of float32 matrix products on a GPU, such as Newton-Schulz's and other
    poolings', which autocast leaves alone. high: TF32 on tensor cores, which takes of
    each factor 10 bits of mantissa instead of 23."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of gradients between workers. bfloat16: half the bytes, for slow networks;
    they are rounded to 8 bits and summed so, weights stay float32."""
    hang_timeout_s: float = 600.0
    """Seconds without a step after which a worker is killed and counts as failed; 0 is
    never."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "scale.",
            num_workers=(self.num_workers >= 0, "at least 0"),
            min_workers=(0 <= self.min_workers <= self.num_workers, "0 to num_workers"),
            resize_every_s=(self.resize_every_s > 0, "above 0"),
            cpus_per_worker=(self.cpus_per_worker > 0, "above 0"),
            max_failures=(self.max_failures >= 0, "at least 0"),
            gradient_dtype=(
                self.gradient_dtype == "float32" or self.sharding == "none",
                "float32 with --scale.sharding fsdp",
            ),
            hang_timeout_s=(self.hang_timeout_s >= 0, "at least 0"),
        )

    @property
    def is_local(self) -> bool:
        """Whether the calling process trains, without Ray."""
        return not self.num_workers

    @property
    def wants_compile(self) -> bool:
        """Whether steps are to be compiled where workers can."""
        return self.use_gpu if self.compile == "auto" else self.compile

    @property
    def world_size(self) -> int:
        """Number of processes that train."""
        return max(self.num_workers, 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that one training needs: a recipe returns this."""

    recipe: str
    """Name that the recipe goes by, such as imagenet.so_vit_14."""
    model: Model
    data: Data
    optim: Optim
    augment: Augment = field(default_factory=Augment)
    scale: Scale = field(default_factory=Scale)
    probe: Probe = field(default_factory=Probe)
    validation: Validation = field(default_factory=Validation)
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
    max_hours: float = 0.0
    """Hours after which the command ends with a checkpoint and exit status 75, to be
    resumed; 0 is no limit."""
    num_checkpoints_to_keep: int = 2
    """Latest checkpoints that are kept, besides the best."""
    max_failed_checkpoints: int = 3
    """Checkpoint writes in a row that may fail, on a full disk say, before the run
    stops."""
    audit_log: str = ""
    """Folder in which every worker logs the images it trained on; none if empty. See
    `pipelines.worker.audit_log`."""
    published_top1: float | None = None
    """Top-1 in percent that the paper or its code reports, if any."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "",
            log_every_steps=(self.log_every_steps >= 1, "at least 1"),
            max_hours=(self.max_hours >= 0, "at least 0"),
            num_checkpoints_to_keep=(self.num_checkpoints_to_keep >= 1, "at least 1"),
            max_failed_checkpoints=(self.max_failed_checkpoints >= 0, "at least 0"),
            checkpoint_every_steps=(self.checkpoint_every_steps >= 0, "at least 0"),
            checkpoint_every_minutes=(self.checkpoint_every_minutes >= 0, "at least 0"),
            audit_log=("://" not in self.audit_log, "a local or shared folder"),
        )
        if self.data.batch_size % self.augment.num_repeats:
            raise ValueError(
                "augment.num_repeats: expected a divisor of data.batch_size, got "
                f"{self.augment.num_repeats} and {self.data.batch_size}; set "
                "--augment.num-repeats or --data.batch-size"
            )
        if self.optim.optimizer == "muon" and self.scale.sharding != "none":
            raise ValueError(
                "optim.optimizer: expected adamw or sgd for a sharded model, got muon, "
                "which needs whole matrices; set --scale.sharding none or "
                "--optim.optimizer adamw"
            )
        if self.data.balance and self.augment.num_repeats > 1:
            raise ValueError(
                "data.balance: expected 0 with repeated augmentation, whose images "
                f"come equally often, got {self.data.balance:g} with "
                f"--augment.num-repeats {self.augment.num_repeats}; leave one out"
            )
        if self.data.balance and self.optim.class_weights != "none":
            raise ValueError(
                "data.balance: expected 0 with --optim.class-weights, since a rare "
                f"class would count twice over, got {self.data.balance:g}; leave one "
                "out"
            )
        if self.validation.asynchronous and self.scale.is_local:
            raise ValueError(
                "validation.asynchronous: expected workers of Ray to evaluate beside, "
                "got --scale.num-workers 0; leave out --validation.asynchronous"
            )
        if self.probe.every_steps and self.scale.sharding != "none":
            raise ValueError(
                "probe.every_steps: expected 0 for a sharded model, which the first "
                f"worker alone can't probe, got {self.probe.every_steps}; set "
                "--scale.sharding none or --probe.every-steps 0"
            )
        share = self.data.batch_size / self.scale.world_size
        if share < 2 * self.optim.num_accumulation:
            raise ValueError(
                "data.batch_size: expected at least 2 images a worker and micro-batch, "
                f"got {self.data.batch_size} over {self.scale.world_size} workers; "
                "raise --data.batch-size or lower --scale.num-workers"
            )
        if self.data.eval_batch_size < self.scale.world_size:
            raise ValueError(
                "data.eval_batch_size: expected at least 1 image a worker, got "
                f"{self.data.eval_batch_size} over {self.scale.world_size} workers; "
                "raise --data.eval-batch-size or lower --scale.num-workers"
            )

    @property
    def micro_batch_size(self) -> int:
        """Number of images of one forward pass of one worker."""
        share = math.ceil(self.data.batch_size / self.scale.world_size)
        return math.ceil(share / self.optim.num_accumulation)

    def pixels(self, *, train: bool) -> PixelSettings:
        """Extract what decides the pixels of a split."""
        return PixelSettings(
            data=self.data,
            augment=self.augment,
            img_size=self.model.img_size,
            seed=self.seed,
            train=train,
        )

    def num_micro(self, num_workers: int) -> int:
        """Count a step's micro-batches on so many workers.

        On fewer than the run has there are more of them, so that each fits a device's
        memory as before.
        """
        if num_workers == self.scale.world_size:
            return self.optim.num_accumulation
        share = math.ceil(self.data.batch_size / num_workers)
        return math.ceil(share / self.micro_batch_size)
