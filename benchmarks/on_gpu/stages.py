"""Define the stages, the most informative first, and their common setting."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Part = Literal["a", "b"]
Figures = Mapping[str, Any]
Tasks = Mapping[str, Callable[[], Figures]]
"""The cases of a stage by name, each measured when its turn comes."""
# Seconds of each part together; `--limit-s` sets another.
PART_LIMITS_S: Mapping[Part, float] = MappingProxyType({"a": 430.0, "b": 200.0})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device, sizes and folders of one run of the script."""

    device: Literal["auto", "cpu", "cuda"]
    tiny: bool
    """Use minimal sizes and durations, to try the script itself."""
    work: Path
    """For what later stages read: images, shards, compiled kernels, runs."""
    out: Path
    """For what a person wants."""

    def pick(self, full: T, *, tiny: T) -> T:
        """Return `tiny` in a tiny run, else `full`."""
        return tiny if self.tiny else full

    @property
    def patience(self) -> float:
        """Factor on each stage's limit: machines that try the script may be busy."""
        return self.pick(1.0, tiny=5.0)

    @property
    def num_threads(self) -> int:
        """Threads for decoding, and for a CPU's steps."""
        return self.pick(len(os.sched_getaffinity(0)), tiny=1)

    @property
    def round_s(self) -> float:
        """Seconds of one measured round, with at least one call."""
        return self.pick(0.7, tiny=0.0)

    @property
    def num_rounds(self) -> int:
        """Number of rounds, whose median counts."""
        return self.pick(3, tiny=1)


@dataclass(frozen=True)
class Stage:
    """A module of this package, whose `tasks` are measured in a process of its own."""

    name: str
    part: Part
    limit_s: float
    needs: tuple[str, ...]
    """Modules that the stage needs."""
    package: str = "benchmarks.on_gpu"

    @property
    def lacks(self) -> list[str]:
        """Needed modules that are not installed."""
        return [name for name in self.needs if not _is_installed(name)]


_DALI = ("torch", "timm", "pyarrow", "nvidia.dali")
_STEPS = ("torch", "timm", "pyarrow", "safetensors")
STAGES = (
    Stage("machine", "a", 40, ("torch",)),
    Stage("marked", "a", 60, ("pytest", "beartype")),
    Stage("images", "a", 40, ("PIL", "pyarrow")),
    Stage("pixels", "a", 40, _DALI),
    Stage("damaged", "a", 30, _DALI),
    Stage("steps", "a", 90, _STEPS),
    Stage("compiled", "a", 150, _STEPS),
    Stage("decoding", "a", 60, _DALI),
    Stage("end_to_end", "a", 60, _STEPS),
    Stage("heads", "a", 60, _STEPS),
    Stage("profile", "a", 60, _STEPS),
    Stage("collectives", "b", 40, ("torch",)),
    Stage("ray_run", "b", 160, ("ray", "mlflow", "tyro")),
)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
