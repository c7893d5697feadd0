"""Write metrics by step from a background thread."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from pipelines.storage.path import StoragePath
from pipelines.storage.redaction import error_summary, without_credentials
from pipelines.tracking.buffer import MetricBuffer, Point, RefusedError
from pipelines.tracking.client import PATIENCE, connect, environment
from pipelines.tracking.entries import name_text

logger = logging.getLogger(__name__)


class MetricWriter:
    """Asynchronous writer of a run's metrics by step; never blocks training.

    A background thread sends the points; while MLflow is away the newest 100 000 wait.
    After a restart from an earlier checkpoint some steps are logged twice: MLflow keeps
    both points, each with its time. Charts are drawn by step, so such a step shows two
    values, and a metric's last value is that of the highest step, the later of two
    points: right as soon as training has passed the step it had reached before.
    `num_restarts` counts such restarts.

    Args:
        run_id: May be a call that raises while there is no run yet; "" writes nothing.
        unsent: A file for the points that MLflow has not taken at the end: the next
            writer sends them first.
    """

    def __init__(
        self,
        uri: str,
        run_id: str | Callable[[], str],
        *,
        unsent: StoragePath | None = None,
    ) -> None:
        self._uri = uri
        self._is_recorded = bool(run_id)
        self._run_id = run_id if callable(run_id) else lambda: run_id
        self._warned = False
        self._buffer = MetricBuffer(self._send, place=f"MLflow at {uri}")
        self._unsent = unsent
        self._buffer.add(self._sent_late())

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Queue one value of each metric at a step; never raises or blocks.

        Characters that MLflow refuses in a name become `_`. Non-finite values are left
        out, with one warning.
        """
        if not self._is_recorded:
            return
        now_ms = int(time.time() * 1000)
        points = []
        for name, value in metrics.items():
            try:
                points.append(Point(name_text(name), float(value), int(step), now_ms))
            except (TypeError, ValueError) as error:
                if not self._warned:
                    logger.warning("metric %r is left out: %s", name, error)
                self._warned = True
        self._buffer.add(points)

    def close(self, timeout_s: float) -> int:
        """Flush for at most `timeout_s`; return how many points were not written."""
        num_lost = self._buffer.close(timeout_s)
        kept = f", kept in {self._unsent}" if self._keep_unsent() else ""
        if num_lost:
            place = without_credentials(self._uri)
            logger.warning(
                "MLflow at %s: %d points not written%s", place, num_lost, kept
            )
        return num_lost

    def _sent_late(self) -> list[Point]:
        """Load the points that an earlier process of the run could not send."""
        if self._unsent is None:
            return []
        try:
            return [Point(*fields) for fields in json.loads(self._unsent.read())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is left out: %s", self._unsent, error_summary(error))
            return []

    def _keep_unsent(self) -> bool:
        """Save the unsent points, or delete the file if there are none."""
        if self._unsent is None:
            return False
        left = self._buffer.left()
        try:
            if left:
                self._unsent.write(json.dumps(left).encode())
            else:
                self._unsent.delete()
        except (OSError, ValueError) as error:
            logger.warning("%s is not written: %s", self._unsent, error_summary(error))
            return False
        return bool(left)

    def _send(self, points: Sequence[Point]) -> None:
        with environment(PATIENCE):
            run_id = self._run_id()
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException

            client = connect(self._uri, create=False)
            metrics = [
                Metric(point.key, point.value, point.timestamp_ms, point.step)
                for point in points
            ]
            try:
                client.log_batch(run_id, metrics=metrics, synchronous=True)
            except MlflowException as error:
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    raise RefusedError(str(error)) from error
                raise
