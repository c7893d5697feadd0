"""Say what `python -m benchmarks.scale` models, and how much it measures for that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scale.loads import Allowed
from benchmarks.scale.model import Cluster


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what is modelled, and how much is measured for it."""

    num_gpus: tuple[int, ...] = (8, 64, 512)
    num_images: tuple[int, ...] = (1_281_167, 14_197_122, 10**9)
    """ImageNet-1K's, ImageNet-21K's, and as many as a crawl of the web gives."""
    images_per_gpu_s: tuple[float, ...] = (500.0, 1500.0, 3000.0)
    """What a GPU trains on: not measured here, so several."""
    images_per_gpu: int = 64
    """Images of a step on one GPU."""
    image_kb: float = 110.0
    small_kb: float = 27.0
    """Size of an image in shards of short side 256, which are advised."""
    in_bucket: bool = True
    """Whether shards and checkpoints lie in a bucket, or on a path."""
    block_ms: float | None = None
    """Ray's cost of a block. If none is given it is measured where RAY_ADDRESS is set,
    and elsewhere 4.8, as on two cores: docs/scale.md."""
    cluster: Cluster = field(default_factory=Cluster)
    allowed: Allowed = field(default_factory=Allowed)
    recipes: tuple[str, ...] = ("imagenet.so_vit_14", "imagenet.sot_base")
    """Whose checkpoints are timed; the first is the one of the model."""
    num_footers: int = 2400
    """More than 2000, as of large sets: then no labels are read."""
    num_bucket_footers: int = 480
    num_bucket_rows: int = 1024
    """Photographs in the bucket, half of which are read as one unit; and all, without a
    delay."""
    num_read_rows: int = 4096
    """Photographs on the disk, half of which are read as one unit."""
    num_rounds: int = 5
    """Times that what is short is measured; the least counts."""
    num_messages: int = 100_000
    num_logs: int = 1000
    """Times that metrics go to MLflow; 0 leaves it out."""
    costs: Path | None = None
    """A result file, whose costs are taken: nothing is measured."""
    folder: Path | None = None
    """Where sets and checkpoints are written for a while; a temporary folder if none
    is given."""
    json: Path | None = None
    """File for all figures."""
    plot: Path | None = None
    """File for a picture of loads against GPUs, PNG."""

    def __post_init__(self) -> None:
        several = (self.num_gpus, self.num_images, self.images_per_gpu_s, self.recipes)
        if not all(several) or min(self.num_gpus) < 1 or self.images_per_gpu < 2:
            raise ValueError(
                "wanted some GPUs, sets, rates and recipes, and 2 images a GPU at "
                f"least, came {several} and {self.images_per_gpu}; set --num-gpus, "
                "--num-images, --images-per-gpu-s, --recipes or --images-per-gpu"
            )
