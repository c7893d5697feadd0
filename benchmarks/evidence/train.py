"""Train a cell as `sovit-train` would, in this process, and return its entry."""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.evidence import plans
from benchmarks.evidence.plan import RATE_SEED, Cell, Images
from benchmarks.evidence.results import DIVERGED, FAILED, FINISHED, Entry
from benchmarks.machine import cpu_name
from pipelines import tracking
from pipelines.checkpoints.run_record import find_record
from pipelines.config import Run
from pipelines.config.overrides import change_fields
from pipelines.driver.fit import fit
from pipelines.errors import NonFiniteLossError, RunFailedError
from pipelines.evaluate import Options, evaluate_checkpoint
from pipelines.robustness.options import Robustness
from pipelines.shards.command import Arguments, make_shards
from pipelines.shards.making import in_process
from pipelines.shards.state import REPORT_FILE
from pipelines.storage.redaction import error_summary
from pipelines.tracking.query import RunStore
from pipelines.tracking.sweeps import NUM_PARAMS
from pipelines.worker.job import Trained
from tuning.heads.extract import write_tokens
from tuning.heads.train import train_head

logger = logging.getLogger(__name__)
_SEED = 0
_DIGITS = 4
_HEAD_EPOCHS = 10


def make_sets(images: Images, *, data: Path, work: Path) -> tuple[Path, Path]:
    """Return the training and held-out shards, which are made once.

    Raises ValueError where DATA has no such images.
    """
    parts = (("train", images.num_train), ("test", images.num_val))
    return tuple(  # pyright: ignore[reportReturnType]
        _make_set(data / images.name, split=split, num=num, work=work)
        for split, num in parts
    )


def _make_set(source: Path, *, split: str, num: int | None, work: Path) -> Path:
    out = work / "shards" / f"{source.name}-{split}-{num or 'all'}"
    if (out / REPORT_FILE).exists():
        return out
    files = sorted(source.glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(
            f"expected {split}-*.parquet in {source}; set --data to the folder of sets"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".parquet")
    table = pa.concat_tables(pq.read_table(path) for path in files)
    pq.write_table(table if num is None else cut(table, num=num), part)
    make_shards(Arguments(part, out, seed=_SEED), execute=in_process)
    part.unlink()
    return out


def cut(table: pa.Table, *, num: int) -> pa.Table:
    """Take as many rows of each class, drawn by a fixed seed, `num` in all."""
    labels, random = np.asarray(table["label"]), np.random.default_rng(_SEED)
    classes = np.unique(labels)
    rows = [
        random.permutation(np.flatnonzero(labels == one))[: num // len(classes)]
        for one in classes
    ]
    return table.take(np.sort(np.concatenate(rows)))


def train_cell(cell: Cell, *, data: Path, work: Path) -> Entry:
    """Train and evaluate a cell; one that ends badly is an entry too."""
    start_s, cpu_s = time.perf_counter(), time.process_time()
    entry: dict[str, Any] = {"settings": cell.settings()}
    try:
        trained = _trained(cell, data=data, work=work)
        entry |= {"status": FINISHED, **_measured(cell, trained, data=data, work=work)}
    except NonFiniteLossError as error:
        entry |= {"status": DIVERGED, "reason": error_summary(error)}
    except (RunFailedError, ValueError) as error:
        logger.warning("%s: %s", cell.key, error)
        entry |= {"status": FAILED, "reason": error_summary(error)}
    return entry | {
        "seconds": round(time.perf_counter() - start_s, 1),
        "cpu_seconds": round(time.process_time() - cpu_s, 1),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(Path("/proc/cpuinfo").read_text()),
    }


def _trained(cell: Cell, *, data: Path, work: Path) -> Trained:
    train, val = make_sets(cell.plan.images, data=data, work=work)
    storage = work / "runs"
    changes = {"data.train": str(train), "data.val": str(val), "storage": str(storage)}
    if source := cell.plan.arms[cell.arm].init_from:
        start = _checkpoint(*source, seed=cell.seed, data=data, work=work)
        changes["model.init_from"] = start
    # Of a start that was cut off.
    shutil.rmtree(storage / cell.run_name, ignore_errors=True)
    run = change_fields(cell.run(), changes)
    return fit(run, name=cell.run_name, tags={"cell": cell.key}, keep_model=False)


def _checkpoint(plan: str, arm: str, *, seed: int, data: Path, work: Path) -> str:
    """Return a checkpoint of another plan's arm, which is trained here if missing.

    Its rate is the middle one of that plan's candidates, so that it does not depend on
    what was measured.
    """
    other = plans.PLANS[plan]
    rate = other.rates[len(other.rates) // 2]
    (cell,) = other.cells(arm, seed=seed, rates=[rate])
    place = work / "runs" / cell.run_name
    name = f"epoch_{cell.run().optim.total_epochs:04d}"
    if not (place / name).exists():
        _trained(cell, data=data, work=work)
    return str(place / name)


def _measured(
    cell: Cell, trained: Trained, *, data: Path, work: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: round(trained.metrics[f"val/{name}"], _DIGITS)
        for name in ("top1", "top5", "loss")
    }
    record = find_record(str(work / "runs"), name=cell.run_name)
    assert record is not None
    store = RunStore(tracking.default_uri(record.run.storage))
    (stored,) = store.find([record.mlflow_run_id])
    num_params = int(stored.params[NUM_PARAMS])
    if cell.plan.curves:
        found["curves"] = {
            metric: [
                [point.step, round(point.value, _DIGITS)]
                for point in store.history(record.mlflow_run_id, metric=metric)
                # A run names its main metric at step 0, before it has a value.
                if math.isfinite(point.value)
            ]
            for metric in cell.plan.curves
        }
    if cell.plan.num_corrupted:
        found["errors"] = _errors(cell, trained, data=data, work=work)
    if cell.plan.tokens_of:
        found["head_top1"] = _head_top1(cell, run=record.run, data=data, work=work)
    return {**found, "num_params": num_params}


def _head_top1(cell: Cell, *, run: Run, data: Path, work: Path) -> float:
    """Train the cell's head alone, on tokens that one Ray job computes for all."""
    plan = cell.plan
    assert plan.tokens_of is not None
    backbone = _checkpoint(*plan.tokens_of, seed=RATE_SEED + 1, data=data, work=work)
    out = str(work / "tokens" / plan.name)
    sets = write_tokens(run, checkpoint=backbone, out=out)
    found = train_head(
        run, tokens=sets.train, val=sets.val, num_epochs=_HEAD_EPOCHS, seed=cell.seed
    )
    return round(found["head/top1"], _DIGITS)


def _errors(
    cell: Cell, trained: Trained, *, data: Path, work: Path
) -> dict[str, float]:
    """Return the mean error under each corruption, over its severities."""
    few = Images(
        name=cell.plan.images.name, num_train=0, num_val=cell.plan.num_corrupted
    )
    shards = _make_set(data / few.name, split="test", num=few.num_val, work=work)
    options = Options(
        checkpoint=str(trained.checkpoint),
        shards=str(shards),
        num_decode_threads=1,
        robustness=Robustness(corruptions=()),
    )
    errors = evaluate_checkpoint(options)["corruptions"]["errors"]
    return {
        name: round(float(np.mean(list(of.values()))), _DIGITS)
        for name, of in errors.items()
    }
