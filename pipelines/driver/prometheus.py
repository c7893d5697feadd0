"""Export a run's state to Prometheus through its Ray."""

from __future__ import annotations

import math
import time
from types import MappingProxyType

from ray.util.metrics import Gauge

from pipelines.events.channel import Event, Metrics, Tick, WorkerStarted

GAUGES = MappingProxyType(
    {
        "sovit_step": "Steps trained.",
        "sovit_epoch": "Epochs that have ended.",
        "sovit_images_per_s": "Images trained on a second, over all workers.",
        "sovit_waiting_share": "Share of the loop's time that waits for data, 0 to 1.",
        "sovit_train_loss": "Training loss, mean since the value before.",
        "sovit_val_top1": "Top-1 on the held-out images in percent.",
        "sovit_checkpoint_s": "Seconds that the last checkpoint held up training.",
        "sovit_num_bad_images": "Images that could not be decoded this epoch.",
        "sovit_num_restarts": "Times that the workers were started again.",
    }
)
"""Our gauges, with what they say; Ray exports each with `ray_` before its name."""
_SOURCES = MappingProxyType(
    {
        "epoch": "sovit_epoch",
        "train/images_per_s": "sovit_images_per_s",
        "train/waiting_share": "sovit_waiting_share",
        "train/loss": "sovit_train_loss",
        "val/top1": "sovit_val_top1",
        "train/checkpoint_s": "sovit_checkpoint_s",
        "train/bad_images": "sovit_num_bad_images",
    }
)


# Ray exports every 10 s, and drops what was not set for 20.
_AGAIN_S = 5.0


class Gauges:
    """Gauges of one run, a sink of its events; Ray must be running."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._num_starts = 0
        self._values: dict[str, float] = {}
        self._set_at_s = 0.0
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("run",))
            for name, text in GAUGES.items()
        }

    def handle(self, event: Event) -> None:
        """Set what was measured, and count restarts."""
        if isinstance(event, Metrics):
            self._set("sovit_step", event.step)
            for name, value in event.metrics.items():
                if name in _SOURCES and math.isfinite(value):
                    self._set(_SOURCES[name], value)
        elif isinstance(event, WorkerStarted) and event.rank == 0:
            self._num_starts += 1
            self._set("sovit_num_restarts", self._num_starts - 1)
        elif isinstance(event, Tick):
            self._set_again()

    def _set_again(self) -> None:
        if time.monotonic() - self._set_at_s < _AGAIN_S:
            return
        self._set_at_s = time.monotonic()
        for name, value in self._values.items():
            self._gauges[name].set(value, tags=self._tags)

    def _set(self, name: str, value: float) -> None:
        self._values[name] = value
        self._gauges[name].set(value, tags=self._tags)
