"""Check a run before it starts or resumes, so that errors show within seconds."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipelines.checkpoints.pretrained import load_initial
from pipelines.checkpoints.run_record import (
    Record,
    check_name,
    find_record,
    read_record,
)
from pipelines.checkpoints.store import CheckpointStore
from pipelines.config import (
    LOCATIONS,
    NOT_LEARNT,
    NOT_LEARNT_GROUPS,
    READING,
    Model,
    Run,
)
from pipelines.config.own_code import OwnCode, read_code
from pipelines.config.recipes import load_code, load_recipe
from pipelines.config.serialization import flat_params
from pipelines.data.loader import Plans
from pipelines.data.shard_set import ShardSet, read_shard_set
from pipelines.driver.image_folders import recorded_facts as recorded_facts
from pipelines.driver.image_folders import recorded_shards as recorded_shards
from pipelines.driver.image_folders import with_shards as with_shards
from pipelines.driver.spot_check import spot_check
from pipelines.evaluation.held_out import (
    HeldOut,
    held_out_of,
    read_keys,
    with_labels,
)
from pipelines.storage.filesystem import absolute
from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import command_line, error_summary, without_credentials
from pipelines.training.model import build_model, checkpoint_gradients, title_of
from pipelines.training.optimizer import freeze
from sovit import find_stem

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"(epoch|step)_\d{4,}")


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """Findings of the checks."""

    model_name: str
    num_params: int
    train_shards: ShardSet
    val_shards: ShardSet | None
    """None for a run without a validation set."""
    held_out: tuple[HeldOut, ...]
    class_counts: tuple[int, ...]
    """Training images of each class; empty where no class is weighed."""
    few_tokens: str
    """A line on tokens too few for the model's pooling; "" where they suffice."""
    balance: str
    """A line on what epochs are made of; "" where every image comes once."""

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
    if run.data.balance:
        train_shards = with_labels(train_shards)
    classes = train_shards.classes
    held_out = held_out_of(run.validation, val=val_shards, classes=classes)
    for shards in (train_shards, *(one.shards for one in held_out)):
        spot_check(shards)
    model, few_tokens = _check_model(run, classes=classes, reads_start=reads_start)
    if short := reserves_too_few(run):
        logger.warning(short)
    balance = Plans(shards=train_shards, run=run, train=True).balance
    if run.probe.every_steps:
        find_stem(model, name=run.probe.stem)
    return CheckedRun(
        model_name=title_of(run.model),
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        train_shards=train_shards,
        val_shards=val_shards,
        held_out=held_out,
        class_counts=_class_counts(run, shards=train_shards),
        few_tokens=few_tokens,
        balance=balance.line(classes) if balance else "",
    )


def _class_counts(run: Run, *, shards: ShardSet) -> tuple[int, ...]:
    if run.optim.class_weights == "none":
        return ()
    _, labels = read_keys(shards)
    return tuple(np.bincount(labels, minlength=len(shards.classes)).tolist())


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
    freeze(model, optim=run.optim)
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
            f"model.img_size: expected a size that {settings.name} takes, got {size} "
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
            f"expected the same classes in {run.data.train!r} and {run.data.val!r}, "
            f"got {len(train_shards.classes)} and {len(val_shards.classes)} that "
            "differ; write the second with sovit-shards --classes of the first"
        )
    return train_shards, val_shards


def with_absolute_paths(run: Run) -> Run:
    """Make local folders absolute: workers have another working directory."""
    data = dataclasses.replace(
        run.data,
        train=absolute(run.data.train),
        val=absolute(run.data.val) if run.data.val else "",
    )
    audit_log = absolute(run.audit_log) if run.audit_log else ""
    start = run.model.init_from
    model = dataclasses.replace(run.model, init_from=absolute(start) if start else "")
    return dataclasses.replace(
        run,
        model=model,
        data=data,
        validation=run.validation.moved(absolute),
        storage=absolute(run.storage),
        audit_log=audit_log,
    )


def record_to_resume(name: str, *, storage: str, recipe: str) -> Record | None:
    """Find the record of a run to resume; None where its recipe is to start it.

    Raises ValueError where there is none and no recipe, and where it has finished.
    """
    storage = storage or (load_recipe(recipe).storage if recipe else "runs")
    if recipe and find_record(storage, name=name) is None:
        return None
    return read_record(storage, name=name)


def resume_command(run: Run, *, name: str, prog: str = "sovit-train") -> str:
    """Format the command that resumes a run or a sweep, ready to paste."""
    storage = "" if run.storage == os.path.abspath("runs") else run.storage
    return command_line(
        prog, "--resume", name, *(["--storage", storage] if storage else [])
    )


def load_recorded(code: OwnCode) -> None:
    """Run the recipe file that a run began with; log if it has changed since."""
    load_code(code)
    try:
        now = read_code(Path(code.origin))
    except ValueError:
        return  # it lay on another machine, or is gone: the record has it
    if now.digest != code.digest:
        logger.warning(
            "%s has changed since this run began, which goes on with what it was; for "
            "what it is now start a new run",
            code.origin,
        )


def run_and_storage(resume: str, *, storage: str) -> tuple[str, str]:
    """Split a run's folder, which `--resume` may name, into its name and its storage.

    Raises ValueError for a folder elsewhere than in `storage`, and for a checkpoint.
    """
    folder, slash, name = resume.rstrip("/").rpartition("/")
    if not slash:
        return resume, storage
    if storage and absolute(storage) != absolute(folder):
        raise ValueError(
            f"expected a run's name beside --storage {storage}, or its folder alone, "
            f"got --resume {resume}; leave one of the two out"
        )
    if _CHECKPOINT.fullmatch(name):
        run = folder.rpartition("/")[2]
        raise ValueError(
            f"expected a run to resume, got {resume!r}, a checkpoint of {run!r}; give "
            f"--resume {folder}: the run goes on from its newest"
        )
    return name, folder or "/"


def check_one_name(name: str, *, resume: str) -> None:
    """Raise ValueError where a resumed run is given another name."""
    if name not in ("", resume):
        raise ValueError(
            f"expected --name for a new run or --resume for one that is there, got "
            f"--name {name} and --resume {resume}; leave one out"
        )


def check_same(before: Run, now: Run, *, advice: str = "leave them out") -> None:
    """Raise ValueError where a run is resumed with settings that change it.

    The shards' location may change: `check_shards` compares their content.
    """
    was, params = flat_params(before), flat_params(now)
    free = NOT_LEARNT | READING | LOCATIONS
    changed = [
        name
        for name in sorted(params.keys() | was.keys())
        if params.get(name) != was.get(name)
        and name not in free
        and not name.startswith(NOT_LEARNT_GROUPS)
    ]
    if changed:
        raise ValueError(
            "expected the settings that the run began with, got others for "
            f"{', '.join(changed)}; {advice}, or start a new run"
        )
    if before.scale.is_local != now.scale.is_local:
        raise ValueError(
            "scale.num_workers: expected 0 again for a run that began so, and at least "
            f"1 for one that did not, got {now.scale.num_workers} after "
            f"{before.scale.num_workers}; leave it out, or start a new run"
        )


def check_start(run: Run, *, name: str, record: Record | None) -> CheckedRun:
    """Check a run before anything is started, new or resumed from its record.

    Raises ValueError as `check_run`, for a name that is taken, and for other shards
    than the run began with.
    """
    if record is None:
        check_name(run.storage, name=name)
        return check_run(run)
    if record.code:
        load_code(record.code)
    folder = StoragePath(run.storage).within(name)
    store = CheckpointStore(folder, num_to_keep=run.num_checkpoints_to_keep)
    # What another training's weights were may be gone once they are in a checkpoint.
    checked = check_run(run, reads_start=not store.newest())
    check_shards(record, now=run, digests=checked.digests)
    return checked


def check_shards(record: Record, *, now: Run, digests: Mapping[str, str]) -> None:
    """Raise ValueError where a run is resumed with other shards than it began with.

    Without digests, in a record of an earlier version, the shards' location must not
    have changed.
    """
    for field, digest in digests.items():
        was = record.digests.get(field)
        place, before = getattr(now.data, field), getattr(record.run.data, field)
        if digest != was and (was is not None or place != before):
            raise ValueError(
                f"data.{field}: expected the shards that the run began with, got "
                f"others in {without_credentials(place)!r}; put them back, set "
                f"--data.{field} to where they are, or start a new run"
            )
