"""Record runs in an MLflow store as trainings do, without training anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipelines import tracking
from pipelines.config import Data, Model, Optim, Run, Scale
from pipelines.config.serialization import flat_params
from pipelines.tracking.sweeps import NUM_PARAMS
from sovit import Pooling

STEPS_PER_EPOCH = 10
CLOSE_S = 120.0
RUN = Run(
    recipe="small.run",
    model=Model(name="so_vit_7", pooling=Pooling(power=0.5)),
    data=Data(train="shards/train", val="shards/val", batch_size=64),
    optim=Optim(lr=1e-3, num_epochs=5),
)


def keep_run(
    uri: str,
    name: str,
    *,
    top1: Sequence[float] = (),
    run: Run = RUN,
    rates: Sequence[float] = (),
    seed: int = 1,
    power: float = 0.5,
    num_params: int = 25_000_000,
    num_workers: int = 1,
    experiment: str = "tests",
    status: Literal["FINISHED", "FAILED", ""] = "FINISHED",
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Record one run with a held-out accuracy per epoch; return its id.

    Args:
        rates: Images per second, one value per logged step; as many as epochs if empty.
        metrics: Further ones, logged at the end.
    """
    pooling = Pooling(power=power)
    run = dataclasses.replace(
        run,
        seed=seed,
        model=dataclasses.replace(run.model, pooling=pooling),
        scale=Scale(num_workers=num_workers),
    )
    params: dict[str, Any] = flat_params(run) | {NUM_PARAMS: num_params}
    run_id = tracking.open_run(
        uri, experiment=experiment, name=name, params=params, tags=tags or {}
    )
    log_epochs(uri, run_id, top1=top1, rates=rates, metrics=metrics)
    if status:
        reason = "lost <b>all</b> workers" if status == "FAILED" else ""
        tracking.end_run(uri, run_id, status=status, reason=reason)
    return run_id


def log_epochs(
    uri: str,
    run_id: str,
    *,
    top1: Sequence[float],
    first_epoch: int = 1,
    rates: Sequence[float] = (),
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Log epochs as a worker does, from `first_epoch` on."""
    writer = tracking.MetricWriter(uri, run_id)
    for at, rate in enumerate(rates or [100.0] * len(top1)):
        writer.log({"train/images_per_s": rate}, step=(first_epoch + at) * 5)
    for epoch, value in enumerate(top1, start=first_epoch):
        found = {"val/top1": value, "val/loss": 5 - value / 25, "epoch": epoch}
        writer.log(found, step=epoch * STEPS_PER_EPOCH)
    if metrics:
        writer.log(metrics, step=len(top1) * STEPS_PER_EPOCH)
    assert writer.close(CLOSE_S) == 0
