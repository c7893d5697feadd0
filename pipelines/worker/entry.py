"""Entry point of a worker process, which imports what it needs only when called.

Ray Train's controller unpickles this function too and never calls it: torch and timm
would cost it seconds at every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def work(config: Mapping[str, Any]) -> None:
    """Train as one worker of a group: Ray Train's `train_loop_per_worker`."""
    from pipelines.worker.ray_group import run_worker

    run_worker(config)
