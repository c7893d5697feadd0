"""Record the Ray address that Ray Train's own processes see."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import UserCallback


class SeenEnvironment(UserCallback):
    """Callback that records the Ray address in the controller's environment."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Write the address in the environment, and that of the controller's Ray."""
        own = ray.get_runtime_context().gcs_address
        seen = {"told": os.environ.get("RAY_ADDRESS"), "own": own}
        self._file.write_text(json.dumps(seen))
