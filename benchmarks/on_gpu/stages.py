"""The stages in their order: what is most worth knowing comes first."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Part = Literal["a", "b"]
# Seconds of each part together; `--limit-s` sets another.
PART_LIMITS_S: Mapping[Part, float] = MappingProxyType({"a": 430.0, "b": 200.0})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A module of this package, whose `tasks` are measured in a process of its own."""

    name: str
    part: Part
    limit_s: float
    needs: tuple[str, ...]
    """Modules without which there is nothing to measure."""
    package: str = "benchmarks.on_gpu"

    @property
    def module(self) -> str:
        """Name of the module that measures it."""
        return f"{self.package}.{self.name}"

    @property
    def lacks(self) -> list[str]:
        """Modules that it needs and that are not installed."""
        return [name for name in self.needs if not _is_installed(name)]


_DALI = ("torch", "timm", "pyarrow", "nvidia.dali")
_STEPS = ("torch", "timm", "pyarrow", "safetensors")
STAGES = (
    Stage(name="machine", part="a", limit_s=40, needs=("torch",)),
    Stage(name="marked", part="a", limit_s=60, needs=("pytest", "beartype")),
    Stage(name="images", part="a", limit_s=40, needs=("PIL", "pyarrow")),
    Stage(name="pixels", part="a", limit_s=40, needs=_DALI),
    Stage(name="damaged", part="a", limit_s=30, needs=_DALI),
    Stage(name="steps", part="a", limit_s=90, needs=_STEPS),
    Stage(name="compiled", part="a", limit_s=150, needs=_STEPS),
    Stage(name="decoding", part="a", limit_s=60, needs=_DALI),
    Stage(name="end_to_end", part="a", limit_s=60, needs=_STEPS),
    Stage(name="heads", part="a", limit_s=60, needs=_STEPS),
    Stage(name="profile", part="a", limit_s=60, needs=_STEPS),
    Stage(name="collectives", part="b", limit_s=40, needs=("torch",)),
    Stage(name="ray_run", part="b", limit_s=160, needs=("ray", "mlflow", "tyro")),
)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
