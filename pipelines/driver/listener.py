"""Hear on the driver what the workers tell: show it, keep it in MLflow, export it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from pipelines.driver.progress import Display
from pipelines.driver.prometheus import Gauges
from pipelines.events.channel import (
    CheckpointSaved,
    DriversChannel,
    Event,
    Figure,
    Metrics,
    WorkerStarted,
    consumed,
)
from pipelines.tracking import FigureWriter, MetricWriter

_FLUSH_S = 15.0
# For an MLflow that has been away since the run began, when that has ended well.
_OPEN_PATIENCE_S = 120.0


class Listener:
    """Pass on what is told to whom it concerns.

    Args:
        is_over: Once it is set, the workers are asked to end.
        gauges: None where no Ray is there to export them.
        wait_for_run: Waits so many seconds at most for MLflow to have the run, or
            `until` an event.
    """

    def __init__(
        self,
        *,
        display: Display,
        writer: MetricWriter,
        figures: FigureWriter,
        is_over: threading.Event,
        gauges: Gauges | None,
        wait_for_run: Callable[..., object] = lambda timeout_s, until: None,
    ) -> None:
        self._display = display
        self._writer = writer
        self._figures = figures
        self._is_over = is_over
        self._gauges = gauges
        self._wait_for_run = wait_for_run

    @contextlib.contextmanager
    def listening(
        self,
        channel: DriversChannel,
        *,
        every_s: float,
        on_kept: Callable[[CheckpointSaved], None] = lambda item: None,
        on_look: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Listen, on a thread, while a `with` block runs; then write what waits.

        Args:
            on_kept: Is told of each checkpoint that was written.
            on_look: Is called each time that the thread looks.
        """

        def handle(item: Event) -> None:
            self.handle(item)
            if isinstance(item, CheckpointSaved):
                on_kept(item)

        def look() -> None:
            on_look()
            if self._gauges is not None:
                self._gauges.keep()

        try:
            with consumed(
                channel,
                handle=handle,
                is_over=self._is_over,
                every_s=every_s,
                on_look=look,
            ):
                yield
            self._wait_for_run(_OPEN_PATIENCE_S, until=self._is_over)
        finally:
            self._display.close()
            self._figures.close(_FLUSH_S)
            self._writer.close(_FLUSH_S)

    def handle(self, item: Event) -> None:
        """Pass on one thing that was told."""
        if isinstance(item, Metrics):
            self._writer.log(item.metrics, step=item.step)
        elif isinstance(item, Figure):
            self._figures.log(item.draw, path=item.path)
        else:
            self._display.show(item)
        if self._gauges is None:
            return
        if isinstance(item, Metrics):
            self._gauges.measured(item.metrics, step=item.step)
        elif isinstance(item, WorkerStarted) and item.rank == 0:
            self._gauges.began()
