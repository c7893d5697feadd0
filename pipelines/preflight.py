"""Check a run before anything is started: what can't work shows within seconds."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass

import torch
from torch import nn

from pipelines.checkpoint import build_model
from pipelines.config import Run
from pipelines.ingest.footers import ShardSet, read_shard_set
from pipelines.ingest.spot_check import spot_check
from pipelines.initial import load_initial
from sovit.probes import find_stem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """Hold what the checks found out."""

    model_name: str
    num_params: int
    train_shards: ShardSet
    val_shards: ShardSet

    @property
    def summary(self) -> str:
        """Say in one line what is trained on what."""
        return (
            f"{self.model_name}, {self.num_params:,} parameters, on "
            f"{self.train_shards.groups.total_rows:,} images of "
            f"{len(self.train_shards.classes):,} classes, "
            f"{self.val_shards.groups.total_rows:,} held out"
        )


def check_run(run: Run) -> CheckedRun:
    """Read the shards' footers and a sample of rows; build the model without memory.

    Raises ValueError where a set can't be used, the two have other classes, or the
    model can't be built or probed so.
    """
    train_shards, val_shards = _read_shards(run)
    for shards in (train_shards, val_shards):
        spot_check(shards)
    model = _check_model(run, classes=train_shards.classes)
    if run.probe.every_steps:
        find_stem(model, name=run.probe.stem)
    return CheckedRun(
        model_name=run.model.name,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        train_shards=train_shards,
        val_shards=val_shards,
    )


def _check_model(run: Run, *, classes: tuple[str, ...]) -> nn.Module:
    """Build the model, without memory unless it starts from a checkpoint."""
    if not run.model.init_from:
        with torch.device("meta"):
            return build_model(run.model, num_classes=len(classes))
    model = build_model(run.model, num_classes=len(classes))
    if not load_initial(model, run.model.init_from, classes=classes):
        logger.info(
            "the classifier starts fresh: %s was trained for other classes",
            run.model.init_from,
        )
    return model


def _read_shards(run: Run) -> tuple[ShardSet, ShardSet]:
    train_shards = read_shard_set(run.data.train)
    val_shards = read_shard_set(run.data.val)
    if train_shards.classes != val_shards.classes:
        raise ValueError(
            f"wanted the same classes in {run.data.train!r} and {run.data.val!r}, came "
            f"{len(train_shards.classes)} and {len(val_shards.classes)} that differ; "
            "write the second with sovit-shards --classes of the first"
        )
    return train_shards, val_shards


def absolute(place: str) -> str:
    """Make a local path absolute; addresses are it already."""
    return place if "://" in place else os.path.abspath(place)


def with_absolute_paths(run: Run) -> Run:
    """Make local folders absolute: workers have another working directory."""
    data = dataclasses.replace(
        run.data, train=absolute(run.data.train), val=absolute(run.data.val)
    )
    key_log = os.path.abspath(run.key_log) if run.key_log else ""
    start = run.model.init_from
    model = dataclasses.replace(run.model, init_from=absolute(start) if start else "")
    return dataclasses.replace(
        run, model=model, data=data, storage=absolute(run.storage), key_log=key_log
    )
