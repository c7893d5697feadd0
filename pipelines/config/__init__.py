"""Configuration of a run: frozen dataclasses, their overrides, and their storage.

The classes that recipes use are imported from here, and each only once it is asked for:
most modules of this room do without torch, which `Run` brings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.config.checks import check_fields
    from pipelines.config.compatibility import (
        LOCATIONS,
        NOT_LEARNT,
        NOT_LEARNT_GROUPS,
        READING,
        RENAMED,
    )
    from pipelines.config.data import (
        CPUS_PER_READ,
        IMAGENET_MEAN,
        IMAGENET_STD,
        Augment,
        Data,
        Exif,
        Interpolation,
        PixelSettings,
    )
    from pipelines.config.evaluation import Validation, named_addresses
    from pipelines.config.facts import Facts
    from pipelines.config.optim import Optim, Schedule
    from pipelines.config.rand_augment import RandAugment, parse_rand_augment
    from pipelines.config.run import Model, Probe, Run, Scale

_MODULES = {
    "checks": "check_fields",
    "compatibility": "LOCATIONS NOT_LEARNT NOT_LEARNT_GROUPS READING RENAMED",
    "data": "CPUS_PER_READ IMAGENET_MEAN IMAGENET_STD Augment Data Exif Interpolation "
    "PixelSettings",
    "evaluation": "Validation named_addresses",
    "facts": "Facts",
    "optim": "Optim Schedule",
    "rand_augment": "RandAugment parse_rand_augment",
    "run": "Model Probe Run Scale",
}
_HOMES = {name: home for home, names in _MODULES.items() for name in names.split()}

__all__ = [
    "CPUS_PER_READ",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LOCATIONS",
    "NOT_LEARNT",
    "NOT_LEARNT_GROUPS",
    "READING",
    "RENAMED",
    "Augment",
    "Data",
    "Exif",
    "Facts",
    "Interpolation",
    "Model",
    "Optim",
    "PixelSettings",
    "Probe",
    "RandAugment",
    "Run",
    "Scale",
    "Schedule",
    "Validation",
    "check_fields",
    "named_addresses",
    "parse_rand_augment",
]


def __getattr__(name: str) -> Any:
    """Import a class from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
