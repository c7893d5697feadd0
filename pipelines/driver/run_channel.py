"""Actor between driver and workers, whose process runs Ray Train.

In a module of its own: its process imports this alone, and not what the driver needs,
so the workers start seconds sooner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.train import TrainingFailedError

from pipelines.driver.failures import end_of
from pipelines.events.channel import Channel

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


class RunChannel(Channel):
    """Channel whose process also runs Ray Train, in a thread of its own."""

    def fit(self, trainer: TorchTrainer) -> Exception | None:
        """Train; return the failure, or None."""
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return end_of(error)
        return None
