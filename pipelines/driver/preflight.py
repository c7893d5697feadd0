"""Check a run before anything is started, so that errors show within seconds."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
from torch import nn

from pipelines.checkpoints.pretrained import load_initial
from pipelines.config import Model, Run
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.data.spot_check import spot_check
from pipelines.evaluation.held_out import HeldOut, held_out_of
from pipelines.storage.filesystem import absolute
from pipelines.storage.redaction import error_summary
from pipelines.training.model import build_model, title_of
from pipelines.training.state import checkpoint_gradients
from sovit.probes import find_stem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """Findings of the checks."""

    model_name: str
    num_params: int
    train_shards: ShardSet
    val_shards: ShardSet | None
    """None for a run without a validation set."""
    held_out: tuple[HeldOut, ...]
    few_tokens: str
    """A line on tokens too few for the model's pooling; "" where they suffice."""

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the two sets, by the field that names each."""
        found = {"train": self.train_shards, "val": self.val_shards}
        return {name: shards.digest for name, shards in found.items() if shards}

    @property
    def summary(self) -> str:
        """One line on the model and its data."""
        held_out = self.val_shards.groups.total_rows if self.val_shards else 0
        return (
            f"{self.model_name}, {self.num_params:,} parameters, on "
            f"{self.train_shards.groups.total_rows:,} images of "
            f"{len(self.train_shards.classes):,} classes, "
            f"{f'{held_out:,}' if held_out else 'none'} held out"
        )


def check_run(run: Run, *, reads_start: bool = True) -> CheckedRun:
    """Read the shards' footers and a sample of rows; build the model on meta.

    Args:
        reads_start: Whether weights that the run starts from must be there and fit.

    Raises ValueError where a set can't be used, the two have other classes, or the
    model can't be built or probed so.
    """
    train_shards, val_shards = _read_shards(run)
    classes = train_shards.classes
    held_out = held_out_of(run.validation, val=val_shards, classes=classes)
    for shards in (train_shards, *(one.shards for one in held_out)):
        spot_check(shards)
    model, few_tokens = _check_model(run, classes=classes, reads_start=reads_start)
    if short := reserves_too_few(run):
        logger.warning(short)
    if run.probe.every_steps:
        find_stem(model, name=run.probe.stem)
    return CheckedRun(
        model_name=title_of(run.model),
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        train_shards=train_shards,
        val_shards=val_shards,
        held_out=held_out,
        few_tokens=few_tokens,
    )


def reserves_too_few(run: Run) -> str:
    """Return a warning if Ray reserves fewer CPUs than a worker decodes with, or "".

    Ray would place more workers on a host than it has CPUs for, and GPUs would wait.
    """
    scale, num_threads = run.scale, run.data.num_decode_threads
    is_here = run.data.decode_on == "workers" and not scale.is_local
    if not is_here or scale.cpus_per_worker >= num_threads:
        return ""
    # One more launches a GPU's kernels; on a CPU steps and decoding take turns.
    wanted = num_threads + scale.use_gpu
    return (
        f"a worker decodes with {num_threads} threads, and Ray reserves "
        f"{scale.cpus_per_worker:g} CPUs for it: set --scale.cpus-per-worker {wanted}, "
        "or lower --data.num-decode-threads"
    )


def _check_model(
    run: Run, *, classes: tuple[str, ...], reads_start: bool
) -> tuple[nn.Module, str]:
    """Build the model on meta, and once more in memory to load initial weights.

    Returns it with the warning on its tokens. Raises ValueError where it does
    not take such images, or the weights do not fit it.
    """
    few_tokens: list[str] = []
    with torch.device("meta"):
        model = build_model(run.model, num_classes=len(classes), tell=few_tokens.append)
    _check_size(model, settings=run.model)
    if run.scale.grad_checkpointing:
        checkpoint_gradients(model, name=run.model.name)
    if reads_start and run.model.init_from:
        load_initial(
            build_model(run.model, num_classes=len(classes)),
            run.model.init_from,
            classes=classes,
            triangle=run.model.triangle,
            tell=logger.info,
        )
    return model, "".join(few_tokens)


def _check_size(model: nn.Module, *, settings: Model) -> None:
    """Send meta images through a model: only shapes are computed.

    Raises ValueError where it does not take them.
    """
    size = settings.img_size
    images = torch.zeros(2, 3, size, size, device="meta")
    try:
        with torch.inference_mode():
            model.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if "meta" in str(error):
            return  # it looks at values, of which there are none: the first step tells
        raise ValueError(
            f"model.img_size: wanted a size that {settings.name} takes, came {size} "
            f"({error_summary(error)}); set --model.img-size, or img_size in "
            "model.kwargs too for a model of timm whose size is fixed"
        ) from error


def _read_shards(run: Run) -> tuple[ShardSet, ShardSet | None]:
    train_shards = read_shard_set(run.data.train)
    if not run.validation.held_out:
        return train_shards, None
    if not run.data.val:
        raise ValueError(
            "data.val: expected a folder of held-out shards, got none; set --data.val, "
            "or --validation.no-held-out to train without"
        )
    val_shards = read_shard_set(run.data.val)
    if train_shards.classes != val_shards.classes:
        raise ValueError(
            f"wanted the same classes in {run.data.train!r} and {run.data.val!r}, came "
            f"{len(train_shards.classes)} and {len(val_shards.classes)} that differ; "
            "write the second with sovit-shards --classes of the first"
        )
    return train_shards, val_shards


def with_absolute_paths(run: Run) -> Run:
    """Make local folders absolute: workers have another working directory."""
    data = dataclasses.replace(
        run.data,
        train=absolute(run.data.train),
        val=absolute(run.data.val) if run.data.val else "",
    )
    key_log = absolute(run.key_log) if run.key_log else ""
    start = run.model.init_from
    model = dataclasses.replace(run.model, init_from=absolute(start) if start else "")
    return dataclasses.replace(
        run,
        model=model,
        data=data,
        validation=run.validation.moved(absolute),
        storage=absolute(run.storage),
        key_log=key_log,
    )
