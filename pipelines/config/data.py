"""Settings of the data: shards, reading, and how training changes images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config.checks import check_fields
from pipelines.config.rand_augment import RandAugment, parse_rand_augment

# Reads wait for storage more than they compute, so four of them share a CPU.
CPUS_PER_READ = 0.25
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bilinear", "bicubic"]
Exif = Literal["ignore", "rotate"]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of training images; names and meanings are timm's."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """random: one of the two for each image."""
    auto_augment: str = ""
    """RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and colour; 0 is off."""
    re_prob: float = 0.0
    """Probability of random erasing."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What erased boxes hold: zeros, one random colour, or noise."""
    re_count: int = 1
    """Boxes of one erasing, at most."""
    num_repeats: int = 1
    """Repeated augmentation: times an image is in one batch, augmented anew. An
    epoch keeps its length, so the whole set passes once in this many epochs."""

    def __post_init__(self) -> None:
        (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
        one_of = "0 where auto_augment is set: timm too applies one of the two"
        check_fields(
            self,
            "augment.",
            crop_scale=(0 < low <= high <= 1, "0 < low <= high <= 1"),
            crop_ratio=(0 < narrow <= wide, "0 < low <= high"),
            hflip=(0 <= self.hflip <= 1, "a probability"),
            color_jitter=(0 <= self.color_jitter <= 1, "0 <= strength <= 1"),
            re_prob=(0 <= self.re_prob <= 1, "a probability"),
            re_count=(self.re_count >= 1, "at least 1"),
            num_repeats=(self.num_repeats >= 1, "at least 1"),
        )
        if self.rand_augment is not None:
            check_fields(
                self, "augment.", color_jitter=(self.color_jitter == 0, one_of)
            )

    @property
    def rand_augment(self) -> RandAugment | None:
        """RandAugment's settings; None where it is off."""
        return parse_rand_augment(self.auto_augment) if self.auto_augment else None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Shards that are read, in what order, and how pixels are made of them."""

    train: str
    """Folder of training shards, as sovit-shards writes them, or of images, a folder
    for each class: shards of these are made once, beside the runs."""
    val: str = ""
    """Folder of held-out shards or images; not read with --validation.no-held-out."""
    val_share: float | None = None
    """Share of each class that is held out of a folder of images without --data.val;
    0.1 if not set. Near-duplicates stay on one side."""
    val_seed: int = 0
    """Another seed holds out other images."""
    batch_size: int
    """Images a step sees, over all workers."""
    eval_batch_size: int = 256
    """Images an evaluation step sees, over all workers."""
    eval_mirror: bool = False
    """Average the logits of every crop and its mirror image in evaluation."""
    balance: float = 0.0
    """Balance of the classes in an epoch: a class of n images is shown in proportion to
    n^(1 - balance). 0: every image once; 0.5: square-root sampling; 1: all classes
    equally often. An epoch keeps its length, and shows some images several times."""
    shuffle_rows: int = 2048
    """Rows shuffled among each other: one read unit. Rounded up to whole batches."""
    eval_interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    """Evaluation resizes the short side to img_size / crop_pct, then crops."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    exif: Exif = "ignore"
    """rotate: photographs are turned upright by their EXIF orientation, in training,
    evaluation and prediction alike. timm ignores it, and so do the papers."""
    decoder: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI where it is installed, else Pillow, which gives the same pixels."""
    hw_decoder_load: float = 0.0
    """Share of a batch that a GPU's JPEG engine decodes, where it has one. Its pixels
    differ a little, and above 0 which images it gets depends on the batch: then an
    image's pixels are no longer the same after a restart, or on other workers."""
    decode_on: Literal["workers", "readers"] = "workers"
    """readers: the machines that read also decode, and pixels travel."""
    reader_label: str = ""
    """Ray node label, `name=value`, of the machines that read; empty is any."""
    num_decode_threads: int = 1
    """Threads of one worker that decode."""
    num_prefetch_batches: int = 4
    """Most decoded batches that wait for the model."""
    num_readers: int = 4
    """Most units that are read at the same time, over all machines."""
    read_ahead_mb: int = 64
    """Most encoded megabytes that wait for one worker."""
    max_bad_share: float = 0.01
    """Share of a set's images that may fail to decode before a run stops."""

    def __post_init__(self) -> None:
        counts = (
            "batch_size",
            "eval_batch_size",
            "shuffle_rows",
            "num_decode_threads",
            "num_prefetch_batches",
            "num_readers",
            "read_ahead_mb",
        )
        name, is_label, value = self.reader_label.partition("=")
        check_fields(
            self,
            "data.",
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
            val_share=(
                self.val_share is None or 0 < self.val_share < 1,
                "0 < share < 1",
            ),
            balance=(0 <= self.balance <= 1, "0 <= balance <= 1"),
            crop_pct=(0 < self.crop_pct <= 1, "0 < share <= 1"),
            std=(min(self.std) > 0, "three numbers above 0"),
            hw_decoder_load=(0 <= self.hw_decoder_load <= 1, "0 <= share <= 1"),
            max_bad_share=(0 <= self.max_bad_share <= 1, "0 <= share <= 1"),
            reader_label=(
                not self.reader_label or bool(name and is_label and value),
                "a Ray node label, name=value",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """Settings that decide a sample's pixels."""

    data: Data
    augment: Augment
    img_size: int
    seed: int
    train: bool

    @property
    def fill(self) -> tuple[int, int, int]:
        """Fill colour where an operation moved the image away."""
        red, green, blue = (min(round(255 * value), 255) for value in self.data.mean)
        return red, green, blue

    @property
    def num_ops(self) -> int:
        """Number of operations that an image may go through one after another."""
        policy = self.augment.rand_augment
        if not self.train:
            return 0
        if policy is not None:
            return policy.num_layers
        return 3 if self.augment.color_jitter else 0
