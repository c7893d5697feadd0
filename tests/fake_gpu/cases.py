"""Define the cases that run on the fake GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pipelines.checkpoints.snapshot import take_snapshot
from pipelines.hardware.device import CPU
from tests.fake_gpu import answers
from tests.fake_gpu.compiled import take_compiled_steps
from tests.fake_gpu.entered import enter_all
from tests.fake_gpu.steps import fake_run, take_steps
from tests.fake_gpu.watch import Watch
from tests.fake_gpu.workers import NUM_WORKERS, among_workers

Case = Callable[[Watch], Any]
ENTERED = "pipelines/hardware/device.py"
# All layers that a family has, few times each.
_RESNET = {"layers": (1, 1, 1, 1)}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "imagenet.so_vit_7": {"depth": 2},
    "imagenet.sot_tiny": {"depth": 2},
    "deit_swin.deit_tiny_so": {"depth": 2},
    "deit_swin.swin_tiny_so": {"depths": (2, 1, 1, 1)},
    "gcp.mpncov_resnet50": _RESNET,
    "gcp.isqrt_resnet50": _RESNET,
    "gcp.isqrt_vgg16": {},
    "gcp.gaussian_resnet50": _RESNET,
    "attention.gsop_resnet50_1": _RESNET,
    "attention.gsop_resnet50_2": _RESNET,
    "attention.eca_resnet18": _RESNET,
    "attention.eca_mobilenetv2": {},
}
# Those of whose kinds of layers others are compiled too.
_NOT_COMPILED = (
    *("deit_swin.deit_tiny_so", "gcp.isqrt_vgg16", "gcp.isqrt_resnet50"),
    *("attention.gsop_resnet50_1", "attention.eca_mobilenetv2"),
)
_CLIPPED = {"clip_grad_norm": 1.0, "on_nonfinite": "skip"}
# What a step can have beside its network.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "clipped, bad steps skipped": {"optim": _CLIPPED},
    "gradients checkpointed": {"grad_checkpointing": True},
    "accumulated": {"optim": {"num_accumulation": 2}},
    "SGD": {"optim": {"optimizer": "sgd", "momentum": 0.9, "ema_decay": 0.0}},
    "float32": {"amp": "off"},
    "logged": {"log_every_steps": 1},
}
_VIT = "imagenet.so_vit_7"


def _step(watch: Watch, *, recipe: str, **changes: Any) -> None:
    take_steps(watch, fake_run(recipe, **changes))


def _compiled(watch: Watch, *, recipe: str, **changes: Any) -> dict[str, Any]:
    return take_compiled_steps(watch, fake_run(recipe, compile=True, **changes))


def _together(watch: Watch, **changes: Any) -> None:
    with among_workers():
        run = fake_run(_VIT, kwargs={"depth": 1}, world_size=NUM_WORKERS, **changes)
        take_steps(watch, run, world_size=NUM_WORKERS)


def _copy(watch: Watch, **changes: Any) -> None:
    """Take a checkpoint's snapshot of a state after some steps."""
    run = fake_run(_VIT, kwargs=FAMILIES[_VIT], **changes)
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


_PARTS = {"optim": {"num_accumulation": 2}, "log_every_steps": 1}
TOGETHER: Mapping[str, dict[str, Any]] = {
    "data parallel": {"optim": _CLIPPED},
    "data parallel, accumulated, logged": _PARTS,
    "sharded": {"sharding": "fsdp", "optim": _CLIPPED},
    "sharded, accumulated, logged": {"sharding": "fsdp", **_PARTS},
}
CASES: Mapping[str, Case] = {
    **{
        f"step of {name}": partial(_step, recipe=name, kwargs=kwargs)
        for name, kwargs in FAMILIES.items()
    },
    **{
        f"step, {name}": partial(_step, recipe=_VIT, kwargs=FAMILIES[_VIT], **changes)
        for name, changes in SETTINGS.items()
    },
    **{
        f"step of 8 workers, {name}": partial(_together, **changes)
        for name, changes in TOGETHER.items()
    },
    "copy of a checkpoint": _copy,
    "supply of images": answers.supply,
    "evaluation": answers.evaluate,
    "prediction": answers.answer,
    "probe": answers.probe,
    "training of a head": answers.head,
    ENTERED: enter_all,
}
# Minutes of more layers, and of settings that others have together.
SLOW = frozenset(
    [
        *("step of imagenet.sot_tiny", "step of deit_swin.swin_tiny_so"),
        *("step of gcp.mpncov_resnet50", "step of attention.gsop_resnet50_1"),
        *("step of attention.eca_resnet18", "step of attention.eca_mobilenetv2"),
        *("step of 8 workers, data parallel", "step of 8 workers, sharded"),
        *(f"compiled step of {name}" for name in FAMILIES if name != _VIT),
    ]
)
COMPILED: Mapping[str, Case] = {
    f"compiled step of {name}": partial(_compiled, recipe=name, kwargs=kwargs)
    for name, kwargs in FAMILIES.items()
    if name not in _NOT_COMPILED
}
