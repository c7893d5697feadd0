"""See what Ray Train's own processes know of their Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import UserCallback


class SeenEnvironment(UserCallback):
    """Write down, in Ray Train's controller, the address in its environment."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Write the address that the controller would ask, and that it belongs to."""
        own = ray.get_runtime_context().gcs_address
        seen = {"told": os.environ.get("RAY_ADDRESS"), "own": own}
        self._file.write_text(json.dumps(seen))
