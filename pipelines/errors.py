"""Define what can end a run beside a ValueError."""

from __future__ import annotations


class RunFailedError(RuntimeError):
    """Say that a run's workers failed more often than it allows."""


class NonFiniteLossError(ValueError):
    """Say that the loss is not a number any more."""


class BadImagesError(ValueError):
    """More images than allowed could not be decoded."""


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


# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same again goes on.
CHECKPOINTED = 75


class InterruptedRun(SystemExit):
    """A run that ended because it was asked to.

    Args:
        line: What to tell the user.
        status: Exit status: `CHECKPOINTED` after a checkpoint, else 128 and the
            signal's number.
    """

    def __init__(self, line: str, *, status: int = CHECKPOINTED) -> None:
        super().__init__(status)
        self.line = line

    def __str__(self) -> str:
        """Return the line."""
        return self.line


class StoppedEarly(SystemExit):
    """Say that a training was stopped because it was no use going on."""


def check_bad_share(num_bad: int, *, num_images: int, max_share: float) -> None:
    """Raise BadImagesError where more than a share of a set's images is bad."""
    if num_bad > max_share * num_images:
        raise BadImagesError(
            f"wanted at most {max_share:.2%} of {num_images:,} images undecodable, "
            f"came {num_bad:,}, each named above and in MLflow's bad_images.csv; "
            "write the shards again with sovit-shards or raise --data.max-bad-share"
        )
