"""Do all cases on the fake GPU: `python -m tests.fake_gpu.cases`, or those named.

Prints a line of JSON for each: what was seen, or why it did not run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pipelines.device import CPU
from pipelines.snapshot import take_snapshot
from sovit.spectral import BATCHED_SINCE
from tests.fake_gpu.device import on_fake_gpu
from tests.fake_gpu.steps import NUM_STEPS, fake_run, take_steps
from tests.fake_gpu.watch import Watch
from tests.fake_gpu.workers import NUM_WORKERS, among_workers

Case = Callable[[Watch], None]
FAMILIES = (
    *("imagenet.so_vit_7", "imagenet.sot_tiny"),
    *("deit_swin.deit_tiny_so", "deit_swin.swin_tiny_so"),
    *("gcp.mpncov_resnet50", "gcp.isqrt_resnet50", "gcp.isqrt_vgg16"),
    *("gcp.isqrt_mobilenetv2", "gcp.gaussian_resnet50"),
    *("attention.gsop_resnet50_1", "attention.gsop_resnet50_2"),
    *("attention.eca_resnet18", "attention.eca_mobilenetv2"),
)
_CLIPPED = {"clip_grad_norm": 1.0, "on_nonfinite": "skip"}
# What a step can have beside its network.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "clipped, bad steps skipped": {"optim": _CLIPPED},
    "gradients checkpointed": {"grad_checkpointing": True},
    "accumulated": {"optim": {"num_accumulation": 4}},
    "SGD": {"optim": {"optimizer": "sgd", "momentum": 0.9, "ema_decay": 0.0}},
    "float32": {"amp": "off"},
    "logged": {"log_every_steps": 1},
}
_VIT, _SHALLOW = "imagenet.so_vit_7", {"depth": 2}
_LOGGED = (
    "reads a value: pipelines/guard.py Guard.check",
    "copies to the device, waiting: pipelines/metrics.py Sums.total",
    "reads a value: pipelines/metrics.py Sums.total",
)
# The decomposition itself, or the way to the host and back.
_EIGEN = (
    ("waits inside: sovit/spectral.py symmetric_eig",)
    if torch.__version__ >= BATCHED_SINCE
    else (
        "copies to the host, waiting: sovit/spectral.py symmetric_eig",
        "copies to the device, waiting: sovit/spectral.py symmetric_eig",
    )
    * NUM_STEPS
)


def _step(watch: Watch, *, recipe: str, **changes: Any) -> None:
    take_steps(watch, fake_run(recipe, **changes))


def _together(watch: Watch, **changes: Any) -> None:
    with among_workers():
        run = fake_run(_VIT, kwargs=_SHALLOW, world_size=NUM_WORKERS, **changes)
        take_steps(watch, run, world_size=NUM_WORKERS)


def _copy(watch: Watch, **changes: Any) -> None:
    """Take a checkpoint's copy of a state that has taken steps."""
    run = fake_run(_VIT, kwargs=_SHALLOW, **changes)
    state = take_steps(watch, run)
    watch.on()
    assert state.ema is not None
    snapshot = take_snapshot(
        run=run,
        position=state.position,
        classes=("a", "b"),
        metrics={},
        model=state.model,
        ema=state.ema.module,
        optimizer=state.optimizer,
    )
    watch.off()
    assert all(value.device == CPU for value in snapshot.model.values())


TOGETHER: Mapping[str, dict[str, Any]] = {
    "data parallel": {"optim": _CLIPPED},
    "data parallel, accumulated": {"optim": {"num_accumulation": 2}},
    "data parallel, logged": {"log_every_steps": 1},
    "sharded": {"sharding": "fsdp", "optim": _CLIPPED},
    "sharded, accumulated": {"sharding": "fsdp", "optim": {"num_accumulation": 2}},
    "sharded, logged": {"sharding": "fsdp", "log_every_steps": 1},
}
CASES: Mapping[str, Case] = {
    **{f"step of {name}": partial(_step, recipe=name) for name in FAMILIES},
    **{
        f"step, {name}": partial(_step, recipe=_VIT, kwargs=_SHALLOW, **changes)
        for name, changes in SETTINGS.items()
    },
    **{
        f"step of 8 workers, {name}": partial(_together, **changes)
        for name, changes in TOGETHER.items()
    },
    "copy of a checkpoint": _copy,
}
# PyTorch's own: it times the first ten steps, and every hundredth after them.
_TIMED = "waits for an event: pipelines/loop.py _forward_backward"
# By case, what is to be seen, in order; nothing of all others.
MEANT: Mapping[str, tuple[str, ...]] = {
    "step of gcp.mpncov_resnet50": _EIGEN,
    "step, logged": _LOGGED * NUM_STEPS,
    "step of 8 workers, data parallel": (_TIMED,),
    "step of 8 workers, data parallel, accumulated": (_TIMED,),
    "step of 8 workers, data parallel, logged": (_TIMED, *_LOGGED),
    "step of 8 workers, sharded, logged": _LOGGED,
    "copy of a checkpoint": (
        "copies to the host: pipelines/device.py download",
        "waits for a stream: pipelines/device.py wait_for_stream",
    ),
}


def _done(name: str) -> dict[str, Any]:
    start_s = time.process_time()
    error = ""
    with on_fake_gpu() as watch:
        try:
            CASES[name](watch)
        except Exception:
            error = traceback.format_exc(limit=-12)
    return {
        "case": name,
        "seen": [dataclasses.asdict(one) for one in watch.seen],
        "num_ops": watch.num_ops,
        "error": error,
        "cpu_s": time.process_time() - start_s,
    }


def main() -> None:
    """Do the cases that are named, or all."""
    for name in sys.argv[1:] or CASES:
        print(json.dumps(_done(name)), flush=True)


if __name__ == "__main__":
    main()
