"""Tell failures that a restart may mend from those that only the user can mend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ray.exceptions import RayTaskError
from ray.train import (
    ControllerError,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)

from pipelines.errors import NonFiniteLossError, RunFailedError
from pipelines.telling.board import Failed


class StopOnValueError(UserCallback):
    """Tell of workers that failed; end a run where one raised a ValueError.

    A ValueError is for the user: a damaged shard is as damaged at the next attempt.
    Ray Train counts restarts but does not look at the error; an exception out of this
    callback ends the run.

    Args:
        tell: Gets what is to be told the driver.
    """

    def __init__(self, tell: Callable[[Failed], object]) -> None:
        self._tell = tell

    def after_exception(
        self, run_context: object, worker_exceptions: dict[int, Exception]
    ) -> None:
        """Raise the first ValueError among the workers' errors; tell of the others."""
        for error in worker_exceptions.values():
            for cause in causes(error):
                if isinstance(cause, ValueError):
                    raise _mendable(cause)
        for rank, error in worker_exceptions.items():
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._tell(Failed(rank=rank, reason=reason))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, through Ray's wrappers."""
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
    """Say in one line how a training ended: a ValueError is for the user to mend."""
    found = list(causes(error))
    for cause in found:
        if isinstance(cause, ValueError):
            return _mendable(cause)
    last = [cause for cause in found if not isinstance(cause, TrainingFailedError)]
    cause = last[0] if last else error
    return RunFailedError(f"{type(cause).__name__}: {first_line(cause)}")


def _mendable(cause: ValueError) -> ValueError:
    """Keep of a worker's error what survives the way to the driver."""
    kind = NonFiniteLossError if isinstance(cause, NonFiniteLossError) else ValueError
    return kind(first_line(cause))


def first_line(error: BaseException) -> str:
    """Give an error's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
