"""Rooms have ranks: each imports lower ones only, and others enter it by its doors."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.test_imports import LAYERS, ROOT, Import, all_imports, module_path

pytestmark = pytest.mark.fast

# What nothing of ours is below of: anybody may import it.
GROUND = ("pipelines.errors", "pipelines.rng")
RANKS = {
    "ground": 0,
    "sovit": 0,
    "sovit.architectures": 1,
    "sovit.weights": 2,
    "sovit.networks": 3,
    "pipelines.hardware": 1,
    "pipelines.storage": 1,
    "pipelines.config": 5,
    "pipelines.cli": 6,
    "pipelines.transforms": 6,
    "pipelines.data": 7,
    "pipelines.shards": 8,
    "pipelines.training": 8,
    "pipelines.events": 8,
    "pipelines.checkpoints": 9,
    "pipelines.robustness": 9,
    "pipelines.tracking": 10,
    "pipelines.evaluation": 10,
    "pipelines.export": 10,
    "pipelines.results": 11,
    "pipelines.worker": 11,
    "pipelines.driver": 12,
    "tuning.heads": 13,
    "pipelines.dry_run": 13,
    "pipelines": 14,
    "tuning.trials": 14,
    "tuning.report": 15,
    "tuning": 16,
}
# Faces show what lies within their folder, so they stand above it.
FACES = {"sovit": 4, "recipes.__main__": 14}
MOST_FLAT, MOST_ROOMS, MOST_DOORS = 8, 28, 5


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    if module in GROUND:
        return "ground"
    is_package = (ROOT / Path(*module.split("."))).is_dir()
    return module if is_package else module.rpartition(".")[0]


def rank_of(module: str) -> int:
    room = room_of(module)
    return FACES.get(module, RANKS.get(room, -1))


@cache
def our_imports() -> list[tuple[str, str, Import]]:
    """Pair each module with each of ours that it imports, for types or when called."""
    found = []
    for one in all_imports():
        if one.name.split(".")[0] in LAYERS:
            target = module_path(one.name)
            assert target is not None, one
            module = module_of(ROOT / one.file)
            if module != module_of(target):
                found.append((module, module_of(target), one))
    return found


def rooms() -> set[str]:
    paths = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return {room_of(module_of(path)) for path in paths} - {"ground"}


def test_every_room_has_a_rank() -> None:
    assert rooms() - {"recipes"} == set(RANKS) - {"ground"}
    assert len(rooms()) <= MOST_ROOMS
    assert len(list((ROOT / "pipelines").glob("*.py"))) <= MOST_FLAT


def test_a_room_imports_lower_ones_only() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, target, _ in our_imports()
        if room_of(module) != room_of(target)
        and target != "pipelines"  # says only where the package lies
        and rank_of(module) <= rank_of(target)
        and room_of(module) != "recipes"
    ]
    assert wrong == []


def test_recipes_know_the_description_of_a_run_and_the_library_alone() -> None:
    known = {
        target
        for module, target, _ in our_imports()
        if room_of(module) == "recipes" and module not in FACES
    }
    assert {name for name in known if room_of(name) != "recipes"} <= {
        "pipelines.config",
        "sovit",
    }


def entered(room: str) -> set[str]:
    """Modules of a room that other rooms import."""
    return {
        target
        for module, target, _ in our_imports()
        if room_of(target) == room and room_of(module) != room
    }


def test_the_loop_takes_batches_and_positions_and_knows_no_storage() -> None:
    taken = {
        target
        for module, target, _ in our_imports()
        if room_of(module) == "pipelines.training"
    }
    data = {name for name in taken if room_of(name) == "pipelines.data"}
    assert data == {"pipelines.data.batch"}
    # Secrets are kept out of its errors.
    storage = {name for name in taken if room_of(name) == "pipelines.storage"}
    assert storage <= {"pipelines.storage.redaction"}


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("pipelines.worker", "pipelines.tracking"),
        ("pipelines.driver", "pipelines.dry_run"),
        ("pipelines.training", "pipelines.checkpoints"),
    ],
)
def test_what_a_room_never_reaches(room: str, never: str) -> None:
    graph = defaultdict(set)
    for module, target, one in our_imports():
        if not one.for_types:
            graph[module].add(target)
    seen: set[str] = set()
    waiting = [module for module in graph if room_of(module) == room]
    assert waiting
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    assert not {module for module in seen if room_of(module) == never}


@pytest.mark.parametrize("room", sorted(set(RANKS) - {"ground"}))
def test_others_enter_a_room_by_few_doors(room: str) -> None:
    doors = entered(room)
    assert len(doors) <= MOST_DOORS, sorted(doors)
