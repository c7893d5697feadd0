"""Describe a run: frozen dataclasses, their overrides, and how they are stored.

The classes that recipes use are imported from here, and each only once it is asked for:
most modules of this room do without torch, which `Run` brings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.config.data import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        Augment,
        Data,
        Interpolation,
    )
    from pipelines.config.evaluation import Validation
    from pipelines.config.optim import Optim, Schedule
    from pipelines.config.run import Model, Probe, Run, Scale

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "Data",
    "Interpolation",
    "Model",
    "Optim",
    "Probe",
    "Run",
    "Scale",
    "Schedule",
    "Validation",
]


def __getattr__(name: str) -> Any:
    """Import what recipes use when they use it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pipelines.config.run"), name)
