"""Define what can end a run beside a ValueError."""

from __future__ import annotations


class RunFailedError(RuntimeError):
    """Say that a run's workers failed more often than it allows."""


class NonFiniteLossError(ValueError):
    """Say that the loss is not a number any more."""


class InterruptedRun(SystemExit):
    """Say that a run was asked to end, and did so after a checkpoint."""


class StoppedEarly(SystemExit):
    """Say that a training was stopped because it was no use going on."""
