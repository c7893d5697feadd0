"""Dispatch the workers' events on the driver: display, MLflow, Prometheus."""

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
    """Dispatcher of the workers' events to display, MLflow and gauges.

    Args:
        is_over: Once set, the workers are asked to stop.
        gauges: None without a Ray to export them.
        wait_for_run: Waits for the run to exist in MLflow, up to a timeout or `until`
            an event.
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
        """Handle events on a thread during a `with` block; then flush what is buffered.

        Args:
            on_kept: Called with each checkpoint that was written.
            on_look: Called on each poll of the channel.
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
        """Dispatch one event."""
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
