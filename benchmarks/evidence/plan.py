"""Plans as data: arms to compare, each with seeds, and the cells that they make."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import Run
from pipelines.config.overrides import change_fields
from pipelines.config.recipes import load_recipe

RATE_SEED = 0
"""Rates are chosen on this seed, which is not counted."""
# What every cell has: one process and one thread, float32 on any CPU, the raw weights,
# which are evaluated at the end, and no pictures.
_ALWAYS: Mapping[str, object] = {
    "scale.num_workers": 0,
    "scale.amp": "off",
    "optim.ema_decay": 0.0,
    "validation.every_epochs": 1000,
    "validation.num_worst": 0,
    "checkpoint_every_minutes": 0.0,
    "experiment": "evidence",
}


@dataclass(frozen=True, kw_only=True)
class Images:
    """A set of photographs, or a part with as many of each class."""

    name: str
    """Folder with Hugging Face Parquet, train-*.parquet and test-*.parquet."""
    num_train: int | None = None
    """None takes all."""
    num_val: int | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the settings that a plan compares."""

    changes: Mapping[str, Any]
    """Of the plan's run, by dotted names."""
    against: str = ""
    """The arm that it is compared with; "" for a baseline."""
    rate_as: str = ""
    """The arm whose learning rate it takes; "" chooses its own."""
    num_seeds: int = 3
    init_from: tuple[str, str] | None = None
    """Plan and arm whose checkpoint of the same seed it starts from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A question, and the trainings that answer it at this size."""

    name: str
    title: str
    about: str
    """What is compared, and where it departs from the paper."""
    images: Images
    changes: Mapping[str, Any]
    """Of the recipe, for all arms: size, budget, augmentation."""
    arms: Mapping[str, Arm]
    rates: tuple[float, ...]
    """Candidates, the same for all arms."""
    recipe: str = "demo"
    curves: tuple[str, ...] = ()
    """Metrics whose course is kept."""
    num_corrupted: int = 0
    """Held-out images that are corrupted too; 0 is none."""
    tokens_of: tuple[str, str] | None = None
    """Plan and arm whose tokens every arm's head is trained on as well, alone."""

    def cells(self, arm: str, *, seed: int, rates: Sequence[float]) -> list[Cell]:
        """Return an arm's cells of one seed, one for each rate."""
        return [Cell(plan=self, arm=arm, rate=rate, seed=seed) for rate in rates]

    def run(self, arm: str) -> Run:
        """Build an arm's run, without images and rate."""
        run = change_fields(load_recipe(self.recipe), {**_ALWAYS, **self.changes})
        return change_fields(run, self.arms[arm].changes)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of a plan."""

    plan: Plan = field(repr=False)
    arm: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Return the cell's name in the file of results."""
        return f"{self.plan.name}: {self.arm}, rate {self.rate:g}, seed {self.seed}"

    @property
    def run_name(self) -> str:
        """Return the name of its run."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        return f"{self.plan.name}-{self.seed}-{digest}"

    def run(self) -> Run:
        """Build the cell's run, without images."""
        found = {"optim.lr": self.rate, "seed": self.seed}
        return change_fields(self.plan.run(self.arm), found)

    def settings(self) -> str:
        """Digest what the cell is: an entry with another one is of an earlier plan."""
        plan, arm = self.plan, self.plan.arms[self.arm]
        parts = [
            plan.recipe,
            _plain(plan.images),
            _plain({**_ALWAYS, **plan.changes}),
            _plain(arm.changes),
            plan.num_corrupted,
            arm.init_from,
        ]
        parts += [plan.tokens_of] if plan.tokens_of else []
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def _plain(value: Any) -> Any:
    """Return what JSON can hold; of a dataclass the fields that are not defaults."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {
            one.name: _plain(found)
            for one in fields
            if (found := getattr(value, one.name)) != one.default
        }
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def phases(plan: Plan, *, rates: Mapping[str, float]) -> Iterator[list[Cell]]:
    """Yield a plan's cells, the main arms first, each group's rates before its seeds.

    Args:
        rates: Rates that were chosen so far, by arm; an arm without one has no counted
            cells yet.
    """
    main = max(arm.num_seeds for arm in plan.arms.values())
    for is_main in (True, False):
        arms = [
            name
            for name, arm in plan.arms.items()
            if (arm.num_seeds == main) == is_main
        ]
        yield [
            cell
            for name in arms
            if not plan.arms[name].rate_as and len(plan.rates) > 1
            for cell in plan.cells(name, seed=RATE_SEED, rates=plan.rates)
        ]
        yield [
            cell
            for number in range(main)
            for name in arms
            if number < plan.arms[name].num_seeds and name in rates
            for cell in plan.cells(
                name, seed=RATE_SEED + 1 + number, rates=[rates[name]]
            )
        ]
