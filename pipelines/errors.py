"""Define the exceptions, beside ValueError, that can end a run."""

from __future__ import annotations


class RunFailedError(RuntimeError):
    """Raised when a run's workers failed more often than it allows."""


class NonFiniteLossError(ValueError):
    """Raised when the loss has become NaN or infinite."""


class BadImagesError(ValueError):
    """Raised when more images than allowed could not be decoded."""


class RewindError(RuntimeError):
    """Raised to rewind a run to its last checkpoint because of a non-finite step.

    Built from its `args` alone, so that it can be pickled between processes.
    """

    def __init__(self, line: str, step: int) -> None:
        super().__init__(line, step)

    @property
    def step(self) -> int:
        """The non-finite step."""
        return self.args[1]

    def __str__(self) -> str:
        """Return the line."""
        return self.args[0]


# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same again goes on.
CHECKPOINTED = 75


class InterruptedRun(SystemExit):
    """Raised to end a run on request, with its exit status.

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
    """Raised to stop a training early because continuing is pointless."""


def check_bad_share(num_bad: int, *, num_images: int, max_share: float) -> None:
    """Raise BadImagesError if more than a share of a set's images is bad."""
    if num_bad > max_share * num_images:
        raise BadImagesError(
            f"expected at most {max_share:.2%} of {num_images:,} images undecodable, "
            f"got {num_bad:,}, each named above and in MLflow's bad_images.csv; write "
            "the shards again with sovit-shards or raise --data.max-bad-share"
        )
