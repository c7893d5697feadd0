"""Define what can end a run beside a ValueError."""

from __future__ import annotations


class RunFailedError(RuntimeError):
    """Say that a run's workers failed more often than it allows."""


class NonFiniteLossError(ValueError):
    """Say that the loss is not a number any more."""


class RewindError(RuntimeError):
    """Say that a run is to go back to its last checkpoint, and because of which step.

    Built of its `args` alone: it goes from one process to another.
    """

    def __init__(self, line: str, step: int) -> None:
        super().__init__(line, step)

    @property
    def step(self) -> int:
        """Give the step that was no number."""
        return self.args[1]

    def __str__(self) -> str:
        """Give the line."""
        return self.args[0]


class InterruptedRun(SystemExit):
    """Say that a run was asked to end, and did so after a checkpoint."""


class StoppedEarly(SystemExit):
    """Say that a training was stopped because it was no use going on."""
