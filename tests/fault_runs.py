"""Build runs of a second, in one process, for tests of faults."""

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
    """Callback that acts at given reports, counted from 1.

    Each checkpoint has a report: at steps 4, 8, 10, 12, 16 and 20.
    """

    def __init__(self, actions: Mapping[int, Callable[[], object]]) -> None:
        self._actions, self._number = actions, 0

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Run the action of this report, if any."""
        self._number += 1
        self._actions.get(self._number, lambda: None)()


def brief_run(folder: Path, *, num_epochs: int, **optim: Any) -> Run:
    """Build a run of ten steps per epoch, with a checkpoint every four steps.

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
    """Load a checkpoint's training state in a form that compares bit for bit.

    Raises ValueError if the checkpoint is damaged.
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
    """Convert the tensors within dicts and lists to comparable bytes."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
