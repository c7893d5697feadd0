"""Make runs of a second, in one process, for what happens to runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ray.train import UserCallback

from pipelines.checkpoints.manifest import read_manifest
from pipelines.checkpoints.snapshot import EMA_FILE, MODEL_FILE, OPTIMIZER_FILE
from pipelines.config import Run, Validation
from tests.demo_runs import small_demo


class At(UserCallback):
    """Do something when a report comes, the first of which is number 1.

    One comes with each checkpoint: at steps 4, 8, 10, 12, 16 and 20.
    """

    def __init__(self, actions: Mapping[int, Callable[[], object]]) -> None:
        self._actions, self._number = actions, 0

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Do what is to be done now."""
        self._number += 1
        self._actions.get(self._number, lambda: None)()


def brief_run(folder: Path, *, num_epochs: int, **optim: Any) -> Run:
    """Make a run of ten steps an epoch, with a checkpoint every four steps.

    It is evaluated at its end alone.
    """
    run = small_demo(folder, num_epochs=num_epochs, num_workers=0)
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, decoder="torch"),
        optim=dataclasses.replace(run.optim, **optim),
        validation=Validation(every_epochs=99, weights="average", num_worst=0),
        checkpoint_every_steps=4,
    )


def learnt(folder: Path) -> dict[str, Any]:
    """Give all that training has made of a checkpoint: equal where it is bit for bit.

    Raises ValueError where the checkpoint is not whole.
    """
    manifest = read_manifest(folder)
    state = torch.load(folder / OPTIMIZER_FILE, weights_only=True)
    return {
        "position": manifest.position,
        "weights": manifest.files[MODEL_FILE],
        "average": manifest.files[EMA_FILE],
        "optimizer": _plain(state),
    }


def _plain(value: Any) -> Any:
    """Turn the tensors within dicts and lists into what can be compared."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
