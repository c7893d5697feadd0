"""Separate retryable worker failures from user errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ray.exceptions import RayTaskError
from ray.train import (
    ControllerError,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)

from pipelines.errors import NonFiniteLossError, RewindError, RunFailedError
from pipelines.events.channel import WorkerFailed
from pipelines.storage.redaction import error_summary

# In what Ray says of a dead process. Its types are not enough: Ray Train wraps them in
# its own, which keep the text.
_RAY_KILLED = "running low on memory"
_KERNEL_MAY_HAVE = "killed by the OOM killer"
_LESS_MEMORY = (
    "go on with --resume and a higher --optim.num-accumulation, which leaves the batch "
    "as it is, or a lower --data.num-prefetch-batches or --data.eval-batch-size"
)


class StopOnValueError(UserCallback):
    """Callback that reports failed workers, and ends a run on a ValueError.

    A ValueError is a user error: a damaged shard is as damaged at the next attempt.
    Ray Train counts restarts but does not look at the error; an exception out of this
    callback ends the run.

    Args:
        tell: Receives the failures to report to the driver.
        max_rewinds: How often the workers may return to the last checkpoint after a
            non-finite step.
    """

    def __init__(
        self, tell: Callable[[WorkerFailed], object], *, max_rewinds: int = 0
    ) -> None:
        self._tell = tell
        self._rewinds = Rewinds(max_rewinds)

    def after_exception(
        self, run_context: object, worker_exceptions: dict[int, Exception]
    ) -> None:
        """Raise the first ValueError among the workers' errors; report the others."""
        found = [c for e in worker_exceptions.values() for c in causes(e)]
        for cause in found:
            if isinstance(cause, ValueError):
                raise _mendable(cause)
        rewinds = [cause for cause in found if isinstance(cause, RewindError)]
        if rewinds:  # all workers say the same
            self._rewinds.count(rewinds[0])
        for rank, error in worker_exceptions.items():
            self._tell(WorkerFailed(rank=rank, reason=reason_of(error)))


class Rewinds:
    """Counter of a run's returns to its last checkpoint.

    A hardware fault doesn't recur afterwards. What recurs at the same step is
    permanent.
    """

    def __init__(self, max_rewinds: int) -> None:
        self._max_rewinds, self._num_rewinds, self._last_step = max_rewinds, 0, -1

    def count(self, error: RewindError) -> None:
        """Count a rewind; raise NonFiniteLossError where another one is no use."""
        self._num_rewinds += 1
        is_same = error.step == self._last_step
        if is_same or self._num_rewinds > self._max_rewinds:
            again = "again" if is_same else f"for the {self._num_rewinds}. time"
            raise NonFiniteLossError(
                f"{error}, {again}; lower --optim.lr, lengthen the warm-up or set "
                "--optim.on-nonfinite skip"
            )
        self._last_step = error.step


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, through Ray's wrappers."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        found = waiting.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if not isinstance(found, RayTaskError):
            yield found
        waiting += [getattr(found, "cause", None), found.__cause__, found.__context__]
        if isinstance(found, WorkerGroupError):
            waiting += list(found.worker_failures.values())
        if isinstance(found, ControllerError):
            waiting.append(found.controller_failure)


def end_of(error: TrainingFailedError) -> ValueError | RunFailedError:
    """Convert a training's failure into one line: ValueError for a user error."""
    found = list(causes(error))
    for cause in found:
        if isinstance(cause, ValueError):
            return _mendable(cause)
    last = [cause for cause in found if not isinstance(cause, TrainingFailedError)]
    cause = last[0] if last else error
    return RunFailedError(reason_of(cause))


def _mendable(cause: ValueError) -> ValueError:
    """Reduce a worker's error to what survives the way to the driver."""
    kind = NonFiniteLossError if isinstance(cause, NonFiniteLossError) else ValueError
    return kind(first_line(cause))


def reason_of(error: BaseException) -> str:
    """Describe a failure in one line, with what to set if memory may be the cause."""
    reason = error_summary(error)
    said = str(error)
    if _RAY_KILLED in said:
        return f"{reason}; {_LESS_MEMORY}"
    # A process that the kernel kills can't say so; Ray lists what it may have been.
    if _KERNEL_MAY_HAVE in said:
        return f"{reason}; if memory ran out (dmesg says so), {_LESS_MEMORY}"
    return reason


def first_line(error: BaseException) -> str:
    """Return an error's first non-empty line, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
