"""Write a benchmark's figures after each case, so that a time limit leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_result(
    path: Path | None, content: Mapping[str, Any], *, missing: Sequence[str]
) -> None:
    """Write figures as JSON, atomically; do nothing without a path.

    Args:
        missing: Names of the cases that were not measured yet.
    """
    if path is None:
        return
    partial = path.with_name(f"{path.name}.partial")
    shown = {**content, "missing": list(missing)}
    partial.write_text(json.dumps(shown, indent=2) + "\n")
    partial.replace(path)
